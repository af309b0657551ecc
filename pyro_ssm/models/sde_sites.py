"""The states of a model as Pyro sites: one path, or the noise that drives it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import DrivenNoise, History
from pyro_ssm.dynamics import NeuralODE, NeuralSDE
from pyro_ssm.dynamics.timed import timed_equation
from pyro_ssm.models.empty import empty_path
from pyro_ssm.models.laws import BoundModel, ModelParts, batch_shape, path_law, solve_from
from pyro_ssm.models.ode_sites import diverging, path_site, sample_start, sample_started, through_start
from pyro_ssm.models.plates import site_name
from pyro_ssm.models.start import known_start, refuse_memory, start_law
from pyro_ssm.models.times import path_times_law
from pyro_ssm.ops import BrownianPath

__all__ = [
    "DRIVING_SITES",
    "driven_path",
    "known_start",
    "noise_law",
    "refuse_memory",
    "sample_states",
    "solve_noise",
    "start_law",
    "through_noise",
]

#: what a path may be a function of
DRIVING_SITES = ("z_start", "z_noise")


def sample_states(model: Any, bound: BoundModel, data: TimeSeries, run: History | None) -> Tensor:
    """Sample the path ``(*batch, time, state)``: the site ``"z"``, or those that drive it; none without a state.

    >>> from pyro_ssm.models.sde_sites import sample_states
    >>> sample_states.__name__
    'sample_states'
    """
    if bound.initial.state_dim == 0:
        return empty_path(bound, data)
    if isinstance(bound.transition, (NeuralODE, NeuralSDE)):
        diverging()
    if through_start(bound):
        return sample_started(model, bound, data)
    if not through_noise(bound):
        path = pyro.sample(site_name(model, "z"), path_law(bound, data, run))
        if data.mask is not None and timed_equation(bound.transition) is not None:
            pyro.sample(site_name(model, "times"), path_times_law(bound, data, path), obs=data.mask)
        return path
    start = sample_start(model, bound, data)
    noise = start[..., 1:, :]  # for a single time: no noise
    if data.num_times > 1:
        noise = pyro.sample(site_name(model, "z_noise"), noise_law(bound, data, start))
    path = solve_noise(bound, data, start, noise)
    path_site(
        model,
        path,
        'it is a function of the sites "z_start" and "z_noise": condition these, or use an equation with the density '
        'of a path (NeuralSDE(..., method="euler", site="path"))',
    )
    return path


def driven_path(model: BoundModel, data: TimeSeries, sites: Mapping[str, Tensor]) -> Tensor | None:
    """The path ``(*lead, time, state)`` from draws of the sites that drive it, by their names relative to the model.

    None where the model's path is a site itself, or a site is missing that drives it.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.models.sde_sites import driven_path
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.NeuralODE(lambda t, z, u: -z, state_dim=1),
    ...     ssm.emissions.LinearNormal(1, 1))
    >>> data = ssm.TimeSeries([0.0, 1.0], torch.zeros(2, 1))
    >>> driven_path(model.bind(), data, {"z_start": torch.ones(5, 1, 1)}).shape
    torch.Size([5, 2, 1])
    """
    if not (through_start(model) or through_noise(model)):
        return None
    held = None if data.inputs is None else data.inputs[..., :1, :]
    start = sites.get("z_start")
    if start is None:
        start = known_start(start_law(model.initial(data.times[..., :1], held), batch_shape(model, data)))
    if start is None or (through_noise(model) and data.num_times > 1 and "z_noise" not in sites):
        return None
    if through_start(model):
        return solve_from(model, data, start)
    return solve_noise(model, data, start, sites.get("z_noise", start[..., 1:, :]))


def through_noise(model: ModelParts) -> bool:
    """Whether the random variable of a model's path is its noise.

    >>> import pyro_ssm as ssm
    >>> from pyro_ssm.models.sde_sites import through_noise
    >>> through_noise(ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1)))
    False
    """
    return isinstance(model.transition, NeuralSDE) and model.transition.site == "noise"


def noise_law(model: BoundModel, data: TimeSeries, start: Tensor, **driven: Any) -> DrivenNoise:
    """White noise over the gaps of ``data``, or a guide's driven noise.

    >>> from pyro_ssm.models.sde_sites import noise_law
    >>> noise_law.__name__
    'noise_law'
    """
    step_mask = None if data.lengths is None else data.step_mask[..., 1:]
    shape = torch.broadcast_shapes(start.shape[:-2], batch_shape(model, data))
    sde = model.transition
    return DrivenNoise(data.num_times - 1, sde.noise_dim, shape, start, step_mask=step_mask, **driven)  # type: ignore[attr-defined]


def solve_noise(model: BoundModel, data: TimeSeries, start: Tensor, noise: Tensor) -> Tensor:
    """The path from a start and standardised increments.

    >>> from pyro_ssm.models.sde_sites import solve_noise
    >>> solve_noise.__name__
    'solve_noise'
    """
    if data.num_times == 1:
        return start
    sde: NeuralSDE = model.transition  # type: ignore[assignment]
    return sde.solve(start, BrownianPath.of_normal(data.times, noise, seed=0), data.inputs)
