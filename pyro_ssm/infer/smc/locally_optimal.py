"""The locally optimal proposal of models with Gaussian motion and linear-Gaussian observations."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor

from pyro_ssm.components import Affine, AffineGaussian, Gaussian, require
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.smc.build import Kernel, Proposed, process
from pyro_ssm.infer.smc.draws import shared_moments
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.model_steps import ModelSteps, StateParticles, check_model_and_data
from pyro_ssm.infer.smc.step_index import StepIndex
from pyro_ssm.models.linear_gaussian import over_time
from pyro_ssm.ops.kalman import HALF_LOG_2PI, matvec, update, without_hidden_rows

__all__ = ["conditional", "given_observation", "locally_optimal"]

_METHOD, _INSTEAD = "locally_optimal", "bootstrap, guided or auxiliary"


def conditional(
    mean: Tensor, root: Tensor, emission: Affine, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One exact update: the law of z given y = H z + d + R e, and the log density of y.

    .. math:: p(z \\mid y) = N(m', L' L'^T), \\qquad \\log p(y) = \\log N(y; H m + d, H L L^T H^T + R R^T)

    Missing rows are integrated out and add exactly 0. All leading dims broadcast; a root that particles share is
    updated once.

    Args:
        mean: ``(..., n)``.
        root: ``(..., n, n)``, lower triangular.
        emission: its matrices.
        value: ``(..., obs)``.
        mask: bool, as ``value``; None where all is seen.

    Returns:
        ``m'``, ``L'`` and the log density ``(...)``.

    >>> import torch
    >>> from pyro_ssm.components import Affine
    >>> from pyro_ssm.infer.smc.locally_optimal import conditional
    >>> one = torch.ones(1, 1)
    >>> mean, root, _ = conditional(torch.zeros(1), one, Affine(one, one[0] * 0, one), 2 * one[0], one[0] > 0)
    >>> mean, root ** 2
    (tensor([1.]), tensor([[0.5000]]))
    """
    y, H, d, R = (value, *emission) if mask is None else without_hidden_rows(mask, value, *emission)
    mean, root, e, s = update(mean, root, y - matvec(H, mean) - d, H, R)
    terms = -0.5 * e.square() - s.log() - HALF_LOG_2PI
    if mask is None:
        return mean, root, terms.sum(-1)
    return mean, root, torch.where(mask, terms, torch.zeros((), dtype=terms.dtype, device=terms.device)).sum(-1)


def locally_optimal(model: Any, data: TimeSeries) -> FeynmanKac:
    """The Feynman-Kac process that proposes from the exact law of the next state given the next observation.

    .. math:: M_k = p(z_k \\mid z_{k-1}, y_k), \\qquad G_k = p(y_k \\mid z_{k-1})

    Among the proposals that see no further than :math:`y_k` it has the least variance of weights. The motion may be
    any Gaussian law (nonlinear in the state), the observation must be linear in the state; missing entries are
    integrated out. A scale that all particles share costs one matrix factorisation a step, one that depends on the
    state costs one a particle.

    Args:
        model: with ``Gaussian`` initial law and transition and ``AffineGaussian`` emission; bound, or without random
            parameters.
        data: with values.

    Raises:
        TypeError: a component lacks the capability.
        ValueError: as :func:`~pyro_ssm.infer.smc.bootstrap`.

    Source: Doucet, Godsill and Andrieu (2000), section II.D.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.GatedTransition(2, 8), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> ssm.infer.particle_filter(ssm.infer.locally_optimal(model, data), num_particles=100).log_likelihood.shape
    torch.Size([3, 4])
    """
    check_model_and_data(model, data, _METHOD)
    require(model.initial, Gaussian, _METHOD, _INSTEAD)
    require(model.transition, Gaussian, _METHOD, _INSTEAD)
    require(model.emission, AffineGaussian, _METHOD, _INSTEAD)
    if model.memory is not None:
        raise TypeError(
            f"{_METHOD} conditions the state on an observation before the memory ({type(model.memory).__name__}) has "
            f"seen it. Use {_INSTEAD}"
        )
    steps = ModelSteps(model, data, _METHOD)

    def propose(k: StepIndex, state: Tensor | None, summary: Tensor | None) -> Proposed:
        prior = steps.law(k, state, summary)
        if steps.is_unobserved(k):
            return Proposed(prior)
        mean, root, weight = given_observation(steps, k, prior)
        return Proposed(MultivariateNormal(mean, scale_tril=root, validate_args=False), weight)

    kernel = Kernel(steps, propose)

    def log_potential(k: StepIndex, previous: StateParticles | None, particles: StateParticles) -> Tensor:
        state, before = particles.state, None if previous is None else previous.state
        weight = kernel.begin(k, previous, state.shape[:-2]).proposed.log_weight
        timing = steps.log_times(k, before, state)
        return timing.expand(state.shape[:-2]) if weight is None else weight + timing

    return process(steps, kernel, log_potential, steps.seen)


def given_observation(steps: ModelSteps, k: StepIndex, prior: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of the state given the observation at k, ``(N, *batch, 1, ...)``, and its log density ``(N, *batch)``.

    >>> from pyro_ssm.infer.smc.locally_optimal import given_observation
    >>> given_observation.__name__
    'given_observation'
    """
    mean, root = shared_moments(prior)
    emission = over_time(steps.affine_emission(k, None))
    mean, root, weight = conditional(mean, root, emission, *steps.observation(k))
    return mean, root, weight.squeeze(-1)
