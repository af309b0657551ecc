"""Iterated filtering: maximum likelihood by particle filters whose parameters are perturbed."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_ssm.data import TimeSeries
from pyro_ssm.dynamics.timed import refuse_intensity
from pyro_ssm.infer.smc.bootstrap import bootstrap
from pyro_ssm.infer.smc.check import ParticleCollapseWarning
from pyro_ssm.infer.smc.feynman_kac import Draw, FeynmanKac
from pyro_ssm.infer.smc.filter import particle_filter
from pyro_ssm.infer.smc.model_steps import ModelSteps, StateParticles
from pyro_ssm.infer.smc.parameter_likelihood import ParameterLikelihood
from pyro_ssm.infer.smc.posterior_draws import RandomParameters
from pyro_ssm.infer.smc.resume import RunFile, run_settings
from pyro_ssm.ops.resampling import systematic

__all__ = ["IteratedFilteringResult", "iterated_filtering"]

_TRIES = 100  # prior draws from which the swarm starts


class IteratedFilteringResult(NamedTuple):
    """What :func:`iterated_filtering` returns.

    >>> from pyro_ssm.infer import IteratedFilteringResult
    >>> IteratedFilteringResult._fields
    ('model', 'parameters', 'log_likelihood', 'standard_error', 'trace', 'perturbed_log_likelihood')
    """

    model: Any  # bound at the estimate
    parameters: dict[str, Tensor]  # dotted name -> (*event), the estimate
    log_likelihood: Tensor  # (), at the estimate, without perturbations, from repeated particle filters
    standard_error: Tensor  # (), of that estimate
    trace: dict[str, Tensor]  # dotted name -> (iterations + 1, *event), the swarm's middle
    perturbed_log_likelihood: Tensor  # (iterations,), of the perturbed model


@torch.no_grad()
def iterated_filtering(
    model: Any,
    data: TimeSeries,
    num_particles: int = 1000,
    num_iterations: int = 50,
    *,
    perturbation: float | Tensor = 0.02,
    cooling: float = 0.5,
    start: Mapping[str, Any] | None = None,
    num_repeats: int = 10,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
    resume: bool = True,
    progress: bool = True,
) -> IteratedFilteringResult:
    """Maximise the likelihood of any model that can be simulated, by iterated filtering (IF2).

    .. math::
        \\theta_k^n = \\theta_{k-1}^n + \\sigma_{m,k}\\, \\epsilon, \\qquad
        z_k^n \\sim p(z_k \\mid z_{k-1}^n, \\theta_k^n), \\qquad
        w^n = p(y_k \\mid z_k^n, \\theta_k^n), \\qquad
        \\sigma_{m,k} = \\sigma\\, a^{(m + k / K) / 50}

    Each particle carries its own parameters, which walk a little at every time, and are resampled with it by how well
    it explains the data. Each iteration passes through all data with smaller perturbations and begins with the swarm
    that the last one left: the swarm contracts about a maximum of the likelihood. It needs no density of the
    transition and no gradients.

    A batch of series shares its parameters: an iteration runs through one series after the other, and hands the swarm
    on (panel iterated filtering).

    Args:
        model: an unbound :class:`~pyro_ssm.models.StateSpaceModel`. What has a prior (``PyroSample``) is estimated; the
            prior tells where to begin and which values are possible, and is not part of what is maximised.
        data: with values.
        num_particles: of each filter.
        num_iterations: passes through the data.
        perturbation: :math:`\\sigma`, in the unconstrained space of the parameters (for positive ones that of their
            logarithm): a number, or one for each coordinate ``(dim,)``.
        cooling: a, what is left of the perturbations after 50 iterations.
        start: values ``(*event)`` by dotted name to start from; default: a cloud of prior draws.
        num_repeats: particle filters from which the likelihood at the estimate is estimated.
        checkpoint: path of a file with the whole state, written atomically.
        checkpoint_every: iterations between checkpoints.
        resume: go on from ``checkpoint`` if it exists; ``num_iterations`` may have grown.
        progress: show a bar with the log-likelihood.

    Returns:
        :class:`IteratedFilteringResult`. The estimate has Monte Carlo error: compare runs from several starts.

    Raises:
        ValueError: numbers out of range; no particle explains an observation; the checkpoint is of another run.
        TypeError: the model is bound, or a prior discrete.

    Randomness: torch's global generator. Not differentiable. Source: Ionides, Nguyen, Atchade, Stoev and King (2015),
    "Inference for dynamic and latent variable models via iterated, perturbed Bayes maps", PNAS 112; Breto, Ionides and
    King (2020), "Panel data analysis via mechanistic models", J. Amer. Statist. Assoc. 115.

    >>> import torch, pyro.distributions as dist, pyro_ssm as ssm
    >>> from pyro.nn import PyroSample
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.OrnsteinUhlenbeck(1), ssm.emissions.LinearNormal(1, 1))
    >>> model.transition.rate = PyroSample(dist.LogNormal(0.0, 1.0))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(4, 1))
    >>> found = ssm.infer.iterated_filtering(model, data, num_particles=50, num_iterations=3, progress=False)
    >>> found.trace["transition.rate"].shape, found.log_likelihood.shape
    (torch.Size([4]), torch.Size([]))
    """
    for name, value, least in (
        ("num_particles", num_particles, 2),
        ("num_iterations", num_iterations, 1),
        ("num_repeats", num_repeats, 2),
    ):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}")
    if not 0 < cooling <= 1:
        raise ValueError(f"`cooling` must be in (0, 1], got {cooling}")
    likelihood = ParameterLikelihood(model, data, bootstrap, num_particles, keep_paths=False)
    parameters = likelihood.parameters
    sizes = torch.as_tensor(perturbation, dtype=torch.float64, device=data.device)
    if sizes.shape not in ((), (parameters.dim,)) or bool((sizes < 0).any()):
        raise ValueError(
            f"`perturbation` must be a number or ({parameters.dim},), one for each coordinate, and not negative, got "
            f"{tuple(sizes.shape)}"
        )
    settings = run_settings("iterated_filtering", likelihood, perturbation=sizes.tolist(), cooling=cooling)
    file = RunFile(checkpoint, checkpoint_every, settings, resume, data.device)
    saved = file.load()
    if saved is None:
        swarm = _start(likelihood, start)
        trace, totals = [swarm.mean(0)], []
    else:
        swarm, trace, totals = saved["swarm"], saved["trace"], saved["totals"]

    series = [data.series(i) for i in itertools.product(*map(range, data.batch_shape))] if data.batch_shape else [data]
    passes = [PerturbedFilter(parameters, one) for one in series]
    times = sum(one.num_times for one in series)
    with tqdm(
        total=num_iterations, initial=len(totals), desc="iterated_filtering", disable=not progress, dynamic_ncols=True
    ) as bar:
        while len(totals) < num_iterations:
            total, before = 0.0, 0
            for one in passes:
                passed = len(totals) + (before + torch.arange(one.num_times).to(sizes)) / times
                swarm, found = one(swarm, sizes * cooling ** (passed.unsqueeze(-1) / 50))
                total, before = total + found, before + one.num_times
            trace.append(swarm.mean(0))
            totals.append(total)
            bar.set_postfix({"log-likelihood": f"{total:.2f}"}, refresh=False)
            bar.update()
            if file.due(len(totals), num_iterations):
                file.save({"swarm": swarm, "trace": trace, "totals": totals})
    middle = torch.stack(trace[: num_iterations + 1])
    repeats = likelihood(middle[-1].expand(num_repeats, -1)).log_likelihood
    relative = (repeats - repeats.max()).exp()
    traced = parameters.to_values(middle)
    return IteratedFilteringResult(
        parameters.bind(middle[-1], data),
        {name: value[-1] for name, value in traced.items()},
        repeats.max() + relative.mean().log(),
        relative.std() / relative.mean() / math.sqrt(num_repeats),
        traced,
        torch.tensor(totals[:num_iterations], dtype=torch.float64),
    )


def _start(likelihood: ParameterLikelihood, start: Mapping[str, Any] | None) -> Tensor:
    """The first swarm ``(N, dim)``: a given point, or prior draws resampled by their likelihood."""
    parameters, number = likelihood.parameters, likelihood.num_particles
    if start is not None:
        return parameters.start(start, number, "particles")
    drawn = likelihood(parameters.draw(min(_TRIES, number)))
    if not bool(torch.isfinite(drawn.log_likelihood).any()):
        raise ValueError("no draw from the prior explains the data: give `start` values")
    ranks = drawn.log_likelihood.argsort(descending=True)
    better = drawn.vectors[ranks[: max(1, len(ranks) // 4)]]  # a quarter: neither a point nor the whole prior
    return better[torch.arange(number) % len(better)]


class PerturbedFilter:
    """A bootstrap filter of one series whose particles carry their own parameters.

    Args:
        parameters: of the model.
        data: one series.

    >>> from pyro_ssm.infer.smc.perturbed import PerturbedFilter
    >>> PerturbedFilter.__name__
    'PerturbedFilter'
    """

    def __init__(self, parameters: RandomParameters, data: TimeSeries) -> None:
        self.parameters, self.data = parameters, data
        origin = torch.zeros(parameters.dim, dtype=torch.float64, device=data.device)
        self._steps = ModelSteps(parameters.bind(origin, data), data, "iterated_filtering")
        refuse_intensity(self._steps.model.transition, "iterated_filtering")
        self.num_times = self._steps.num_times

    def __call__(self, swarm: Tensor, scales: Tensor) -> tuple[Tensor, float]:
        """The swarm ``(N, dim)`` after all data, perturbed at each time by ``scales`` ``(time, 1 or dim)``; and the
        log-likelihood of the perturbed model.
        """

        def bound(k: int, vectors: Tensor) -> Tensor:
            moved = vectors + scales[k] * torch.randn_like(vectors)
            self._steps.model = self.parameters.bind(moved, self.data)  # one value a particle: their dim is leftmost
            self._steps.memory = self._steps.model.memory
            return moved

        def move(k: int, previous: StateParticles | None, shape: torch.Size, draw: Draw) -> StateParticles:
            carry, summary = self._steps.before(k, previous, shape)
            law = self._steps.law(k, None if previous is None else previous.state, summary)
            return self._steps.particles(k, carry, summary, draw(law, shape + (1,)))

        def initial(draw: Draw, shape: torch.Size) -> tuple[StateParticles, Tensor]:
            vectors = bound(0, swarm)
            return move(0, None, shape, draw), vectors

        def propagate(k: int, previous: tuple[StateParticles, Tensor], draw: Draw) -> tuple[StateParticles, Tensor]:
            vectors = bound(k, previous[1])
            return move(k, previous[0], vectors.shape[:1], draw), vectors

        def log_potential(k: int, previous: Any, particles: tuple[StateParticles, Tensor]) -> Tensor:
            return self._steps.log_observation(k, particles[0].state, particles[0].summary)

        fk = FeynmanKac(
            initial, propagate, log_potential, self.num_times, active=self._steps.seen, describe=self._steps.describe
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ParticleCollapseWarning)  # far from the maximum that is to be expected
            found = particle_filter(fk, len(swarm), ess_threshold=1.0)
        shift = torch.rand(1, dtype=torch.float64, device=swarm.device)
        chosen = systematic(found.cloud.weights, shift)
        return found.cloud.particles[1][chosen], float(found.total)
