"""Fixed-lag smoothing: each state given the data up to a few steps later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.infer.smc.collectors.base import Collector
from pyro_ssm.infer.smc.collectors.moments import weighted_mean
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.stepper import Step
from pyro_ssm.infer.smc.tree import take

__all__ = ["FixedLag"]


class FixedLag(Collector):
    """Smoothed means with a lag, :math:`E[f(x_k) \\mid y_{\\le \\min(k + L, T)}]`, ``(*batch, time, m)``.

    Each particle carries the values of its last L ancestors: memory and time are L + 1 times a particle's. A longer
    lag has less bias against the full smoother and more variance, since ancestors coalesce. A series that has ended
    weighs by its own last observation.

    Args:
        lag: L, steps, at least 0.
        function: f, ``particles -> (N, *batch, m)``; default the state.
        name: of the result.

    Raises:
        ValueError: a negative lag; or, in a run, a resampling without ancestors.

    Source: Kitagawa (1996), "Monte Carlo filter and smoother for non-Gaussian nonlinear state space models"; Olsson,
    Cappe, Douc and Moulines (2008), "Sequential Monte Carlo smoothing with application to parameter estimation".

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> fk = ssm.infer.bootstrap(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> ssm.infer.particle_filter(fk, 100, collectors=[ssm.infer.smc.FixedLag(2)]).collected["fixed_lag"].shape
    torch.Size([3, 4, 2])
    """

    def __init__(self, lag: int, function: Callable[[Any], Tensor] | None = None, name: str = "fixed_lag") -> None:
        if lag < 0:
            raise ValueError(f"`lag` must be at least 0, got {lag}")
        self.lag, self.function, self.name = lag, function, name

    def start(self, fk: FeynmanKac, num_particles: int) -> None:
        self._of, self._batch = self.function or fk.state, fk.batch_shape
        self._window: list[Tensor] = []  # oldest first, each (N, *batch, m) along the lines of the particles of now
        self._weights: Tensor | None = None
        self._found: list[Tensor] = []

    def collect(self, step: Step) -> None:
        if len(self._window) > self.lag:
            self._window.pop(0)
        if step.ancestors is not None and self._window:
            self._window = take(self._window, step.ancestors, self._batch)
        require_ancestors(self, step)
        self._window.append(self._of(step.cloud.particles))
        self._weights = step.weights
        if len(self._window) > self.lag:
            self._found.append(weighted_mean(step.weights, self._window[0]))

    def result(self) -> Tensor:
        rest = self._window[1:] if len(self._window) > self.lag else self._window
        return torch.stack(self._found + [weighted_mean(self._weights, values) for values in rest], -2)


def require_ancestors(collector: Collector, step: Step) -> None:
    """Refuse a resampling that mixes particles."""
    if step.ancestors is None and step.resampled is not False:
        raise ValueError(
            f"{type(collector).__name__} follows ancestors, and the resampling of this run has none. Use a scheme such "
            "as 'systematic'"
        )
