"""The likelihood of parameters with the states integrated out: exactly, or estimated by particles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import FiniteState
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.discrete import sample_posterior_states
from pyro_ssm.infer.gaussian import sample_posterior
from pyro_ssm.infer.smc.bootstrap import bootstrap
from pyro_ssm.infer.smc.check import check_fraction, check_number
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.filter_bank import FilterBank
from pyro_ssm.infer.smc.model_steps import check_model_and_data
from pyro_ssm.infer.smc.noise import Noise
from pyro_ssm.infer.smc.posterior_draws import RandomParameters
from pyro_ssm.infer.smc.resample import Resampling, resampling_of
from pyro_ssm.infer.smc.tree import tree_map

__all__ = ["Evaluated", "ParameterLikelihood"]

#: ``(bound model, data) -> FeynmanKac`` (an estimate), or ``-> result`` with ``log_likelihood`` ``(*batch, time)``
Filter = Callable[[Any, TimeSeries], Any]


class Evaluated(NamedTuple):
    """Vectors of parameters and what is known of them: a population of a sampler.

    >>> import torch
    >>> from pyro_ssm.infer.smc.parameter_likelihood import Evaluated
    >>> Evaluated(torch.zeros(3, 1), torch.zeros(3), torch.arange(3.0), None).take(torch.tensor([2, 2])).log_likelihood
    tensor([2., 2.])
    """

    vectors: Tensor  # (S, dim)
    log_prior: Tensor  # (S,), of the vectors
    log_likelihood: Tensor  # (S,); in IBIS (S, time), the increments
    states: Tensor | None  # (S, *batch, time, state), a path of each filter; None where the filter has none

    def take(self, index: Tensor) -> Evaluated:
        """The members ``index``."""
        return tree_map(lambda x: x.index_select(0, index), self)

    def where(self, accepted: Tensor, other: Evaluated) -> Evaluated:
        """The members of ``other`` where ``accepted`` ``(S,)`` holds, and one's own elsewhere."""
        return tree_map(
            lambda own, others: torch.where(accepted.reshape((-1,) + (1,) * (own.dim() - 1)), others, own), self, other
        )


