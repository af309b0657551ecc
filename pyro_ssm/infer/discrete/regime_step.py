"""One Kalman step given the regime: the piece under Rao-Blackwellised particles and the Kim and IMM filters."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.blocks._tables import pick
from pyro_ssm.components import Affine
from pyro_ssm.infer.discrete.switching_system import SwitchingStep, SwitchingSystem
from pyro_ssm.ops.kalman import hide_rows, predict, update
from pyro_ssm.ops.linalg import tria

__all__ = ["RegimeCarry", "collapse", "condition", "regime_log_probs", "regime_start", "regime_step"]

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class RegimeCarry(NamedTuple):
    """The law of x given the observations so far and one path of regimes, of which only the last is kept.

    >>> from pyro_ssm.infer.discrete import RegimeCarry
    >>> RegimeCarry._fields
    ('mean', 'scale_tril', 'regime')
    """

    mean: Tensor  # (*particles, *batch, n)
    scale_tril: Tensor  # (*particles, *batch, n, n)
    regime: Tensor  # (*particles, *batch)  whole numbers


def condition(mean: Tensor, scale_tril: Tensor, emission: Affine, values: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The Kalman update by what is seen: log weight ``(...)``, mean and root. What is missing adds exactly 0."""
    H, d, R = emission
    y = values
    if not bool(mask.all()):
        lead = torch.broadcast_shapes(H.shape[:-2], d.shape[:-1], R.shape[:-2], values.shape[:-1])
        shown = mask.expand(lead + mask.shape[-1:])
        H, d, R = H.expand(lead + H.shape[-2:]), d.expand(lead + d.shape[-1:]), R.expand(lead + R.shape[-2:])
        y, H, d, R = hide_rows(shown, y.expand(lead + y.shape[-1:]), H, d, R)
        mask = shown
    m, L, e, s = update(mean, scale_tril, y - (H @ mean.unsqueeze(-1)).squeeze(-1) - d, H, R)
    terms = -0.5 * e.square() - s.log() - HALF_LOG_2PI
    zero = torch.zeros((), dtype=terms.dtype, device=terms.device)
    return torch.where(mask, terms, zero).sum(-1), m, L


def regime_start(system: SwitchingSystem, regime: Tensor) -> tuple[Tensor, RegimeCarry]:
    """The first step of a particle in ``regime``: its law of x given the first observation.

    .. math:: \\log p(y_1 \\mid s_1), \\qquad p(x_1 \\mid s_1, y_1)

    Args:
        system: of :func:`switching_system`.
        regime: whole numbers ``(*particles, *batch)``, drawn from ``system.log_initial`` or a proposal.

    Returns:
        The log weight ``(*particles, *batch)`` (without :math:`\\log P(s_1)`), and the carry.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.discrete import regime_start, switching_system
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.SwitchingInitial(ssm.dynamics.CategoricalInitial(2), [ssm.dynamics.NormalInitial(1)] * 2),
    ...     ssm.dynamics.SwitchingLinear(ssm.dynamics.MarkovChain(2), [ssm.dynamics.LinearNormal(1)] * 2),
    ...     ssm.emissions.SwitchingLinear([ssm.emissions.LinearNormal(1, 1)] * 2))
    >>> system = switching_system(model, ssm.TimeSeries(torch.arange(3.0), torch.zeros(3, 1)))
    >>> regime_start(system, torch.tensor([0, 1, 1]))[0].shape
    torch.Size([3])
    """
    step = system.step(0)
    mean, scale_tril = pick(system.mean, regime, 1), pick(system.scale_tril, regime, 2)
    return _seen(mean, scale_tril, regime, step)


def regime_step(carry: RegimeCarry, new_regime: Tensor, step: SwitchingStep) -> tuple[Tensor, RegimeCarry]:
    """One Kalman step of each particle into its new regime.

    .. math:: \\log p(y_k \\mid s_{1:k}, y_{<k}), \\qquad p(x_k \\mid s_{1:k}, y_{\\le k})

    Exact for models that are not recurrent (a recurrent regime depends on x, which must then stay in the particle). For
    the locally optimal proposal call it with all regimes, ``new_regime = torch.arange(K)`` before the particles' dims:
    the weights of :math:`P(s_k \\mid s_{1:k-1}, y_{\\le k})` are these plus :func:`regime_log_probs`.

    Args:
        carry: of :func:`regime_start` or the step before, resampled with its particle.
        new_regime: whole numbers ``(..., *particles, *batch)``.
        step: ``system.step(k)``: the matrices, the observation and its mask.

    Returns:
        The log weight (without the regime's own probability), and the new carry. Differentiable in all but regimes.

    Source: Doucet, de Freitas, Murphy and Russell (2000), "Rao-Blackwellised particle filtering for dynamic Bayesian
    networks"; Chen and Liu (2000), "Mixture Kalman filters".

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.discrete import regime_start, regime_step, switching_system
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.SwitchingInitial(ssm.dynamics.CategoricalInitial(2), [ssm.dynamics.NormalInitial(1)] * 2),
    ...     ssm.dynamics.SwitchingLinear(ssm.dynamics.MarkovChain(2), [ssm.dynamics.LinearNormal(1)] * 2),
    ...     ssm.emissions.SwitchingLinear([ssm.emissions.LinearNormal(1, 1)] * 2))
    >>> system = switching_system(model, ssm.TimeSeries(torch.arange(3.0), torch.zeros(3, 1)))
    >>> _, carry = regime_start(system, torch.tensor([0, 1, 1]))
    >>> each = torch.arange(2).unsqueeze(-1)      # each particle into each regime
    >>> log_weight, carry = regime_step(carry, each, system.step(1))
    >>> log_weight.shape
    torch.Size([2, 3])
    """
    F, b, Q = (pick(part, new_regime, event) for part, event in zip(step.transition, (2, 1, 2)))
    mean, scale_tril = predict(carry.mean, carry.scale_tril, F, b, Q)
    return _seen(mean, scale_tril, new_regime, step)


