"""The law of a regime together with a Gaussian vector that depends on it."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_ssm.distributions.codes import CategoricalCodes

__all__ = ["RegimeNormal"]


class RegimeNormal(TorchDistribution):
    """A regime and a vector, side by side in one event ``(1 + n,)``,

    .. math:: P(s = j) \\propto e^{w_j}, \\qquad x \\mid s = j \\;\\sim\\; N(m_j, L_j L_j^T).

    ``log_prob`` is :math:`\\log P(s) + \\log N(x; m_s, L_s L_s^T)`, differentiable with respect to parameters and x. A
    draw is not reparametrised.

    Args:
        log_weights: ``(..., K)``.
        loc: ``(..., K, n)``.
        scale_tril: ``(..., K, n, n)``.

    >>> import torch
    >>> from pyro_ssm.distributions import RegimeNormal
    >>> law = RegimeNormal(torch.zeros(4, 2), torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3))
    >>> law.batch_shape, law.event_shape, law.log_prob(law.sample()).shape
    (torch.Size([4]), torch.Size([4]), torch.Size([4]))
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False
    support = constraints.real_vector

    def __init__(self, log_weights: Tensor, loc: Tensor, scale_tril: Tensor) -> None:
        batch = torch.broadcast_shapes(log_weights.shape[:-1], loc.shape[:-2], scale_tril.shape[:-3])
        K, n = loc.shape[-2:]
        self.log_weights = log_weights.expand(batch + (K,))
        self.loc = loc.expand(batch + (K, n))
        self.scale_tril = scale_tril.expand(batch + (K, n, n))
        super().__init__(batch, torch.Size([1 + n]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> RegimeNormal:
        batch = torch.Size(batch_shape)
        K, n = self.loc.shape[-2:]
        return RegimeNormal(
            self.log_weights.expand(batch + (K,)),
            self.loc.expand(batch + (K, n)),
            self.scale_tril.expand(batch + (K, n, n)),
        )

    def _moments(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and root at a regime ``(...)``, leading dims broadcast."""
        n = self.loc.shape[-1]
        lead = torch.broadcast_shapes(index.shape, self.batch_shape)
        index = index.expand(lead)[..., None, None]
        loc = self.loc.expand(lead + self.loc.shape[-2:]).gather(-2, index.expand(lead + (1, n)))
        root = self.scale_tril.expand(lead + self.scale_tril.shape[-3:])
        return loc.squeeze(-2), root.gather(-3, index.unsqueeze(-1).expand(lead + (1, n, n))).squeeze(-3)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws ``(*sample_shape, *batch, 1 + n)`` from torch's generator; not differentiable."""
        with torch.no_grad():
            regime = CategoricalCodes(logits=self.log_weights, validate_args=False).sample(torch.Size(sample_shape))
            loc, root = self._moments(regime.long())
            x = loc + (root @ torch.randn_like(loc).unsqueeze(-1)).squeeze(-1)
            return torch.cat([regime.unsqueeze(-1).to(x.dtype), x], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """``(...)`` for values ``(..., 1 + n)``."""
        index = value[..., 0].round().long()
        loc, root = self._moments(index)
        log_weights = self.log_weights.log_softmax(-1).expand(loc.shape[:-1] + self.log_weights.shape[-1:])
        chosen = log_weights.gather(-1, index.expand(loc.shape[:-1]).unsqueeze(-1)).squeeze(-1)
        law = torch.distributions.MultivariateNormal(loc, scale_tril=root, validate_args=False)
        return chosen + law.log_prob(value[..., 1:])
