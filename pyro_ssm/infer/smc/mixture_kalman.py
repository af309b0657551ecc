"""The mixture Kalman filter: particles of regimes, each with the exact law of the rest of the state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions.codes import index_law
from pyro_ssm.infer.discrete import RegimeCarry, regime_log_probs, regime_start, regime_step, switching_system
from pyro_ssm.infer.smc.feynman_kac import Draw, FeynmanKac
from pyro_ssm.infer.smc.model_steps import check_model_and_data
from pyro_ssm.infer.smc.rao_blackwellised import Weighed
from pyro_ssm.infer.smc.tree import tree_map

__all__ = ["mixture_kalman"]

_METHOD = "mixture_kalman"


def mixture_kalman(model: Any, data: TimeSeries) -> FeynmanKac:
    """The Feynman-Kac process of a switching linear model whose regimes are drawn and whose vector is integrated out.

    .. math::
        M_k = P(s_k = j \\mid s_{1:k-1}, y_{\\le k}) \\propto P(j \\mid s_{k-1})\\, p(y_k \\mid s_{1:k-1}, j, y_{<k}),
        \\qquad G_k = \\sum_j P(j \\mid s_{k-1})\\, p(y_k \\mid s_{1:k-1}, j, y_{<k})

    The proposal is the locally optimal one: a Kalman step into each of the K regimes, at K times the cost of one. The
    evidence varies much less than that of :func:`bootstrap`, which draws the vector too. Missing entries, ragged
    batches, own times, refined grids and batches of parameters are as in the model.

    A particle is a :class:`~pyro_ssm.infer.smc.Weighed` whose ``particles`` are the ``mean``, ``scale_tril`` and
    ``regime`` of a :class:`~pyro_ssm.infer.discrete.RegimeCarry`. Its state, of which collectors and paths are by
    default, is the regime alone, ``(N, *batch, 1)``: what is drawn. The filtered mean of the vector is ``Moments(lambda
    weighed: weighed.particles.mean)``; its covariance is that of these means and the average of the particles' own.

    Args:
        model: with ``SwitchingInitial``, ``dynamics.SwitchingLinear`` (not recurrent: then regimes depend on the
            vector) and ``emissions.SwitchingLinear``; bound, or without random parameters.
        data: with values.

    Raises:
        TypeError: another kind of model.
        ValueError: no values.

    Source: Chen and Liu (2000), "Mixture Kalman filters", J. R. Statist. Soc. B 62, section 3.2; Doucet, de Freitas,
    Murphy and Russell (2000), "Rao-Blackwellised particle filtering for dynamic Bayesian networks".

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.SwitchingInitial(ssm.dynamics.CategoricalInitial(2), [ssm.dynamics.NormalInitial(1)] * 2),
    ...     ssm.dynamics.SwitchingLinear(ssm.dynamics.MarkovChain(2), [ssm.dynamics.LinearNormal(1)] * 2),
    ...     ssm.emissions.SwitchingLinear([ssm.emissions.LinearNormal(1, 1)] * 2))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> ssm.infer.particle_filter(ssm.infer.mixture_kalman(model, data), num_particles=20).log_likelihood.shape
    torch.Size([3, 4])
    """
    check_model_and_data(model, data, _METHOD)
    system = switching_system(model, data, _METHOD)
    if system.log_transition is None:
        raise TypeError(
            f"{_METHOD} integrates the vector out, on which the regimes of a recurrent model depend. Use bootstrap"
        )
    batch, num_times = system.lead, data.num_times
    over_time = batch + (num_times,)

    def every(shape: torch.Size) -> Tensor:
        """Each regime for each particle, ``(K, N, *batch)``."""
        regimes = torch.arange(system.num_regimes, device=data.values.device)
        return regimes.reshape((-1,) + (1,) * len(shape)).expand((-1, *shape))

    def start(draw: Draw, shape: torch.Size) -> Weighed:
        log_probs = system.log_initial.expand(shape + (system.num_regimes,))
        return _chosen(draw, log_probs, *regime_start(system, every(shape)))

    def step(k: int, previous: Weighed, draw: Draw) -> Weighed:
        carry = previous.particles
        log_probs = regime_log_probs(system, k, carry.regime)
        return _chosen(draw, log_probs, *regime_step(carry, every(carry.regime.shape), system.step(k)))

    return FeynmanKac(
        start,
        step,
        lambda k, previous, weighed: weighed.log_weight,
        num_times,
        batch,
        step_mask=data.step_mask.expand(over_time) if data.is_ragged else None,
        active=system.seen.expand(over_time),
        state=lambda weighed: weighed.particles.regime.unsqueeze(-1).to(weighed.log_weight.dtype),
        describe=lambda k, position: f"step {k} of {data._series_name(position[len(batch) - len(data.batch_shape) :])}",
    )


def _chosen(draw: Draw, log_probs: Tensor, log_weight: Tensor, carry: RegimeCarry) -> Weighed:
    """A regime of each particle by its law given the observation, and what that observation says of the particle.

    Args:
        draw: takes the run's noise.
        log_probs: of the regimes before it, ``(N, *batch, K)``.
        log_weight: ``(K, N, *batch)``.
        carry: of each regime, leaves ``(K, N, *batch, ...)``.
    """
    joint = log_probs + log_weight.movedim(0, -1)
    total = joint.logsumexp(-1)
    possible = torch.where(torch.isfinite(total).unsqueeze(-1), joint, torch.zeros_like(joint))
    regime = draw(index_law(possible.unsqueeze(-2)), torch.Size((*total.shape, 1))).squeeze((-1, -2)).long()

    def leaf(x: Tensor) -> Tensor:
        index = regime.reshape((1, *regime.shape) + (1,) * (x.dim() - 1 - regime.dim()))
        return x.gather(0, index.expand((1, *x.shape[1:]))).squeeze(0)

    return Weighed(tree_map(leaf, carry), total)
