"""A particle filter that meets its data one observation at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.smc.bootstrap import bootstrap
from pyro_ssm.infer.smc.check import check_evidence, check_fraction, check_number, explained
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.noise import Noise, PseudoRandom
from pyro_ssm.infer.smc.resample import Resampling, resampling_of
from pyro_ssm.infer.smc.stepper import Cloud, Step, Stepper

__all__ = ["OnlineParticleFilter", "OnlineState"]


class OnlineState(NamedTuple):
    """All that an on-line filter remembers.

    >>> from pyro_ssm.infer import OnlineState
    >>> OnlineState._fields
    ('cloud', 'states', 'log_likelihood', 'ess', 'data', 'num_steps')
    """

    cloud: Cloud
    states: Tensor  # (N, *batch, state), of the cloud
    log_likelihood: Tensor  # (*batch,), log p(y_k | y_<k) of the last observation
    ess: Tensor  # (*batch,)
    data: TimeSeries  # the last observation alone
    num_steps: int  # observations seen

    @property
    def mean(self) -> Tensor:
        """:math:`E[z_k \\mid y_{\\le k}]`, ``(*batch, state)``."""
        return (self.cloud.weights.unsqueeze(-1) * self.states).sum(0)


class OnlineParticleFilter:
    """A particle filter in the form ``init`` and ``step``: pure functions of a state that the caller keeps.

    Each step builds the process of two times, the last and the new one, so that memory, own times, inputs and missing
    entries are as in the whole series, and memory does not grow. The result is that of
    :func:`~pyro_ssm.infer.particle_filter` on the whole series.

    Args:
        model: a :class:`~pyro_ssm.models.StateSpaceModel`, bound, or without random parameters.
        num_particles: N.
        build: ``(model, data) -> FeynmanKac``: :func:`bootstrap`, :func:`locally_optimal`, or a function of one's own
            around ``guided`` whose proposal reads no more than the observation it meets. The data it is given holds two
            times, or at the start one.
        resampling: as for ``particle_filter``.
        ess_threshold: as for ``particle_filter``.
        noise: as for ``particle_filter``; step k asks it for row k.

    Raises:
        ValueError: in a step, a time that is not later than the last, weights that are all 0 or NaN, or a process whose
            proposal looks ahead.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> filter = ssm.infer.OnlineParticleFilter(model, num_particles=100)
    >>> now = filter.init(0.0, torch.zeros(1))
    >>> now = filter.step(now, 1.5, torch.tensor([float("nan")]))  # nothing was seen
    >>> now.log_likelihood, now.mean.shape
    (tensor(0.), torch.Size([2]))
    """

    def __init__(
        self,
        model: Any,
        num_particles: int,
        *,
        build: Callable[[Any, TimeSeries], FeynmanKac] = bootstrap,
        resampling: str | Resampling = "systematic",
        ess_threshold: float = 0.5,
        noise: Noise | None = None,
    ) -> None:
        check_number(num_particles)
        check_fraction(ess_threshold)
        self.model, self.num_particles, self.build = model.bind(), num_particles, build
        self.resampling, self.ess_threshold = resampling_of(resampling), ess_threshold
        self.noise = PseudoRandom() if noise is None else noise

    def init(self, time: Any, values: Any, mask: Any = None, inputs: Any = None) -> OnlineState:
        """The first observation: ``values`` ``(*batch, obs)``, NaN or a False ``mask`` where nothing was seen, at
        ``time`` (a number, or ``(*batch,)`` where series have their own times); ``inputs`` ``(*batch, input)``.
        """
        data = _observation(time, values, mask, inputs)
        stepper = self._stepper(data, 0)
        with torch.no_grad():
            return self._state(stepper.fk, explained(stepper.fk, stepper.init), data, 1)

    def step(self, state: OnlineState, time: Any, values: Any, mask: Any = None, inputs: Any = None) -> OnlineState:
        """The next observation, arguments as for :meth:`init`; ``state`` stays as it is."""
        data = _observation(time, values, mask, inputs)
        stepper = self._stepper(_joined(state.data, data), state.num_steps - 1)
        cloud = state.cloud._replace(k=0)
        with torch.no_grad():
            step = explained(stepper.fk, lambda: stepper.step(stepper.resume(cloud)))
            return self._state(stepper.fk, step, data, state.num_steps + 1)

    def _stepper(self, data: TimeSeries, offset: int) -> Stepper:
        fk = self.build(self.model, data)
        if fk.looks_ahead:
            raise ValueError(
                "an on-line filter cannot look ahead, and the proposal reads future data. Train a guide with "
                "direction='past', or use bootstrap or locally_optimal"
            )
        fk = replace(fk, describe=_later_steps(fk.describe, offset))
        return Stepper(fk, self.num_particles, self.resampling, self.ess_threshold, _Later(self.noise, offset))

    def _state(self, fk: FeynmanKac, step: Step, data: TimeSeries, num_steps: int) -> OnlineState:
        check_evidence(fk, step.log_likelihood.unsqueeze(-1), step.k)
        cloud = step.cloud._replace(k=num_steps - 1)
        return OnlineState(cloud, fk.state(cloud.particles), step.log_likelihood, step.ess, data, num_steps)


def _later_steps(describe: Callable[[int, tuple[int, ...]], str], offset: int) -> Callable[..., str]:
    """How errors name the steps of a process that began some steps ago."""

    def named(k: int, position: tuple[int, ...]) -> str:
        return describe(k, position).replace(f"step {k}", f"step {k + offset}", 1)

    return named


class _Later(Noise):
    """The noise of a run that began some steps ago."""

    def __init__(self, noise: Noise, offset: int) -> None:
        self._noise, self._offset = noise, offset

    def draw(self, k: int, law: Any, shape: torch.Size) -> Tensor:
        return self._noise.draw(k + self._offset, law, shape)

    def uniforms(self, k: int, shape: torch.Size, device: torch.device) -> Tensor:
        return self._noise.uniforms(k + self._offset, shape, device)


def _observation(time: Any, values: Any, mask: Any, inputs: Any) -> TimeSeries:
    """One time; unlike the record of a whole series it may be empty."""
    values = torch.as_tensor(values)
    seen = torch.ones_like(values, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand(values.shape)
    seen = (seen & ~torch.isnan(values)).unsqueeze(-2)
    filled = torch.where(seen, values.unsqueeze(-2), torch.zeros((), dtype=values.dtype, device=values.device))
    times = torch.as_tensor(time, dtype=torch.float64).unsqueeze(-1)
    return TimeSeries(times, filled, inputs=None if inputs is None else torch.as_tensor(inputs).unsqueeze(-2)).hide(
        ~seen
    )


def _joined(last: TimeSeries, new: TimeSeries) -> TimeSeries:
    """Two observations after each other."""
    inputs = None
    if last.inputs is not None and new.inputs is not None:
        inputs = torch.cat([last.inputs, new.inputs], -2)
    elif last.inputs is not None or new.inputs is not None:
        raise ValueError("`inputs` were given for one of two steps and not for the other: give them at every step")
    times = torch.cat([last.times, new.times], -1)
    if not bool((times[..., 1] > times[..., 0]).all()):
        raise ValueError(
            f"`time` must be later than the last one, got {times[..., 1].tolist()} after {times[..., 0].tolist()}"
        )
    joined = TimeSeries(times, torch.cat([last.values, new.values], -2), inputs=inputs)
    return joined.hide(~torch.cat([last.mask, new.mask], -2))
