"""``torch.ops.pyro_ssm.diag_lti``: a bank of diagonal systems that do not change in time (``csrc/diag_lti.h``).

No tensor of time times states: the states before every 64 steps are kept, the backward pass computes the others again.
Complex numbers are pairs of real ones here, in a last dim of size 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.batched_operator import Argument, BatchedOperator
from pyro_ssm.ops.linear_scan import linear_scan
from pyro_ssm.ops.operator import Way, way_of

__all__ = ["DIAG_LTI", "bank_is_compiled", "diag_bank"]

_STEPS, _BYTES = 64, 64  # BANK_STEPS, BANK_BYTES of csrc/diag_lti.h
_REALS = (torch.float32, torch.float64)


def bank_is_compiled(u: Tensor, *rest: Tensor | None) -> bool:
    """Whether kernels can take these arguments of :func:`diag_bank`: they are there, and no transform looks on.

    >>> import torch
    >>> from pyro_ssm.ops.diag_bank import bank_is_compiled
    >>> torch.func.vmap(lambda x: x + bank_is_compiled(x))(torch.zeros(2))
    tensor([0., 0.])
    """
    if u.dtype not in _REALS or DIAG_LTI.engine(u) is None:
        return False
    return way_of(u, *rest) is not Way.TRANSFORM


def diag_bank(
    u: Tensor, a: Tensor, b: Tensor, C: Tensor, initial: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the bank over a sequence.

    .. math:: h_t = a \\odot h_{t-1} + b\\, u_t, \\qquad y_{td} = \\operatorname{Re} \\sum_n C_{dn} h_{tdn}

    Args:
        u: ``(..., time, D)`` real.
        a, b, C: ``(..., D, N)`` complex; leading dims broadcast against those of u.
        initial: ``(..., D, N)`` complex, or None.
        reset: bool ``(..., time)``, or None.

    All is done in float64 where one of them is double, else in float32.

    Returns:
        ``(y, final)``: ``(..., time, D)``, ``(..., D, N)``. Derivatives of any order, forward mode and
        ``torch.func.vmap`` are exact (through torch, with a tensor of all states).

    >>> import torch
    >>> from pyro_ssm.ops.diag_bank import diag_bank
    >>> one = torch.ones(1, 1, dtype=torch.complex64)
    >>> diag_bank(torch.ones(2, 1), one / 2, one, one, None, None)[0].squeeze(-1)
    tensor([1.0000, 1.5000])
    """
    given = (a, b, C, initial)
    double = u.dtype == torch.float64 or any(x is not None and x.dtype == torch.complex128 for x in given)
    real, shape = torch.float64 if double else torch.float32, (u.shape[-1], a.shape[-1])
    pairs = [None if x is None else _pairs(x.expand(x.shape[:-2] + shape)).to(real) for x in given]
    y, final = DIAG_LTI.run(u.to(real), *pairs, reset)
    return y, torch.view_as_complex(final)


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj())


def _composite(
    u: Tensor, a: Tensor, b: Tensor, C: Tensor, initial: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The bank with all its states, in plain torch."""
    a, b, C = (torch.view_as_complex(x.contiguous()) for x in (a, b, C))
    drive = (b.unsqueeze(-3) * u.unsqueeze(-1)).flatten(-2)
    first = None if initial is None else torch.view_as_complex(initial.contiguous()).flatten(-2)
    if u.shape[-2] == 0 and first is None:
        first = drive.new_zeros(drive.shape[:-2] + drive.shape[-1:])
    h = linear_scan(a.flatten(-2).unsqueeze(-2), drive, first, reset=reset)
    final = h[..., -1, :] if u.shape[-2] else first.expand(h.shape[:-2] + h.shape[-1:])
    y = (C.unsqueeze(-3) * h.unflatten(-1, a.shape[-2:])).sum(-1).real
    return y, torch.view_as_real(final.unflatten(-1, a.shape[-2:]))


def _sizes(u: Tensor, a: Tensor, *rest: Any) -> tuple[int, ...]:
    return (*u.shape, a.shape[2])


def _shapes(u: Tensor, a: Tensor, *rest: Any) -> tuple[tuple[int, ...], ...]:
    batch, times, channels = u.shape
    block = _BYTES // u.element_size()
    blocks, segments = (batch * channels + block - 1) // block, (times + _STEPS - 1) // _STEPS
    return (batch, times, channels), (batch, *a.shape[1:]), (blocks * segments, a.shape[2], 2, block)


DIAG_LTI = BatchedOperator(
    "diag_lti",
    [
        Argument("u", 2, timed=True),
        Argument("a", 3, solid=3),
        Argument("b", 3, solid=3),
        Argument("C", 3, solid=3),
        Argument("initial", 3, solid=3, optional=True),
        Argument("reset", 1, differentiable=False, optional=True),
    ],
    "",
    _composite,
    _sizes,
    _shapes,
    ("pyro_ssm_diag_lti_forward", "pyro_ssm_diag_lti_backward"),
    keeps=True,
)
