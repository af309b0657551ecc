"""The elementwise linear recurrence, forward or backward in time."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ssm.ops.recurrence import recur
from pyro_ssm.ops.recurrence_arguments import arranged
from pyro_ssm.ops.recurrence_kernel import shape_of
from pyro_ssm.ops.recurrence_torch import Diagonal

__all__ = ["linear_scan", "linear_scan_reference"]


def linear_scan_reference(
    a: Tensor,
    b: Tensor,
    initial: Tensor | None = None,
    *,
    reverse: bool = False,
    reset: Tensor | None = None,
    last: bool = False,
) -> Tensor:
    """The recurrence of :func:`linear_scan` as a plain loop.

    >>> import torch
    >>> from pyro_ssm.ops import linear_scan_reference
    >>> linear_scan_reference(torch.full((3, 1), 0.5), torch.ones(3, 1)).squeeze(-1)
    tensor([1.0000, 1.5000, 1.7500])
    """
    a, b, initial, reset = arranged(Diagonal, a, b, initial, reset)
    shape = shape_of(Diagonal, a, b, initial, reset)
    fresh = torch.zeros(shape[:-1], dtype=torch.bool, device=b.device) if reset is None else reset
    a, b, fresh = a.expand(shape), b.expand(shape), fresh.expand(shape[:-1]).unsqueeze(-1)
    h = (b.new_zeros(()) if initial is None else initial).expand(shape[:-2] + shape[-1:])
    steps = list(zip(a.unbind(-2), b.unbind(-2), fresh.unbind(-2), strict=True))
    states = []
    for a_t, b_t, fresh_t in reversed(steps) if reverse else steps:
        h = a_t * torch.where(fresh_t, torch.zeros_like(h), h) + b_t
        states.append(h)
    if last:
        return h
    return torch.stack(states[::-1] if reverse else states, -2) if states else b.clone()


def linear_scan(
    a: Tensor,
    b: Tensor,
    initial: Tensor | None = None,
    *,
    reverse: bool = False,
    reset: Tensor | None = None,
    last: bool = False,
) -> Tensor:
    """The linear recurrence over time, one lane a channel; real or complex.

    .. math:: h_t = a_t h_{t-1} + b_t, \\qquad t = 1, \\dots, T, \\quad h_0 = \\text{initial}

    Its gradient is the same scan run the other way, :math:`x_t = g_t + \\bar a_{t+1} x_{t+1}`, with
    :math:`\\partial b_t = x_t`, :math:`\\partial a_t = x_t \\bar h_{t-1}`, :math:`\\partial h_0 = \\bar a_1 x_1`: no
    graph over time is kept. Derivatives of any order, forward mode and the transforms of ``torch.func`` are exact. What
    is shared (a size of 1 in ``a``) is read where it stands. Half precision is accumulated in float32; under autocast
    dtypes that differ are promoted. Without the compiled operator, long scans of few lanes run in two levels of blocks.

    Args:
        a: ``(..., time, channels)``, broadcast against ``b`` (a time size of 1 is a constant coefficient).
        b: ``(..., time, channels)``.
        initial: ``(..., channels)``, zero by default.
        reverse: run from the last time to the first, :math:`h_t = a_t h_{t+1} + b_t`, with ``initial`` after the last.
        reset: bool ``(..., time)``; where True the state before the step counts as zero, :math:`h_t = b_t`.
        last: return the final state alone.

    Returns:
        All states ``(..., time, channels)``, or the final one ``(..., channels)``.

    Raises:
        ValueError: a or b has fewer than two dims, sizes do not broadcast, ``reset`` has another number of steps, or an
            argument is on another device.
        TypeError: ``reset`` is not boolean, or a and b are integers.

    >>> import torch
    >>> from pyro_ssm.ops import linear_scan
    >>> linear_scan(torch.tensor([[0.5]]), torch.zeros(3, 1), initial=torch.tensor([8.0])).squeeze(-1)
    tensor([4., 2., 1.])
    """
    a, b, initial, reset = arranged(Diagonal, a, b, initial, reset)
    return recur(Diagonal, a, b, initial, reset, reverse=reverse, last=last)
