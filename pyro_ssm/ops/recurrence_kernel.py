"""The linear recurrence on plain tensors: by the compiled library, or in torch. Nothing here is differentiable.

Arguments have the same number of dims; a size of 1 stands for all of that dim. With ``lead`` for leading dims and one
dim ``C`` of channels, for diagonal matrices (in brackets for 2 x 2 ones): a ``(*lead, time, C[, 2, 2])``, b
``(*lead, time, C[, 2])``, initial ``(*lead, C[, 2])``, reset bool ``(*lead, time)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.engine import Engine, engine_of
from pyro_ssm.ops.operator import address, in_memory, rows_of, solid
from pyro_ssm.ops.recurrence_torch import Diagonal, Pairs, before, scan_torch

__all__ = ["backward", "cleared", "expanded", "forward", "shape_of"]

FIELDS = 67  # eight-byte fields of ScanArgs

_CODES = {
    (Diagonal, torch.float32): 0,
    (Diagonal, torch.float64): 1,
    (Diagonal, torch.complex64): 2,
    (Diagonal, torch.complex128): 3,
    (Pairs, torch.float32): 4,
    (Pairs, torch.float64): 5,
}
_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}


def shape_of(kind: Any, a: Tensor, b: Tensor, initial: Tensor | None, reset: Tensor | None) -> torch.Size:
    """The shape of all states.

    >>> import torch
    >>> from pyro_ssm.ops.recurrence_kernel import shape_of
    >>> from pyro_ssm.ops.recurrence_torch import Diagonal
    >>> shape_of(Diagonal, torch.zeros(1, 1, 3), torch.zeros(1, 4, 3), None, torch.zeros(2, 4) > 0)
    torch.Size([2, 4, 3])
    """
    shapes = [a.shape if kind is Diagonal else a.shape[:-1], b.shape]
    if initial is not None:
        shapes.append(initial.shape[: -kind.event] + (1,) + initial.shape[-kind.event :])
    if reset is not None:
        shapes.append(reset.shape + (1,) * kind.event)
    return torch.broadcast_shapes(*shapes)


def forward(
    kind: Any,
    a: Tensor,
    b: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    last: bool,
    out: Tensor | None = None,
) -> Tensor:
    """All states ``(*lead, time, C[, 2])``, or the last one ``(*lead, C[, 2])``; into ``out``, contiguous, if given.

    >>> import torch
    >>> from pyro_ssm.ops.recurrence_kernel import forward
    >>> from pyro_ssm.ops.recurrence_torch import Diagonal
    >>> forward(Diagonal, torch.full((1, 1), 0.5), torch.ones(3, 1), None, None, False, False).squeeze(-1)
    tensor([1.0000, 1.5000, 1.7500])
    """
    if b.dtype in _WIDE:
        wide = _WIDE[b.dtype]
        start = None if initial is None else initial.to(wide)
        return forward(kind, a.to(wide), b.to(wide), start, reset, reverse, last).to(b.dtype)
    shape = shape_of(kind, a, b, initial, reset)
    state = shape[: kind.time] + shape[kind.time + 1 :]
    if shape[kind.time] == 0 and last:
        return b.new_zeros(state) if initial is None else initial.expand(state).clone()
    fields = _fields(kind, shape, a, b, initial, reset, None, None, reverse)
    if out is None:
        out = torch.empty(state if last else shape, dtype=b.dtype, device=b.device)
    if out.numel() == 0:
        return out
    if fields is None:
        h = scan_torch(kind, *expanded(kind, shape, a, b, initial, reset), reverse)
        return h.select(kind.time, 0 if reverse else -1).clone() if last else h
    engine, values, alive = fields
    engine.run(
        "pyro_ssm_linear_scan_forward", [*values, *([0, out.data_ptr()] if last else [out.data_ptr(), 0]), 0, 0, 0, 0]
    )
    del alive
    return out


def backward(
    kind: Any,
    grad: Tensor | None,
    grad_last: Tensor | None,
    a: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    states: Tensor | None,
    shape: Sequence[int],
    reverse: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a, b and initial: that of a in its shape, the others with every repetition.

    .. math:: x_t = g_t + a_{t+1}^* x_{t+1}, \\qquad \\partial a_t = x_t h_{t-1}^*, \\quad \\partial b_t = x_t, \\quad
        \\partial h_0 = a_1^* x_1

    Args:
        grad: of all states.
        grad_last: of the last state.
        states: all of them, where the gradient of a is wanted.
        shape: of all states; at least one step.
        wanted: of a, b and initial.

    >>> import torch
    >>> from pyro_ssm.ops.recurrence_kernel import backward
    >>> from pyro_ssm.ops.recurrence_torch import Diagonal
    >>> half, one = torch.full((1, 1), 0.5), torch.ones(3, 1)
    >>> backward(Diagonal, one, None, half, None, None, None, (3, 1), False, (False, True, False))[1].squeeze(-1)
    tensor([1.7500, 1.5000, 1.0000])
    """
    if a.dtype in _WIDE:
        narrow, wide = a.dtype, _WIDE[a.dtype]
        grad, grad_last, initial, states = (
            None if x is None else x.to(wide) for x in (grad, grad_last, initial, states)
        )
        found = backward(kind, grad, grad_last, a.to(wide), initial, reset, states, shape, reverse, wanted)
        return tuple(None if x is None else x.to(narrow) for x in found)  # type: ignore[return-value]
    shape = torch.Size(shape)
    state = shape[: kind.time] + shape[kind.time + 1 :]
    matrix = () if kind is Diagonal else (2,)
    steps = a.shape[kind.matrix_time]  # summed over time where a is shared by all times
    summed = shape[: kind.time] + (steps,) + shape[kind.time + 1 :] + matrix
    new = a.new_zeros if 0 in shape else a.new_empty
    sizes = (summed, shape, state)
    out = [new(size) if want else None for size, want in zip(sizes, wanted, strict=True)]
    if 0 not in shape:
        fields = _fields(kind, shape, a, None, initial, reset, grad, grad_last, reverse)
        if fields is None:
            out = _backward_torch(kind, grad, grad_last, a, initial, reset, states, shape, reverse, wanted)
        else:
            engine, values, alive = fields
            results = [address(states), 0, address(out[0]), steps, address(out[1]), address(out[2])]
            engine.run("pyro_ssm_linear_scan_backward", values + results)
            del alive
    if out[0] is not None and out[0].shape != a.shape:
        out[0] = out[0].sum_to_size(a.shape)
    return out[0], out[1], out[2]


