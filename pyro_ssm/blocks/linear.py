"""Affine maps whose weights may be drawn: one weight matrix a draw, a plate, or a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_size

__all__ = ["Linear", "linear"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The affine map :math:`y = W x + b` for a weight with or without leading dims.

    Args:
        x: ``(..., time, in)``.
        weight: ``(out, in)``, or ``(*lead, time or 1, out, in)`` whose leading dims broadcast against those of ``x``.
        bias: ``(out,)``, ``(*lead, time or 1, out)``, or None.

    Returns:
        ``(..., time, out)``, the leading dims of ``x`` and ``weight`` broadcast.

    Raises:
        ValueError: the last dimension of ``x``, or its dtype, is not that of ``weight``.

    Weights that do not vary over time or series are multiplied as one matrix a draw, not copied to each series.

    >>> import torch
    >>> from pyro_ssm.blocks import linear
    >>> x, weight = torch.ones(5, 2), torch.ones(3, 1, 4, 2)      # five steps; three draws, a time axis
    >>> linear(x, weight).shape
    torch.Size([3, 5, 4])
    """
    check_map(x, weight)
    if weight.dim() == 2:
        if bias is None or bias.dim() == 1:
            return F.linear(x, weight, bias)
        return F.linear(x, weight) + bias
    if weight.shape[-3] == 1:
        y = _one_matrix_per_lead(x, weight.squeeze(-3).mT)
    else:
        y = (weight @ x.unsqueeze(-1)).squeeze(-1)
    return y if bias is None else y + bias


def check_map(x: Tensor, weight: Tensor) -> None:
    """Raise unless ``weight`` ``(..., out, in)`` can be applied to ``x`` ``(..., in)``.

    Raises:
        ValueError: sizes or dtypes differ.

    >>> import torch
    >>> from pyro_ssm.blocks.linear import check_map
    >>> check_map(torch.zeros(5, 2), torch.zeros(4, 2))
    """
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"a linear map of {weight.shape[-1]} feature(s) got {x.shape[-1]}: x has shape {tuple(x.shape)}, "
            f"weight {tuple(weight.shape)}. Check state_dim, input_dim and memory_dim of the component"
        )
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"a linear map with weights of {weight.dtype} got x of {x.dtype}. Give data and networks one precision: "
            "data.to(dtype=torch.float32), or model.double() and guide.double()"
        )


def _one_matrix_per_lead(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix`` for ``matrix`` ``(*lead, in, out)``; last leads of size 1 join the rows: no copies."""
    lead = matrix.shape[:-2]
    shared = 0
    while shared < min(len(lead), x.dim() - 2) and lead[-1 - shared] == 1:
        shared += 1
    if shared == 0:
        return x @ matrix
    rows = x.shape[-2 - shared : -1]
    matrix = matrix.reshape(lead[:-shared] + matrix.shape[-2:])
    return (x.flatten(-2 - shared, -2) @ matrix).unflatten(-2, rows)


class Linear(PyroModule):
    """The affine map :math:`y = W x + b` as a PyroModule: its weights may be learnt, have a prior, or be drawn.

    Without leading dims it is :func:`torch.nn.functional.linear`; a weight bound as ``(*draws, *plates, 1, out, in)``
    is a batched product. The first values are those of :class:`torch.nn.Linear` (uniform, bound
    :math:`1 / \\sqrt{\\text{in}}`), drawn from torch's generator.

    Args:
        in_features: size of the last dimension of ``x``.
        out_features: size of the last dimension of the result.
        bias: whether there is a ``bias``.

    Shapes:
        ``x`` ``(..., time, in)`` gives ``(..., time, out)``; ``weight`` ``(out, in)`` (event 2), ``bias`` ``(out,)``.

    >>> import torch
    >>> from pyro_ssm.binding import bind
    >>> from pyro_ssm.blocks import Linear
    >>> layer = Linear(2, 4)
    >>> bind(layer, {"weight": torch.zeros(3, 4, 2)})(torch.ones(5, 2)).shape
    torch.Size([3, 5, 4])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"weight": 2, "bias": 1}

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = check_size("in_features", in_features)
        self.out_features = check_size("out_features", out_features)
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features).uniform_(-bound, bound))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features).uniform_(-bound, bound))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., time, in)`` to ``(..., time, out)``."""
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self.in_features}, {self.out_features}" + (", bias=False" if self.bias is None else "")
