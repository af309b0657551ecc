"""PaRIS: smoothed additive functionals, on-line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.infer.smc.collectors.base import Collector
from pyro_ssm.infer.smc.collectors.moments import weighted_mean
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.stepper import Cloud, Step
from pyro_ssm.infer.smc.tree import take, tree_map
from pyro_ssm.ops.resampling import multinomial

__all__ = ["OnlineSmoothing", "backward_indices"]

_PAIRS = 2**22  # pairs of particles weighed at a time


def backward_indices(fk: FeynmanKac, previous: Cloud, particles: Any, k: int, num_draws: int) -> Tensor:
    """Draws from the backward kernel: for each particle at k, indices into the cloud before.

    .. math:: P(J_n = i) \\propto W_{k-1}^i\\, M_k G_k(x_{k-1}^i, x_k^n)

    Every pair is weighed, in blocks: N times N a series.

    Args:
        fk: with ``log_backward``.
        previous: the cloud after step k - 1.
        particles: at k, leaves ``(N, *batch, ...)``.
        k: the step.
        num_draws: independent draws for each particle.

    Returns:
        int64 ``(num_draws, N, *batch)``.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.smc import Cloud, StateParticles, backward_indices
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.LinearNormal(1), ssm.emissions.LinearNormal(1, 1))
    >>> fk = ssm.infer.bootstrap(model, ssm.TimeSeries(torch.arange(2.0), torch.zeros(2, 1)))
    >>> x = StateParticles(torch.randn(5, 1, 1), None, None)
    >>> backward_indices(fk, Cloud(x, torch.zeros(5), 0), x, 1, num_draws=2).shape
    torch.Size([2, 5])
    """
    num, found = previous.num_particles, []
    block = max(1, _PAIRS // max(previous.log_weights.numel(), 1))
    early = tree_map(lambda x: x.unsqueeze(1), previous.particles)
    for start in range(0, num, block):
        late = tree_map(lambda x, at=start: x[at : at + block].unsqueeze(0), particles)
        pairs = previous.log_weights.unsqueeze(1) + fk.log_backward(k, early, late)  # (N before, block, *batch)
        weights = (pairs - pairs.amax(0)).exp()
        cumulative = weights.movedim(0, -1).cumsum(-1, dtype=torch.float64)
        point = torch.rand(cumulative.shape[:-1] + (num_draws,), dtype=torch.float64, device=weights.device)
        index = torch.searchsorted(cumulative, point * cumulative[..., -1:], right=True).clamp(max=num - 1)
        found.append(index.movedim(-1, 0))
    return torch.cat(found, 1)


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
        if fk.log_backward is None:
            raise ValueError(
                "OnlineSmoothing needs a backward kernel, and this process has none (a memory, a SampleOnly "
                "transition, or an integrated part). Use FixedLag or Genealogy"
            )
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
            indices = torch.stack([self._rejection(previous, particles, k) for _ in range(self.num_draws)])
        for index in indices:
            before, statistic = take((previous.particles, self._statistic), index, batch)
            terms.append(statistic + self.function(k, before, particles))
        return torch.stack(terms).mean(0)

    def _rejection(self, previous: Cloud, particles: Any, k: int) -> Tensor:
        """J with probability W_J, accepted with probability q(x_J, x) / bound; pair by pair what is left at the end."""
        fk, shape = self._fk, previous.log_weights.shape
        device = previous.log_weights.device
        found = torch.zeros(shape, dtype=torch.int64, device=device)
        open_ = torch.ones(shape, dtype=torch.bool, device=device)
        for _ in range(self.trials):
            rows = torch.rand((shape[0] + 1,) + shape[1:], dtype=torch.float64, device=device)
            # sorted draws, dealt in random order, are independent of the particle that tries them
            trial = multinomial(previous.weights, rows).gather(0, torch.rand(shape, device=device).argsort(0))
            log_ratio = fk.log_backward(k, take(previous.particles, trial, shape[1:]), particles) - self.log_bound
            if bool((log_ratio > 1e-3).any()):
                raise ValueError(
                    f"OnlineSmoothing: `log_bound` is {self.log_bound}, but a log transition density at step {k} is "
                    f"{float(log_ratio.max()) + self.log_bound:.4g}. Give an upper bound, or leave `log_bound` out"
                )
            accepted = open_ & (torch.rand(shape, device=device).log() < log_ratio)
            found = torch.where(accepted, trial, found)
            open_ = open_ & ~accepted
            if not bool(open_.any()):
                return found
        left = open_.reshape(shape[0], -1).any(1).nonzero()[:, 0]  # particles with a series still open
        rest = backward_indices(fk, previous, tree_map(lambda x: x[left], particles), k, 1)[0]
        found[left] = torch.where(open_[left], rest, found[left])
        return found
