"""The one place that hides observation entries: a hidden entry adds exactly 0, constants included."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_ssm.ops.reading import may_read

__all__ = ["MaskedLaw", "masked"]


def masked(law: Any, mask: Tensor) -> MaskedLaw:
    """Hide entries of an observation law, so that they add exactly 0 to its log density.

    .. math:: \\log p(y_{\\text{seen}}) = \\log \\int p(y)\\, dy_{\\text{hidden}}

    * ``Independent`` over a univariate law: entry by entry.
    * A multivariate normal: the exact marginal of its observed rows.
    * Any other law with event dims (a simplex, a one-hot vector): the mask must be all or none along the event.

    Hidden values are replaced by a constant inside the law's support before ``log_prob``, so that values, and gradients
    with respect to the law's parameters, are finite whatever stands in the hidden places.

    Args:
        law: batch ``(..., time)``, event ``(obs,)``.
        mask: bool, broadcastable to ``(..., time, obs)``, True where observed.

    Raises:
        ValueError: the law's event is not one-dimensional.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.distributions import masked
    >>> law = dist.LogNormal(torch.zeros(1, 3), torch.ones(1, 3)).to_event(1)
    >>> seen = masked(law, torch.tensor([[True, False, False]]))
    >>> bool(seen.log_prob(torch.tensor([[2.0, 0.0, -1.0]])) == dist.LogNormal(0.0, 1.0).log_prob(torch.tensor(2.0)))
    True
    """
    if len(law.event_shape) != 1:
        raise ValueError(
            f"masked needs a law with one event dim (obs,), got event shape {tuple(law.event_shape)}. "
            "Let the emission return Independent(law, 1), or a multivariate law over the observed vector"
        )
    return MaskedLaw(law, mask)


def _filler(law: Any, like: Tensor) -> Tensor:
    """A constant in the support of ``law``, broadcastable to its event (0 for a real line or a count, 1/2 for a
    probability), of the dtype and device of ``like``, and made there.
    """
    support = law.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if getattr(support, "is_discrete", False):
        if support is constraints.one_hot:
            return (torch.arange(law.event_shape[-1], device=like.device) == 0).to(like)
        lowest = getattr(support, "lower_bound", 0)
        return lowest.to(like) if isinstance(lowest, Tensor) else like.new_full((), lowest)
    event = law.event_shape[-1:] if support.event_dim else torch.Size([1])
    return transform_to(support)(torch.zeros(event, device=like.device)).to(like)


def _cholesky(covariance: Tensor) -> Tensor:
    """The root; of what has none an error, or NaN where an error would take a look at the numbers."""
    if may_read():
        return torch.linalg.cholesky(covariance)
    root, failed = torch.linalg.cholesky_ex(covariance)
    return torch.where((failed == 0)[..., None, None], root, torch.nan)


class MaskedLaw(TorchDistribution):
    """A law with hidden entries; built by :func:`masked`.

    ``log_prob`` has shape ``(..., time)``; ``log_prob_entries`` has ``(..., time, obs)`` where the law is independent
    over entries. Sampling ignores the mask.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.distributions import masked
    >>> law = masked(dist.Normal(torch.zeros(4, 2), 1.0).to_event(1), torch.ones(4, 2, dtype=torch.bool))
    >>> law.log_prob(torch.zeros(4, 2)).shape
    torch.Size([4])
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, law: Any, mask: Tensor) -> None:
        self.law, self.hidden_mask = law, mask
        batch = torch.broadcast_shapes(law.batch_shape, mask.shape[:-1])
        super().__init__(batch, law.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.law.has_rsample

    @property
    def support(self) -> Any:  # type: ignore[override]
        return self.law.support

    @property
    def mean(self) -> Tensor:
        """The mean of the law, hidden entries included."""
        return self.law.mean

    @property
    def variance(self) -> Tensor:
        """The variance of the law, hidden entries included."""
        return self.law.variance

    def expand(self, batch_shape: Any, _instance: Any = None) -> MaskedLaw:
        return MaskedLaw(self.law.expand(batch_shape), self.hidden_mask)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self._full_law().sample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self._full_law().rsample(sample_shape)

    def _full_law(self) -> Any:
        return self.law if self.law.batch_shape == self.batch_shape else self.law.expand(self.batch_shape)

    @property
    def _is_entrywise(self) -> bool:
        return isinstance(self.law, Independent) and self.law.base_dist.event_dim == 0

    def log_prob_entries(self, value: Tensor) -> Tensor:
        """Log density of each entry ``(..., time, obs)``, 0 where hidden; needs a law that is independent over
        entries.
        """
        if not self._is_entrywise:
            raise TypeError(
                f"log_prob_entries needs a law that is independent over entries, got {type(self.law).__name__}; "
                "use log_prob, which gives one number a time"
            )
        base = self.law.base_dist
        safe = torch.where(self.hidden_mask, value, _filler(base, value))
        terms = base.log_prob(safe)
        return torch.where(self.hidden_mask, terms, torch.zeros((), dtype=terms.dtype, device=terms.device))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._is_entrywise:
            return self.log_prob_entries(value).sum(-1)
        if isinstance(self.law, (MultivariateNormal, LowRankMultivariateNormal)):
            return self._marginal_log_prob(value)
        return self._all_or_none_log_prob(value)

    def _marginal_log_prob(self, value: Tensor) -> Tensor:
        """N(y_s; m_s, S_ss): a hidden row becomes a standard normal at its mean, less its constant."""
        law, seen = self.law, self.hidden_mask.expand(self.hidden_mask.shape[:-1] + self.law.event_shape)
        residual = torch.where(seen, value - law.loc, torch.zeros((), dtype=law.loc.dtype, device=law.loc.device))
        both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
        eye = torch.eye(seen.shape[-1], dtype=law.loc.dtype, device=law.loc.device)
        root = _cholesky(torch.where(both, law.covariance_matrix, eye))
        white = torch.linalg.solve_triangular(root, residual.unsqueeze(-1), upper=False).squeeze(-1)
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * white.square().sum(-1) - log_det - 0.5 * math.log(2 * math.pi) * seen.sum(-1).to(log_det.dtype)

    def _all_or_none_log_prob(self, value: Tensor) -> Tensor:
        seen = self.hidden_mask.all(-1)
        if self.hidden_mask.shape[-1] > 1 and may_read() and bool((self.hidden_mask.any(-1) != seen).any()):
            raise ValueError(
                f"{type(self.law).__name__} cannot hide part of its event: `mask` must be all True or all False along "
                "the last dim. Hide whole times, or use an emission with independent entries or a multivariate normal"
            )
        safe = torch.where(seen.unsqueeze(-1), value, _filler(self.law, value))
        terms = self.law.log_prob(safe)
        return torch.where(seen, terms, torch.zeros((), dtype=terms.dtype, device=terms.device))
