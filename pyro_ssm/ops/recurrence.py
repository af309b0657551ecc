"""The linear recurrence of vectors whose matrices are diagonal or made of 2 x 2 blocks: forward, gradient, tangent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Diagonal", "Pairs", "Recurrence", "recur"]

# Measured on CPU: a time loop pays about 3 us of Python a step, two levels of blocks do three times the arithmetic.
_BLOCKED_FROM = 64  # steps
_BLOCKED_LANES = {"cpu": 2048}  # elements a step up to which blocks win; elsewhere always


class Diagonal:
    """:math:`a_t` is a vector, applied elementwise: time is the last dimension but one.

    >>> import torch
    >>> from pyro_ssm.ops.recurrence import Diagonal
    >>> Diagonal.apply(torch.tensor([2.0]), torch.tensor([3.0]))
    tensor([6.])
    """

    time, matrix_time = -2, -2

    @staticmethod
    def apply(a: Tensor, h: Tensor) -> Tensor:
        """:math:`a h`."""
        return a * h

    @staticmethod
    def step(a: Tensor, h: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """:math:`a h + b`, written to ``out``."""
        return torch.addcmul(b, a, h, out=out)

    @staticmethod
    def compose(later: Tensor, earlier: Tensor) -> Tensor:
        """The matrix product."""
        return later * earlier

    @staticmethod
    def adjoint(a: Tensor) -> Tensor:
        """:math:`a^*`."""
        return a.conj()

    @staticmethod
    def outer(x: Tensor, h: Tensor) -> Tensor:
        """The gradient of :math:`a` in :math:`\\langle x, a h \\rangle`."""
        return x * h.conj()


class Pairs:
    """:math:`a_t` is a 2 x 2 matrix a channel: ``a`` is ``(..., time, channels, 2, 2)``, states ``(..., 2)``.

    >>> import torch
    >>> from pyro_ssm.ops.recurrence import Pairs
    >>> Pairs.apply(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([3.0, 4.0]))
    tensor([4., 6.])
    """

    time, matrix_time = -3, -4

    @staticmethod
    def apply(a: Tensor, h: Tensor) -> Tensor:
        """:math:`a h`."""
        return (a * h.unsqueeze(-2)).sum(-1)

    @staticmethod
    def step(a: Tensor, h: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """:math:`a h + b`, written to ``out``."""
        return torch.add(b, Pairs.apply(a, h), out=out)

    @staticmethod
    def compose(later: Tensor, earlier: Tensor) -> Tensor:
        """The matrix product."""
        return (later.unsqueeze(-1) * earlier.unsqueeze(-3)).sum(-2)

    @staticmethod
    def adjoint(a: Tensor) -> Tensor:
        """:math:`a^*`."""
        return a.mH

    @staticmethod
    def outer(x: Tensor, h: Tensor) -> Tensor:
        """The gradient of :math:`a` in :math:`\\langle x, a h \\rangle`."""
        return x.unsqueeze(-1) * h.conj().unsqueeze(-2)


def recur(kind: Any, a: Tensor, b: Tensor, initial: Tensor, reverse: bool) -> Tensor:
    """All states of :math:`h_t = a_t h_{t-1} + b_t`; ``a``, ``b`` and ``initial`` have been expanded to one shape.

    Differentiable to any order, in reverse and forward mode, and under ``torch.func.vmap``.

    >>> import torch
    >>> from pyro_ssm.ops.recurrence import Diagonal, recur
    >>> recur(Diagonal, torch.full((3, 1), 0.5), torch.ones(3, 1), torch.zeros(1), False).squeeze(-1)
    tensor([1.0000, 1.5000, 1.7500])
    """
    if b.shape[kind.time] == 0:
        return b.clone()
    if b.shape[kind.time] == 1:
        return kind.apply(a, initial.unsqueeze(kind.time)) + b
    return Recurrence.apply(a, b, initial, kind, reverse)


class Recurrence(torch.autograd.Function):
    """:func:`recur` with its hand-derived gradient :math:`x_t = g_t + a_{t+1}^* x_{t+1}`, itself a recurrence.

    >>> from pyro_ssm.ops.recurrence import Recurrence
    >>> Recurrence.__name__
    'Recurrence'
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor, initial: Tensor, kind: Any, reverse: bool) -> Tensor:  # type: ignore[override]
        steps, lanes = b.shape[kind.time], initial.numel()
        if steps >= _BLOCKED_FROM and lanes <= _BLOCKED_LANES.get(b.device.type, lanes):
            return _blocked(kind, a, b, initial, reverse)
        return _loop(kind, a, b, initial, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        a, _, initial, ctx.kind, ctx.reverse = inputs
        ctx.save_for_backward(a, initial, output)
        ctx.save_for_forward(a, initial, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (a, initial, h), kind, reverse, (g,) = ctx.saved_tensors, ctx.kind, ctx.reverse, grads
        last = g.shape[kind.time] - 1
        first_at, last_at = (last, 0) if reverse else (0, last)
        later_at, earlier_at = (0, 1) if reverse else (1, 0)  # where the later, the earlier ones of each pair begin
        x_last = g.narrow(kind.time, last_at, 1)
        later, earlier = a.narrow(kind.matrix_time, later_at, last), g.narrow(kind.time, earlier_at, last)
        x = recur(kind, kind.adjoint(later), earlier, x_last.squeeze(kind.time), not reverse)
        x = torch.cat([x_last, x] if reverse else [x, x_last], kind.time)
        grad_a = grad_initial = None
        if ctx.needs_input_grad[0]:
            grad_a = kind.outer(x, _before(kind, initial, h, reverse))
        if ctx.needs_input_grad[2]:
            start = kind.adjoint(a.narrow(kind.matrix_time, first_at, 1))
            grad_initial = kind.apply(start, x.narrow(kind.time, first_at, 1)).squeeze(kind.time)
        return grad_a, x, grad_initial, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (a, initial, h), kind = ctx.saved_tensors, ctx.kind
        a_dot, b_dot, initial_dot = tangents[:3]
        drive = torch.zeros_like(h) if b_dot is None else b_dot
        if a_dot is not None:
            drive = drive + kind.apply(a_dot, _before(kind, initial, h, ctx.reverse))
        return recur(kind, a, drive, torch.zeros_like(initial) if initial_dot is None else initial_dot, ctx.reverse)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        batched = [
            x.unsqueeze(0).expand((info.batch_size,) + x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(args[:3], in_dims[:3], strict=True)
        ]
        return Recurrence.apply(*batched, *args[3:]), 0


def _before(kind: Any, initial: Tensor, h: Tensor, reverse: bool) -> Tensor:
    """:math:`h_{t-1}` for every t."""
    start, rest = initial.unsqueeze(kind.time), h.narrow(kind.time, int(reverse), h.shape[kind.time] - 1)
    return torch.cat([rest, start] if reverse else [start, rest], kind.time)


def _loop(kind: Any, a: Tensor, b: Tensor, initial: Tensor, reverse: bool) -> Tensor:
    h = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    steps = list(zip(a.unbind(kind.matrix_time), b.unbind(kind.time), h.unbind(kind.time), strict=True))
    last = initial
    for a_t, b_t, h_t in reversed(steps) if reverse else steps:
        last = kind.step(a_t, last, b_t, h_t)
    return h


def _blocked(kind: Any, a: Tensor, b: Tensor, initial: Tensor, reverse: bool) -> Tensor:
    """Blocks of about sqrt(T) steps side by side from zero, then the carries from block to block, then both together.

    .. math:: h_{c,q} = \\ell_{c,q} + \\Big(\\prod_{r \\le q} a_{c,r}\\Big) H_{c-1}, \\qquad H_c = h_{c,Q}
    """
    if reverse:
        turned = a if a.stride(kind.matrix_time) == 0 else _shrink(a, kind.matrix_time).flip(kind.matrix_time)
        return _blocked(kind, turned, b.flip(kind.time), initial, False).flip(kind.time)
    steps = b.shape[kind.time]
    size = max(8, round(steps**0.5))
    whole = steps // size * size
    a_whole, b_whole = a.narrow(kind.matrix_time, 0, whole), b.narrow(kind.time, 0, whole)
    a_cut = _shrink(a_whole.unflatten(kind.matrix_time, (-1, size)), kind.matrix_time)  # (..., blocks | 1, size, ...)
    b_cut = b_whole.unflatten(kind.time, (-1, size))
    a_rows, b_rows = a_cut.unbind(kind.matrix_time), b_cut.unbind(kind.time)
    products, local = [a_rows[0]], torch.empty(b_cut.shape, dtype=b.dtype, device=b.device)
    rows = local.unbind(kind.time)
    rows[0].copy_(b_rows[0])
    for q in range(1, size):
        products.append(kind.compose(a_rows[q], products[-1]))
        kind.step(a_rows[q], rows[q - 1], b_rows[q], rows[q])
    carry, starts = initial, []
    leap = products[-1].expand(rows[-1].shape[: kind.time + 1] + products[-1].shape[kind.matrix_time + 1 :])
    for leap_c, end_c in zip(leap.unbind(kind.matrix_time), rows[-1].unbind(kind.time), strict=True):
        starts.append(carry)
        carry = kind.apply(leap_c, carry) + end_c
    start = torch.stack(starts, kind.time)
    for product, row in zip(products, rows, strict=True):
        row += kind.apply(product, start)
    h = local.flatten(kind.time - 1, kind.time)
    if whole == steps:
        return h
    rest = _loop(
        kind, a.narrow(kind.matrix_time, whole, steps - whole), b.narrow(kind.time, whole, steps - whole), carry, False
    )
    return torch.cat([h, rest], kind.time)


def _shrink(a: Tensor, time: int) -> Tensor:
    """``a`` with size 1 in the leading dims along which it was expanded: products need not be repeated there."""
    index = [slice(0, 1) if stride == 0 else slice(None) for stride in a.stride()[: a.dim() + time]]
    return a[tuple(index)]
