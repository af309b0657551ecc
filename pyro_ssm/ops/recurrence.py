"""The linear recurrence, differentiable to any order: its four ways (see :class:`~pyro_ssm.ops.operator.Way`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops import recurrence_kernel as kernel
from pyro_ssm.ops.operator import Way, define, unbatched, way_of
from pyro_ssm.ops.recurrence_torch import Diagonal, Pairs, before, scan_associative

__all__ = ["Recurrence", "recur"]


def recur(
    kind: Any,
    a: Tensor,
    b: Tensor,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    reverse: bool = False,
    last: bool = False,
) -> Tensor:
    """All states of :math:`h_t = a_t h_{t-1} + b_t`, or the last one.

    Differentiable to any order, in reverse and forward mode, and under ``torch.func``. Arguments as in
    :mod:`pyro_ssm.ops.recurrence_kernel`: equally many dims, of one dtype.

    >>> import torch
    >>> from pyro_ssm.ops.recurrence import recur
    >>> from pyro_ssm.ops.recurrence_torch import Diagonal
    >>> recur(Diagonal, torch.full((1, 1), 0.5), torch.ones(3, 1)).squeeze(-1)
    tensor([1.0000, 1.5000, 1.7500])
    """
    way = way_of(a, b, initial)
    if way is Way.KERNEL:
        return kernel.forward(kind, a, b, initial, reset, reverse, last)
    if way is Way.OPERATOR:
        return _OPERATORS[kind](a, b, initial, reset, reverse, last)
    if last and b.shape[kind.time] and (way is Way.TRANSFORM or a.requires_grad):  # the gradient of a needs all states
        return recur(kind, a, b, initial, reset, reverse=reverse).select(kind.time, 0 if reverse else -1)
    if way is Way.GRADIENT:
        return _Scan.apply(a, b, initial, reset, kind, reverse, last)
    return _transformable(kind, a, b, initial, reset, reverse, last)


def _transformable(
    kind: Any, a: Tensor, b: Tensor, initial: Tensor | None, reset: Tensor | None, reverse: bool, last: bool = False
) -> Tensor:
    shape = kernel.shape_of(kind, a, b, initial, reset)
    a, b, initial = kernel.expanded(kind, shape, a, b, initial, reset)
    if b.shape[kind.time] == 0:
        return initial.clone() if last else b.clone()
    if torch.compiler.is_compiling():  # a graph cannot hold Recurrence's rule of forward mode
        return scan_associative(kind, a, b, initial, reverse)
    return Recurrence.apply(a, b, initial, kind, reverse)


class Recurrence(torch.autograd.Function):
    """The recurrence of arguments of one full shape, for every transform that torch has.

    Its hand-derived gradient :math:`x_t = g_t + a_{t+1}^* x_{t+1}` and its tangent are recurrences themselves.

    >>> from pyro_ssm.ops.recurrence import Recurrence
    >>> Recurrence.__name__
    'Recurrence'
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor, initial: Tensor, kind: Any, reverse: bool) -> Tensor:  # type: ignore[override]
        if way_of(a, b, initial) is Way.KERNEL:
            return kernel.forward(kind, a, b, initial, None, reverse, False)
        return _OPERATORS[kind](a, b, initial, None, reverse, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        a, _, initial, ctx.kind, ctx.reverse = inputs
        ctx.save_for_backward(a, initial, output)
        ctx.save_for_forward(a, initial, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, initial, h = ctx.saved_tensors
        needed = [ctx.needs_input_grad[i] for i in (0, 2)]
        grad_a, x, grad_initial = _gradients(ctx.kind, a, initial, h, grads[0], ctx.reverse, needed)
        return grad_a, x, grad_initial, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (a, initial, h), kind = ctx.saved_tensors, ctx.kind
        a_dot, b_dot, initial_dot = tangents[:3]
        drive = torch.zeros_like(h) if b_dot is None else b_dot
        if a_dot is not None:
            drive = drive + kind.apply(a_dot, before(kind, initial, h, ctx.reverse))
        start = torch.zeros_like(initial) if initial_dot is None else initial_dot
        return recur(kind, a, drive, start, reverse=ctx.reverse)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        batched = [
            x.unsqueeze(0).expand((info.batch_size,) + x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(args[:3], in_dims[:3], strict=True)
        ]
        return Recurrence.apply(*batched, *args[3:]), 0


def _gradients(
    kind: Any, a: Tensor, initial: Tensor, h: Tensor, g: Tensor, reverse: bool, needed: list[bool]
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Of arguments of one full shape, without resets: differentiable, by recurrences."""
    last = g.shape[kind.time] - 1
    first_at, last_at = (last, 0) if reverse else (0, last)
    later_at, earlier_at = (0, 1) if reverse else (1, 0)  # where the later, the earlier ones of each pair begin
    x_last = g.narrow(kind.time, last_at, 1)
    x = x_last
    if last:
        later, earlier = a.narrow(kind.matrix_time, later_at, last), g.narrow(kind.time, earlier_at, last)
        x = recur(kind, kind.adjoint(later), earlier, x_last.squeeze(kind.time), reverse=not reverse)
        x = torch.cat([x_last, x] if reverse else [x, x_last], kind.time)
    grad_a = grad_initial = None
    if needed[0]:
        grad_a = kind.outer(x, before(kind, initial, h, reverse))
    if needed[1]:
        start = kind.adjoint(a.narrow(kind.matrix_time, first_at, 1))
        grad_initial = kind.apply(start, x.narrow(kind.time, first_at, 1)).squeeze(kind.time)
    return grad_a, x, grad_initial


class _Scan(torch.autograd.Function):
    """The way of plain tensors: one kernel forward, one backward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # type: ignore[override]
        *tensors, kind, reverse, last = inputs
        out = kernel.forward(kind, *tensors, reverse, last)  # type: ignore[call-arg]
        _keep(ctx, kind, tensors, out, reverse, last)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled() or (grads[0] is not None and way_of(grads[0]) is not Way.KERNEL)
        return (*_pull(ctx, grads[0], None if again else kernel.backward), None, None, None, None)


def _keep(ctx: Any, kind: Any, tensors: Any, out: Tensor, reverse: bool, last: bool) -> None:
    """What the backward pass needs."""
    a, b, initial, reset = tensors
    ctx.kind, ctx.reverse, ctx.last = kind, reverse, last
    ctx.shape = kernel.shape_of(kind, a, b, initial, reset)
    ctx.shapes = (a.shape, b.shape, None if initial is None else initial.shape)
    ctx.set_materialize_grads(False)
    needs_states = ctx.needs_input_grad[0]
    ctx.save_for_backward(
        a, initial, reset, out if needs_states and not last else None, b if needs_states and last else None
    )


def _pull(ctx: Any, g: Tensor | None, run: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a, b and initial by the backward kernel ``run``; differentiable ones where it is None."""
    if g is None:
        return None, None, None
    a, initial, reset, states, b = ctx.saved_tensors
    kind, wanted = ctx.kind, list(ctx.needs_input_grad[:3])
    if b is not None:
        states = recur(kind, a, b, initial, reset, reverse=ctx.reverse)
    if run is None or 0 in ctx.shape:
        found = _differentiable(ctx, g, a, initial, reset, states, wanted)
    else:
        grads = (None, g) if ctx.last else (g, None)
        found = run(kind, *grads, a, initial, reset, states, ctx.shape, ctx.reverse, wanted)
    grad_a, grad_b, grad_initial = (
        None if not want else x if x.shape == size else x.sum_to_size(size)
        for x, size, want in zip(found, ctx.shapes, wanted, strict=True)
    )
    return grad_a, grad_b, grad_initial


def _differentiable(
    ctx: Any, g: Tensor, a: Tensor, initial: Tensor | None, reset: Tensor | None, states: Tensor | None, wanted: list
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    kind, shape, time = ctx.kind, ctx.shape, ctx.kind.time
    if ctx.last and shape[time]:
        g = g.unsqueeze(time)
        rest = g.new_zeros(shape[:time] + (shape[time] - 1,) + shape[time + 1 :])
        g = torch.cat([g, rest] if ctx.reverse else [rest, g], time)
    if shape[time] == 0:
        zero = g.new_zeros(shape)
        return torch.zeros_like(a), zero, g if ctx.last else g.new_zeros(shape[:time] + shape[time + 1 :])
    full_a, _, first = kernel.expanded(kind, shape, a, g, initial, reset)
    grad_a, x, grad_initial = _gradients(kind, full_a, first, states, g, ctx.reverse, [wanted[0], wanted[2]])
    if grad_a is not None and reset is not None:
        grad_a = kernel.cleared(kind, grad_a, reset)
    return grad_a, x, grad_initial


def _operator(kind: Any) -> Any:
    """Register the recurrence of one kind, and its backward kernel."""
    name = kind.name

    def run_backward(*arguments: Any) -> tuple[Tensor, ...]:
        like = arguments[2]
        return tuple(like.new_empty(0) if x is None else x for x in kernel.backward(kind, *arguments))

    def fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
        a, shape, wanted = arguments[2], arguments[6], arguments[8]
        state = [*shape[: kind.time], *shape[len(shape) + kind.time + 1 :]]
        sizes = (a.shape, shape, state)
        return tuple(a.new_empty(size if want else (0,)) for size, want in zip(sizes, wanted, strict=True))

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"torch.ops.pyro_ssm.{name}_backward has no derivative; differentiate {name} itself with create_graph=True"
        )

    backward = define(
        f"{name}_backward",
        "Tensor? grad, Tensor? grad_last, Tensor a, Tensor? initial, Tensor? reset, Tensor? states, SymInt[] shape, "
        "bool reverse, bool[] wanted",
        "(Tensor, Tensor, Tensor)",
        run_backward,
        fake_backward,
        backward=refuse,
    )

    def run(a: Tensor, b: Tensor, initial: Any, reset: Any, reverse: bool, last: bool) -> Tensor:
        return kernel.forward(kind, a, b, initial, reset, reverse, last)

    def fake(a: Tensor, b: Tensor, initial: Any, reset: Any, reverse: bool, last: bool) -> Tensor:
        shape = kernel.shape_of(kind, a, b, initial, reset)
        return b.new_empty(shape[: kind.time] + shape[kind.time + 1 :] if last else shape)

    def keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _keep(ctx, kind, inputs[:4], output, *inputs[4:])

    def pull(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return (*_pull(ctx, g, None if again else lambda _, *arguments: backward(*arguments)), None, None, None)

    def batch(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        tensors = unbatched(info, in_dims[:4], arguments[:4])
        return forward(*tensors, *arguments[4:]), 0

    forward = define(
        name,
        "Tensor a, Tensor b, Tensor? initial, Tensor? reset, bool reverse, bool last",
        "Tensor",
        run,
        fake,
        setup=keep,
        backward=pull,
        batch=batch,
    )
    return forward


_OPERATORS = {kind: _operator(kind) for kind in (Diagonal, Pairs)}
