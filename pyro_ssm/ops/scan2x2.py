"""The linear recurrence of pairs, one 2 x 2 matrix a channel: oscillators."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ssm.ops.recurrence import Pairs, recur

__all__ = ["scan2x2", "scan2x2_reference"]


def scan2x2_reference(
    matrix: Tensor, drive: Tensor, initial: Tensor | None = None, *, reset: Tensor | None = None
) -> Tensor:
    """The recurrence of :func:`scan2x2` as a plain loop.

    >>> import torch
    >>> from pyro_ssm.ops import scan2x2_reference
    >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).expand(2, 1, 2, 2)
    >>> scan2x2_reference(turn, torch.zeros(2, 1, 2), torch.tensor([[1.0, 0.0]])).squeeze(-2)
    tensor([[ 0.,  1.],
            [-1.,  0.]])
    """
    matrix, drive, h = _broadcast(matrix, drive, initial, reset)
    fresh = torch.zeros(drive.shape[:-2], dtype=torch.bool) if reset is None else reset.expand(drive.shape[:-2])
    states = []
    for t in range(drive.shape[-3]):
        h = torch.where(fresh[..., t, None, None].to(h.device), torch.zeros_like(h), h)
        h = (matrix[..., t, :, :, :] @ h.unsqueeze(-1)).squeeze(-1) + drive[..., t, :, :]
        states.append(h)
    return torch.stack(states, -3) if states else drive.clone()


def scan2x2(matrix: Tensor, drive: Tensor, initial: Tensor | None = None, *, reset: Tensor | None = None) -> Tensor:
    """The linear recurrence of pairs over time, one channel beside the other.

    .. math:: h_t = M_t h_{t-1} + f_t, \\qquad h_t \\in \\mathbb R^2 \\text{ for each channel}

    The matrices are kept as they are: diagonalised, a harmonic oscillator is defective where it is critically damped.
    The gradient is the transposed recurrence run the other way; derivatives of any order, forward mode and
    ``torch.func.vmap`` are exact.

    Args:
        matrix: :math:`M_t`, ``(..., time, channels, 2, 2)``; a time size of 1 is one matrix for all steps.
        drive: :math:`f_t`, ``(..., time, channels, 2)``.
        initial: ``(..., channels, 2)``, zero by default.
        reset: bool ``(..., time)``; where True the state before the step counts as zero.

    Returns:
        All states ``(..., time, channels, 2)``.

    Raises:
        ValueError: a shape that does not fit.
        TypeError: ``reset`` is not boolean.

    >>> import torch
    >>> from pyro_ssm.ops import scan2x2
    >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).expand(1, 1, 2, 2)
    >>> scan2x2(turn, torch.zeros(2, 1, 2), torch.tensor([[1.0, 0.0]])).squeeze(-2)
    tensor([[ 0.,  1.],
            [-1.,  0.]])
    """
    matrix, drive, initial = _broadcast(matrix, drive, initial, reset)
    if reset is not None:
        matrix = matrix.masked_fill(reset[..., None, None, None], 0.0)
    return recur(Pairs, matrix, drive, initial, False)


def _broadcast(
    matrix: Tensor, drive: Tensor, initial: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if matrix.dim() < 4 or matrix.shape[-2:] != (2, 2):
        raise ValueError(f"scan2x2: `matrix` must be (..., time, channels, 2, 2), got shape {tuple(matrix.shape)}")
    if drive.dim() < 3 or drive.shape[-1] != 2:
        raise ValueError(f"scan2x2: `drive` must be (..., time, channels, 2), got shape {tuple(drive.shape)}")
    if reset is not None and reset.dtype != torch.bool:
        raise TypeError(f"scan2x2: `reset` must be boolean, got {reset.dtype}")
    shapes = [matrix.shape[:-1], drive.shape]
    shapes += [] if initial is None else [initial.unsqueeze(-3).shape]
    shapes += [] if reset is None else [reset.shape + (1, 1)]
    shape = torch.broadcast_shapes(*shapes)
    state = shape[:-3] + shape[-2:]
    h = torch.zeros(state, dtype=drive.dtype, device=drive.device) if initial is None else initial.expand(state)
    return matrix.expand(shape + (2,)), drive.expand(shape), h
