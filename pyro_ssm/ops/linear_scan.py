"""The elementwise linear recurrence, forward or backward in time, and its hand-derived gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["linear_scan", "linear_scan_reference"]


def linear_scan_reference(a: Tensor, b: Tensor, initial: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """The recurrence of :func:`linear_scan` as a plain loop.

    >>> import torch
    >>> from pyro_ssm.ops import linear_scan_reference
    >>> linear_scan_reference(torch.full((3, 1), 0.5), torch.ones(3, 1)).squeeze(-1)
    tensor([1.0000, 1.5000, 1.7500])
    """
    a, b, h = _broadcast(a, b, initial)
    steps = list(zip(a.unbind(-2), b.unbind(-2), strict=True))
    states = []
    for a_t, b_t in reversed(steps) if reverse else steps:
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states[::-1] if reverse else states, -2) if states else b.clone()


def linear_scan(a: Tensor, b: Tensor, initial: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """The linear recurrence over time, one lane a channel.

    .. math:: h_t = a_t h_{t-1} + b_t, \\qquad t = 1, \\dots, T, \\quad h_0 = \\text{initial}

    Its gradient is the same scan run the other way, :math:`x_t = g_t + a_{t+1} x_{t+1}`, with
    :math:`\\partial b_t = x_t`, :math:`\\partial a_t = x_t h_{t-1}`, :math:`\\partial h_0 = a_1 x_1`: no graph over
    time is kept, and derivatives of any order are exact.

    Args:
        a: ``(..., time, channels)``, broadcast against ``b`` (a time size of 1 is a constant coefficient).
        b: ``(..., time, channels)``.
        initial: ``(..., channels)``, zero by default.
        reverse: run from the last time to the first, :math:`h_t = a_t h_{t+1} + b_t`, with ``initial`` after the last.

    Returns:
        All states ``(..., time, channels)``.

    Raises:
        ValueError: a or b has fewer than two dims.

    >>> import torch
    >>> from pyro_ssm.ops import linear_scan
    >>> linear_scan(torch.tensor([[0.5]]), torch.zeros(3, 1), initial=torch.tensor([8.0])).squeeze(-1)
    tensor([4., 2., 1.])
    """
    a, b, initial = _broadcast(a, b, initial)
    if b.shape[-2] == 0:
        return b.clone()
    return _LinearScan.apply(a, b, initial, reverse)


def _broadcast(a: Tensor, b: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dim() < 2:
            raise ValueError(f"linear_scan: `{name}` must be (..., time, channels), got shape {tuple(tensor.shape)}")
    shapes = [a.shape, b.shape] + ([] if initial is None else [initial.unsqueeze(-2).shape])
    shape = torch.broadcast_shapes(*shapes)
    dtype = torch.promote_types(a.dtype, b.dtype)
    state = shape[:-2] + shape[-1:]
    h = torch.zeros(state, dtype=dtype, device=b.device) if initial is None else initial.to(dtype).expand(state)
    return a.to(dtype).expand(shape), b.to(dtype).expand(shape), h


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, initial: Tensor, reverse: bool) -> Tensor:
        h = torch.empty(b.shape, dtype=b.dtype, device=b.device)
        steps = list(zip(a.unbind(-2), b.unbind(-2), h.unbind(-2), strict=True))
        last = initial
        for a_t, b_t, h_t in reversed(steps) if reverse else steps:
            last = torch.addcmul(b_t, a_t, last, out=h_t)
        ctx.save_for_backward(a, initial, h)
        ctx.reverse = reverse
        return h

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        a, initial, h = ctx.saved_tensors
        # Times in the order of the scan: the first has no state before it, the last no adjoint after it.
        first, later, last, earlier = slice(0, 1), slice(1, None), slice(-1, None), slice(None, -1)
        if ctx.reverse:
            first, later, last, earlier = last, earlier, first, later
        x_last = g[..., last, :]
        x = linear_scan(a[..., later, :], g[..., earlier, :], x_last.squeeze(-2), reverse=not ctx.reverse)
        x = torch.cat([x_last, x] if ctx.reverse else [x, x_last], -2)
        grad_a = grad_initial = None
        if ctx.needs_input_grad[0]:
            pair = [initial.unsqueeze(-2), h[..., earlier, :]]
            grad_a = x * torch.cat(pair[::-1] if ctx.reverse else pair, -2)
        if ctx.needs_input_grad[2]:
            grad_initial = (a[..., first, :] * x[..., first, :]).squeeze(-2)
        return grad_a, x, grad_initial, None
