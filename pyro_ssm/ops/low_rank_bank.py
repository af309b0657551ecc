"""``torch.ops.pyro_ssm.low_rank_bank``: a bank of systems that are diagonal plus low rank and do not change in time
(``csrc/low_rank_bank.h``).

No tensor of time times states: the states before every 32 steps are kept, the backward pass computes the others again.
Complex numbers are pairs of real ones here, in a last dim of size 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.batched_operator import Argument, BatchedOperator
from pyro_ssm.ops.diag_bank import bank_shapes, pairs, precision

__all__ = ["LOW_RANK_BANK", "MAX_RANK", "low_rank_bank"]

MAX_RANK = 2  # BANK_RANK of csrc/low_rank_bank.h
_STEPS = 32  # LOW_RANK_STEPS


def low_rank_bank(
    u: Tensor,
    a: Tensor,
    b: Tensor,
    C: Tensor,
    W: Tensor,
    Q: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """:func:`~pyro_ssm.ops.diag_bank.diag_bank` of systems whose states are coupled by matrices of low rank.

    .. math::
        h_t = a \\odot h_{t-1} + b\\, u_t - \\sum_j W_j \\operatorname{Re} \\sum_n Q_{jn} h_{t-1,n}, \\qquad
        y_{td} = \\operatorname{Re} \\sum_n C_{dn} h_{tdn}

    Args:
        u: ``(..., time, D)`` real.
        a, b, C: ``(..., D, N)`` complex; leading dims broadcast against those of u.
        W, Q: ``(..., D, r, N)`` complex, r from 1 to ``MAX_RANK``.
        initial: ``(..., D, N)`` complex, or None.
        reset: bool ``(..., time)``, or None.

    All is done in float64 where one of them is double, else in float32. On a GPU, and where the compiled library is
    not, a loop over time does it.

    Returns:
        ``(y, final)``: ``(..., time, D)``, ``(..., D, N)``. Derivatives of any order, forward mode and
        ``torch.func.vmap`` are exact (through the loop).

    Raises:
        ValueError: a rank that is not possible.

    >>> import torch
    >>> from pyro_ssm.ops.low_rank_bank import low_rank_bank
    >>> one, u = torch.ones(1, 1, dtype=torch.complex64), torch.ones(2, 1)
    >>> low_rank_bank(u, one / 2, one, one, one.unsqueeze(0) / 4, one.unsqueeze(0), None, None)[0]
    tensor([[1.0000],
            [1.2500]])
    """
    rank = W.shape[-2]
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"low_rank_bank: `W` must be (..., D, r, N) with r from 1 to {MAX_RANK}, got r = {rank}")
    real, shape = precision(u, a, b, C, W, Q, initial), (u.shape[-1], a.shape[-1])
    coupling = (pairs(x, (shape[0], rank, shape[1]), real) for x in (W, Q))
    y, final = LOW_RANK_BANK.run(
        u.to(real), *(pairs(x, shape, real) for x in (a, b, C)), *coupling, pairs(initial, shape, real), reset
    )
    return y, torch.view_as_complex(final)


def _composite(
    u: Tensor,
    a: Tensor,
    b: Tensor,
    C: Tensor,
    W: Tensor,
    Q: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The bank as a loop, in plain torch."""
    a, b, C, W, Q = (torch.view_as_complex(x.contiguous()) for x in (a, b, C, W, Q))
    h = torch.zeros_like(a) if initial is None else torch.view_as_complex(initial.contiguous())
    outputs = []
    for t, u_t in enumerate(u.unbind(-2)):
        h = h if reset is None else h * ~reset[..., t, None, None]
        coupled = (Q @ h.unsqueeze(-1)).real  # (..., D, r, 1)
        h = a * h + b * u_t.unsqueeze(-1) - (W * coupled).sum(-2)
        outputs.append((C * h).sum(-1).real)
    lead = torch.broadcast_shapes(u.shape[:-2], *(x.shape[:-2] for x in (h, C)))
    y = torch.stack(outputs, -2) if outputs else u.expand(lead + u.shape[-2:])
    return y, torch.view_as_real(h.expand(lead + h.shape[-2:]))


def _sizes(u: Tensor, a: Tensor, b: Tensor, C: Tensor, W: Tensor, *rest: Any) -> tuple[int, ...]:
    return (*u.shape, a.shape[2], W.shape[2])


def _shapes(u: Tensor, a: Tensor, *rest: Any) -> tuple[tuple[int, ...], ...]:
    return bank_shapes(u, a, _STEPS)


#: of u, a, b, C, W, Q, the initial state and reset
LOW_RANK_BANK = BatchedOperator(
    "low_rank_bank",
    [
        Argument("u", 2, timed=True),
        Argument("a", 3, solid=3),
        Argument("b", 3, solid=3),
        Argument("C", 3, solid=3),
        Argument("W", 4, solid=4),
        Argument("Q", 4, solid=4),
        Argument("initial", 3, solid=3, optional=True),
        Argument("reset", 1, differentiable=False, optional=True),
    ],
    "",
    _composite,
    _sizes,
    _shapes,
    ("pyro_ssm_low_rank_bank_forward", "pyro_ssm_low_rank_bank_backward"),
    keeps=True,
)
