"""A bound model and one data set, read one step at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import gaps
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import PoissonTimes
from pyro_ssm.dynamics.timed import timed_equation
from pyro_ssm.infer.smc.affine_moves import AffineMoves
from pyro_ssm.infer.smc.densities import log_density
from pyro_ssm.infer.smc.step_index import Rows, StepIndex
from pyro_ssm.infer.smc.tree import tree_where
from pyro_ssm.models.laws import batch_shape
from pyro_ssm.models.state_space import StateSpaceModel
from pyro_ssm.models.times import check_channels

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

    Masks, own times, inputs, refined grids and ragged lengths are looked up here, once, before the loop. A step is
    named by its index, or in a captured run by a tensor ``(1,)`` that holds it: the numbers are the same.

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
        self._times = Rows(data.times, -1)
        self._inputs = None if data.inputs is None else Rows(data.inputs, -2)
        self._values = Rows(data.values.movedim(-2, 0).contiguous().movedim(0, -2), -2)  # each row contiguous
        # one host read for the whole run: steps where all is seen need no mask, steps where nothing is need no law
        entries = data.mask.reshape(-1, data.num_observed_times, data.obs_dim)
        whole = entries.all(-1)
        by_rows = (whole == entries.any(-1)).all().reshape(1)
        *self._full, whole_rows = torch.cat([whole.all(0), by_rows]).tolist()
        self._all_full = all(self._full)
        self._masks = Rows(data.mask, -2)
        self._law_masks = Rows(data.mask[..., :1], -2) if whole_rows else self._masks  # as few columns as say it all
        at = range(data.num_times) if data.observed_index is None else data.observed_index.tolist()
        self.observed_at: dict[int, int] = {k: j for j, k in enumerate(at)}
        self._timed = timed_equation(self.model.transition)
        # the same on the device, where some step is unobserved: which are observed, and the place of the last that is
        self._is_observed = self._place = None
        if data.observed_index is not None:
            self._is_observed = torch.zeros(data.num_times, dtype=torch.bool, device=data.times.device)
            self._is_observed[data.observed_index] = True
            self._place = (self._is_observed.cumsum(0) - 1).clamp(min=0)
        self._moves: AffineMoves | None = None
        self._moves_of: Any = None  # the model whose they are
        if self.memory is not None:
            self._gaps = Rows(gaps(data.observed_times, data.values), -2)

    # ------------------------------------------------------------------------------------------------- masks

    @property
    def is_timed(self) -> bool:
        """Whether the times of observation have a law, so that a weight depends on the state before too."""
        return self._timed is not None

    @property
    def step_mask(self) -> Tensor | None:
        """bool ``(*batch, time)``, False on padding; None without padding."""
        if not self.data.is_ragged:
            return None
        return self.data.step_mask.expand(self.batch_shape + (self.num_times,))

    @property
    def seen(self) -> Tensor:
        """bool ``(*batch, time)``, True where any entry of a series was observed; where the times tell something, all
        real steps: that nothing was seen tells something too.
        """
        if self._timed is not None:
            return self.data.step_mask.expand(self.batch_shape + (self.num_times,))
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

    def law(self, k: StepIndex, state: Tensor | None, summary: Tensor | None) -> Any:
        """:math:`p(z_1)` at k = 0 (``state`` None), else :math:`p(z_k \\mid z_{k-1}, m_{k-1})`."""
        if state is None:
            self._moves, self._moves_of = None, None  # a new run
            return self.model.initial(self._times[0], self._input(0), memory=summary)
        again, self._moves_of = self._moves_of is self.model, self.model
        if not again:
            self._moves = None
        if again or isinstance(k, Tensor):  # worth it from the second step on: a model may last for one step only
            if self._moves is None or self._moves.is_stale:
                self._moves = AffineMoves(self.model.transition, self.data, self.memory is not None)
            moved = self._moves.law(k, state)
            if moved is not None:
                return moved
        return self.transition(k, state, summary)

    def transition(self, k: StepIndex, state: Tensor, summary: Tensor | None = None) -> Any:
        """:math:`p(z_k \\mid z_{k-1}, m_{k-1})` by the model's transition, whatever is known of it."""
        return self.model.transition(state, self._times[k - 1], self._times[k], self._input(k - 1), memory=summary)

    def affine_emission(self, k: StepIndex, summary: Tensor | None) -> Any:
        """The emission's matrices at step k."""
        return self.model.emission.affine(self._times[k], self._input(k), memory=summary)

    def is_unobserved(self, k: StepIndex) -> bool:
        """Whether step k is known to have no observation; on the device all steps are taken to have one."""
        return isinstance(k, int) and k not in self.observed_at

    def observation(self, k: StepIndex) -> tuple[Tensor, Tensor | None]:
        """Values and mask ``(*batch, 1, obs)`` at step k, which must be an observed one; no mask where all is seen."""
        j, full = self._row(k)
        if isinstance(k, Tensor) and self._is_observed is not None:
            return self._values[j], self._masks[j] & self._is_observed.index_select(0, k)
        return self._values[j], None if full else self._masks[j]

    def log_observation(self, k: StepIndex, state: Tensor, summary: Tensor | None) -> Tensor:
        """:math:`\\log p(y_k \\mid z_k, m'_k)`, ``(N, *batch)``; exactly 0 for what was not observed."""
        if self.is_unobserved(k):
            return state.new_zeros(())
        return self._only_observed(k, log_density(*self.observed(k, state, summary)))

    def log_times(self, k: StepIndex, previous: Tensor | None, state: Tensor) -> Tensor:
        """What the times of observation say, ``(N, *batch)``, where the equation has an intensity; else exactly 0,

        .. math:: \\sum_i \\Big( m_{ki} \\log \\lambda_i(t_k, z_k) - \\int_{t_{k-1}}^{t_k} \\lambda_i\\, dt \\Big),

        the integral on the flow from the state before.
        """
        ode, terms = self._timed, state.new_zeros(())
        if ode is None:
            return terms
        if previous is not None:
            inputs = self._input(k - 1)
            terms = -ode.flow_intensity(previous, self._times[k - 1], self._times[k], inputs).sum(-1).squeeze(-1)
        if self.is_unobserved(k):
            return terms
        log_rate = ode.log_intensity_at(state, self._times[k], self._input(k))
        check_channels(log_rate, self.data.obs_dim)
        none = log_rate.new_zeros(log_rate.shape[-1])
        seen = PoissonTimes(log_rate, none).log_prob(self._masks[self._row(k)[0]])
        return terms + self._only_observed(k, seen)

    def observed(self, k: StepIndex, state: Tensor, summary: Tensor | None = None) -> tuple[Any, Tensor, Tensor | None]:
        """The law of :math:`y_k`, what was seen, and its mask (None where all was), at an observed step.

        The mask has one column where times were seen whole or not at all.
        """
        j, full = self._row(k)
        law = self.model.emission(state, self._times[k], self._input(k), memory=summary)
        return law, self._values[j], None if full else self._law_masks[j]

    def _only_observed(self, k: StepIndex, found: Tensor) -> Tensor:
        """``found`` at a step with an observation, else 0; on the host steps without one do not come here."""
        if isinstance(k, int) or self._is_observed is None:
            return found
        return torch.where(self._is_observed.index_select(0, k), found, torch.zeros_like(found))

    def _row(self, k: StepIndex) -> tuple[StepIndex, bool]:
        """Which observation is that of step k, and whether all of it is known to be seen."""
        if isinstance(k, int):
            j = self.observed_at[k]
            return j, self._full[j]
        return k if self._place is None else self._place.index_select(0, k), self._all_full

    def _where_observed(self, k: StepIndex, new: Callable[[StepIndex], Any], old: Callable[[], Any]) -> Any:
        """``new(j)`` at the j-th observation, ``old()`` at a step that is none."""
        if self.is_unobserved(k):
            return old()
        found = new(self._row(k)[0])
        if not isinstance(k, Tensor) or self._is_observed is None:
            return found
        return tree_where(self._is_observed.index_select(0, k), found, old(), 0)

    def moves(self) -> list[tuple[Tensor, Tensor, Tensor]] | None:
        """Of an affine transition with independent noise, what it does at each step from the second on."""
        return AffineMoves(self.model.transition, self.data, self.memory is not None).steps

    def _input(self, k: StepIndex) -> Tensor | None:
        return None if self._inputs is None else self._inputs[k]

    # ------------------------------------------------------------------------------------------------ memory

    def before(self, k: StepIndex, previous: StateParticles | None, shape: torch.Size) -> tuple[Any, Tensor | None]:
        """The memory's carry and summary with which step k begins: it has seen :math:`y_{k-1}`."""
        if self.memory is None:
            return None, None
        if previous is None:
            return self.memory.start(shape)
        kept = previous.carry, previous.summary
        if not self.memory.sees_observations:
            return kept
        see = self.memory.see_observation
        return self._where_observed(k - 1, lambda j: see(previous.carry, self._values[j], self._masks[j]), lambda: kept)

    def particles(self, k: StepIndex, carry: Any, summary: Tensor | None, state: Tensor) -> StateParticles:
        """The particles of a state ``(N, *batch, 1, state)``, which the memory now sees."""
        if self.memory is not None:
            see = self.memory.see_state
            carry, summary = self._where_observed(
                k, lambda j: see(carry, state, self._gaps[j], self._input(k)), lambda: (carry, summary)
            )
        return StateParticles(state, carry, summary)
