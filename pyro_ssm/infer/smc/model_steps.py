"""A bound model and one data set, read one step at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import gaps
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.smc.affine_moves import AffineMoves
from pyro_ssm.infer.smc.densities import log_density
from pyro_ssm.models.laws import batch_shape
from pyro_ssm.models.state_space import StateSpaceModel

__all__ = ["ModelSteps", "StateParticles", "check_model_and_data"]


class StateParticles(NamedTuple):
    """The particles of a state-space model.

    The memory (None without one) has seen the state of this step, and not yet its observation: that comes with the
    next move, after resampling.

    >>> from pyro_ssm.infer.smc import StateParticles
    >>> StateParticles._fields
    ('state', 'carry', 'summary')
    """

    state: Tensor  # (N, *batch, 1, state)
    carry: Any  # what the memory holds; leaves (N, *batch, ...)
    summary: Tensor | None  # (N, *batch, 1, features)


def check_model_and_data(model: Any, data: Any, method: str) -> None:
    """Refuse arguments of other kinds, or in the other order.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.smc.model_steps import check_model_and_data
    >>> check_model_and_data(torch.zeros(3), None, "bootstrap")
    Traceback (most recent call last):
    ...
    TypeError: bootstrap: `model` must be a StateSpaceModel, got Tensor
    """
    if isinstance(model, TimeSeries) and isinstance(data, StateSpaceModel):
        raise TypeError(
            f"{method}: `model` is a TimeSeries and `data` a {type(data).__name__}: give the model first, then the data"
        )
    if not isinstance(model, StateSpaceModel):
        raise TypeError(f"{method}: `model` must be a StateSpaceModel, got {type(model).__name__}")
    if not isinstance(data, TimeSeries):
        raise TypeError(
            f"{method}: `data` must be a TimeSeries, got {type(data).__name__}. Wrap it: TimeSeries(times, values)"
        )


class ModelSteps:
    """The laws, the densities and the memory of a bound model at each step of one data set.

    Masks, own times, inputs, refined grids and ragged lengths are looked up here, once, before the loop.

    Args:
        model: a StateSpaceModel, bound, or unbound and without random parameters.
        data: with values.
        method: who asks, for errors.

    Raises:
        TypeError: ``model`` is no StateSpaceModel, or ``data`` no TimeSeries.
        ValueError: no values, or another width than the emission's.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.smc.model_steps import ModelSteps
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> steps = ModelSteps(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)), "bootstrap")
    >>> steps.log_observation(0, torch.zeros(10, 3, 1, 2), None).shape
    torch.Size([10, 3])
    """

    def __init__(self, model: Any, data: TimeSeries, method: str) -> None:
        check_model_and_data(model, data, method)
        if data.values is None or data.mask is None:
            raise ValueError(f"{method} needs observations, but `data` has no values. Give TimeSeries(times, values)")
        if data.values.shape[-1] != model.emission.obs_dim:
            raise ValueError(
                f"`data.values` has {data.values.shape[-1]} columns, the emission has obs_dim={model.emission.obs_dim}"
            )
        self.model, self.data = model.bind(), data
        self.memory = self.model.memory
        self.batch_shape, self.num_times = batch_shape(self.model, data), data.num_times
        self._times = data.times.split(1, -1)
        self._inputs = None if data.inputs is None else data.inputs.split(1, -2)
        self._values = [now.contiguous() for now in data.values.split(1, -2)]
        self._masks = data.mask.split(1, -2)
        # one host read for the whole run: steps where all is seen need no mask, steps where nothing is need no law
        flat = data.mask.reshape(-1, data.num_observed_times, data.obs_dim)
        self._full = flat.all(-1).all(0).tolist()
        at = range(data.num_times) if data.observed_index is None else data.observed_index.tolist()
        self.observed_at: dict[int, int] = {k: j for j, k in enumerate(at)}
        self._moves: AffineMoves | None = None
        self._moves_of: Any = None  # the model whose they are
        if self.memory is not None:
            self._gaps = gaps(data.observed_times, data.values).split(1, -2)

    # ------------------------------------------------------------------------------------------------- masks

    @property
    def step_mask(self) -> Tensor | None:
        """bool ``(*batch, time)``, False on padding; None without padding."""
        if not self.data.is_ragged:
            return None
        return self.data.step_mask.expand(self.batch_shape + (self.num_times,))

    @property
    def seen(self) -> Tensor:
        """bool ``(*batch, time)``, True where any entry of a series was observed."""
        seen = self.data.mask.any(-1)
        if self.data.observed_index is not None:
            full = seen.new_zeros(seen.shape[:-1] + (self.num_times,))
            seen = full.index_copy(-1, self.data.observed_index, seen)
        return seen.expand(self.batch_shape + (self.num_times,))

    def describe(self, k: int, position: tuple[int, ...]) -> str:
        """How an error names a step of a series."""
        draws = len(self.batch_shape) - len(self.data.batch_shape)
        at = tuple(p if size > 1 else 0 for p, size in zip(position[draws:], self.data.batch_shape, strict=True))
        times = self.data.times[at] if self.data.times.dim() > 1 else self.data.times
        name = self.data._series_name(at)
        parameters = f", parameter draw {position[:draws]}" if draws else ""
        return f"step {k} (time {times[k].item():g}) of {name}{parameters}"

    # -------------------------------------------------------------------------------------------------- laws

    def law(self, k: int, state: Tensor | None, summary: Tensor | None) -> Any:
        """:math:`p(z_1)` at k = 0 (``state`` None), else :math:`p(z_k \\mid z_{k-1}, m_{k-1})`."""
        if state is None:
            self._moves, self._moves_of = None, None  # a new run
            return self.model.initial(self._times[0], self._input(0), memory=summary)
        if self._moves_of is not self.model:  # worth it from the second step on: a model may last for one step only
            self._moves, self._moves_of = None, self.model
        else:
            if self._moves is None or self._moves.is_stale:
                self._moves = AffineMoves(self.model.transition, self.data, self.memory is not None)
            moved = self._moves.law(k, state)
            if moved is not None:
                return moved
        return self.transition(k, state, summary)

    def transition(self, k: int, state: Tensor, summary: Tensor | None = None) -> Any:
        """:math:`p(z_k \\mid z_{k-1}, m_{k-1})` by the model's transition, whatever is known of it."""
        return self.model.transition(state, self._times[k - 1], self._times[k], self._input(k - 1), memory=summary)

    def affine_emission(self, k: int, summary: Tensor | None) -> Any:
        """The emission's matrices at step k."""
        return self.model.emission.affine(self._times[k], self._input(k), memory=summary)

    def observation(self, k: int) -> tuple[Tensor, Tensor]:
        """Values and mask ``(*batch, 1, obs)`` at step k, which must be an observed one."""
        j = self.observed_at[k]
        return self._values[j], self._masks[j]

    def log_observation(self, k: int, state: Tensor, summary: Tensor | None) -> Tensor:
        """:math:`\\log p(y_k \\mid z_k, m'_k)`, ``(N, *batch)``; exactly 0 for what was not observed."""
        if k not in self.observed_at:
            return state.new_zeros(())
        return log_density(*self.observed(k, state, summary))

    def observed(self, k: int, state: Tensor, summary: Tensor | None = None) -> tuple[Any, Tensor, Tensor | None]:
        """The law of :math:`y_k`, what was seen, and its mask (None where all was), at an observed step."""
        j = self.observed_at[k]
        law = self.model.emission(state, self._times[k], self._input(k), memory=summary)
        return law, self._values[j], None if self._full[j] else self._masks[j]

    def moves(self) -> list[tuple[Tensor, Tensor, Tensor]] | None:
        """Of an affine transition with independent noise, what it does at each step from the second on."""
        return AffineMoves(self.model.transition, self.data, self.memory is not None).steps

    def _input(self, k: int) -> Tensor | None:
        return None if self._inputs is None else self._inputs[k]

    # ------------------------------------------------------------------------------------------------ memory

    def before(self, k: int, previous: StateParticles | None, shape: torch.Size) -> tuple[Any, Tensor | None]:
        """The memory's carry and summary with which step k begins: it has seen :math:`y_{k-1}`."""
        if self.memory is None:
            return None, None
        if previous is None:
            return self.memory.start(shape)
        j = self.observed_at.get(k - 1)
        if j is None or not self.memory.sees_observations:
            return previous.carry, previous.summary
        return self.memory.see_observation(previous.carry, self._values[j], self._masks[j])

    def particles(self, k: int, carry: Any, summary: Tensor | None, state: Tensor) -> StateParticles:
        """The particles of a state ``(N, *batch, 1, state)``, which the memory now sees."""
        j = self.observed_at.get(k)
        if self.memory is not None and j is not None:
            carry, summary = self.memory.see_state(carry, state, self._gaps[j], self._input(k))
        return StateParticles(state, carry, summary)
