"""``torch.ops.pyro_ssm.gap_bank``: a bank of diagonal systems in continuous time whose steps differ
(``csrc/gap_bank.h``).

No tensor of time times states: the states before every 64 steps are kept, the backward pass computes the others again.
Complex numbers are pairs of real ones here, in a last dim of size 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.batched_operator import Argument, BatchedOperator
from pyro_ssm.ops.diag_bank import all_states, bank_shapes, pairs, precision

__all__ = ["GAP_BANK", "METHODS", "gap_bank"]

METHODS = ("zoh", "bilinear")  # BankMethod of csrc/gap_bank.h


def gap_bank(
    u: Tensor,
    step: Tensor,
    a: Tensor,
    b: Tensor,
    C: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    method: str,
) -> tuple[Tensor, Tensor]:
    """A :func:`~pyro_ssm.ops.diag_bank.diag_bank` in continuous time, each step discretised where it is taken.

    .. math::
        h_t = h_{t-1} + e(\\Delta_t a) \\odot (h_{t-1} + b\\, u_t), \\qquad
        e(x) = e^x - 1 \\;\\text{(zoh)}, \\quad \\tfrac{x}{1 - x/2} \\;\\text{(bilinear)}

    This is :math:`\\dot h = a h + B u` with :math:`b = B / a`. A step of 0 leaves a state exactly as it is.

    Args:
        u: ``(..., time, D)`` real.
        step: :math:`\\Delta`, ``(..., time, D)``; its D may be 1.
        a, b, C: ``(..., D, N)`` complex; leading dims broadcast against those of u.
        initial: ``(..., D, N)`` complex, or None.
        reset: bool ``(..., time)``, or None.
        method: ``"zoh"`` or ``"bilinear"``.

    All is done in float64 where one of them is double, else in float32. On a GPU, and where the compiled library is
    not, it is done with all states.

    Returns:
        ``(y, final)``: ``(..., time, D)``, ``(..., D, N)``. Derivatives of any order, forward mode and
        ``torch.func.vmap`` are exact (through torch, with a tensor of all states).

    Raises:
        ValueError: there is no such method.

    >>> import torch
    >>> from pyro_ssm.ops.gap_bank import gap_bank
    >>> one, u = torch.ones(1, 1, dtype=torch.complex64), torch.ones(1, 1)
    >>> gap_bank(u, u, -2 * one, one, one, None, None, "bilinear")[0]
    tensor([[-1.]])
    """
    if method not in METHODS:
        raise ValueError(f"gap_bank: `method` must be 'zoh' or 'bilinear', got {method!r}")
    real, shape = precision(u, step, a, b, C, initial), (u.shape[-1], a.shape[-1])
    step = step.expand(step.shape[:-2] + u.shape[-2:])
    of_states = (pairs(x, shape, real) for x in (a, b, C, initial))
    y, final = GAP_BANK.run(u.to(real), step.to(real), *of_states, reset, METHODS.index(method))
    return y, torch.view_as_complex(final)


def _composite(
    u: Tensor,
    step: Tensor,
    a: Tensor,
    b: Tensor,
    C: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    method: int,
) -> tuple[Tensor, Tensor]:
    """The bank with all its states, in plain torch."""
    a, b = (torch.view_as_complex(x.contiguous()).unsqueeze(-3) for x in (a, b))
    x = step.unsqueeze(-1) * a  # (..., time, D, N)
    grown = torch.expm1(x) if METHODS[method] == "zoh" else x / (1 - x / 2)
    return all_states(grown + 1, grown * b * u.unsqueeze(-1), C, initial, reset)


def _sizes(u: Tensor, step: Tensor, a: Tensor, *rest: Any) -> tuple[int, ...]:
    return (*u.shape, a.shape[2], rest[-1])


def _shapes(u: Tensor, step: Tensor, a: Tensor, *rest: Any) -> tuple[tuple[int, ...], ...]:
    return bank_shapes(u, a)


#: of u, the steps, a, b, C, the initial state, reset and the number of the method
GAP_BANK = BatchedOperator(
    "gap_bank",
    [
        Argument("u", 2, timed=True),
        Argument("step", 2, timed=True),
        Argument("a", 3, solid=3),
        Argument("b", 3, solid=3),
        Argument("C", 3, solid=3),
        Argument("initial", 3, solid=3, optional=True),
        Argument("reset", 1, differentiable=False, optional=True),
    ],
    "int method",
    _composite,
    _sizes,
    _shapes,
    ("pyro_ssm_gap_bank_forward", "pyro_ssm_gap_bank_backward"),
    keeps=True,
)
