"""``torch.ops.pyro_ssm.selective_scan`` and its gradient: the kernels of ``csrc/selective_scan.h``, or torch.

One operator serves :func:`~pyro_ssm.ops.selective_scan` (a head is a channel) and :func:`~pyro_ssm.ops.ssd` (the channels
of a head share a step and one decay). Its arguments are those of :class:`~pyro_ssm.ops.selective_torch.Scan` with one
leading dim each: the batch, or a size of 1 that stands for all of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.compiled import library
from pyro_ssm.ops.composite import composite_backward, transformed
from pyro_ssm.ops.operator import Way, address, define, way_of
from pyro_ssm.ops.selective_torch import EVENTS, Scan, selective_composite

__all__ = ["run_scan"]

CHUNK = 16  # of csrc/selective_scan.h: steps between the states that are kept
FIELDS = 58  # eight-byte fields of SelectiveArgs
_DIFFERENTIABLE = (0, 1, 2, 3, 4, 5, 6, 7, 8, 11)  # fields of a Scan that have a gradient
_HALVES = (torch.float16, torch.bfloat16)

_ARGUMENTS = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, Tensor? gap, "
    "Tensor? mask, Tensor? reset, Tensor? initial, bool softplus, int groups"
)


def run_scan(scan: Scan) -> tuple[Tensor, Tensor]:
    """The scan, the way that its arguments can go; leading dims broadcast.

    >>> import torch
    >>> from pyro_ssm.ops.selective_kernel import run_scan
    >>> from pyro_ssm.ops.selective_torch import Scan
    >>> u = torch.ones(2, 1)
    >>> run_scan(Scan(u, u, -u[:1], u, u, None, None, None, None, None, None, None, False, 1))[1]
    tensor([[1.3679]])
    """
    dtype = scan.u.dtype
    if dtype in _HALVES or any(x is not None and x.dtype in _HALVES for x in scan[1:12]):  # type: ignore[union-attr]
        wide = [x.float() if isinstance(x, Tensor) and x.dtype != torch.bool else x for x in scan]
        y, final = run_scan(Scan(*wide))
        return y.to(dtype), final
    compiled = library().functions is not None and scan.u.device.type == "cpu"
    way = way_of(*scan[:12]) if compiled else Way.TRANSFORM
    if way is Way.TRANSFORM:
        return selective_composite(scan)
    lead = scan.lead()
    flat = _flat(scan, lead)
    if way is Way.OPERATOR:
        y, final, _ = torch.ops.pyro_ssm.selective_scan(*flat, torch.is_grad_enabled())
    elif way is Way.GRADIENT:
        y, final = _Scan.apply(*flat)
    else:
        y, final, _ = forward(*flat, False)
    if len(lead) == 1:
        return y, final
    return y.reshape(lead + y.shape[1:]), final.reshape(lead + final.shape[1:])


def _flat(scan: Scan, lead: torch.Size) -> Scan:
    """With one leading dim each."""
    flat = list(scan)
    for i, event in enumerate(EVENTS):
        x = scan[i]
        if x is None or (x.dim() == event + 1 and len(lead) == 1):  # type: ignore[union-attr]
            continue
        inner = x.shape[x.dim() - event :]  # type: ignore[union-attr]
        if x.dim() == event or x.shape[: x.dim() - event].numel() == 1:  # type: ignore[union-attr]
            flat[i] = x.reshape((1,) + inner)  # type: ignore[union-attr]
        else:
            flat[i] = x.expand(lead + inner).reshape((lead.numel(),) + inner)  # type: ignore[union-attr]
    if flat[0].shape[0] == 1 != lead.numel():  # type: ignore[union-attr]
        flat[0] = flat[0].expand((lead.numel(),) + flat[0].shape[1:])  # type: ignore[union-attr]
    return Scan(*flat)  # type: ignore[arg-type]


def _solid(x: Tensor | None, last: int) -> Tensor | None:
    """With its last dims contiguous; booleans are read as bytes."""
    if x is None or x.is_contiguous():
        return x
    shape, stride = x.shape, x.stride()
    expected = 1
    for i in range(1, last + 1):
        if shape[-i] > 1 and stride[-i] != expected:
            return x.contiguous()
        expected *= shape[-i]
    return x


_LAST = (1, 1, 2, 1, 1, 1, 1, 1, 0, 1, 1, 2)  # dims of each tensor that must be contiguous


def _fields(scan: Scan) -> tuple[list[int], list[Tensor | None]]:
    """The first fields of SelectiveArgs, and the tensors whose memory they point to."""
    tensors = [_solid(x, last) for x, last in zip(scan[:12], _LAST, strict=True)]  # type: ignore[arg-type]
    u, dt, A, B = tensors[:4]
    batch, times, channels = u.shape  # type: ignore[union-attr]
    n = B.shape[2] // scan.groups  # type: ignore[union-attr]
    fields = [int(u.dtype == torch.float64), batch, times, channels, dt.shape[2], scan.groups, n, A.shape[2]]  # type: ignore[union-attr]
    fields.append(int(scan.softplus))
    for i, x in enumerate(tensors):
        timed = i in _TIMED
        if x is None:
            fields += (0, 0, 0) if timed else (0, 0)
            continue
        stride = x.stride()
        fields += (x.data_ptr(), 0 if x.shape[0] == 1 else stride[0])
        if timed:
            fields.append(stride[1])
    return fields, tensors


_TIMED = (0, 1, 3, 4, 6, 8)  # with a stride of their own over time


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, final, kept)`` of a :class:`~pyro_ssm.ops.selective_torch.Scan` and ``keep``.

    >>> from pyro_ssm.ops.selective_kernel import forward
    >>> forward.__name__
    'forward'
    """
    scan, keep = Scan(*arguments[:-1]), arguments[-1]
    functions, _, _, parallel_for = library()
    y, final, kept = out = _results(*arguments)
    if functions is None or scan.u.device.type != "cpu":
        with torch.no_grad():
            found, state = selective_composite(scan)
        y.copy_(found)
        final.copy_(state)
        return out
    if final.numel():
        fields, alive = _fields(scan)
        fields += (y.data_ptr(), final.data_ptr(), kept.data_ptr() if keep else 0, parallel_for)
        _call(functions.pyro_ssm_selective_forward, fields)
        del alive
    else:
        y.zero_()
    return out


