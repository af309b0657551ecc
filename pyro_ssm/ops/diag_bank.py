"""``torch.ops.pyro_ssm.diag_lti``: a bank of diagonal systems that do not change in time (``csrc/diag_lti.h``).

No tensor of time times states: the states before every 64 steps are kept, the backward pass computes the others again.
Complex numbers are pairs of real ones here, in a last dim of size 2. What the other banks share with this one is here
too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.batched_operator import Argument, BatchedOperator
from pyro_ssm.ops.linear_scan import linear_scan
from pyro_ssm.ops.operator import Way, way_of

__all__ = [
    "COMPLEX",
    "DIAG_LTI",
    "STEPS",
    "all_states",
    "bank_is_compiled",
    "bank_shapes",
    "diag_bank",
    "pairs",
    "precision",
]

STEPS = 64  # BANK_STEPS of csrc/diag_lti.h
_BYTES = 64  # BANK_BYTES
#: of the precisions in which banks are computed, that of their complex numbers
COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def bank_is_compiled(bank: BatchedOperator, u: Tensor, *rest: Tensor | None) -> bool:
    """Whether kernels can take these arguments of a bank: they are there, and no transform looks on.

    >>> import torch
    >>> from pyro_ssm.ops.diag_bank import DIAG_LTI, bank_is_compiled
    >>> torch.func.vmap(lambda x: x + bank_is_compiled(DIAG_LTI, x))(torch.zeros(2))
    tensor([0., 0.])
    """
    if u.dtype not in COMPLEX or bank.engine(u) is None:
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
    real, shape = precision(u, a, b, C, initial), (u.shape[-1], a.shape[-1])
    y, final = DIAG_LTI.run(u.to(real), *(pairs(x, shape, real) for x in (a, b, C, initial)), reset)
    return y, torch.view_as_complex(final)


def precision(*tensors: Tensor | None) -> torch.dtype:
    """float64 where one of them is double, else float32.

    >>> import torch
    >>> from pyro_ssm.ops.diag_bank import precision
    >>> precision(torch.zeros(1), None, torch.zeros(1, dtype=torch.complex128))
    torch.float64
    """
    double = any(x is not None and x.dtype in (torch.float64, torch.complex128) for x in tensors)
    return torch.float64 if double else torch.float32


def pairs(x: Tensor | None, shape: tuple[int, ...], real: torch.dtype) -> Tensor | None:
    """A complex argument, its last dims expanded to ``shape``, as pairs of real numbers of a precision.

    >>> import torch
    >>> from pyro_ssm.ops.diag_bank import pairs
    >>> pairs(torch.tensor([1j]), (2,), torch.float64)
    tensor([[0., 1.],
            [0., 1.]], dtype=torch.float64)
    """
    if x is None:
        return None
    return torch.view_as_real(x.expand(x.shape[: -len(shape)] + shape).resolve_conj()).to(real)


def all_states(
    a: Tensor, drive: Tensor, C: Tensor, initial: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A bank with all its states, in plain torch: :math:`h_t = a_t \\odot h_{t-1} + d_t`, read by C.

    Args:
        a: ``(..., time or 1, D, N)`` complex.
        drive: ``(..., time, D, N)`` complex.
        C: ``(..., D, N, 2)``, pairs; initial: the same, or None.
        reset: bool ``(..., time)``, or None.

    Returns:
        ``(y, final)``: ``(..., time, D)``, and ``(..., D, N, 2)``, pairs.

    >>> import torch
    >>> from pyro_ssm.ops.diag_bank import all_states
    >>> one = torch.ones(1, 1, 1, dtype=torch.complex64)
    >>> all_states(one / 2, one.expand(2, 1, 1), torch.view_as_real(one[0]), None, None)[0].squeeze(-1)
    tensor([1.0000, 1.5000])
    """
    C, shape = torch.view_as_complex(C.contiguous()), drive.shape[-2:]
    first = None if initial is None else torch.view_as_complex(initial.contiguous()).flatten(-2)
    if drive.shape[-3] == 0 and first is None:
        first = drive.new_zeros(shape.numel())
    h = linear_scan(a.flatten(-2), drive.flatten(-2), first, reset=reset).unflatten(-1, shape)
    y = (C.unsqueeze(-3) * h).sum(-1).real
    final = h[..., -1, :, :] if drive.shape[-3] else first.unflatten(-1, shape)
    return y, torch.view_as_real(final.expand(y.shape[:-2] + shape))


def bank_shapes(u: Tensor, a: Tensor, steps: int = STEPS) -> tuple[tuple[int, ...], ...]:
    """Shapes of y, of the final state and of what is kept: the states before every ``steps`` steps of blocks of lanes.

    >>> import torch
    >>> from pyro_ssm.ops.diag_bank import bank_shapes
    >>> bank_shapes(torch.zeros(2, 65, 3), torch.zeros(1, 3, 4, 2))
    ((2, 65, 3), (2, 3, 4, 2), (2, 4, 2, 16))
    """
    batch, times, channels = u.shape
    block = _BYTES // u.element_size()
    blocks, segments = (batch * channels + block - 1) // block, (times + steps - 1) // steps
    return (batch, times, channels), (batch, *a.shape[1:]), (blocks * segments, a.shape[2], 2, block)


def _composite(
    u: Tensor, a: Tensor, b: Tensor, C: Tensor, initial: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The bank with all its states, in plain torch."""
    a, b = (torch.view_as_complex(x.contiguous()).unsqueeze(-3) for x in (a, b))
    return all_states(a, b * u.unsqueeze(-1), C, initial, reset)


def _sizes(u: Tensor, a: Tensor, *rest: Any) -> tuple[int, ...]:
    return (*u.shape, a.shape[2])


def _shapes(u: Tensor, a: Tensor, *rest: Any) -> tuple[tuple[int, ...], ...]:
    return bank_shapes(u, a)


#: of u, a, b, C, the initial state and reset
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
