"""The linear recurrence of pairs, one 2 x 2 matrix a channel: oscillators."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ssm.ops.recurrence import recur
from pyro_ssm.ops.recurrence_arguments import arranged
from pyro_ssm.ops.recurrence_kernel import shape_of
from pyro_ssm.ops.recurrence_torch import Pairs

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
    matrix, drive, initial, reset = arranged(Pairs, matrix, drive, initial, reset)
    shape = shape_of(Pairs, matrix, drive, initial, reset)
    fresh = torch.zeros(shape[:-2], dtype=torch.bool, device=drive.device) if reset is None else reset
    matrix, drive, fresh = matrix.expand(shape + (2,)), drive.expand(shape), fresh.expand(shape[:-2])
    h = (drive.new_zeros(()) if initial is None else initial).expand(shape[:-3] + shape[-2:])
    states = []
    for t in range(drive.shape[-3]):
        h = torch.where(fresh[..., t, None, None], torch.zeros_like(h), h)
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
    matrix, drive, initial, reset = arranged(Pairs, matrix, drive, initial, reset)
    return recur(Pairs, matrix, drive, initial, reset)
