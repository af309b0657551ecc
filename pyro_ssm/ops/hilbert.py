"""Hilbert's curve: an order of points in space in which neighbours are close."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["hilbert_index", "hilbert_order"]

_INDEX_BITS = 62  # of an int64, the sign and one to spare
_AXIS_BITS = 16


def hilbert_index(points: Tensor, bits: int) -> Tensor:
    """The position of grid points along Hilbert's curve.

    Points of neighbouring positions differ by 1 in exactly one coordinate.

    Args:
        points: int64 ``(..., d)``, each coordinate in :math:`[0, 2^{bits})`.
        bits: of a coordinate; ``d * bits`` is at most 62.

    Returns:
        int64 ``(...)``, a bijection onto :math:`[0, 2^{d\\,bits})`.

    Raises:
        ValueError: there are too many bits for an int64.

    Source: Skilling (2004), "Programming the Hilbert curve".

    >>> import torch
    >>> from pyro_ssm.ops.hilbert import hilbert_index
    >>> hilbert_index(torch.tensor([[0, 0], [0, 1], [1, 1], [1, 0]]), bits=1)
    tensor([0, 1, 2, 3])
    """
    dim = points.shape[-1]
    if dim * bits > _INDEX_BITS:
        raise ValueError(f"`bits` is {bits} for {dim} coordinates, but at most {_INDEX_BITS} in all are wanted")
    x = list(points.unbind(-1))
    for bit in range(bits - 1, 0, -1):  # undo the excess work of the curve's turns
        high, low = 1 << bit, (1 << bit) - 1
        for i in range(dim):
            is_set = (x[i] & high) != 0
            swapped = torch.where(is_set, 0, (x[0] ^ x[i]) & low)
            x[0] = x[0] ^ torch.where(is_set, low, swapped)
            x[i] = x[i] ^ swapped if i else x[0]
    for i in range(1, dim):  # Gray code
        x[i] = x[i] ^ x[i - 1]
    turn = torch.zeros_like(x[0])
    for bit in range(bits - 1, 0, -1):
        turn = torch.where((x[-1] & (1 << bit)) != 0, turn ^ ((1 << bit) - 1), turn)
    index = torch.zeros_like(x[0])
    for bit in range(bits - 1, -1, -1):
        for axis in x:
            index = (index << 1) | (((axis ^ turn) >> bit) & 1)
    return index


def hilbert_order(states: Tensor) -> Tensor:
    """The order of particles along Hilbert's curve, each series by itself.

    Coordinates are standardised and squeezed to the unit cube by a logistic function first. One coordinate is sorted as
    it is; of more than 62 the first 62 count. Resampling after this order has a variance of smaller order than
    :math:`1/N`.

    Args:
        states: ``(N, *batch, d)``.

    Returns:
        int64 ``(N, *batch)``, the particle that stands at each place; not differentiable.

    Source: Gerber and Chopin (2015), "Sequential quasi-Monte Carlo", section 3.1.

    >>> import torch
    >>> from pyro_ssm.ops.hilbert import hilbert_order
    >>> hilbert_order(torch.tensor([[0.3], [-1.0], [0.1]]))
    tensor([1, 2, 0])
    """
    states = states.detach()[..., :_INDEX_BITS]
    if not states.shape[-1]:  # models without a state: any order will do
        order = torch.arange(len(states), device=states.device).reshape((-1,) + (1,) * (states.dim() - 2))
        return order.expand(states.shape[:-1])
    if states.shape[-1] == 1:
        return states.squeeze(-1).argsort(0)
    bits = min(_AXIS_BITS, _INDEX_BITS // states.shape[-1])
    centred = states.double() - states.double().mean(0)
    scale = centred.square().mean(0).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    cube = torch.sigmoid(centred / scale) * 2**bits
    return hilbert_index(cube.long().clamp(0, 2**bits - 1), bits).argsort(0)
