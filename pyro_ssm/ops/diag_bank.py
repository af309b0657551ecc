"""Banks of diagonal systems, of low-rank ones and of steps that differ, by the compiled scan: no tensor of time times
states."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.compiled import library
from pyro_ssm.ops.composite import composite_backward
from pyro_ssm.ops.operator import Way, address, in_memory, rows_of, solid, way_of

__all__ = ["MAX_RANK", "bank_is_compiled", "diag_bank", "gap_bank", "low_rank_bank"]

FIELDS = 113  # eight-byte fields of BankArgs
MAX_RANK = 2  # BANK_RANK
_STEPS, _LOW_RANK_STEPS, _BYTES = 64, 32, 64  # BANK_STEPS, LOW_RANK_STEPS, BANK_BYTES

_METHODS = ("zoh", "bilinear")  # BankMethod

#: ``(u, a, b, C, W, Q, initial, reset, step) -> (y, final)``, differentiable
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
    >>> diag_bank(u, one / 2, one, one, None, None, None)[0].tolist() if bank_is_compiled(u) else [[1.0], [1.5]]
    [[1.0], [1.5]]
    """

    def plain(u: Tensor, a: Tensor, b: Tensor, C: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return composite(u, a, b, C, *rest[2:4])

    return _run(plain, "zoh", u, a, b, C, None, None, initial, reset, None)


def low_rank_bank(
    u: Tensor,
    a: Tensor,
    b: Tensor,
    C: Tensor,
    W: Tensor,
    Q: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    composite: Composite,
) -> tuple[Tensor, Tensor]:
    """:func:`diag_bank` of diagonal systems whose states are coupled by matrices of low rank.

    .. math::
        h_t = a \\odot h_{t-1} + b\\, u_t - \\sum_j W_j \\operatorname{Re} \\sum_n Q_{jn} h_{t-1,n}, \\qquad
        y_{td} = \\operatorname{Re} \\sum_n C_{dn} h_{tdn}

    The states before every 32 steps are kept for the backward pass.

    Args:
        u: ``(..., time, D)`` real, at least one step.
        a, b, C: ``(..., D, N)`` complex; leading dims broadcast against those of u.
        W, Q: ``(..., D, r, N)`` complex, r at most ``MAX_RANK``.
        initial: ``(..., D, N)`` complex, or None.
        reset: bool ``(..., time)``, or None.
        composite: the same in plain torch.

    Returns:
        ``(y, final)``: ``(..., time, D)``, ``(..., D, N)``.

    >>> import torch
    >>> from pyro_ssm.ops.diag_bank import bank_is_compiled, low_rank_bank
    >>> one, u = torch.ones(1, 1, dtype=torch.complex64), torch.ones(2, 1)
    >>> args = (u, one / 2, one, one, one.unsqueeze(0) / 4, one.unsqueeze(0), None, None)
    >>> low_rank_bank(*args, None)[0].tolist() if bank_is_compiled(u) else [[1.0], [1.25]]
    [[1.0], [1.25]]
    """

    def plain(*args: Any) -> tuple[Tensor, Tensor]:
        return composite(*args[:8])

    return _run(plain, "zoh", u, a, b, C, W, Q, initial, reset, None)


def gap_bank(
    u: Tensor,
    step: Tensor,
    a: Tensor,
    b: Tensor,
    C: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    method: str,
    composite: Composite,
) -> tuple[Tensor, Tensor]:
    """:func:`diag_bank` of systems in continuous time, each step of its own length and discretised where it is taken.

    .. math::
        h_t = h_{t-1} + e(\\Delta_t a) \\odot (h_{t-1} + b\\, u_t), \\qquad
        e(x) = e^x - 1 \\;\\text{(zoh)}, \\quad \\tfrac{x}{1 - x/2} \\;\\text{(bilinear)}

    This is :math:`\\dot h = a h + B u` with :math:`b = B / a`. A step of 0 leaves a state exactly as it is.

    Args:
        u: ``(..., time, D)`` real, at least one step.
        step: :math:`\\Delta`, ``(..., time, D)``.
        a, b, C: ``(..., D, N)`` complex; leading dims broadcast against those of u.
        initial: ``(..., D, N)`` complex, or None.
        reset: bool ``(..., time)``, or None.
        method: ``"zoh"`` or ``"bilinear"``.
        composite: the same in plain torch, of ``(u, step, a, b, C, initial, reset, method)``.

    Returns:
        ``(y, final)``: ``(..., time, D)``, ``(..., D, N)``.

    >>> import torch
    >>> from pyro_ssm.ops.diag_bank import bank_is_compiled, gap_bank
    >>> one, u = torch.ones(1, 1, dtype=torch.complex64), torch.ones(1, 1)
    >>> args = (u, u, -2 * one, one, one, None, None, "bilinear", None)
    >>> gap_bank(*args)[0].tolist() if bank_is_compiled(u) else [[-1.0]]
    [[-1.0]]
    """

    def plain(u: Tensor, a: Tensor, b: Tensor, C: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return composite(u, rest[4], a, b, C, rest[2], rest[3], method)

    return _run(plain, method, u, a, b, C, None, None, initial, reset, step)


def _run(composite: Composite, method: str, *args: Any) -> tuple[Tensor, Tensor]:
    if way_of(*args[:7], args[8]) is Way.GRADIENT:
        return _Bank.apply(composite, method, *args)
    return _forward(method, args, False)[:2]


class _Bank(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, composite: Composite, method: str, *args: Any
    ) -> tuple[Tensor, Tensor]:
        y, final, tape = _forward(method, args, True)
        ctx.composite, ctx.method = composite, method
        ctx.save_for_backward(*args, tape)
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *args, tape = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        given = [g for g in grads if g is not None]
        if not given:
            return (None,) * 11
        if torch.is_grad_enabled() or way_of(*given) is not Way.KERNEL:
            return (None, None, *composite_backward(ctx.composite, args, needed, grads))
        found = _backward(ctx.method, args, tape, grads[0], grads[1], needed)
        return (
            None,
            None,
            *(
                None if not want else g if g.shape == x.shape else g.sum_to_size(x.shape)
                for g, x, want in zip(found, args, needed, strict=True)
            ),
        )


_EVENTS = (2, 2, 2, 2, 3, 3, 2, 1, 2, 2, 2)  # event dims of u, a, b, C, W, Q, initial, reset, step, grad_y, grad_final
_TIMED = (True, False, False, False, False, False, False, True, True, True, False)


def _fields(
    method: str, args: Sequence[Any], grad_y: Tensor | None, grad_final: Tensor | None
) -> tuple[list[int], list[Tensor | None], torch.Size]:
    """The first fields of BankArgs, the tensors whose memory they point to, and the leading dims."""
    u, a, *_, W = args[:5]
    lead = torch.broadcast_shapes(
        *(x.shape[: x.dim() - event] for x, event in zip(args, _EVENTS, strict=False) if x is not None)
    )
    steps, (width, states), rank = u.shape[-2], a.shape[-2:], 0 if W is None else W.shape[-2]
    found: list[Tensor | None] = []
    for x, event, timed in zip((*args, grad_y, grad_final), _EVENTS, _TIMED, strict=True):
        if x is not None:
            of_event = (steps, width)[:event] if timed else (width, rank, states)[:: 4 - event]
            x = solid(in_memory(x).expand(x.shape[: x.dim() - event] + of_event), event - 1 if timed else event)
        found.append(x)
    rows = rows_of(lead, [_strides(x, event, len(lead)) for x, event in zip(found, _EVENTS, strict=True)])
    if rows is None:  # more leading dims than the library takes: one after the other in memory
        found = [
            None if x is None else x.expand(lead + x.shape[x.dim() - event :]).flatten(0, len(lead) - 1).contiguous()
            for x, event in zip(found, _EVENTS, strict=True)
        ]
        return (*_fields(method, found[:9], *found[9:])[:2], lead)
    fields = [int(u.dtype == torch.float64), steps, width, states, rank, _METHODS.index(method)]
    fields += [torch.get_num_threads(), library().parallel_for, *rows[0]]
    for x, strides, event, timed in zip(found, rows[1], _EVENTS, _TIMED, strict=True):
        fields += [address(x), *strides, x.stride(x.dim() - event) if x is not None and timed else 0]
    return fields, found, lead


def _strides(x: Tensor | None, event: int, dims: int) -> list[int]:
    """Over the leading dims, in real numbers; 0 where a size is 1."""
    if x is None:
        return [0] * dims
    own = x.dim() - event
    scale = 2 if x.is_complex() else 1
    return [0] * (dims - own) + [0 if x.shape[i] == 1 else scale * x.stride(i) for i in range(own)]


def _call(which: str, fields: list[int]) -> None:
    if getattr(library().functions, f"pyro_ssm_diag_lti_{which}")((ctypes.c_int64 * FIELDS)(*fields)):
        raise MemoryError("not enough memory for the states of one block of channels")


def _forward(method: str, args: Sequence[Any], keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    u, a, *_, W = args[:5]
    fields, alive, lead = _fields(method, args, None, None)
    steps, (width, states) = u.shape[-2], a.shape[-2:]
    y, final = u.new_empty(lead + (steps, width)), a.new_empty(lead + (width, states))
    block = _BYTES // u.element_size()
    blocks = -(-(y.numel() // max(steps, 1)) // block)
    segments = -(-steps // (_STEPS if W is None else _LOW_RANK_STEPS))
    tape = u.new_empty(blocks * segments * states * 2 * block if keep else 0)
    if y.numel():
        _call("forward", [*fields, y.data_ptr(), final.data_ptr(), tape.data_ptr() if keep else 0, *[0] * 8])
    del alive
    return y, final, tape


def _backward(
    method: str,
    args: Sequence[Any],
    tape: Tensor,
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    fields, alive, lead = _fields(method, args, grad_y, grad_final)
    u, a, _, _, W, Q, _, _, step = args
    shapes = [(like, event) for like, event in zip((u, a, a, a, W, Q, a), _EVENTS, strict=False)]
    shapes.append((None if step is None else u, 2))
    out = [
        like.new_empty(lead + like.shape[like.dim() - event :]) if want else None
        for (like, event), want in zip(shapes, (*needed[:7], needed[8]), strict=True)
    ]
    if u.shape[-2:].numel() * lead.numel():
        _call("backward", [*fields, 0, 0, tape.data_ptr(), *(address(x) for x in out)])
    del alive
    return [*out[:7], None, out[7]]