def _results(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    scan, keep = Scan(*arguments[:-1]), arguments[-1]
    u = scan.u
    batch, times, channels = u.shape
    n = scan.B.shape[2] // scan.groups
    kept = (batch, (times - 1) // CHUNK, n, channels) if keep and times > CHUNK else (0,)
    return u.new_empty((batch, times, channels)), u.new_empty((batch, channels, n)), u.new_empty(kept)


def _call(function: Any, fields: list[int]) -> None:
    fields += [0] * (FIELDS - len(fields))
    if function((ctypes.c_int64 * FIELDS)(*fields)):
        raise MemoryError("selective_scan: not enough memory for the states of one chunk of steps")


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of the ten differentiable arguments, in their shapes; what is not wanted comes back empty.

    >>> from pyro_ssm.ops.selective_kernel import backward
    >>> backward.__name__
    'backward'
    """
    *given, kept, grad_y, grad_final, wanted = arguments
    scan = Scan(*given)
    inputs = [scan[i] for i in _DIFFERENTIABLE]
    functions, _, _, parallel_for = library()
    batch, _, channels = scan.u.shape
    if functions is None or scan.u.device.type != "cpu" or batch * channels == 0:
        with torch.no_grad():
            found = _by_composite(scan, wanted, grad_y, grad_final)
        return tuple(
            scan.u.new_empty(0) if not want or x is None else torch.zeros_like(x) if g is None else g.contiguous()
            for g, x, want in zip(found, inputs, wanted, strict=True)
        )
    grads = [
        scan.u.new_empty((batch,) + x.shape[1:] if want and x is not None else (0,))
        for x, want in zip(inputs, wanted, strict=True)
    ]
    fields, alive = _fields(scan)
    outer = [None if g is None else g.contiguous() for g in (grad_y, grad_final)]
    fields += (0, 0, kept.data_ptr() if kept.numel() else 0, parallel_for, *(address(g) for g in outer))
    fields += (g.data_ptr() if want else 0 for g, want in zip(grads, wanted, strict=True))
    _call(functions.pyro_ssm_selective_backward, fields)
    del alive
    return tuple(
        g.sum(0, keepdim=True) if want and x is not None and x.shape[0] != batch else g
        for g, x, want in zip(grads, inputs, wanted, strict=True)
    )


def _by_composite(
    scan: Scan, wanted: Sequence[bool], grad_y: Tensor | None, grad_final: Tensor | None
) -> tuple[Tensor | None, ...]:
    def composite(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        given: list[Any] = list(scan)
        for i, x in zip(_DIFFERENTIABLE, tensors, strict=True):
            given[i] = x
        return selective_composite(Scan(*given))

    return composite_backward(composite, [scan[i] for i in _DIFFERENTIABLE], wanted, (grad_y, grad_final))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        y, final, kept = forward(*arguments, True)
        ctx.there = [x is not None for x in arguments[:12]]
        ctx.save_for_backward(*(x for x in arguments[:12] if x is not None), kept)
        ctx.options = arguments[12:]
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _derivative(ctx, *grads)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.there = [x is not None for x in inputs[:12]]
    ctx.save_for_backward(*(x for x in inputs[:12] if x is not None), output[2])
    ctx.options = inputs[12:14]
    ctx.set_materialize_grads(False)


def _derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, kept = ctx.saved_tensors
    present = iter(saved)
    scan = Scan(*(next(present) if there else None for there in ctx.there), *ctx.options)
    wanted = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    compiling = torch.compiler.is_compiling()
    if not compiling and (torch.is_grad_enabled() or any(g is not None and transformed(g) for g in grads[:2])):
        found: Sequence[Tensor | None] = _by_composite(scan, wanted, *grads[:2])
    else:
        call = torch.ops.pyro_ssm.selective_scan_backward if compiling else backward
        found = call(*scan, kept, *grads[:2], wanted)
    out: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for i, want, grad in zip(_DIFFERENTIABLE, wanted, found, strict=True):
        out[i] = grad if want else None
    return tuple(out)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    scan, wanted = Scan(*arguments[:14]), arguments[-1]
    inputs = [scan[i] for i in _DIFFERENTIABLE]
    return tuple(
        scan.u.new_empty(x.shape if want and x is not None else (0,)) for x, want in zip(inputs, wanted, strict=True)
    )


define(
    "selective_scan",
    f"{_ARGUMENTS}, bool keep",
    "(Tensor, Tensor, Tensor)",
    forward,
    _results,
    setup=_setup,
    backward=_derivative,
)
define(
    "selective_scan_backward",
    f"{_ARGUMENTS}, Tensor kept, Tensor? grad_y, Tensor? grad_final, bool[] wanted",
    f"({', '.join(['Tensor'] * 10)})",
    backward,
    _fake_backward,
)
