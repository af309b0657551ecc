"""How variable the estimates are, from one run: families of particles that descend from one ancestor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.infer.smc.collectors.base import Collector
from pyro_ssm.infer.smc.collectors.fixed_lag import require_ancestors
from pyro_ssm.infer.smc.collectors.moments import weighted_mean
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.stepper import Step
from pyro_ssm.infer.smc.tree import take

__all__ = ["EvidenceVariance", "MeanVariance"]


class _Families(Collector):
    """Each particle's ancestor at each of the last ``lag`` steps, or at the first step only (lag None)."""

    def __init__(self, lag: int | None, name: str) -> None:
        if lag is not None and lag < 1:
            raise ValueError(f"`lag` must be at least 1, or None for the whole past, got {lag}")
        self.lag, self.name = lag, name

    def start(self, fk: FeynmanKac, num_particles: int) -> None:
        self._fk, self._num = fk, num_particles
        self._origins: list[Tensor] = []  # oldest first, each (N, *batch)
        self._times: list[Tensor] = []  # how often a series was resampled since then, (*batch)

    def _follow(self, step: Step) -> None:
        require_ancestors(self, step)
        if step.ancestors is not None:
            self._origins = take(self._origins, step.ancestors, self._fk.batch_shape)
            self._times = [times + torch.as_tensor(step.resampled, device=times.device) for times in self._times]
        if self.lag is None and self._origins:
            return
        if self.lag is not None and len(self._origins) > self.lag:
            self._origins.pop(0)
            self._times.pop(0)
        shape = step.weights.shape
        itself = torch.arange(self._num, device=step.weights.device).reshape((-1,) + (1,) * (len(shape) - 1))
        self._origins.append(itself.expand(shape))
        self._times.append(torch.zeros(shape[1:], device=step.weights.device))

    def _sums(self, values: Tensor, origins: Tensor) -> Tensor:
        """Sums of ``values`` ``(N, *batch, m)`` over families."""
        index = origins.unsqueeze(-1).expand(values.shape)
        return torch.zeros_like(values, dtype=torch.float64).scatter_add_(0, index, values.double())

    def _relative(self, weights: Tensor, origins: Tensor, times: Tensor) -> Tensor:
        """Lee and Whiteley's estimate of the relative variance of the evidence since the origins, ``(*batch,)``."""
        squares = self._sums(weights.unsqueeze(-1), origins).square().sum(0).squeeze(-1)
        growth = (1 + times.double()) * -torch.log1p(torch.tensor(-1.0 / self._num, dtype=torch.float64))
        return 1 - growth.exp() * (1 - squares)


class EvidenceVariance(_Families):
    """The variance of the log evidence, estimated from the very run, after each step: ``(*batch, time)``.

    .. math::
        V_k = 1 - \\left(\\frac{N}{N-1}\\right)^{r_k + 1} \\left(1 - \\sum_e S_e^2\\right), \\qquad
        S_e = \\sum_{n : E_n = e} W_k^n

    where :math:`E_n` is the first ancestor of particle n and :math:`r_k` counts resamplings. :math:`V_k
    \\hat p(y_{\\le k})^2` is unbiased for the variance of :math:`\\hat p(y_{\\le k})` under multinomial resampling at
    every step; with adaptive resampling it is consistent; after systematic or stratified resampling, whose variance is
    smaller, it errs on the large side. When few first ancestors are left it breaks down (V tends to 1): then give a
    ``lag``. The variance is then the sum over steps of what each adds, seen through ancestors at most ``lag`` steps
    back, with a small bias for a filter that forgets.

    Args:
        lag: steps; None goes back to the first step.
        name: of the result.

    Raises:
        ValueError: a lag below 1; or, in a run, a resampling without ancestors, or fewer than two particles.

    Source: Lee and Whiteley (2018), "Variance estimation in the particle filter", Biometrika 105, section 3; for the
    lag, the idea of Olsson and Douc (2019), "Numerically stable online estimation of variance in particle filters",
    Bernoulli 25, applied to the increments of the log evidence.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.LinearNormal(1), ssm.emissions.LinearNormal(1, 1))
    >>> fk = ssm.infer.bootstrap(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> variance = ssm.infer.smc.EvidenceVariance()
    >>> run = ssm.infer.particle_filter(fk, 100, resampling="multinomial", collectors=[variance])
    >>> run.collected["evidence_variance"].shape
    torch.Size([3, 4])
    """

    def __init__(self, lag: int | None = None, name: str = "evidence_variance") -> None:
        super().__init__(lag, name)

    def start(self, fk: FeynmanKac, num_particles: int) -> None:
        super().start(fk, num_particles)
        if num_particles < 2:
            raise ValueError("EvidenceVariance needs at least two particles")
        self._total: Tensor | None = None
        self._before: list[Tensor] = []  # V since each origin, after the last step
        self._found: list[Tensor] = []

    def collect(self, step: Step) -> None:
        if self.lag is not None and len(self._origins) > self.lag:
            self._before.pop(0)
        self._follow(step)
        now = [self._relative(step.weights, *pair) for pair in zip(self._origins, self._times, strict=True)]
        # what this step adds, seen from the oldest origin; the newest one has no step before
        added = now[0] if self._total is None else now[0] - self._before[0]
        if self._total is not None and self._fk.step_mask is not None:
            added = torch.where(self._fk.step_mask[..., step.k], added, torch.zeros_like(added))
        self._total = added if self._total is None else self._total + added
        self._before = now
        self._found.append(self._total)

    def result(self) -> Tensor:
        return torch.stack(self._found, -1).to(torch.get_default_dtype())


class MeanVariance(_Families):
    """The Monte Carlo variance of the filtered mean of f, from one run: ``(*batch, time, m)``.

    .. math:: V_k = \\sum_e \\left( \\sum_{n : E_n = e} W_k^n\\, (f(x_k^n) - \\bar f_k) \\right)^2

    with :math:`E_n` the ancestor of particle n at most ``lag`` steps back. A short lag leaves out the variance that
    older resamplings passed on, a long one is noisy since ancestors coalesce; 10 to 20 steps suit a filter that forgets
    in a few.

    Args:
        lag: steps; None goes back to the first step (Chan and Lai 2013; Lee and Whiteley 2018).
        function: f, ``particles -> (N, *batch, m)``; default the state.
        name: of the result.

    Raises:
        ValueError: a lag below 1; or, in a run, a resampling without ancestors.

    Source: Olsson and Douc (2019), section 4.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> fk = ssm.infer.bootstrap(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> run = ssm.infer.particle_filter(fk, 100, collectors=[ssm.infer.smc.MeanVariance(lag=10)])
    >>> run.collected["mean_variance"].shape
    torch.Size([3, 4, 2])
    """

    def __init__(
        self,
        lag: int | None = 15,
        function: Callable[[Any], Tensor] | None = None,
        name: str = "mean_variance",
    ) -> None:
        super().__init__(lag, name)
        self.function = function

    def start(self, fk: FeynmanKac, num_particles: int) -> None:
        super().start(fk, num_particles)
        self._of = self.function or fk.state
        self._found: list[Tensor] = []

    def collect(self, step: Step) -> None:
        self._follow(step)
        values = self._of(step.cloud.particles)
        weighed = step.weights.unsqueeze(-1) * (values - weighted_mean(step.weights, values))
        self._found.append(self._sums(weighed, self._origins[0]).square().sum(0).to(values.dtype))

    def result(self) -> Tensor:
        return torch.stack(self._found, -2)