class ParameterLikelihood:
    """:math:`\\log p(y \\mid \\theta)` of many vectors of parameters in one call, with impossible ones at -inf.

    Args:
        model: an unbound model with random parameters, or its :class:`RandomParameters`.
        data: with values.
        filter: of a bound model and data; a Feynman-Kac process is run with particles, and of anything else the
            ``log_likelihood`` is taken.
        num_particles: of each particle filter.
        resampling: as in ``particle_filter``.
        ess_threshold: as in ``particle_filter``.
        keep_paths: whether particle filters draw a path.

    Raises:
        TypeError: the model is bound, a prior discrete, or ``filter`` not callable.
        ValueError: no random parameter, no values, or numbers out of range.

    >>> import torch, pyro.distributions as dist, pyro_ssm as ssm
    >>> from pyro.nn import PyroSample
    >>> from pyro_ssm.infer.smc.parameter_likelihood import ParameterLikelihood
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.OrnsteinUhlenbeck(1), ssm.emissions.LinearNormal(1, 1))
    >>> model.transition.rate = PyroSample(dist.LogNormal(0.0, 1.0))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> found = ParameterLikelihood(model, data, ssm.infer.bootstrap, num_particles=50)(torch.zeros(5, 1))
    >>> found.log_likelihood.shape, found.states.shape
    (torch.Size([5]), torch.Size([5, 3, 4, 1]))
    """

    def __init__(
        self,
        model: Any,
        data: TimeSeries,
        filter: Filter = bootstrap,
        num_particles: int = 100,
        resampling: str | Resampling = "systematic",
        ess_threshold: float = 0.5,
        keep_paths: bool = True,
    ) -> None:
        if not callable(filter):
            raise TypeError(f"`filter` must be a function of a bound model and data, got {type(filter).__name__}")
        check_number(num_particles)
        check_fraction(ess_threshold)
        self.parameters = model if isinstance(model, RandomParameters) else RandomParameters(model)
        check_model_and_data(self.parameters.model, data, "the likelihood of parameters")
        if data.values is None:
            raise ValueError("the likelihood needs observations, but `data` has no values: TimeSeries(times, values)")
        self.model, self.data, self.filter = self.parameters.model, data, filter
        self.num_particles, self.resampling = num_particles, resampling_of(resampling)
        self.ess_threshold, self.keep_paths = ess_threshold, keep_paths
        self._estimated: bool | None = None

    @property
    def estimated(self) -> bool:
        """Whether the likelihood is a particle estimate."""
        if self._estimated is None:
            origin = torch.zeros(1, self.parameters.dim, dtype=torch.float64)
            try:
                with torch.no_grad():
                    self._estimated = isinstance(self._filtered(origin), FeynmanKac)
            except torch.linalg.LinAlgError:  # an exact filter that finds no density there
                self._estimated = False
        return self._estimated

    @torch.no_grad()
    def __call__(self, vectors: Tensor, noise: Noise | None = None) -> Evaluated:
        """The vectors ``(S, dim)`` with the log-likelihood of each, summed over series."""
        log_prior = self.parameters.log_prior(vectors)
        if self.estimated:
            bank = self.bank(vectors, noise=noise, log_prior=log_prior).run()
            return Evaluated(vectors, log_prior, bank.log_likelihood, bank.paths() if self.keep_paths else None)
        return Evaluated(vectors, log_prior, self.increments(vectors).sum(-1), None)

    def bank(
        self,
        vectors: Tensor,
        num_particles: int | None = None,
        noise: Noise | None = None,
        log_prior: Tensor | None = None,
    ) -> FilterBank:
        """Particle filters of the vectors, before their first step."""
        return FilterBank(
            self._filtered,
            vectors,
            self.parameters.log_prior(vectors) if log_prior is None else log_prior,
            num_particles or self.num_particles,
            self.resampling,
            self.ess_threshold,
            noise,
            self.keep_paths,
        )

    @torch.no_grad()
    def increments(self, vectors: Tensor) -> Tensor:
        """:math:`\\log p(y_k \\mid y_{<k}, \\theta)` by a filter without particles, of all series: ``(S, time)``."""
        try:
            found = self._filtered(vectors)
        except (
            torch.linalg.LinAlgError
        ):  # a filter stops at the first series without a density: halve until it is found
            if len(vectors) > 1:
                return torch.cat([self.increments(half) for half in vectors.chunk(2)])
            return torch.full((1, self.data.num_times), -math.inf, dtype=torch.float64, device=vectors.device)
        if isinstance(found, FeynmanKac):
            raise TypeError(
                "a likelihood without noise is wanted, and `filter` builds a particle filter. Give kalman_filter, "
                "hmm_filter or the like, or use smc_squared, smc_sampler or pmmh"
            )
        terms = found.log_likelihood
        lead = torch.Size((len(vectors),)) + self.data.batch_shape
        terms = terms.expand(lead + terms.shape[-1:]).double()
        terms = torch.nan_to_num(terms, nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
        return terms.reshape((len(vectors), -1, terms.shape[-1])).sum(1)

    @torch.no_grad()
    def paths(self, vectors: Tensor) -> Tensor:
        """Paths ``(S, *batch, time, state)`` given data and vectors, for filters that draw none.

        By the exact simulation smoother where the model has one, otherwise from a bootstrap particle filter.
        """
        bound = self.parameters.bind(vectors, self.data)
        try:
            if isinstance(bound.transition, FiniteState):
                return sample_posterior_states(bound, self.data)
            return sample_posterior(bound, self.data)
        except TypeError:
            return ParameterLikelihood(self.parameters, self.data, bootstrap, self.num_particles)(vectors).states

    def _filtered(self, vectors: Tensor) -> Any:
        return self.filter(self.parameters.bind(vectors, self.data), self.data)
