"""`particle_filter`: a process run to its end, for a batch of series at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.infer.smc.check import (
    check_arguments,
    check_evidence,
    check_fraction,
    check_states,
    explained,
    warn_of_collapse,
    warn_of_look_ahead,
)
from pyro_ssm.infer.smc.collectors.base import Collector
from pyro_ssm.infer.smc.compiled_run import compiled_run
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.graph_run import captured_run
from pyro_ssm.infer.smc.noise import Noise, PseudoRandom, QuasiRandom
from pyro_ssm.infer.smc.resample import OrderedResampling, Resampling, resampling_of
from pyro_ssm.infer.smc.stepper import Cloud, Stepper

__all__ = ["ParticleFiltered", "particle_filter"]


class ParticleFiltered(NamedTuple):
    """What :func:`particle_filter` returns.

    >>> from pyro_ssm.infer import ParticleFiltered
    >>> ParticleFiltered._fields
    ('log_likelihood', 'cloud', 'ess', 'resampled', 'collected')
    """

    log_likelihood: Tensor  # (*batch, time)  log p(y_k | y_<k), estimated; exactly 0 at padding and where G_k = 1
    cloud: Cloud  # after the last step; a series that has ended keeps its last one
    ess: Tensor  # (*batch, time)  effective sample size after each step, 1 to N
    resampled: Tensor  # bool (*batch, time)  whether the series was resampled before the step
    collected: dict[str, Any]  # by the collectors' names

    @property
    def exact(self) -> bool:
        """False: the likelihood is an estimate, unbiased for :math:`p(y)`, not for its logarithm."""
        return False

    @property
    def total(self) -> Tensor:
        """The log of the estimated likelihood of each series ``(*batch,)``."""
        return self.log_likelihood.sum(-1)


def particle_filter(
    fk: FeynmanKac,
    num_particles: int | None = None,
    *,
    resampling: str | Resampling = "systematic",
    ess_threshold: float = 0.5,
    collectors: Sequence[Collector] = (),
    noise: Noise | None = None,
    quasi_random: bool = False,
    start: Cloud | None = None,
    differentiable: bool = False,
    cuda_graph: bool = False,
) -> ParticleFiltered:
    """Run a particle filter over all series of a batch together.

    .. math:: \\hat p(y_{1:T}) = \\prod_k \\sum_n W_{k-1}^n\\, G_k(x_{k-1}^n, x_k^n), \\qquad E\\, \\hat p(y) = p(y)

    Each series is resampled when its own effective sample size falls below ``ess_threshold * num_particles``. Memory
    does not grow with time, but for two numbers a series and step, and what collectors keep. The estimate is unbiased
    for the likelihood; its logarithm lies below in expectation, by about half its variance.

    Args:
        fk: the process: ``bootstrap(model, data)``, ``guided(...)``, ``locally_optimal(...)``, ``auxiliary(...)``,
            ``rao_blackwellised(...)``, or one made by hand.
        num_particles: N; may be left out with ``start``.
        resampling: ``"systematic"``, ``"stratified"``, ``"multinomial"``, ``"residual"``, ``"ssp"``, ``"killing"``, one
            of them after ``"hilbert-"``, or a :class:`~pyro_ssm.infer.smc.Resampling`.
        ess_threshold: fraction of N; 0 never resamples (importance sampling), 1 always does.
        collectors: what to record along the way: see :mod:`pyro_ssm.infer.smc`.
        noise: what to draw from; default torch's global generator. A :class:`~pyro_ssm.infer.smc.FixedNoise` repeats
            a run.
        quasi_random: sequential quasi-Monte Carlo: Sobol' points instead of independent draws, ordered along Hilbert's
            curve, with resampling at every step. Needs laws that are maps of uniforms (Gaussian ones); best with N a
            power of 2 and few state dimensions.
        start: a cloud to go on from, left by an earlier run over the beginning of the same data: steps after
            ``start.k`` are run, and the results have these times only.
        differentiable: keep the graph: gradients flow through the reparametrised draws and the weights, and the choice
            of ancestors counts as fixed. That is the exact gradient of the estimate without resampling, and the usual
            biased one (Maddison et al. 2017; Naesseth et al. 2018; Le et al. 2018) with it. Memory then grows with
            time.
        cuda_graph: capture the step in a CUDA graph and replay it, so that a step costs one launch: for models and
            data on a CUDA device, where many small kernels take longer to launch than to run. The numbers are those
            of the run without it, given the same noise; ``PseudoRandom`` draws others. Components see tensors only and
            need nothing; functions that get ``k`` (a process or a proposal made by hand) get an int64 tensor ``(1,)``
            from step 1 on: ``y[k]`` keeps an axis of 1 in place of particles. Laws do not validate their arguments in
            a captured step.

    Returns:
        :class:`ParticleFiltered`.

    Raises:
        ValueError: at a step all weights of a series are 0, or a law returned NaN (the message names both); arguments
            out of range; two collectors of one name.
        TypeError: an argument of another kind than wanted, or with ``quasi_random`` or ``FixedNoise`` a law that is no
            map of the noise, or with ``cuda_graph`` noise that must know the step.
        RuntimeError: with ``cuda_graph``, a step looks at values on the device, or ``k`` is used as a number.

    Warns:
        ParticleCollapseWarning: an effective sample size below 2 of 100 or more particles.

    Randomness: torch's global generator. Source: Chopin and Papaspiliopoulos (2020), "An introduction to sequential
    Monte Carlo", chapters 10 and 13.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> moments = ssm.infer.smc.Moments()
    >>> found = ssm.infer.particle_filter(ssm.infer.bootstrap(model, data), num_particles=100, collectors=[moments])
    >>> found.log_likelihood.shape, found.ess.shape, found.collected["moments"].mean.shape
    (torch.Size([3, 4]), torch.Size([3, 4]), torch.Size([3, 4, 2]))
    """
    check_arguments(fk, num_particles, noise, collectors)
    num_particles = _number(num_particles, start, fk)
    check_fraction(ess_threshold)
    names = [collector.name for collector in collectors]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"`collectors` has two of the name {twice}: give one of them another `name`")
    if quasi_random:
        if noise is not None or resampling != "systematic":
            raise ValueError("`quasi_random` brings its own noise and resampling: leave `noise` and `resampling` out")
        noise, resampling, ess_threshold = QuasiRandom(), OrderedResampling(), 1.0
    if cuda_graph and differentiable:
        raise ValueError(
            "`cuda_graph=True` replays a step without a graph for gradients: leave it out, or `differentiable`"
        )
    warn_of_look_ahead(fk, ess_threshold)
    resampling, noise = resampling_of(resampling), noise or PseudoRandom()

    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        noise.restart(None if start is None else fk.state(start.particles).shape[-1])
        run = None
        if cuda_graph:
            run = captured_run(fk, num_particles, resampling, ess_threshold, noise, start, collectors)
        elif start is None:
            run = compiled_run(fk, num_particles, resampling, ess_threshold, noise, collectors)
            if run is None:
                noise.restart()
        first = 0 if start is None else start.k + 1
        if run is not None:
            check_evidence(fk, run.log_likelihood, first)
            check_states(fk, run.cloud)
            warn_of_collapse(fk, run.ess, num_particles, first)
            collected = {collector.name: collector.result() for collector in collectors}
            return ParticleFiltered(run.log_likelihood, run.cloud, run.ess, run.resampled, collected)
        stepper = Stepper(fk, num_particles, resampling, ess_threshold, noise)
        for collector in collectors:
            collector.start(fk, num_particles)
        increments, sizes, resampled = [], [], []
        step = None
        for _ in range(first, fk.num_times):
            if step is None:
                begin = stepper.init if start is None else partial(stepper.step, stepper.resume(start))
                step = explained(fk, begin)
            else:
                step = explained(fk, partial(stepper.step, step))
            increments.append(step.log_likelihood)
            sizes.append(step.ess)
            resampled.append(step.resampled)
            for collector in collectors:
                collector.collect(step)
        log_likelihood, ess = torch.stack(increments, -1), torch.stack(sizes, -1)
        check_evidence(fk, log_likelihood, first)
        check_states(fk, step.cloud)
        if not differentiable:
            warn_of_collapse(fk, ess, num_particles, first)
        return ParticleFiltered(
            log_likelihood,
            step.cloud,
            ess.detach(),
            _flags(resampled, ess),
            {collector.name: collector.result() for collector in collectors},
        )


def _flags(resampled: list[Tensor | bool], ess: Tensor) -> Tensor:
    """bool, of the shape of ``ess`` ``(*batch, time)``."""
    if not any(isinstance(flag, Tensor) for flag in resampled):
        return torch.tensor(resampled, device=ess.device).expand(ess.shape).contiguous()
    batch = ess[..., 0]
    flags = [flag if isinstance(flag, Tensor) else torch.full_like(batch, flag, dtype=torch.bool) for flag in resampled]
    return torch.stack([flag.expand(batch.shape) for flag in flags], -1)


def _number(num_particles: int | None, start: Cloud | None, fk: FeynmanKac) -> int:
    if start is not None:
        if not isinstance(start, Cloud):
            raise TypeError(
                f"`start` must be a Cloud, such as the `cloud` of an earlier run's result, got {type(start).__name__}"
            )
        if num_particles not in (None, start.num_particles):
            raise ValueError(f"`start` has {start.num_particles} particles, `num_particles` is {num_particles}")
        if not 0 <= start.k < fk.num_times - 1:
            raise ValueError(
                f"`start` is the cloud after step {start.k}, and `fk` has {fk.num_times} steps: none is left"
            )
        return start.num_particles
    if num_particles is None:
        raise ValueError("`num_particles` must be at least 1, got None: give it, or `start`, a cloud to go on from")
    return int(num_particles)