def _fields(
    kind: Any,
    shape: torch.Size,
    a: Tensor,
    b: Tensor | None,
    initial: Tensor | None,
    reset: Tensor | None,
    grad: Tensor | None,
    grad_last: Tensor | None,
    reverse: bool,
) -> tuple[Engine, list[int], list[Tensor | None]] | None:
    """The engine, the first fields of ScanArgs, the tensors whose memory they point to; None where torch must do it."""
    code = _CODES.get((kind, a.dtype))
    engine = None if code is None else engine_of(a, "pyro_ssm_linear_scan_forward", code)  # one program for both ways
    if engine is None or code is None:
        return None
    event, lanes, lead = kind.event, shape[-kind.event], len(shape) - kind.event - 1
    width = 2 if a.is_complex() else 1  # real numbers in an element
    shared = a.shape[kind.matrix_time + 1] == 1 or a.stride(kind.matrix_time + 1) == 0
    a = solid(in_memory(a), event if kind is Pairs else 0 if shared else 1)
    of_states = [None if x is None else _lanes(in_memory(x), shape, event) for x in (b, initial, grad, grad_last)]
    reset = None if reset is None else in_memory(reset)
    b, initial, grad, grad_last = of_states
    given = ((a, width, True), (b, width, True), (initial, width, False), (reset, 1, True), (grad, width, True))
    arrays = [
        (0, [0] * lead, 0) if x is None else _array(x, lead, width, timed)
        for x, width, timed in (*given, (grad_last, width, False))
    ]
    rows = rows_of(shape[:lead], [strides for _, strides, _ in arrays])
    if rows is None:
        return None
    sizes, strides = rows
    values = [code, shape[kind.time], lanes, int(reverse), torch.get_num_threads(), engine.parallel_for, *sizes]
    for i, (at, _, t) in enumerate(arrays):
        values += [at, *strides[i], t]
        if i == 0:
            values.append(0 if shared else 1)
    return engine, values, [a, reset, *of_states]