def _seen(mean: Tensor, scale_tril: Tensor, regime: Tensor, step: SwitchingStep) -> tuple[Tensor, RegimeCarry]:
    if step.emission is None:
        return mean.new_zeros(mean.shape[:-1]), RegimeCarry(mean, scale_tril, regime.expand(mean.shape[:-1]))
    emission = Affine(*(pick(part, regime, event) for part, event in zip(step.emission, (2, 1, 2))))
    log_weight, mean, scale_tril = condition(mean, scale_tril, emission, step.values, step.mask)
    lead = torch.broadcast_shapes(log_weight.shape, mean.shape[:-1])
    return log_weight.expand(lead), RegimeCarry(
        mean.expand(lead + mean.shape[-1:]), scale_tril.expand(lead + scale_tril.shape[-2:]), regime.expand(lead)
    )


def regime_log_probs(system: SwitchingSystem, k: int, regime: Tensor) -> Tensor:
    """:math:`\\log P(s_k = j \\mid s_{k-1})` for every j, ``(*particles, *batch, K)``; k is at least 1.

    Raises:
        TypeError: the model is recurrent.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.discrete import regime_log_probs, switching_system
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.SwitchingInitial(ssm.dynamics.CategoricalInitial(2), [ssm.dynamics.NormalInitial(1)] * 2),
    ...     ssm.dynamics.SwitchingLinear(ssm.dynamics.MarkovChain(2), [ssm.dynamics.LinearNormal(1)] * 2),
    ...     ssm.emissions.SwitchingLinear([ssm.emissions.LinearNormal(1, 1)] * 2))
    >>> system = switching_system(model, ssm.TimeSeries(torch.arange(3.0), torch.zeros(3, 1)))
    >>> regime_log_probs(system, 1, torch.tensor([0, 1, 1])).exp().detach()[0]
    tensor([0.9000, 0.1000])
    """
    if system.log_transition is None:
        raise TypeError(
            "regime_log_probs needs regimes that do not depend on x, got a recurrent model: integrating x out of its "
            "particles is not exact. Use a bootstrap or guided particle filter on the whole state"
        )
    table = system.log_transition[..., min(k, system.log_transition.shape[-3]) - 1, :, :]
    return pick(table, regime, 1)


def collapse(log_weights: Tensor, mean: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and root of a mixture of Gaussians over the last dim before their events.

    .. math::
        m = \\sum_i w_i m_i, \\qquad L L^T = \\sum_i w_i \\left(L_i L_i^T + (m_i - m)(m_i - m)^T\\right)

    As one orthogonal transformation: no covariance is subtracted.

    Args:
        log_weights: ``(..., I)``, normalised.
        mean: ``(..., I, n)``; scale_tril: ``(..., I, n, n)``.

    >>> import torch
    >>> from pyro_ssm.infer.discrete.regime_step import collapse
    >>> collapse(torch.tensor([0.5, 0.5]).log(), torch.tensor([[-1.0], [1.0]]), torch.zeros(2, 1, 1))
    (tensor([0.]), tensor([[1.0000]]))
    """
    w = log_weights.exp()
    m = (w.unsqueeze(-1) * mean).sum(-2)
    root = w.clamp_min(torch.finfo(w.dtype).tiny).sqrt()[..., None, None]
    away = (mean - m.unsqueeze(-2)).unsqueeze(-1)
    lead = torch.broadcast_shapes(scale_tril.shape[:-2], away.shape[:-2])
    both = torch.cat([scale_tril.expand(lead + scale_tril.shape[-2:]), away.expand(lead + away.shape[-2:])], -1) * root
    return m, tria(both.movedim(-3, -2).flatten(-2))
