"""Banks of systems that do not change in time, diagonal or diagonal plus low rank, by the compiled scan: no tensor of
time times states."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.compiled import library
from pyro_ssm.ops.composite import composite_backward
from pyro_ssm.ops.operator import Way, address, in_memory, rows_of, solid, way_of

__all__ = ["MAX_RANK", "bank_is_compiled", "diag_bank", "low_rank_bank"]

FIELDS = 103  # eight-byte fields of BankArgs
MAX_RANK = 2  # BANK_RANK
_STEPS, _LOW_RANK_STEPS, _BYTES = 64, 32, 64  # BANK_STEPS, LOW_RANK_STEPS, BANK_BYTES

#: ``(u, a, b, C, W, Q, initial, reset) -> (y, final)``, differentiable
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
    return _run(lambda u, a, b, C, W, Q, *rest: composite(u, a, b, C, *rest), u, a, b, C, None, None, initial, reset)


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
    return _run(composite, u, a, b, C, W, Q, initial, reset)


def _run(composite: Composite, *args: Any) -> tuple[Tensor, Tensor]:
    if way_of(*args[:7]) is Way.GRADIENT:
        return _Bank.apply(composite, *args)
    return _forward(args, False)[:2]


class _Bank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, composite: Composite, *args: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y, final, tape = _forward(args, True)
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
            return (None,) * 9
        if torch.is_grad_enabled() or way_of(*given) is not Way.KERNEL:
            return (None, *composite_backward(ctx.composite, args, needed, grads))
        found = _backward(args, tape, grads[0], grads[1], needed)
        return (
            None,
            *(
                None if not want else g if g.shape == x.shape else g.sum_to_size(x.shape)
                for g, x, want in zip(found, args, needed, strict=True)
            ),
        )


_EVENTS = (2, 2, 2, 2, 3, 3, 2, 1, 2, 2)  # event dims of u, a, b, C, W, Q, initial, reset, grad_y, grad_final
_TIMED = (True, False, False, False, False, False, False, True, True, False)


def _fields(
    args: Sequence[Any], grad_y: Tensor | None, grad_final: Tensor | None
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
        return (*_fields(found[:8], *found[8:])[:2], lead)
    threads = [torch.get_num_threads(), library().parallel_for]
    fields = [int(u.dtype == torch.float64), steps, width, states, rank, *threads, *rows[0]]
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


def _forward(args: Sequence[Any], keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    u, a, *_, W = args[:5]
    fields, alive, lead = _fields(args, None, None)
    steps, (width, states) = u.shape[-2], a.shape[-2:]
    y, final = u.new_empty(lead + (steps, width)), a.new_empty(lead + (width, states))
    block = _BYTES // u.element_size()
    blocks = -(-(y.numel() // max(steps, 1)) // block)
    segments = -(-steps // (_STEPS if W is None else _LOW_RANK_STEPS))
    tape = u.new_empty(blocks * segments * states * 2 * block if keep else 0)
    if y.numel():
        _call("forward", [*fields, y.data_ptr(), final.data_ptr(), tape.data_ptr() if keep else 0, *[0] * 7])
    del alive
    return y, final, tape


def _backward(
    args: Sequence[Any], tape: Tensor, grad_y: Tensor | None, grad_final: Tensor | None, needed: Sequence[bool]
) -> list[Tensor | None]:
    fields, alive, lead = _fields(args, grad_y, grad_final)
    u, a, _, _, W, Q, _, _ = args
    likes = (u, a, a, a, W, Q, a)
    out = [
        like.new_empty(lead + like.shape[like.dim() - event :]) if want else None
        for like, event, want in zip(likes, _EVENTS, needed[:7], strict=False)
    ]
    if u.shape[-2:].numel() * lead.numel():
        _call("backward", [*fields, 0, 0, tape.data_ptr(), *(address(x) for x in out)])
    del alive
    return [*out, None]
