"""Every kind of posterior, turned into draws of parameters and paths: the one place that knows how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from inspect import isfunction
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoGuide
from pyro.infer.mcmc.api import AbstractMCMC
from torch import Tensor

from pyro_ssm.binding import random_parameters
from pyro_ssm.components import FiniteState
from pyro_ssm.data import TimeSeries
from pyro_ssm.guides import Guide
from pyro_ssm.infer import FitResult, evaluating, local_parameters, sample_posterior, sample_posterior_states
from pyro_ssm.infer.fit_gradient import EmptyGuide
from pyro_ssm.infer.smc import ParameterSMCResult, ParticleMCMCResult
from pyro_ssm.models import StateSpaceModel, empty_path, site_name
from pyro_ssm.models.sde_sites import DRIVING_SITES, driven_path
from pyro_ssm.predict.parameters import align, by_dotted_name, event_dims, fits, missing_parameters
from pyro_ssm.predict.record import record_of

__all__ = ["PosteriorDraws", "draw_chunks", "posterior_draws"]

DEFAULT_DRAWS = 200  # where the posterior has no number of draws of its own


class PosteriorDraws(NamedTuple):
    """Draws from a posterior, sample dims leftmost.

    >>> from pyro_ssm.predict import PosteriorDraws
    >>> PosteriorDraws._fields
    ('parameters', 'states')
    """

    parameters: dict[str, Tensor]  # dotted name -> (S, *plates aligned to the batch, *event)
    states: Tensor  # (S, *batch, time, state)


def posterior_draws(
    model: StateSpaceModel,
    posterior: Any,
    data: TimeSeries,
    num_samples: int | None = None,
    *,
    chunk: int | None = None,
) -> PosteriorDraws:
    """Draws :math:`\\theta, z_{1:T} \\sim p(\\theta, z \\mid y)` from whatever stands for the posterior.

    ===========================  =============================================  ===================================
    ``posterior``                parameters                                     path
    ===========================  =============================================  ===================================
    ``FitResult``, ``Guide``     the guide                                      the guide
    other guide (``AutoGuide``)  the guide                                      exact (below)
    ``MCMC``, dict of draws      given, by Pyro site or dotted name             given as ``"z"`` or by what drives it
                                                                                (``"z_start"``), else exact
    ``ParticleMCMCResult``,      given                                          given
    ``ParameterSMCResult``
    None                         none are random                                exact
    ===========================  =============================================  ===================================

    Exact paths are drawn given each draw of the parameters by forward filtering and backward sampling
    (``infer.sample_posterior``); they need affine-Gaussian laws, or finite states. Given draws are thinned
    evenly when fewer are wanted, and used again (with fresh paths, where these are exact) when more are. Draws that are
    grouped by chain are flattened.

    Args:
        model: unbound, or bound when ``posterior`` is None.
        posterior: see above.
        data: with values.
        num_samples: S; default: all that there are, 200 for guides and None.
        chunk: draws at a time; bounds the memory that the guide's network takes, not that of the result.

    Returns:
        Parameters ``(S, *plates, *event)`` where plates are aligned to the batch with dims of 1, and states
        ``(S, *batch, time, state)``. Nothing is differentiable; draws come from torch's global generator.

    Raises:
        TypeError: of an unknown kind of posterior; or the path is missing and the model is not affine-Gaussian.
        ValueError: draws of a random parameter are missing, their shapes do not fit, or there are no values.
        KeyError: a dict of draws has a name that the model does not know.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.predict import posterior_draws
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> posterior_draws(model, None, data, num_samples=10).states.shape
    torch.Size([10, 3, 4, 2])
    """
    chunks = list(draw_chunks(model, posterior, data, num_samples, chunk))
    parameters = {name: torch.cat([part.parameters[name] for part in chunks]) for name in chunks[0].parameters}
    return PosteriorDraws(parameters, torch.cat([part.states for part in chunks]))


def draw_chunks(
    model: StateSpaceModel, posterior: Any, data: TimeSeries, num_samples: int | None, chunk: int | None
) -> Iterator[PosteriorDraws]:
    """:func:`posterior_draws`, some draws at a time (all at once when ``chunk`` is None)."""
    for name, number in (("num_samples", num_samples), ("chunk", chunk)):
        if number is not None and number < 1:
            raise ValueError(f"`{name}` is {number}, but at least 1 is wanted")
    if not isinstance(model, StateSpaceModel):
        raise TypeError(f"`model` must be a StateSpaceModel, got {type(model).__name__}; of a Marginal give its model")
    record_of(data)
    source = _source(model, posterior, data, num_samples)
    total = source.num_draws if num_samples is None else num_samples
    step = total if chunk is None else chunk
    for start in range(0, total, step):
        with torch.no_grad(), local_parameters(), evaluating(model, source.guide), pyro.poutine.block():
            part = source.draw(range(start, min(start + step, total)), total)
        yield part


class _Source(ABC):
    """Where draws come from."""

    num_draws: int
    guide: Guide | None = None

    @abstractmethod
    def draw(self, which: range, total: int) -> PosteriorDraws:
        """The draws ``which`` of ``total``."""


class _Amortised(_Source):
    """A guide draws parameters and path."""

    def __init__(self, guide: Guide, data: TimeSeries) -> None:
        self.guide, self.data, self.num_draws = guide, data, DEFAULT_DRAWS

    def draw(self, which: range, total: int) -> PosteriorDraws:
        parameters, number = {}, len(which)
        with local_parameters():
            if random_parameters(self.guide.model):
                drawn = Predictive(self.guide.parameters_given, num_samples=number, parallel=True)(self.data)
                parameters = _aligned(self.guide.model, drawn, self.data)
            path = self.guide.path(self.data, self.guide.bind_model(parameters))
            states = path.sample() if parameters else path.sample(torch.Size([number]))
        return PosteriorDraws(parameters, states)


class _Given(_Source):
    """Draws of parameters, and of the path too unless it is to be drawn exactly."""

    def __init__(
        self,
        model: StateSpaceModel,
        data: TimeSeries,
        parameters: dict[str, Tensor],
        states: Tensor | None = None,
        driving: Mapping[str, Tensor] | None = None,
    ) -> None:
        if missing := missing_parameters(model, parameters):
            raise ValueError(
                f"the posterior has no draws of the random parameters {missing}. Add them, or bind them: "
                "model.bind({name: value}) is a model without them"
            )
        sizes = {name: value.shape[0] for name, value in parameters.items()}
        if states is not None:
            sizes["z"] = states.shape[0]
        self.driving = dict(driving or {}) if states is None else {}
        sizes |= {name: value.shape[0] for name, value in self.driving.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the numbers of draws differ: {sizes}")
        self.model, self.data, self.parameters, self.states = model, data, parameters, states
        self.num_draws = next(iter(sizes.values())) if sizes else DEFAULT_DRAWS
        self.size = next(iter(sizes.values())) if sizes else None

    def draw(self, which: range, total: int) -> PosteriorDraws:
        if self.size is None:
            return PosteriorDraws({}, self._exact_paths(self.model.bind(), torch.Size([len(which)])))
        index = torch.tensor([i * self.size // total for i in which])
        parameters = {name: value[index.to(value.device)] for name, value in self.parameters.items()}
        if self.states is not None:
            return PosteriorDraws(parameters, self.states[index.to(self.states.device)])
        bound = self.model.bind(parameters or None)
        path = driven_path(
            bound, self.data, {name: value[index.to(value.device)] for name, value in self.driving.items()}
        )
        return PosteriorDraws(parameters, self._exact_paths(bound, torch.Size()) if path is None else path)

    def _exact_paths(self, bound: StateSpaceModel, sample_shape: torch.Size) -> Tensor:
        if bound.initial.state_dim == 0:
            path = empty_path(bound, self.data)
            return path.expand(sample_shape + path.shape)
        try:
            if isinstance(bound.transition, FiniteState):
                return sample_posterior_states(bound, self.data, sample_shape)
            return sample_posterior(bound, self.data, sample_shape)
        except TypeError as error:
            raise TypeError(
                'the posterior has no draws of the path "z", and paths can be drawn exactly only from an '
                f"affine-Gaussian or finite-state model without memory ({error}). Give a guide (infer.fit), or MCMC "
                'over the explicit path, or draws of "z" from a particle smoother'
            ) from error


def _source(model: StateSpaceModel, posterior: Any, data: TimeSeries, num_samples: int | None) -> _Source:
    if isinstance(posterior, FitResult):
        posterior = posterior.guide
    if posterior is None:
        return _Given(model, data, {})
    if isinstance(posterior, Guide):
        if posterior.model is not model:
            raise ValueError("the guide belongs to another model than `model`: give guide.model")
        return _Amortised(posterior, data)
    if isinstance(posterior, AbstractMCMC):
        return _from_draws(model, data, sampled(posterior), others_allowed=True)
    if isinstance(posterior, (ParticleMCMCResult, ParameterSMCResult)):
        return _from_draws(model, data, posterior.get_samples(), others_allowed=False)
    if isinstance(posterior, PosteriorDraws):
        return _Given(model, data, dict(posterior.parameters), posterior.states)
    if isinstance(posterior, Mapping):
        return _from_draws(model, data, posterior, others_allowed=False)
    if isinstance(posterior, (AutoGuide, EmptyGuide)) or isfunction(posterior):  # of Marginal(model)
        with torch.no_grad(), local_parameters(), pyro.poutine.block():
            drawn = Predictive(posterior, num_samples=num_samples or DEFAULT_DRAWS, parallel=True)(data)
        return _from_draws(model, data, drawn, others_allowed=True)
    raise TypeError(
        f"`posterior` is a {type(posterior).__name__}, but one of these is wanted: what infer.fit returns, a guide, a "
        "Pyro MCMC that has run, what particle MCMC or an SMC sampler returns, a dict of draws (by dotted name or Pyro "
        "site), or None for a model without random parameters"
    )


def _from_draws(model: StateSpaceModel, data: TimeSeries, draws: Mapping[str, Any], others_allowed: bool) -> _Given:
    draws = _flatten_chains(model, draws, data)
    parameters = _aligned(model, draws, data)
    states = by_dotted_name(model, draws)[1]
    path = states.pop("z", None)
    driving = {name: states.pop(name) for name in DRIVING_SITES if name in states}
    if states and not others_allowed:
        raise KeyError(
            f"the posterior has draws of {sorted(states)}, which the model does not know; it has "
            f"{sorted([*event_dims(model), site_name(model, 'z')])}"
        )
    wanted = data.batch_shape + (data.num_times, model.initial.state_dim)
    if path is not None and (path.dim() != len(wanted) + 1 or path.shape[1:] != wanted):
        raise ValueError(f'draws of "z" have shape {tuple(path.shape)}, but (draws, *{tuple(wanted)}) is wanted')
    return _Given(model, data, parameters, path, driving)


def _aligned(model: StateSpaceModel, draws: Mapping[str, Any], data: TimeSeries) -> dict[str, Tensor]:
    parameters = by_dotted_name(model, draws)[0]
    dims = event_dims(model) if parameters else {}
    return {name: align(name, value, dims[name], data) for name, value in parameters.items()}


def _flatten_chains(model: StateSpaceModel, draws: Mapping[str, Any], data: TimeSeries) -> dict[str, Tensor]:
    """Draws with one leading dim, the path under the name ``"z"``."""
    parameters, others = by_dotted_name(model, draws)
    chains = _chains_of_dict(model, draws, data)
    if chains is None:
        return {**parameters, **others}
    return {name: value.flatten(0, 1) if value.dim() > 1 else value for name, value in {**parameters, **others}.items()}


def _chains_of_dict(model: StateSpaceModel, draws: Mapping[str, Any], data: TimeSeries) -> int | None:
    """The number of chains by which draws are grouped: where one leading dim does not fit the batch and two do."""
    parameters, others = by_dotted_name(model, draws)
    dims = event_dims(model) if parameters else {}
    known = [(value, dims[name]) for name, value in parameters.items()]
    known += [(value, 2) for name, value in others.items() if name in ("z", *DRIVING_SITES)]
    if not known or all(fits(value, own, data, lead=1) for value, own in known):
        return None
    grouped = all(fits(value, own, data, lead=2) for value, own in known)
    leads = {value.shape[:2] for value, _ in known}
    return next(iter(leads))[0] if grouped and len(leads) == 1 else None


def sampled(mcmc: Any) -> dict[str, Tensor]:
    """The draws of a sampler that has run, by site, chains one after the other.

    Raises:
        ValueError: it has not run.

    >>> from pyro.infer import MCMC, NUTS
    >>> from pyro_ssm.predict.posterior import sampled
    >>> sampled(MCMC(NUTS(lambda: None), num_samples=1))
    Traceback (most recent call last):
    ...
    ValueError: the sampler has no draws: call mcmc.run(data) first
    """
    if getattr(mcmc, "_samples", True) is None:
        raise ValueError("the sampler has no draws: call mcmc.run(data) first")
    return mcmc.get_samples()


def num_chains(model: StateSpaceModel, posterior: Any, data: TimeSeries) -> int:
    """How many chains the draws of :func:`posterior_draws` come from, one after the other; 1 unless they were sampled.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.predict.posterior import num_chains
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(4, 1))
    >>> num_chains(model, {"z": torch.zeros(3, 100, 4, 2)}, data)
    3
    """
    if isinstance(posterior, (AbstractMCMC, ParticleMCMCResult, ParameterSMCResult)):
        return posterior.num_chains
    if isinstance(posterior, Mapping):
        return _chains_of_dict(model, posterior, data) or 1
    return 1
