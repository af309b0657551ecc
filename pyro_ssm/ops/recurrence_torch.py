"""The linear recurrence of vectors whose matrices are diagonal or made of 2 x 2 blocks, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.associative_scan import associative_scan

__all__ = ["Diagonal", "Pairs", "before", "scan_associative", "scan_torch"]

# Measured on CPU: a time loop pays about 3 us of Python a step, two levels of blocks do three times the arithmetic.
_BLOCKED_FROM = 64  # steps
_BLOCKED_LANES = {"cpu": 2048}  # elements a step up to which blocks win; elsewhere always


class Diagonal:
    """:math:`a_t` is a vector, applied elementwise: time is the last dimension but one.

    >>> import torch
    >>> from pyro_ssm.ops.recurrence_torch import Diagonal
    >>> Diagonal.apply(torch.tensor([2.0]), torch.tensor([3.0]))
    tensor([6.])
    """

    name, arguments = "linear_scan", ("a", "b")
    time, matrix_time, event = -2, -2, 1

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
    >>> from pyro_ssm.ops.recurrence_torch import Pairs
    >>> Pairs.apply(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([3.0, 4.0]))
    tensor([4., 6.])
    """

    name, arguments = "scan2x2", ("matrix", "drive")
    time, matrix_time, event = -3, -4, 2

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


def scan_torch(kind: Any, a: Tensor, b: Tensor, initial: Tensor, reverse: bool) -> Tensor:
    """All states, where ``a``, ``b`` and ``initial`` have been expanded to one shape of at least one step.

    >>> import torch
    >>> from pyro_ssm.ops.recurrence_torch import Diagonal, scan_torch
    >>> scan_torch(Diagonal, torch.full((3, 1), 0.5), torch.ones(3, 1), torch.zeros(1), False).squeeze(-1)
    tensor([1.0000, 1.5000, 1.7500])
    """
    steps, lanes = b.shape[kind.time], initial.numel()
    if steps >= _BLOCKED_FROM and lanes <= _BLOCKED_LANES.get(b.device.type, lanes):
        return _blocked(kind, a, b, initial, reverse)
    return _loop(kind, a, b, initial, reverse)


def scan_associative(kind: Any, a: Tensor, b: Tensor, initial: Tensor, reverse: bool) -> Tensor:
    """All states in logarithmically many steps of plain operators, which every transform can look into.

    >>> import torch
    >>> from pyro_ssm.ops.recurrence_torch import Diagonal, scan_associative
    >>> scan_associative(Diagonal, torch.full((3, 1), 0.5), torch.ones(3, 1), torch.zeros(1), False).squeeze(-1)
    tensor([1.0000, 1.5000, 1.7500])
    """

    def combine(earlier: tuple[Tensor, ...], later: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inner, outer = (later, earlier) if reverse else (earlier, later)
        return kind.compose(outer[0], inner[0]), kind.apply(outer[0], inner[1]) + outer[1]

    events = (-kind.matrix_time - 1, kind.event)
    leaps, local = associative_scan(combine, (a, b), events, reverse=reverse)
    return kind.apply(leaps, initial.unsqueeze(kind.time)) + local


def before(kind: Any, initial: Tensor, h: Tensor, reverse: bool) -> Tensor:
    """:math:`h_{t-1}` for every t.

    >>> import torch
    >>> from pyro_ssm.ops.recurrence_torch import Diagonal, before
    >>> before(Diagonal, torch.zeros(1), torch.ones(3, 1), False).squeeze(-1)
    tensor([0., 1., 1.])
    """
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
