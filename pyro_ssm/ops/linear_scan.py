"""The elementwise linear recurrence, forward or backward in time."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ssm.ops.recurrence import Diagonal, recur

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
    a, b, h = _broadcast(a, b, initial, reset)
    fresh = torch.zeros(b.shape[:-1], dtype=torch.bool, device=b.device) if reset is None else reset
    fresh = fresh.expand(b.shape[:-1]).unsqueeze(-1)
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
    graph over time is kept. Derivatives of any order, forward mode and ``torch.func.vmap`` are exact. Long scans of few
    lanes run in two levels of blocks; half precision is accumulated in float32.

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
        ValueError: a or b has fewer than two dims, or ``reset`` has another number of steps.
        TypeError: ``reset`` is not boolean.

    >>> import torch
    >>> from pyro_ssm.ops import linear_scan
    >>> linear_scan(torch.tensor([[0.5]]), torch.zeros(3, 1), initial=torch.tensor([8.0])).squeeze(-1)
    tensor([4., 2., 1.])
    """
    a, b, initial = _broadcast(a, b, initial, reset)
    if last and b.shape[-2] == 0:
        return initial.clone()
    if reset is not None:
        a = a.masked_fill(reset.unsqueeze(-1), 0.0)
    dtype = b.dtype
    if dtype in (torch.float16, torch.bfloat16):
        a, b, initial = a.float(), b.float(), initial.float()
    h = recur(Diagonal, a, b, initial, reverse).to(dtype)
    return h.select(-2, 0 if reverse else -1) if last else h


def _broadcast(a: Tensor, b: Tensor, initial: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dim() < 2:
            raise ValueError(f"linear_scan: `{name}` must be (..., time, channels), got shape {tuple(tensor.shape)}")
    shapes = [a.shape, b.shape] + ([] if initial is None else [initial.unsqueeze(-2).shape])
    shape = torch.broadcast_shapes(*shapes)
    if reset is not None:
        if reset.dtype != torch.bool:
            raise TypeError(f"linear_scan: `reset` must be boolean, got {reset.dtype}")
        if reset.dim() < 1 or reset.shape[-1] != shape[-2]:
            raise ValueError(
                f"linear_scan: `reset` must be (..., time) with {shape[-2]} step(s), got shape {tuple(reset.shape)}"
            )
        shape = torch.broadcast_shapes(shape, reset.shape + (1,))
    dtype = torch.promote_types(a.dtype, b.dtype)
    dtype = dtype if initial is None else torch.promote_types(dtype, initial.dtype)
    state = shape[:-2] + shape[-1:]
    h = torch.zeros(state, dtype=dtype, device=b.device) if initial is None else initial.to(dtype).expand(state)
    return a.to(dtype).expand(shape), b.to(dtype).expand(shape), h
