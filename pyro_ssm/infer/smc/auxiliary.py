"""The auxiliary particle filter: resampling that looks one observation ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.components import AffineGaussian, Gaussian
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.smc.bootstrap import bootstrap
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.locally_optimal import given_observation
from pyro_ssm.infer.smc.model_steps import ModelSteps, StateParticles
from pyro_ssm.infer.smc.step_index import StepIndex, row

__all__ = ["auxiliary"]


def auxiliary(
    model: Any,
    data: TimeSeries,
    first_stage: Callable[[Any, Tensor], Tensor] | None = None,
    *,
    base: FeynmanKac | None = None,
) -> FeynmanKac:
    """A Feynman-Kac process whose particles are resampled by how well they predict the next observation.

    .. math:: P(a_n = i) \\propto W_i\\, \\eta_k(z_k^i), \\qquad \\eta_k(z_k) \\approx p(y_{k+1} \\mid z_k), \\qquad
        w_n \\propto \\frac{1}{\\eta_k(z_k^{a_n})}

    The evidence stays unbiased whatever :math:`\\eta` is, and the weights that are reported are those of the filter.
    It helps where an observation is surprising and the motion small; where :math:`\\eta` has lighter tails than the
    predictive density it can hurt.

    Args:
        model: a :class:`~pyro_ssm.models.StateSpaceModel`, bound, or without random parameters.
        data: with values.
        first_stage: ``(k, state) -> (N, *batch)``, an estimate of :math:`\\log p(y_{k+1} \\mid z_k)` up to a constant,
            of ``state`` ``(N, *batch, state)``. By default the exact one where motion is ``Gaussian`` and observation
            ``AffineGaussian``, and else the observation's density at the mean of the next state.
        base: how particles move, built from the same model and data; default :func:`bootstrap`. With
            :func:`locally_optimal` and the exact first stage the filter is fully adapted.

    Raises:
        ValueError: ``base`` has a twist already; and as :func:`bootstrap`.

    Source: Pitt and Shephard (1999), "Filtering via simulation: auxiliary particle filters"; Johansen and Doucet
    (2008), "A note on auxiliary particle filters".

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> ssm.infer.particle_filter(ssm.infer.auxiliary(model, data), num_particles=100).log_likelihood.shape
    torch.Size([3, 4])
    """
    base = bootstrap(model, data) if base is None else base
    if base.log_twist is not None:
        raise ValueError("`base` has a twist already; auxiliary would put another in its place. Leave one of them out")
    steps = ModelSteps(model, data, "auxiliary")
    seen = steps.seen
    exact = isinstance(model.transition, Gaussian) and isinstance(model.emission, AffineGaussian)
    exact = exact and model.memory is None

    def predictive(k: StepIndex, particles: StateParticles) -> Tensor:
        """log p(y_k | z_{k-1}), exact or at the mean of z_k."""
        carry, summary = steps.before(k, particles, particles.state.shape[:-2])
        law = steps.law(k, particles.state, summary)
        if exact:
            return given_observation(steps, k, law)[2]
        mean = law.mean.expand(particles.state.shape)
        return steps.log_observation(k, mean, steps.particles(k, carry, summary, mean).summary)

    def log_twist(k: StepIndex, particles: StateParticles) -> Tensor:
        if steps.is_unobserved(k + 1):
            return particles.state.new_zeros(particles.state.shape[:-2])
        if first_stage is None:
            ahead = predictive(k + 1, particles)
        else:
            ahead = first_stage(k, particles.state.squeeze(-2))
        return torch.where(row(seen, k + 1), ahead, torch.zeros((), dtype=ahead.dtype, device=ahead.device))

    return replace(base, log_twist=log_twist)
