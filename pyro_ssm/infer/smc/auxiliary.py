"""The auxiliary particle filter: resampling that looks one observation ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent

from pyro_ssm.components import AffineGaussian, Gaussian
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import RegimeNormal
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
            ``AffineGaussian`` or where the state is finite, and else the observation's density at the mean of the next
            state (of a switching model: in each regime).
        base: how particles move, built from the same model and data; default :func:`bootstrap`. With
            :func:`locally_optimal` and the exact first stage the filter is fully adapted.

    Raises:
        TypeError: ``base`` is no process, or ``first_stage`` no function; in a run, a transition without a mean.
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
    if not isinstance(base, FeynmanKac):
        raise TypeError(
            f"`base` must be a FeynmanKac process, such as bootstrap(model, data), got {type(base).__name__}"
        )
    if first_stage is not None and not callable(first_stage):
        raise TypeError(f"`first_stage` must be a function (k, state) or None, got {type(first_stage).__name__}")
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
        found = []
        for log_prob, point in _likely(law):
            state = point.expand(particles.state.shape)
            seen = steps.log_observation(k, state, steps.particles(k, carry, summary, state).summary)
            found.append(seen if log_prob is None else seen + log_prob.squeeze(-1))
        return found[0] if len(found) == 1 else torch.stack(found).logsumexp(0)

    def log_twist(k: StepIndex, particles: StateParticles) -> Tensor:
        if steps.is_unobserved(k + 1):
            return particles.state.new_zeros(particles.state.shape[:-2])
        if first_stage is None:
            ahead = predictive(k + 1, particles)
        else:
            ahead = first_stage(k, particles.state.squeeze(-2))
        return torch.where(row(seen, k + 1), ahead, torch.zeros((), dtype=ahead.dtype, device=ahead.device))

    return replace(base, log_twist=log_twist)


def _likely(law: Any) -> Iterator[tuple[Tensor | None, Tensor]]:
    """States that stand for a law ``(..., 1, state)``, with their log-probabilities ``(..., 1)``; None for the one that
    stands for all: each of finitely many, the mean in each regime, or the mean.
    """
    base = law.base_dist if isinstance(law, Independent) else law
    if isinstance(base, RegimeNormal):
        log_probs, means = base.log_weights.log_softmax(-1), base.loc
        for j in range(means.shape[-2]):
            mean = means[..., j, :]
            yield log_probs[..., j], torch.cat([torch.full_like(mean[..., :1], j), mean], -1)
    elif isinstance(base, Categorical) and law.event_shape == (1,):
        log_probs = base.logits.squeeze(-2)
        for j in range(log_probs.shape[-1]):
            yield log_probs[..., j], torch.full_like(log_probs[..., :1], j)
    else:
        try:
            yield None, law.mean
        except NotImplementedError:
            raise TypeError(
                f"auxiliary looks at the mean of the next state, and {type(base).__name__} has none. Give "
                "first_stage(k, state), an estimate of log p(y[k + 1] | state)"
            ) from None