def _lanes(x: Tensor, shape: torch.Size, event: int) -> Tensor:
    """``x`` with every lane, contiguous."""
    if x.shape[-event:] != shape[-event:]:
        x = x.expand(x.shape[:-event] + shape[-event:])
    return solid(x, event)


def _array(x: Tensor, lead: int, width: int, timed: bool) -> tuple[int, list[int], int]:
    """Address, strides over leading dims, stride over time, in real numbers; 0 where a size is 1."""
    strides = [0 if size == 1 else width * stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return x.data_ptr(), strides[:lead], strides[lead] if timed else 0


def expanded(
    kind: Any, shape: torch.Size, a: Tensor, b: Tensor, initial: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and initial in one full shape, for a recurrence without resets.

    >>> import torch
    >>> from pyro_ssm.ops.recurrence_kernel import expanded
    >>> from pyro_ssm.ops.recurrence_torch import Diagonal
    >>> expanded(Diagonal, (2, 1), torch.ones(1, 1), torch.ones(2, 1), None, torch.tensor([True, False]))[0]
    tensor([[0.],
            [1.]])
    """
    state = shape[: kind.time] + shape[kind.time + 1 :]
    initial = b.new_zeros(()) if initial is None else initial
    a = a if reset is None else cleared(kind, a, reset)
    return a.expand(shape + (() if kind is Diagonal else (2,))), b.expand(shape), initial.expand(state)


def cleared(kind: Any, a: Tensor, reset: Tensor) -> Tensor:
    """Matrices ``a``, 0 where a step is reset.

    >>> import torch
    >>> from pyro_ssm.ops.recurrence_kernel import cleared
    >>> from pyro_ssm.ops.recurrence_torch import Diagonal
    >>> cleared(Diagonal, torch.ones(1, 1), torch.tensor([True, False])).squeeze(-1)
    tensor([0., 1.])
    """
    return a.masked_fill(reset.reshape(reset.shape + (1,) * (-kind.matrix_time - 1)), 0.0)


def _backward_torch(
    kind: Any,
    grad: Tensor | None,
    grad_last: Tensor | None,
    a: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    states: Tensor | None,
    shape: torch.Size,
    reverse: bool,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    state = shape[: kind.time] + shape[kind.time + 1 :]
    final, start = (0, shape[kind.time] - 1) if reverse else (shape[kind.time] - 1, 0)
    g = a.new_zeros(shape) if grad is None else grad.expand(shape)
    if grad_last is not None:
        g = g.clone()
        g.select(kind.time, final).add_(grad_last)
    a, g, first = expanded(kind, shape, a, g, initial, reset)
    adjoint = kind.adjoint(a)
    shifted = adjoint.roll(1 if reverse else -1, kind.matrix_time)  # of the step after; the last one meets a zero state
    x = scan_torch(kind, shifted, g, g.new_zeros(()).expand(state), not reverse)
    found_a = None
    if wanted[0]:
        found_a = kind.outer(x, before(kind, first, states, reverse))
        found_a = found_a if reset is None else cleared(kind, found_a, reset)
    found_initial = None
    if wanted[2]:
        found_initial = kind.apply(adjoint.select(kind.matrix_time, start), x.select(kind.time, start))
    return [found_a, x, found_initial]
