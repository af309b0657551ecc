"""The gradient of the log-likelihood by Fisher's identity: densities are differentiated, draws are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import SampleOnly
from pyro_ssm.data import TimeSeries
from pyro_ssm.dynamics.timed import refuse_intensity
from pyro_ssm.infer.smc.bootstrap import bootstrap
from pyro_ssm.infer.smc.collectors.genealogy import Ancestry, Genealogy
from pyro_ssm.infer.smc.densities import log_density
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.filter import ParticleFiltered, particle_filter
from pyro_ssm.infer.smc.model_steps import ModelSteps
from pyro_ssm.infer.smc.noise import Noise
from pyro_ssm.infer.smc.resample import Resampling
from pyro_ssm.models.laws import history, observation_law, path_law

__all__ = ["FisherScore", "fisher_score"]

METHODS = ("backward", "path")


class FisherScore(NamedTuple):
    """What :func:`fisher_score` returns.

    >>> from pyro_ssm.infer.smc import FisherScore
    >>> FisherScore._fields
    ('log_likelihood', 'filtered')
    """

    log_likelihood: Tensor  # (*batch,)  the filter's estimate; its *gradient* is the estimated score
    filtered: ParticleFiltered  # the run it rests on, without gradient


def fisher_score(
    model: Any,
    data: TimeSeries,
    num_particles: int,
    *,
    method: str = "backward",
    build: Callable[[Any, TimeSeries], FeynmanKac] = bootstrap,
    resampling: str | Resampling = "systematic",
    ess_threshold: float = 0.5,
    noise: Noise | None = None,
) -> FisherScore:
    """Estimate the log-likelihood of each series and its gradient, the score, from one particle filter.

    .. math::
        \\nabla_\\theta \\log p_\\theta(y) = E\\left[ \\nabla_\\theta \\log p_\\theta(z_{1:T}, y) \\mid y \\right]
        \\approx \\sum_n \\Omega^n\\, \\nabla_\\theta \\log p_\\theta(z^n_{1:T}, y)

    The particles count as given numbers: proposal and resampling need no gradient, and draws need not be
    reparameterised. ``"path"`` takes the ancestral paths and their final weights: of order N, for every model with
    densities, memory included, with a variance that grows with the square of time (early states are those of few
    ancestors). ``"backward"`` weighs every pair of particles of neighbouring steps by the backward kernel (the
    marginals of forward filtering, backward smoothing): of order N times N a step, in memory too, with a variance that
    grows linearly with time.

    Args:
        model: a :class:`~pyro_ssm.models.StateSpaceModel`, bound, or without random parameters. What requires a
            gradient in it gets one: ``torch.autograd.grad(found.log_likelihood.sum(), list(model.parameters()))``.
        data: with values.
        num_particles: N.
        method: ``"backward"`` or ``"path"``.
        build: ``(bound model, data) -> FeynmanKac``, over the states of the model (not ``rao_blackwellised``).
        resampling: by ancestors, as for :func:`~pyro_ssm.infer.particle_filter`.
        ess_threshold: as for ``particle_filter``.
        noise: as for ``particle_filter``.

    Returns:
        :class:`FisherScore`.

    Raises:
        ValueError: an unknown method; ``"backward"`` for a model with memory; as ``particle_filter``.
        TypeError: the transition has no density.

    Gradient: the estimated score is biased for finite N (a ratio of estimates; of order 1 / N) and consistent. It has
    no second derivative.

    Source: O. Cappe, E. Moulines, T. Ryden (2005), "Inference in hidden Markov models", chapter 10; G. Poyiadjis, A.
    Doucet, S. Singh (2011), "Particle approximations of the score and observed information matrix in state space models
    with application to parameter estimation", Biometrika 98.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> found = ssm.infer.smc.fisher_score(model, data, num_particles=50)
    >>> found.log_likelihood.sum().backward()
    >>> model.transition.matrix.grad.shape
    torch.Size([2, 2])
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}, got {method!r}")
    if isinstance(model.transition, SampleOnly):
        raise TypeError(
            f"fisher_score differentiates the transition's density; {type(model.transition).__name__} is SampleOnly. "
            "Use particle_filter(..., differentiable=True) with reparameterised draws"
        )
    refuse_intensity(model.transition, "fisher_score")
    bound = model.bind()
    with torch.no_grad():
        fk = build(bound, data)
        if method == "backward" and fk.log_backward is None:
            raise ValueError(
                "method='backward' needs a backward kernel, and this process has none (a memory, or an integrated "
                "part). Use method='path'"
            )
        filtered = particle_filter(
            fk,
            num_particles,
            resampling=resampling,
            ess_threshold=ess_threshold,
            noise=noise,
            collectors=[Genealogy()],
        )
    ancestry = filtered.collected["genealogy"]
    weigh = _pairs if method == "backward" else _paths
    joint = weigh(bound, data, fk, ancestry)
    return FisherScore(filtered.total + (joint - joint.detach()), filtered._replace(collected={}))


def _paths(bound: Any, data: TimeSeries, fk: FeynmanKac, ancestry: Ancestry) -> Tensor:
    """sum_n W_n log p(z^n, y) over ancestral paths."""
    paths, run = ancestry.paths(), history(bound, data)
    joint = path_law(bound, data, run).log_prob(paths)
    joint = joint + observation_law(bound, data, paths, run).log_prob(data.values)
    return (ancestry.clouds[-1].weights * joint).sum(0)


def _pairs(bound: Any, data: TimeSeries, fk: FeynmanKac, ancestry: Ancestry) -> Tensor:
    """E log p(z, y) under the smoothed marginals of pairs (z_{k-1}, z_k), from the last step backwards."""
    steps = ModelSteps(bound, data, "fisher_score")
    states = ancestry.states.unsqueeze(-2)  # (time, N, *batch, 1, state)
    weights = ancestry.clouds[-1].weights  # of the cloud at k, given all data
    total = weights.new_zeros(())
    for k in range(len(states) - 1, 0, -1):
        seen = (weights * steps.log_observation(k, states[k], None)).sum(0)
        moved = log_density(steps.law(k, states[k - 1].unsqueeze(1), None), states[k].unsqueeze(0))
        given = ancestry.clouds[k - 1].log_weights.unsqueeze(1) + moved.detach()
        pairs = given.softmax(0) * weights  # P(z_{k-1} = i, z_k = j | y)
        terms, earlier = (pairs * moved).sum((0, 1)), pairs.sum(1)
        if fk.step_mask is not None:  # a series that has ended keeps its last cloud
            alive = fk.step_mask[..., k]
            terms = torch.where(alive, terms, torch.zeros_like(terms))
            earlier = torch.where(alive, earlier, weights)
        total, weights = total + seen + terms, earlier
    first = log_density(steps.law(0, None, None), states[0]) + steps.log_observation(0, states[0], None)
    return total + (weights * first).sum(0)
