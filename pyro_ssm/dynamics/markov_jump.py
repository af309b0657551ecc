"""Finite states in continuous time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_ssm.blocks._checks import check_positive, check_size
from pyro_ssm.blocks._conditioning import check_state
from pyro_ssm.blocks._gaussian import with_time
from pyro_ssm.blocks._tables import log_of_probability, pick, positive_table, state_index, table_of
from pyro_ssm.components import FiniteState, Transition
from pyro_ssm.distributions.codes import index_law

__all__ = ["MarkovJump"]


class MarkovJump(Transition, FiniteState):
    """A Markov jump process on finitely many states, exact over any gap,

    .. math:: P(z_{k+1} = j \\mid z_k = i) = \\left[e^{Q \\Delta_k}\\right]_{ij}, \\qquad
        Q_{ij} = r_{ij} \\; (i \\ne j), \\quad Q_{ii} = -\\sum_{j \\ne i} r_{ij}.

    The matrix exponential is taken in float64 by uniformisation and squaring (no subtraction, so that small
    probabilities keep their digits), once for each different gap.

    Args:
        num_states: K.
        rates: first value of the rates ``r`` per unit of time, a number or ``(K, K)``; the diagonal is not read.
        allowed: bool ``(K, K)``, where a direct jump is possible (a birth-death chain, say); None allows all.
        floor: lower bound of the learnable rates.

    Parameters: ``rates`` ``(K, K)``, positive (a prior: ``Gamma(...).expand([K, K]).to_event(2)``).

    Raises:
        ValueError: a size is wrong, or a rate does not lie above the floor.

    Source: Jensen (1953), "Markoff chains as an aid in the study of Markoff processes" (uniformisation).

    >>> import torch
    >>> from pyro_ssm.dynamics import MarkovJump
    >>> times = torch.tensor([0.0, 0.1, 1000.0], dtype=torch.float64)
    >>> MarkovJump(2, rates=0.5).log_matrix(times[:-1], times[1:], None).exp()[:, 0].detach()
    tensor([[0.9524, 0.0476],
            [0.5000, 0.5000]])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"rates": 2}
    state_dim = 1
    allowed: Tensor

    def __init__(
        self, num_states: int, rates: float | Tensor = 1.0, allowed: Tensor | None = None, floor: float = 1e-6
    ) -> None:
        super().__init__()
        K = self.num_states = check_size("num_states", num_states)
        apart = ~torch.eye(K, dtype=torch.bool)
        if allowed is not None:
            allowed = torch.as_tensor(allowed, dtype=torch.bool)
            if allowed.shape != (K, K):
                raise ValueError(f"`allowed` must have shape ({K}, {K}), got {tuple(allowed.shape)}")
            apart = apart & allowed
        self.register_buffer("allowed", apart)
        floor = check_positive("floor", floor)
        start = torch.where(apart, table_of("rates", rates, (K, K)), torch.full((), 1.0))
        self.rates = positive_table("rates", start, (K, K), floor)

    def generator(self) -> Tensor:
        """The generator ``Q``, ``(..., K, K)``, rows sum to 0."""
        rates = torch.where(self.allowed, self.rates, torch.zeros((), dtype=self.rates.dtype, device=self.rates.device))
        return rates - torch.diag_embed(rates.sum(-1))

    def log_matrix(
        self, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Tensor:
        """:math:`\\log [e^{Q \\Delta_k}]_{ij}`, ``(..., time, K, K)``."""
        Q = with_time(self.generator(), 2)
        gaps = (next_time - time).double()
        if Q.dim() > 3 and gaps.dim() > 1:  # parameters of their own for series with grids of their own
            return log_of_probability(_stochastic_exponential(Q, gaps)).to(Q.dtype)
        different, which = torch.unique(gaps, return_inverse=True)
        log_matrix = log_of_probability(_stochastic_exponential(Q, different)).to(Q.dtype)
        return log_matrix[..., which, :, :]

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Any:
        """The law of the next index; ``state`` ``(..., time, 1)``."""
        check_state(self, state)
        return index_law(pick(self.log_matrix(time, next_time, inputs), state_index(state), 1))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"num_states={self.num_states}, state_dim=1"


def _stochastic_exponential(Q: Tensor, gaps: Tensor) -> Tensor:
    """:math:`e^{Q \\Delta}` in float64 for generators ``(..., time or 1, K, K)`` and gaps ``(..., time)``.

    With a rate l above all exits, Q = l (P - I) and exp(Q D) = (e^{-lh} exp(l h P))^{2^s}, h = D / 2^s, l h <= 1: sums
    and products of non-negative numbers only.
    """
    Q = Q.double()
    leave = -Q.diagonal(dim1=-2, dim2=-1)
    scale = leave.amax(-1, keepdim=True).unsqueeze(-1)
    size = float((scale * gaps[..., None, None]).detach().max()) if gaps.numel() else 0.0
    squarings = max(0, math.ceil(math.log2(size))) if size > 0 else 0
    step = gaps[..., None, None] / 2**squarings
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    P = torch.matrix_exp((Q + scale * eye) * step) * torch.exp(-scale * step)
    for _ in range(squarings):
        P = P @ P
        P = P / P.sum(-1, keepdim=True)
    return P
