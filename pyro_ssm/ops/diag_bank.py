"""A bank of diagonal systems that do not change in time, by the compiled scan: no tensor of time times states."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.compiled import library
from pyro_ssm.ops.composite import composite_backward
from pyro_ssm.ops.operator import Way, address, rows_of, way_of

__all__ = ["bank_is_compiled", "diag_bank"]

FIELDS = 84  # eight-byte fields of BankArgs
_STEPS, _BYTES = 64, 64  # BANK_STEPS, BANK_BYTES

#: ``(u, a, b, C, initial, reset) -> (y, final)``, differentiable
Composite = Callable[..., tuple[Tensor, Tensor]]


def bank_is_compiled(u: Tensor, *rest: Tensor | None) -> bool:
    """Whether :func:`diag_bank` can take these arguments: the library is there, and they are plain tensors.

    >>> import torch
    >>> from pyro_ssm.ops.diag_bank import bank_is_compiled
    >>> torch.func.vmap(lambda x: x + bank_is_compiled(x))(torch.zeros(2))
    tensor([0., 0.])
    """
    if torch.compiler.is_compiling() or library().functions is None:
        return False
    if u.device.type != "cpu" or u.dtype not in (torch.float32, torch.float64):
        return False
    return way_of(u, *rest) in (Way.KERNEL, Way.GRADIENT)


def diag_bank(
    u: Tensor, a: Tensor, b: Tensor, C: Tensor, initial: Tensor | None, reset: Tensor | None, composite: Composite
) -> tuple[Tensor, Tensor]:
    """Run the bank over a sequence.

    .. math:: h_t = a \\odot h_{t-1} + b\\, u_t, \\qquad y_{td} = \\operatorname{Re} \\sum_n C_{dn} h_{tdn}

    The states before every 64 steps are kept for the backward pass, which computes the others again. Second
    derivatives go through ``composite``.

    Args:
        u: ``(..., time, D)`` real, at least one step.
        a, b, C: ``(..., D, N)`` complex; leading dims broadcast against those of u.
        initial: ``(..., D, N)`` complex, or None.
        reset: bool ``(..., time)``, or None.
        composite: the same in plain torch.

    Returns:
        ``(y, final)``: ``(..., time, D)``, ``(..., D, N)``.

    >>> import torch
    >>> from pyro_ssm.ops.diag_bank import bank_is_compiled, diag_bank
    >>> one, u = torch.ones(1, 1, dtype=torch.complex64), torch.ones(2, 1)
    >>> diag_bank(u, one / 2, one, one, None, None, None)[0].squeeze(-1) if bank_is_compiled(u) else "not compiled"
    tensor([1.0000, 1.5000])
    """
    if way_of(u, a, b, C, initial) is Way.GRADIENT:
        return _Bank.apply(composite, u, a, b, C, initial, reset)
    return _forward(u, a, b, C, initial, reset, False)[:2]


class _Bank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, composite: Composite, *args: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y, final, tape = _forward(*args, True)
        ctx.composite = composite
        ctx.save_for_backward(*args, tape)
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *args, tape = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        given = [g for g in grads if g is not None]
        if not given:
            return (None,) * 7
        if torch.is_grad_enabled() or way_of(*given) is not Way.KERNEL:
            return (None, *composite_backward(ctx.composite, args, needed, grads))
        found = _backward(*args, tape, *grads, needed)
        return (
            None,
            *(
                None if not want else g if g.shape == x.shape else g.sum_to_size(x.shape)
                for g, x, want in zip(found, args, needed, strict=True)
            ),
        )


def _lead(*tensors: tuple[Tensor | None, int]) -> torch.Size:
    return torch.broadcast_shapes(*(x.shape[: x.dim() - event] for x, event in tensors if x is not None))


def _fields(
    u: Tensor, coefficients: Sequence[Tensor | None], reset: Tensor | None, grad_y: Tensor | None, grad_final: Any
) -> tuple[list[int], list[Tensor | None], torch.Size]:
    """The first fields of BankArgs, the tensors whose memory they point to, and the leading dims."""
    a = coefficients[0]
    lead = _lead((u, 2), *((x, 2) for x in coefficients), (reset, 1))
    steps, width, states = u.shape[-2], u.shape[-1], a.shape[-1]

    def solid(x: Tensor, event: tuple[int, ...], timed: bool) -> Tensor:
        x = x.resolve_conj().resolve_neg() if x.is_conj() or x.is_neg() else x
        x = x.expand(x.shape[: x.dim() - len(event)] + event)
        wanted = torch.empty(event, device="meta").stride()
        one = slice(-1, None) if timed else slice(x.dim() - len(event), None)
        return x if x.stride()[one] == wanted[-1:] * timed + wanted * (not timed) else x.contiguous()

    series, matrix = (steps, width), (width, states)
    kept = [solid(u, series, True), *(None if x is None else solid(x, matrix, False) for x in coefficients)]
    kept.append(None if reset is None else reset.expand(reset.shape[:-1] + (steps,)))
    kept.append(None if grad_y is None else solid(grad_y, series, True))
    kept.append(None if grad_final is None else solid(grad_final, matrix, False))
    arrays, times = [], []
    for x, event in zip(kept, (2, 2, 2, 2, 2, 1, 2, 2), strict=True):
        if x is None:
            arrays.append([0] * len(lead))
            times.append(0)
            continue
        scale = 2 if x.is_complex() else 1
        own = x.dim() - event
        strides = [0 if x.shape[i] == 1 else scale * x.stride(i) for i in range(own)]
        arrays.append([0] * (len(lead) - own) + strides)
        times.append(0 if x.is_complex() else x.stride(own))
    rows = rows_of(lead, arrays)
    if rows is None:  # more leading dims than the library takes: one after the other in memory
        whole = (x if x is None else x.expand(lead + x.shape[x.dim() - e :]).flatten(0, len(lead) - 1).contiguous()
                 for x, e in zip(kept, (2, 2, 2, 2, 2, 1, 2, 2), strict=True))  # fmt: skip
        u, a, b, C, initial, reset, grad_y, grad_final = whole
        return (*_fields(u, (a, b, C, initial), reset, grad_y, grad_final)[:2], lead)
    sizes, strides = rows
    fields = [int(u.dtype == torch.float64), steps, width, states, torch.get_num_threads(), library().parallel_for, *sizes]
    for x, of, t in zip(kept, strides, times, strict=True):
        fields += [address(x), *of, t]
    return fields, kept, lead


def _call(which: str, fields: list[int]) -> None:
    if getattr(library().functions, f"pyro_ssm_diag_lti_{which}")((ctypes.c_int64 * FIELDS)(*fields)):
        raise MemoryError("diag_lti: not enough memory for the states of one block of channels")


def _forward(
    u: Tensor, a: Tensor, b: Tensor, C: Tensor, initial: Tensor | None, reset: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    fields, alive, lead = _fields(u, (a, b, C, initial), reset, None, None)
    steps, width, states = u.shape[-2], u.shape[-1], a.shape[-1]
    y, final = u.new_empty(lead + (steps, width)), a.new_empty(lead + (width, states))
    block = _BYTES // u.element_size()
    blocks = -(-(y.numel() // max(steps, 1)) // block)
    tape = u.new_empty(blocks * -(-steps // _STEPS) * states * 2 * block if keep else 0)
    if y.numel():
        addresses = [y.data_ptr(), final.data_ptr(), tape.data_ptr() if keep else 0]
        _call("forward", fields + addresses + [0] * 5)
    del alive
    return y, final, tape


def _backward(
    u: Tensor,
    a: Tensor,
    b: Tensor,
    C: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    tape: Tensor,
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    fields, alive, lead = _fields(u, (a, b, C, initial), reset, grad_y, grad_final)
    sizes = [u.shape[-2:], *[a.shape[-2:]] * 4]
    likes = (u, a, a, a, a)
    out = [
        like.new_empty(lead + size) if want else None for like, size, want in zip(likes, sizes, needed[:5], strict=True)
    ]
    if u.shape[-2:].numel() * lead.numel():
        _call("backward", [*fields, 0, 0, tape.data_ptr(), *(address(x) for x in out)])
    del alive
    return [*out, None]
