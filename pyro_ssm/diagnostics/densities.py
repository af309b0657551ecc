"""Log densities of draws: of the observations given them, of everything together, and importance weights."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_ssm.binding import random_parameters
from pyro_ssm.data import TimeSeries
from pyro_ssm.dynamics import NeuralODE
from pyro_ssm.dynamics.timed import timed_equation
from pyro_ssm.guides import Guide
from pyro_ssm.infer import evaluating, kalman_log_likelihood, local_parameters
from pyro_ssm.models import StateSpaceModel, history, observation_law, path_law, site_name
from pyro_ssm.models.times import path_times_law, times_law
from pyro_ssm.predict import PosteriorDraws
from pyro_ssm.predict.impute import entrywise
from pyro_ssm.predict.record import record_of

__all__ = ["Densities", "densities", "log_prior", "log_weight", "one_step"]

_PROBES = 7  # draws whose prior density is evaluated one by one


class Densities(NamedTuple):
    """Log densities at each of S draws, in nats.

    >>> from pyro_ssm.diagnostics.densities import Densities
    >>> Densities._fields
    ('entries', 'joint')
    """

    #: log p(y | z) of each entry ``(S, *batch, time, obs)``, or of each time ``(S, *batch, time)`` where the emission's
    #: entries depend on each other; 0 where nothing was observed
    entries: Tensor
    joint: Tensor  # (S, *batch)  log p(y, z | parameters)


@torch.no_grad()
def densities(model: StateSpaceModel, draws: PosteriorDraws, data: TimeSeries) -> Densities:
    """:math:`\\log p(y_{k,i} \\mid z_k, \\theta)` of each observed entry, and :math:`\\log p(y, z \\mid \\theta)`.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.diagnostics.densities import densities
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> densities(model, ssm.predict.PosteriorDraws({}, torch.zeros(5, 3, 4, 2)), data).entries.shape
    torch.Size([5, 3, 4, 1])
    """
    bound = model.bind(draws.parameters or None)
    run = history(bound, data)
    values, _ = record_of(data)
    law = observation_law(bound, data, draws.states, run).law
    path = path_law(bound, data, run).log_prob(draws.states)
    terms = law.log_prob_entries(values) if entrywise(law.law) else law.log_prob(values)
    lead = draws.states.shape[:-2]
    entries = terms.expand(lead + terms.shape[terms.dim() - (2 if entrywise(law.law) else 1) :])
    joint = path + entries.flatten(len(lead)).sum(-1)
    if timed_equation(bound.transition) is not None:
        through_start = isinstance(bound.transition, NeuralODE)
        timing = (
            times_law(bound, data, draws.states[..., :1, :])[1]
            if through_start
            else path_times_law(bound, data, draws.states)
        )
        joint = joint + timing.log_prob(data.mask)
    return Densities(entries, joint)


@torch.no_grad()
def one_step(model: StateSpaceModel, draws: PosteriorDraws, data: TimeSeries) -> Tensor:
    """:math:`\\log p(y_k \\mid y_{<k}, \\theta)`, ``(S, *batch, time)`` at observation times, by the Kalman filter.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.diagnostics.densities import one_step
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> one_step(model, ssm.predict.PosteriorDraws({}, torch.zeros(5, 3, 4, 2)), data).shape
    torch.Size([5, 3, 4])
    """
    terms = kalman_log_likelihood(model.bind(draws.parameters or None), data)
    terms = terms.expand(draws.states.shape[:-2] + terms.shape[-1:])
    return terms if data.observed_index is None else terms.index_select(-1, data.observed_index)


@torch.no_grad()
def log_prior(model: StateSpaceModel, parameters: dict[str, Tensor], number: int) -> Tensor:
    """:math:`\\log p(\\theta)` of each draw, ``(S,)``; 0 for a model without random parameters.

    All draws are evaluated at once where that gives what one by one gives (tried on a few), else one by one.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.diagnostics.densities import log_prior
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> log_prior(model, {}, 2)
    tensor([0., 0.], dtype=torch.float64)
    """

    def one_by_one(first: int, last: int) -> list[Tensor]:
        return [_log_prior(model, {name: value[s] for name, value in parameters.items()}) for s in range(first, last)]

    probes = one_by_one(0, min(number, _PROBES))
    try:
        together = _log_prior(model, parameters, number)
    except RuntimeError:  # a prior that depends on a parameter need not broadcast over draws of it
        together = torch.full((number,), math.nan, dtype=torch.float64)
    if torch.allclose(together[: len(probes)], torch.stack(probes)):  # and where it does, may do so along another dim
        return together
    return torch.stack(probes + one_by_one(len(probes), number))


def _log_prior(model: StateSpaceModel, parameters: dict[str, Tensor], number: int | None = None) -> Tensor:
    """Of one draw ``()``, or of ``number`` at once."""
    lead = () if number is None else (number,)
    total = torch.zeros(lead, dtype=torch.float64)
    values = {site_name(model, name): value for name, value in parameters.items()}
    with (
        local_parameters(),
        pyro.poutine.block(),
        pyro.poutine.trace() as traced,
        pyro.poutine.condition(data=values),
    ):
        model.bind()
    for name in random_parameters(model):
        site: Any = traced.trace.nodes.get(site_name(model, name))
        if site is not None:  # else a function of the others, without a density of its own
            term = site["fn"].log_prob(site["value"])
            total = total + term.reshape((*lead, -1)).sum(-1).to(total)
    return total


@torch.no_grad()
def log_weight(model: StateSpaceModel, guide: Guide, draws: PosteriorDraws, data: TimeSeries, joint: Tensor) -> Tensor:
    """:math:`\\log p(y, z \\mid \\theta) - \\log q(z \\mid y, \\theta)`, ``(S, *batch)``.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.diagnostics.densities import densities, log_weight
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data, guide = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)), ssm.guides.Structured(model, 8)
    >>> draws = ssm.predict.posterior_draws(model, guide, data, 5)
    >>> log_weight(model, guide, draws, data, densities(model, draws, data).joint).shape
    torch.Size([5, 3])
    """
    with local_parameters(), evaluating(guide), pyro.poutine.block():
        path = guide.path(data, guide.bind_model(draws.parameters))
        return joint - path.log_prob(draws.states)
