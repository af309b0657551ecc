"""The laws that a bound model gives to one data set: pure functions, no Pyro."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pyro_ssm.components import Emission, Initial, Memory, Transition, gaps
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import (
    EulerPath,
    GirsanovPath,
    History,
    MarkovPath,
    Observations,
    StartedPath,
    masked,
)
from pyro_ssm.dynamics import NeuralODE, NeuralSDE
from pyro_ssm.models.start import known_start, refuse_memory, start_law

__all__ = [
    "BoundModel",
    "ModelParts",
    "batch_shape",
    "check_record",
    "emission_law",
    "history",
    "observation_law",
    "path_law",
    "solve_from",
    "stopped_times",
]


@runtime_checkable
class ModelParts(Protocol):
    """What can be said of a model whose parameters may still be random (see ``StateSpaceModel``).

    >>> from pyro_ssm.models import ModelParts
    >>> sorted(ModelParts.__annotations__)
    ['emission', 'initial', 'transition']
    """

    initial: Initial
    transition: Transition
    emission: Emission

    @property
    def memory(self) -> Memory | None:
        """The model's memory, or None."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its learnable parameters."""
        ...


@runtime_checkable
class BoundModel(ModelParts, Protocol):
    """What these functions ask of a model: its parts, with plain tensors for parameters (see ``StateSpaceModel.bind``).

    >>> from pyro_ssm.models import BoundModel
    >>> sorted(BoundModel.__annotations__)
    ['parameter_shape']
    """

    parameter_shape: torch.Size


def batch_shape(model: BoundModel, data: TimeSeries) -> torch.Size:
    """``(*draws, *plates)`` of the bound parameters, broadcast with the batch of the data.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.models.laws import batch_shape
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> batch_shape(model.bind(), ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    torch.Size([3])
    """
    return torch.broadcast_shapes(model.parameter_shape, data.batch_shape)


def check_record(model: ModelParts, data: Any) -> None:
    """Refuse data that cannot be a record of the model.

    Raises:
        TypeError: it is no ``TimeSeries``.
        ValueError: it has another number of columns than the emission.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.models.laws import check_record
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> check_record(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    """
    if not isinstance(data, TimeSeries):
        raise TypeError(
            f"model(data) needs a TimeSeries, got {type(data).__name__}. Wrap it: TimeSeries(times, values)"
        )
    if data.values is not None and data.values.shape[-1] != model.emission.obs_dim:
        raise ValueError(
            f"`data.values` has {data.values.shape[-1]} columns, the emission has obs_dim={model.emission.obs_dim}. "
            "Build the emission with the number of columns of the data"
        )


def at_observations(data: TimeSeries, tensor: Tensor | None, dim: int) -> Tensor | None:
    """Of a refined grid, the entries at the times of observation."""
    if tensor is None or data.observed_index is None:
        return tensor
    return tensor.index_select(dim, data.observed_index)


def tensor_like(model: BoundModel, data: TimeSeries) -> Tensor:
    """A tensor of the dtype and device in which the model computes."""
    if data.values is not None:
        return data.values
    return next(iter(model.parameters()), torch.zeros((), device=data.times.device))


def history(model: BoundModel, data: TimeSeries) -> History | None:
    """The run of the model's memory along ``data``; None for a model without memory.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.models.laws import history
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> history(model.bind(), ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))) is None
    True
    """
    if model.memory is None:
        return None
    times = at_observations(data, data.times, -1)
    inputs = at_observations(data, data.inputs, -2)

    def emission(state: Tensor, j: int, summary: Tensor) -> Any:
        now = slice(j, j + 1)
        held = None if inputs is None else inputs[..., now, :]
        return model.emission(state, times[..., now], held, memory=summary)

    return History(
        model.memory,
        gaps(times, tensor_like(model, data)),
        inputs,
        data.values,
        _observation_mask(model, data),
        emission,
        data.observed_index,
    )


def path_law(
    model: BoundModel, data: TimeSeries, run: History | None = None
) -> MarkovPath | GirsanovPath | StartedPath:
    """The law of the path ``z`` of a bound model at ``data.times``.

    A :class:`~pyro_ssm.distributions.GirsanovPath` for an equation in the hands of torchsde's solvers, a
    :class:`~pyro_ssm.distributions.StartedPath` for an ordinary differential equation.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.models.laws import path_law
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> path_law(model.bind(), ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))).sample().shape
    torch.Size([3, 4, 2])
    """
    if isinstance(model.transition, NeuralSDE) and model.transition.site == "girsanov":
        return reference_law(model, data)
    if isinstance(model.transition, NeuralODE):
        return _started_law(model, data)
    step_mask = None if data.lengths is None else data.step_mask
    if run is None and _is_diagonal_euler(model.transition):
        return _euler_law(model, data, step_mask)
    return MarkovPath(
        model.initial,
        model.transition,
        data.times,
        data.inputs,
        run,
        step_mask=step_mask,
        batch_shape=batch_shape(model, data),
    )


def _started_law(model: BoundModel, data: TimeSeries) -> StartedPath:
    """The law of a path that is a function of its start."""
    refuse_memory(model)
    held = None if data.inputs is None else data.inputs[..., :1, :]
    first = start_law(model.initial(data.times[..., :1], held), batch_shape(model, data))
    known = known_start(first) is not None
    return StartedPath(first, lambda start: solve_from(model, data, start), data.num_times, known)


