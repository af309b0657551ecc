"""Exact inference for short switching series: every path of regimes, a Kalman filter each."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.blocks._tables import pick
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.discrete.regime_step import collapse
from pyro_ssm.infer.discrete.switching_system import SwitchingSystem, switching_system
from pyro_ssm.ops.kalman import kalman_filter_reference
from pyro_ssm.ops.kalman_backward import backward_conditionals_reference, kalman_smoother_reference

__all__ = ["RegimeEnumeration", "enumerate_regimes"]


class RegimeEnumeration(NamedTuple):
    """What :func:`enumerate_regimes` returns; P paths of regimes.

    >>> from pyro_ssm.infer.discrete import RegimeEnumeration
    >>> RegimeEnumeration._fields[:3]
    ('log_likelihood', 'paths', 'log_weights')
    """

    log_likelihood: Tensor  # (*batch, time)  log p(y_k | y_<k)
    paths: Tensor  # (P, time)  whole numbers
    log_weights: Tensor  # (*batch, P)  log P(path | y)
    log_filtered: Tensor  # (*batch, time, K)  log P(s_k = j | y_<=k)
    probs: Tensor  # (*batch, time, K)  P(s_k = j | y)
    mean: Tensor  # (*batch, time, n)  E[x_k | y]
    scale_tril: Tensor  # (*batch, time, n, n)
    filtered_mean: Tensor  # (*batch, time, n)  E[x_k | y_<=k]
    filtered_scale_tril: Tensor  # (*batch, time, n, n)

    @property
    def exact(self) -> bool:
        """True: the likelihood and the laws are the model's own, not an approximation."""
        return True


def enumerate_regimes(model: Any, data: TimeSeries, max_paths: int = 100_000) -> RegimeEnumeration:
    """Exact evidence and posterior of a switching linear model by the sum over all :math:`K^T` paths of regimes.

    .. math::
        p(y) = \\sum_{s_{1:T}} P(s_{1:T})\\, p(y \\mid s_{1:T}), \\qquad p(y \\mid s_{1:T}) \\text{ by a Kalman filter}

    The judge of the approximations, for a handful of steps. The means and roots are the moments of the mixtures.

    Args:
        model: as for :func:`~pyro_ssm.infer.kim_filter`, not recurrent.
        data: with values.
        max_paths: the largest :math:`K^T` that is tried.

    Returns:
        Differentiable in parameters and values.

    Raises:
        TypeError: the model is recurrent, or not of the switching kind.
        ValueError: there are more than ``max_paths`` paths; the data has no values.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.SwitchingInitial(ssm.dynamics.CategoricalInitial(2), [ssm.dynamics.NormalInitial(1)] * 2),
    ...     ssm.dynamics.SwitchingLinear(ssm.dynamics.MarkovChain(2), [ssm.dynamics.LinearNormal(1) for _ in "ab"]),
    ...     ssm.emissions.SwitchingLinear([ssm.emissions.LinearNormal(1, 1)] * 2))
    >>> result = ssm.infer.enumerate_regimes(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> result.log_likelihood.shape, result.paths.shape, result.probs.shape
    (torch.Size([3, 4]), torch.Size([16, 4]), torch.Size([3, 4, 2]))
    """
    system = switching_system(model, data, "enumerate_regimes")
    K, T = system.num_regimes, system.num_times
    if system.log_transition is None:
        raise TypeError(
            "enumerate_regimes needs regimes that do not depend on x, got a recurrent model: given its regimes it is "
            "not Gaussian. Use a particle filter, or kim_filter as an approximation"
        )
    if K**T > max_paths:
        raise ValueError(
            f"{K} regimes over {T} times have {K}^{T} paths, more than max_paths={max_paths}. Use kim_filter, or a "
            "Rao-Blackwellised particle filter (regime_step)"
        )
    paths = torch.tensor(list(itertools.product(range(K), repeat=T)), device=data.device)
    index = paths.reshape(paths.shape[:1] + (1,) * len(system.lead) + (T,))  # (P, *1, time)
    prior = _path_log_prob(system, index)
    at = list(range(T)) if data.observed_index is None else data.observed_index.tolist()
    F, b, Q = (pick(part, index[..., 1:], e) for part, e in zip(system.transition, (2, 1, 2)))
    emission = [pick(part, index[..., at], e) for part, e in zip(system.emission, (2, 1, 2))]
    step_mask = data.step_mask if data.is_ragged else None
    steps = kalman_filter_reference(
        system.values,
        system.mask,
        pick(system.mean, index[..., 0], 1),
        pick(system.scale_tril, index[..., 0], 2),
        F,
        b,
        Q,
        *emission,
        num_times=T,
        observed_index=None if data.observed_index is None else at,
        step_mask=step_mask,
    )
    n = steps.filtered_mean.shape[-1]
    lead = paths.shape[:1] + system.lead
    so_far = prior.unsqueeze(-1) + steps.log_likelihood.cumsum(-1).expand(lead + (T,))
    evidence = so_far.logsumexp(0)
    smoothed = kalman_smoother_reference(steps, backward_conditionals_reference(steps, F, b, Q, step_mask))

    def moments(log_weights: Tensor, mean: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        mean, root = mean.expand(lead + (T, n)), root.expand(lead + (T, n, n))
        return collapse(log_weights.movedim(0, -1), mean.movedim(0, -2), root.movedim(0, -3))

    filtered_weights = so_far - evidence
    log_weights = filtered_weights[..., -1]
    each = log_weights.unsqueeze(-1).expand(lead + (T,))
    terms = torch.diff(evidence, dim=-1, prepend=torch.zeros_like(evidence[..., :1]))
    return RegimeEnumeration(
        torch.where(system.seen, terms, torch.zeros_like(terms)),
        paths,
        log_weights.movedim(0, -1),
        _of_regimes(filtered_weights, index, K).log(),
        _of_regimes(each, index, K),
        *moments(each, *smoothed),
        *moments(filtered_weights, steps.filtered_mean, steps.filtered_scale_tril),
    )


def _path_log_prob(system: SwitchingSystem, index: Tensor) -> Tensor:
    """log P(path), ``(P, *lead)``; a padded step keeps the regime."""
    K = system.num_regimes
    first = pick(system.log_initial, index[..., 0], 0)
    moves = pick(system.log_transition.flatten(-2), index[..., :-1] * K + index[..., 1:], 0)
    return (first + moves.sum(-1)).expand(index.shape[:1] + system.lead)


def _of_regimes(log_weights: Tensor, index: Tensor, num_regimes: int) -> Tensor:
    """Weights ``(P, *lead, time)`` summed by the regime of their path, ``(*lead, time, K)``."""
    hot = torch.nn.functional.one_hot(index, num_regimes).to(log_weights.dtype)
    return (log_weights.exp().unsqueeze(-1) * hot).sum(0)
