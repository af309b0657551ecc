"""The law of when something was observed, where an equation has an intensity."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import PoissonTimes
from pyro_ssm.dynamics import NeuralODE
from pyro_ssm.dynamics.timed import timed_equation
from pyro_ssm.models.laws import BoundModel, at_observations, check_jump, over_starts, stopped_times

__all__ = ["check_channels", "path_times_law", "times_law"]


def times_law(model: BoundModel, data: TimeSeries, start: Tensor) -> tuple[Tensor, PoissonTimes]:
    """The path from a start, and the law of when something was observed on it (``NeuralODE(log_intensity=...)``).

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.models.times import times_law
    >>> model = ssm.models.latent_ode(2, 3, hidden=8, poisson=True)
    >>> path, law = times_law(model.bind(), ssm.TimeSeries([0.0, 1.0], torch.zeros(2, 3)), torch.ones(1, 2))
    >>> path.shape, law.event_shape
    (torch.Size([2, 2]), torch.Size([2, 3]))
    """
    ode: NeuralODE = model.transition  # type: ignore[assignment]
    check_jump(ode, data)
    path, integral = ode.solve_with_intensity(start, stopped_times(data), data.inputs)
    return over_starts(path, start), _poisson(model, ode, data, path, integral[..., -1, :])


def path_times_law(model: BoundModel, data: TimeSeries, path: Tensor) -> PoissonTimes:
    """The law of when something was observed on a path ``(*batch, time, state)`` of a discretised equation.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.models.times import path_times_law
    >>> ode = ssm.dynamics.NeuralODE(lambda t, z, u: 0 * z, state_dim=1, log_intensity=lambda t, z, u: z)
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.discretize(ode, "flow", noise_floor=1.0),
    ...     ssm.emissions.LinearNormal(1, 1))
    >>> data = ssm.TimeSeries([0.0, 1.0, 3.0], torch.zeros(3, 1))
    >>> path_times_law(model.bind(), data, torch.zeros(3, 1)).total.round()     # a rate of 1 over 3 units of time
    tensor([3.])
    """
    ode: NeuralODE = timed_equation(model.transition)  # type: ignore[assignment]
    check_jump(ode, data)
    clock, held = stopped_times(data), None if data.inputs is None else data.inputs[..., :-1, :]
    if data.num_times == 1:
        total = torch.zeros_like(ode.log_intensity_at(path, clock, data.inputs)).squeeze(-2)
    else:
        total = ode.flow_intensity(path[..., :-1, :], clock[..., :-1], clock[..., 1:], held).sum(-2)
    return _poisson(model, ode, data, path, total)


def _poisson(model: BoundModel, ode: NeuralODE, data: TimeSeries, path: Tensor, total: Tensor) -> PoissonTimes:
    times, inputs = at_observations(data, stopped_times(data), -1), at_observations(data, data.inputs, -2)
    log_rate = ode.log_intensity_at(at_observations(data, path, -2), times, inputs)  # type: ignore[arg-type]
    check_channels(log_rate, model.emission.obs_dim)
    return PoissonTimes(log_rate, total)


def check_channels(log_rate: Tensor, obs_dim: int) -> None:
    """Raise unless there is one channel, or one for each column of an observation.

    Raises:
        ValueError: another number of channels.

    >>> import torch
    >>> from pyro_ssm.models.times import check_channels
    >>> check_channels(torch.zeros(4, 1), obs_dim=3)
    """
    if log_rate.shape[-1] not in (1, obs_dim):
        raise ValueError(
            f"`log_intensity` returns {log_rate.shape[-1]} channels, and an observation has {obs_dim} columns: one "
            "channel for the times, or one for each column"
        )
