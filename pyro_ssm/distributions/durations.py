"""The law of a semi-Markov state: an index and how many steps of it remain."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_ssm.distributions.codes import CategoricalCodes

__all__ = ["RemainingLaw"]


class RemainingLaw(TorchDistribution):
    """An index j and a number of remaining steps r = 1, ..., D, side by side in one event ``(2,)``.

    .. math:: P(j, r) \\propto e^{w_{jr}}

    Args:
        log_weights: ``(..., K, D)``.

    >>> import torch
    >>> from pyro_ssm.distributions.durations import RemainingLaw
    >>> law = RemainingLaw(torch.tensor([[-torch.inf, 0.0], [-torch.inf, -torch.inf]]))
    >>> law.sample()
    tensor([0., 2.])
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False
    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(self, log_weights: Tensor) -> None:
        self.log_weights = log_weights
        super().__init__(log_weights.shape[:-2], torch.Size([2]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> RemainingLaw:
        return RemainingLaw(self.log_weights.expand(torch.Size(batch_shape) + self.log_weights.shape[-2:]))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws ``(*sample_shape, *batch, 2)`` from torch's generator; not differentiable."""
        D = self.log_weights.shape[-1]
        with torch.no_grad():
            cell = CategoricalCodes(logits=self.log_weights.flatten(-2), validate_args=False).sample(sample_shape)
            index = torch.div(cell, D, rounding_mode="floor")
            return torch.stack([index, cell - index * D + 1], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """``(...)`` for values ``(..., 2)``."""
        K, D = self.log_weights.shape[-2:]
        index, remaining = value.round().long().unbind(-1)
        cell = (index * D + remaining - 1).unsqueeze(-1)
        log_probs = self.log_weights.flatten(-2).log_softmax(-1)
        lead = torch.broadcast_shapes(cell.shape[:-1], log_probs.shape[:-1])
        known = (remaining >= 1) & (remaining <= D) & (index >= 0) & (index < K)
        cell = torch.where(known.unsqueeze(-1), cell, torch.zeros_like(cell))
        terms = log_probs.expand(lead + (K * D,)).gather(-1, cell.expand(lead + (1,))).squeeze(-1)
        return torch.where(known, terms, torch.full((), -torch.inf, dtype=terms.dtype, device=terms.device))
