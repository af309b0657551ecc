"""The states of an ordinary differential equation as Pyro sites: the start is random, the path a function of it."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.ops.integrator import register_exception_handler
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.dynamics import NeuralODE
from pyro_ssm.models.laws import BoundModel, ModelParts, batch_shape, solve_from, stopped_times
from pyro_ssm.models.parameter_store import mcmc_begins
from pyro_ssm.models.plates import site_name
from pyro_ssm.models.start import known_start, refuse_memory, start_law
from pyro_ssm.models.times import times_law
from pyro_ssm.ops import SolverError

__all__ = ["diverging", "field_penalty", "path_site", "sample_start", "sample_started", "through_start"]


def diverging() -> None:
    """Let Pyro's HMC and NUTS count an equation that cannot be solved as a divergence, which ends a trajectory.

    >>> from pyro_ssm.models.ode_sites import diverging
    >>> diverging()
    """
    register_exception_handler("pyro_ssm.SolverError", _cannot_be_solved, warn_on_overwrite=False)


def _cannot_be_solved(error: Exception) -> bool:
    return isinstance(error, SolverError)


def through_start(model: ModelParts) -> bool:
    """Whether the random variable of a model's path is its start.

    >>> import pyro_ssm as ssm
    >>> from pyro_ssm.models.ode_sites import through_start
    >>> through_start(ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1)))
    False
    """
    return isinstance(model.transition, NeuralODE)


def sample_start(model: Any, bound: BoundModel, data: TimeSeries) -> Tensor:
    """The first state ``(*batch, 1, state)``: the site ``"z_start"``, or the point at which it is known to be.

    >>> from pyro_ssm.models.ode_sites import sample_start
    >>> sample_start.__name__
    'sample_start'
    """
    refuse_memory(bound)
    held = None if data.inputs is None else data.inputs[..., :1, :]
    first = start_law(bound.initial(data.times[..., :1], held), batch_shape(bound, data))
    start = known_start(first)
    return pyro.sample(site_name(model, "z_start"), first) if start is None else start


def sample_started(model: Any, bound: BoundModel, data: TimeSeries) -> Tensor:
    """Sample the site ``"z_start"``, and solve for the deterministic path ``"z"`` ``(*batch, time, state)``.

    An equation with an intensity has the observed site ``"times"`` where there are values: their mask.

    >>> from pyro_ssm.models.ode_sites import sample_started
    >>> sample_started.__name__
    'sample_started'
    """
    start = sample_start(model, bound, data)
    timed = bound.transition.log_intensity is not None and data.mask is not None  # type: ignore[attr-defined]
    path, timing = times_law(bound, data, start) if timed else (solve_from(bound, data, start), None)
    path_site(
        model,
        path,
        'the path of an ordinary differential equation is a function of its start: condition "z_start", or give the '
        'equation noise, dynamics.discretize(ode, "flow", noise_floor=s)',
    )
    if timing is not None:
        pyro.sample(site_name(model, "times"), timing, obs=data.mask)
    penalty = field_penalty(bound, data, path)
    if penalty is not None:
        if mcmc_begins():
            raise ValueError(
                "MCMC would sample from the density times exp(-penalty), and the penalty of the field is a term of "
                "training, no part of the model. Switch it off: model.eval()"
            )
        pyro.factor(site_name(model, "penalty"), -penalty)
    return path


def path_site(model: Any, path: Tensor, why: str) -> None:
    """Record the deterministic site ``"z"``, or raise where it was conditioned on something else.

    Outside of every handler Pyro returns a copy of what it was given.

    >>> from pyro_ssm.models.ode_sites import path_site
    >>> path_site.__name__
    'path_site'
    """
    z = pyro.deterministic(site_name(model, "z"), path, event_dim=2)
    if z is not path and not torch.equal(z, path):
        raise ValueError(f'site "z" was conditioned, but {why}')


def field_penalty(model: BoundModel, data: TimeSeries, path: Tensor) -> Tensor | None:
    """The regularisation of the field along a path, ``(*batch,)``; None where there is none, or not in training.

    >>> from pyro_ssm.models.ode_sites import field_penalty
    >>> field_penalty.__name__
    'field_penalty'
    """
    ode: NeuralODE = model.transition  # type: ignore[assignment]
    if ode.penalty is None or not ode.training:
        return None
    times = stopped_times(data)
    return ode.penalty(lambda z: ode.field_at(z, times, data.inputs), path, times)
