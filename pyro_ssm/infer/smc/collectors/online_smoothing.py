"""PaRIS: smoothed additive functionals, on-line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.infer.smc.backward import backward_indices, rejection_indices, require_backward
from pyro_ssm.infer.smc.collectors.base import Collector
from pyro_ssm.infer.smc.collectors.moments import weighted_mean
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.stepper import Step
from pyro_ssm.infer.smc.tree import take

__all__ = ["OnlineSmoothing"]


class OnlineSmoothing(Collector):
    """Smoothed expectations of additive functionals at every step, without keeping the past (PaRIS).

    .. math::
        S_k = \\sum_{j \\le k} h_j(x_{j-1}, x_j), \\qquad
        \\tau_k^n = \\frac1M \\sum_{m=1}^M \\left( \\tau_{k-1}^{J_n^m} + h_k(x_{k-1}^{J_n^m}, x_k^n) \\right), \\qquad
        E[S_k \\mid y_{\\le k}] \\approx \\sum_n W_k^n \\tau_k^n

    with :math:`J` from the backward kernel. Two draws (M = 2) keep the variance linear in time, where ancestral paths
    (M = 1) degenerate. Each step weighs every pair of particles; with ``log_bound`` the draws come from rejection
    instead, about as many trials as the ratio of the bound to the typical density, and only what is left after
    ``trials`` of them is weighed pair by pair. A series that has ended keeps its statistic.

    Args:
        function: ``(k, previous, particles) -> (N, *batch, m)``, :math:`h_k` of particles; previous is None at k = 0.
        num_draws: M.
        log_bound: an upper bound of ``fk.log_backward``, the log transition density; None weighs every pair.
        trials: rounds of rejection.
        name: of the result, ``(*batch, time, m)``: :math:`E[S_k \\mid y_{\\le k}]` for every k.

    Raises:
        ValueError: in a run, a process without ``log_backward`` (models with memory, ``SampleOnly`` transitions), or
            fewer than one draw.

    Source: Olsson and Westerborn (2017), "Efficient particle-based online smoothing in general hidden Markov models:
    the PaRIS algorithm".

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.LinearNormal(1), ssm.emissions.LinearNormal(1, 1))
    >>> fk = ssm.infer.bootstrap(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(4, 1)))
    >>> total = ssm.infer.smc.OnlineSmoothing(lambda k, previous, particles: fk.state(particles))
    >>> ssm.infer.particle_filter(fk, 50, collectors=[total]).collected["online_smoothing"].shape
    torch.Size([4, 1])
    """

    def __init__(
        self,
        function: Callable[[int, Any, Any], Tensor],
        num_draws: int = 2,
        *,
        log_bound: float | None = None,
        trials: int = 30,
        name: str = "online_smoothing",
    ) -> None:
        if num_draws < 1:
            raise ValueError(f"`num_draws` must be at least 1, got {num_draws}")
        self.function, self.num_draws, self.log_bound, self.trials = function, num_draws, log_bound, trials
        self.name = name

    def start(self, fk: FeynmanKac, num_particles: int) -> None:
        require_backward(fk, "OnlineSmoothing", "FixedLag or Genealogy")
        self._fk = fk
        self._statistic: Tensor | None = None
        self._found: list[Tensor] = []

    def collect(self, step: Step) -> None:
        fk, particles, k = self._fk, step.cloud.particles, step.k
        if step.previous is None or self._statistic is None:
            statistic = self.function(k, None, particles)
        else:
            statistic = self._updated(step)
            if fk.step_mask is not None:
                statistic = torch.where(fk.step_mask[..., k, None], statistic, self._statistic)
        self._statistic = statistic
        self._found.append(weighted_mean(step.weights, statistic))

    def result(self) -> Tensor:
        return torch.stack(self._found, -2)

    def _updated(self, step: Step) -> Tensor:
        previous, particles, k = step.previous, step.cloud.particles, step.k
        batch, terms = self._fk.batch_shape, []
        if self.log_bound is None:
            indices = backward_indices(self._fk, previous, particles, k, self.num_draws)
        else:
            draws = [
                rejection_indices(self._fk, previous, particles, k, self.log_bound, self.trials)
                for _ in range(self.num_draws)
            ]
            indices = torch.stack(draws)
        for index in indices:
            before, statistic = take((previous.particles, self._statistic), index, batch)
            terms.append(statistic + self.function(k, before, particles))
        return torch.stack(terms).mean(0)
