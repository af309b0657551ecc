"""Several chains of Metropolis-Hastings over parameters, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.infer.smc.correlated import CorrelatedNoise
from pyro_ssm.infer.smc.moves import AdaptiveWalk, metropolis, walk_root
from pyro_ssm.infer.smc.parameter_likelihood import Evaluated, ParameterLikelihood
from pyro_ssm.infer.smc.tree import tree_map

__all__ = ["MetropolisChains"]

_TRIES = 10  # prior draws from which a chain's start is chosen
_PRIOR_DRAWS = 100  # from which the first walk is made


class MetropolisChains:
    """The state of the chains of :func:`pmmh`, and one step of them.

    Args:
        likelihood: of vectors of parameters.
        correlation: of the filters' random numbers from one proposal to the next; 0 draws them afresh.
        screening: a likelihood without noise for delayed acceptance, or None.
        target_acceptance: what the walks adapt to.

    >>> from pyro_ssm.infer.smc.metropolis_chains import MetropolisChains
    >>> MetropolisChains.__name__
    'MetropolisChains'
    """

    def __init__(
        self,
        likelihood: ParameterLikelihood,
        correlation: float,
        screening: ParameterLikelihood | None,
        target_acceptance: float,
    ) -> None:
        self.likelihood, self.correlation, self.screening = likelihood, correlation, screening
        self.target_acceptance = target_acceptance
        self.recent = math.nan  # a running mean of the acceptance
        self.current: Evaluated
        self._screened: Evaluated | None = None
        self._noise: CorrelatedNoise | None = None
        self._walk: AdaptiveWalk

    def start(self, num_chains: int, start: Mapping[str, Any] | None) -> None:
        """Choose where the chains begin.

        Raises:
            ValueError: a chain would begin where the data are impossible.
        """
        parameters = self.likelihood.parameters
        if start is None:
            candidates = self.likelihood(parameters.draw(_TRIES * num_chains))
            total = (candidates.log_prior + candidates.log_likelihood).reshape(num_chains, _TRIES)
            best = total.argmax(1) + _TRIES * torch.arange(num_chains, device=total.device)
            vectors = candidates.vectors[best]
            possible = torch.isfinite(total.amax(1))
        else:
            vectors = parameters.start(start, num_chains, "chains")
            possible = torch.isfinite(self.likelihood(vectors).log_likelihood)
        if not bool(possible.all()):
            raise ValueError(
                f"chain {int((~possible).nonzero()[0])}: the data have no likelihood at "
                + ("`start`" if start is not None else f"any of {_TRIES} draws from the prior")
                + ". Give other `start` values, more particles, or a filter that sees the observations"
            )
        if self.correlation:
            data = self.likelihood.data
            shape = (data.num_times, self.likelihood.num_particles, num_chains) + tuple(data.batch_shape)
            rows = self.likelihood.resampling.rows(self.likelihood.num_particles)
            dim = self.likelihood.model.initial.state_dim
            self._noise = CorrelatedNoise.draw(shape, dim, rows, data.values.dtype, data.device)
        self.current = self._evaluate(vectors, self._noise)  # anew: the best of ten estimates is too good
        self._screened = None if self.screening is None else self.screening(vectors)
        root = walk_root(parameters.draw(_PRIOR_DRAWS))
        self._walk = AdaptiveWalk(root.expand(num_chains, *root.shape), self.target_acceptance)

    def step(self, adapt: bool) -> Tensor:
        """One iteration of every chain; the probability ``(chains,)`` with which each was to move."""
        current = self.current
        epsilon = torch.randn_like(current.vectors)
        vectors = current.vectors + self._walk.step(epsilon)
        noise = None if self._noise is None else self._noise.near(self.correlation)
        log_uniforms = torch.rand_like(current.log_likelihood).log()
        if self.screening is None:
            proposed = self._evaluate(vectors, noise)
            self.current, accepted, probability = metropolis(current, proposed, _log_posterior, log_uniforms)
        else:
            accepted, probability = self._delayed(vectors, noise, log_uniforms)
        if noise is not None:
            self._noise = self._noise.where(accepted, noise)
        if adapt:
            self._walk.learn(epsilon, probability)
            self._walk.visit(self.current.vectors)
        mean = float(probability.mean())
        self.recent = mean if math.isnan(self.recent) else 0.98 * self.recent + 0.02 * mean
        return probability

    def _evaluate(self, vectors: Tensor, noise: CorrelatedNoise | None) -> Evaluated:
        return self.likelihood(vectors, None if noise is None else noise.fixed())

    def _delayed(self, vectors: Tensor, noise: CorrelatedNoise | None, log_uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Screen first, then correct: accepts with

        .. math:: \\min(1, \\tilde\\pi' / \\tilde\\pi)\\, \\min(1, \\hat\\pi' \\tilde\\pi / (\\hat\\pi \\tilde\\pi'))
        """
        screened = self.screening(vectors)
        _, passed, first = metropolis(self._screened, screened, _log_posterior, log_uniforms)
        if not bool(passed.any()):
            return passed, torch.zeros_like(first)
        index = passed.nonzero().squeeze(-1)
        full = self._evaluate(vectors[index], None if noise is None else noise.take(index))
        proposed = tree_map(lambda own, new: own.index_copy(0, index, new), self.current, full)
        old, cheap = _log_posterior(self.current), _log_posterior(self._screened)
        log_ratio = _log_posterior(proposed) - old + cheap - _log_posterior(screened)
        log_ratio = torch.nan_to_num(log_ratio, nan=-math.inf)
        accepted = passed & (torch.rand_like(log_ratio).log() < log_ratio)
        self.current = self.current.where(accepted, proposed)
        self._screened = self._screened.where(accepted, screened)
        return accepted, torch.where(passed, log_ratio.clamp(max=0).exp(), torch.zeros_like(first))

    # ---------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes."""
        noise = self._noise
        return {
            "current": list(self.current),
            "screened": None if self._screened is None else list(self._screened),
            "noise": None if noise is None else [noise.normals, noise.levels],
            "walk": self._walk.state,
            "recent": self.recent,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.current = Evaluated(*state["current"])
        self._screened = None if state["screened"] is None else Evaluated(*state["screened"])
        self._noise = None if state["noise"] is None else CorrelatedNoise(*state["noise"])
        self._walk = AdaptiveWalk(target_acceptance=self.target_acceptance, **state["walk"])
        self.recent = state["recent"]


def _log_posterior(population: Evaluated) -> Tensor:
    return population.log_prior + population.log_likelihood