def over_starts(path: Tensor, start: Tensor) -> Tensor:
    return path.expand(torch.broadcast_shapes(path.shape, start.shape[:-2] + (1, 1)))


def check_jump(ode: NeuralODE, data: TimeSeries) -> None:
    if ode.jump is not None and ode.interpolation is None and data.observed_index is not None:
        raise ValueError(
            "the data are refined, and a jump would be made at every refined time. Let the inputs know theirs: "
            "dynamics.interpolate_inputs(data, 'held').refine(n), with NeuralODE(..., interpolation='held')"
        )


def solve_from(model: BoundModel, data: TimeSeries, start: Tensor) -> Tensor:
    """The path ``(*batch, time, state)`` of an ordinary differential equation from a start ``(*batch, 1, state)``.

    At padding it stands still where the series has ended.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.models.laws import solve_from
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.NeuralODE(lambda t, z, u: -z, state_dim=1),
    ...     ssm.emissions.LinearNormal(1, 1))
    >>> solve_from(model.bind(), ssm.TimeSeries([0.0, 1.0], torch.zeros(2, 1)), torch.ones(1, 1)).squeeze(-1)
    tensor([1.0000, 0.3679])
    """
    ode: NeuralODE = model.transition  # type: ignore[assignment]
    check_jump(ode, data)
    return over_starts(ode.solve(start, stopped_times(data), data.inputs), start)


def stopped_times(data: TimeSeries) -> Tensor:
    """The times, with padding at the last real time of its series: nothing moves there.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.models.laws import stopped_times
    >>> stopped_times(ssm.TimeSeries([0.0, 1.0, 2.0], torch.zeros(2, 3, 1), lengths=[2, 3])).tolist()
    [[0.0, 1.0, 1.0], [0.0, 1.0, 2.0]]
    """
    if data.lengths is None or not data.is_ragged:
        return data.times
    own = data.times.expand(data.batch_shape + (data.num_times,))
    return torch.minimum(own, own.gather(-1, (data.lengths - 1).unsqueeze(-1)))


def _is_diagonal_euler(transition: Transition) -> bool:
    return isinstance(transition, NeuralSDE) and transition.site == "path" and transition.noise == "diagonal"


def _euler_law(model: BoundModel, data: TimeSeries, step_mask: Tensor | None) -> EulerPath:
    """The Euler chain of an equation with diagonal noise."""
    sde: NeuralSDE = model.transition  # type: ignore[assignment]
    times, inputs = data.times, data.inputs
    first = model.initial(times[..., :1], None if inputs is None else inputs[..., :1, :])

    def step(state: Tensor | None, k: slice, summary: Tensor | None) -> Any:
        if state is None:
            return first
        last = slice(k.start - 1, k.stop - 1)
        return sde(state, times[..., last], times[..., k], None if inputs is None else inputs[..., last, :])

    return EulerPath(
        step,
        first,
        lambda states: sde.mean_of_steps(states, times, inputs),
        sde.diffusion_key(times, inputs),
        data.num_times,
        sde.state_dim,
        step_mask,
        batch_shape(model, data),
    )


def reference_law(model: BoundModel, data: TimeSeries) -> GirsanovPath:
    """The law of a :class:`~pyro_ssm.dynamics.NeuralSDE` by one of torchsde's solvers: the reference of its guides."""
    if model.memory is not None:
        raise NotImplementedError(
            "a memory needs a path that is stepped: use NeuralSDE(..., method='euler'), or leave the memory out"
        )
    sde: NeuralSDE = model.transition  # type: ignore[assignment]
    first = model.initial(data.times[..., :1], None if data.inputs is None else data.inputs[..., :1, :])
    return GirsanovPath(
        first,
        lambda start, noise: sde.solve(start, noise, data.inputs),
        data.times,
        sde.noise_dim,
        batch_shape(model, data),
        tensor_like(model, data),
        step_mask=None if data.lengths is None else data.step_mask,
    )


def emission_law(model: BoundModel, data: TimeSeries, states: Tensor, run: History | None = None) -> Any:
    """The unmasked law of all observations given a path, batch ``(..., time)``, event ``(obs,)``.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.models.laws import emission_law
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> emission_law(model.bind(), data, torch.zeros(3, 4, 2)).mean.shape
    torch.Size([3, 4, 1])
    """
    after = None if run is None else run.summaries(states)[1]
    at = at_observations(data, states, -2)
    times, inputs = at_observations(data, data.times, -1), at_observations(data, data.inputs, -2)
    return model.emission(at, times, inputs, memory=after)


def observation_law(model: BoundModel, data: TimeSeries, states: Tensor, run: History | None = None) -> Observations:
    """The law of the record ``y`` given a path; what is missing or padded adds exactly 0.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.models.laws import observation_law
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> observation_law(model.bind(), data, torch.zeros(3, 4, 2)).event_shape
    torch.Size([4, 1])
    """
    mask = _observation_mask(model, data)

    def law() -> Any:
        return masked(emission_law(model, data, states, run), mask)

    if run is None or not run.memory.sees_observations:
        return Observations(law())
    shape = (torch.broadcast_shapes(states.shape[:-2], batch_shape(model, data)), mask.shape[-2:])
    return Observations(law, states, run, shape)


def _observation_mask(model: BoundModel, data: TimeSeries) -> Tensor:
    if data.mask is not None:
        return data.mask
    return data.observed_step_mask.unsqueeze(-1).expand(data.observed_step_mask.shape + (model.emission.obs_dim,))
