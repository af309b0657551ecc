"""Gaussian approximations for switching linear models: the Kim filter and smoother, and the IMM filter."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import Affine
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.discrete.regime_step import collapse, condition
from pyro_ssm.infer.discrete.switching_system import SwitchingStep, SwitchingSystem, switching_system
from pyro_ssm.ops.finite import log_sum
from pyro_ssm.ops.kalman import FilterSteps, predict
from pyro_ssm.ops.kalman_backward import backward_conditionals_reference

__all__ = ["SwitchingFiltered", "SwitchingSmoothed", "imm_filter", "kim_filter", "kim_smoother"]

EVENTS = (2, 1, 2)


class SwitchingFiltered(NamedTuple):
    """What :func:`kim_filter` and :func:`imm_filter` return; ``*batch`` is that of parameters and data together.

    >>> from pyro_ssm.infer.discrete import SwitchingFiltered
    >>> SwitchingFiltered._fields[:3]
    ('log_likelihood', 'log_filtered', 'mean')
    """

    log_likelihood: Tensor  # (*batch, time)  log p(y_k | y_<k), approximate; exactly 0 where nothing is observed
    log_filtered: Tensor  # (*batch, time, K)  log P(s_k = j | y_<=k)
    mean: Tensor  # (*batch, time, n)  E[x_k | y_<=k]
    scale_tril: Tensor  # (*batch, time, n, n)
    regime_mean: Tensor  # (*batch, time, K, n)  E[x_k | s_k = j, y_<=k]
    regime_scale_tril: Tensor  # (*batch, time, K, n, n)

    @property
    def exact(self) -> bool:
        """Whether the likelihood and the laws are the model's own: only with one regime."""
        return self.log_filtered.shape[-1] == 1


class SwitchingSmoothed(NamedTuple):
    """What :func:`kim_smoother` returns.

    >>> from pyro_ssm.infer.discrete import SwitchingSmoothed
    >>> SwitchingSmoothed._fields[:3]
    ('probs', 'pairwise', 'mean')
    """

    probs: Tensor  # (*batch, time, K)  P(s_k = j | y)
    pairwise: Tensor  # (*batch, time - 1, K, K)  P(s_k = i, s_{k+1} = j | y)
    mean: Tensor  # (*batch, time, n)  E[x_k | y]
    scale_tril: Tensor  # (*batch, time, n, n)
    regime_mean: Tensor  # (*batch, time, K, n)  E[x_k | s_k = j, y]
    regime_scale_tril: Tensor  # (*batch, time, K, n, n)
    log_likelihood: Tensor  # (*batch, time)

    @property
    def exact(self) -> bool:
        """Whether the laws are the model's own: only with one regime."""
        return self.probs.shape[-1] == 1


class _Belief(NamedTuple):
    log_weights: Tensor  # (*lead, K)
    mean: Tensor  # (*lead, K, n)
    scale_tril: Tensor  # (*lead, K, n, n)


def kim_filter(model: Any, data: TimeSeries) -> SwitchingFiltered:
    """The filter of Kim: a Kalman step for each pair of regimes, then one Gaussian a regime.

    .. math::
        p(x_k, s_k = j \\mid y_{\\le k}) \\approx w_{kj}\\, N(m_{kj}, P_{kj}), \\qquad
        K^2 \\text{ Gaussians} \\to K \\text{ by their moments}

    Exact for the first two likelihood terms, and with one regime. A recurrent model's regime probabilities are averaged
    over the law of x in the regime before (spherical rule). A missing entry is integrated out; a padded step adds
    exactly 0 and carries the last laws; a refined grid has its results at the latent times.

    Args:
        model: a :class:`~pyro_ssm.models.StateSpaceModel` of ``SwitchingInitial``, ``dynamics.SwitchingLinear`` and
            ``emissions.SwitchingLinear``; bound, or without random parameters.
        data: with values.

    Returns:
        Differentiable in parameters and values.

    Raises:
        TypeError: the model is not of the switching kind, or has a memory.
        ValueError: the data has no values, or the numbers of regimes differ.

    Sources: Kim (1994), "Dynamic linear models with Markov-switching", section 2; Kim and Nelson (1999), ch. 5.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.SwitchingInitial(ssm.dynamics.CategoricalInitial(2), [ssm.dynamics.NormalInitial(2)] * 2),
    ...     ssm.dynamics.SwitchingLinear(ssm.dynamics.MarkovChain(2), [ssm.dynamics.LinearNormal(2) for _ in "ab"]),
    ...     ssm.emissions.SwitchingLinear([ssm.emissions.LinearNormal(2, 1)] * 2))
    >>> result = ssm.infer.kim_filter(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> result.log_likelihood.shape, result.log_filtered.shape, result.mean.shape
    (torch.Size([3, 4]), torch.Size([3, 4, 2]), torch.Size([3, 4, 2]))
    """
    return _filter(switching_system(model, data, "kim_filter"), _kim_move)[0]


def imm_filter(model: Any, data: TimeSeries) -> SwitchingFiltered:
    """The interacting multiple model filter: mix the Gaussians of the regimes first, then K Kalman steps.

    .. math::
        p(x_{k-1} \\mid s_k = j, y_{<k}) \\approx N\\Big(\\sum_i w_{i|j} m_i,\\; \\ldots\\Big), \\qquad
        w_{i|j} \\propto w_i A_{ij}

    K Kalman steps where :func:`kim_filter` takes :math:`K^2`, and somewhat less precise (exact for the first
    likelihood term). Arguments, results, gradients and errors as :func:`kim_filter`.

    Source: Blom and Bar-Shalom (1988), "The interacting multiple model algorithm for systems with Markovian switching
    coefficients".

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.SwitchingInitial(ssm.dynamics.CategoricalInitial(2), [ssm.dynamics.NormalInitial(2)] * 2),
    ...     ssm.dynamics.SwitchingLinear(ssm.dynamics.MarkovChain(2), [ssm.dynamics.LinearNormal(2) for _ in "ab"]),
    ...     ssm.emissions.SwitchingLinear([ssm.emissions.LinearNormal(2, 1)] * 2))
    >>> ssm.infer.imm_filter(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))).log_likelihood.shape
    torch.Size([3, 4])
    """
    return _filter(switching_system(model, data, "imm_filter"), _imm_move)[0]


def _filter(system: SwitchingSystem, move: Any) -> tuple[SwitchingFiltered, Tensor]:
    """The filter's laws, and log P(s_{k-1} = i | s_k = j, y_<=k) of each move, ``(*batch, time - 1, i, j)``."""
    K = system.num_regimes
    mean, root = system.mean.expand(system.lead + system.mean.shape[-2:]), system.scale_tril
    belief = _Belief(system.log_initial.expand(system.lead + (K,)), mean, root.expand(mean.shape + mean.shape[-1:]))
    log_joint, mean, root = _update(belief.log_weights, belief.mean, belief.scale_tril, system.step(0))
    term = log_sum(log_joint, -1)
    belief = _Belief(log_joint - term.unsqueeze(-1), mean, root)
    beliefs, terms, origins = [belief], [term], []
    for k in range(1, system.num_times):
        log_matrix = system.log_matrix(k, belief.mean, belief.scale_tril)
        term, new, origin = move(belief, log_matrix, system.step(k))
        if (real := system.real(k)) is not None:
            real = real.expand(system.lead)
            new = _Belief(*(torch.where(_over(real, x), x, old) for x, old in zip(new, belief)))
            term = torch.where(real, term, torch.zeros_like(term))
        belief = new
        beliefs.append(belief)
        terms.append(term)
        origins.append(origin)
    log_weights, means, roots = (torch.stack(parts, -1 - event) for parts, event in zip(zip(*beliefs), (1, 2, 3)))
    zero = torch.zeros((), dtype=means.dtype, device=means.device)
    log_likelihood = torch.where(system.seen, torch.stack(terms, -1), zero)
    origin = torch.stack(origins, -3) if origins else log_weights.new_zeros(system.lead + (0, K, K))
    return SwitchingFiltered(log_likelihood, log_weights, *collapse(log_weights, means, roots), means, roots), origin


def _over(condition: Tensor, like: Tensor) -> Tensor:
    return condition.reshape(condition.shape + (1,) * (like.dim() - condition.dim()))


def _update(log_weights: Tensor, mean: Tensor, root: Tensor, step: SwitchingStep) -> tuple[Tensor, Tensor, Tensor]:
    """Condition the Gaussian of each regime, ``(*lead, K, n)``, on what is seen."""
    if step.emission is None:
        return log_weights, mean, root
    log_lik, mean, root = condition(mean, root, step.emission, step.values.unsqueeze(-2), step.mask.unsqueeze(-2))
    return log_weights + log_lik, mean, root


def _kim_move(belief: _Belief, log_matrix: Tensor, step: SwitchingStep) -> tuple[Tensor, _Belief, Tensor]:
    transition = Affine(*(part.unsqueeze(-2 - event) for part, event in zip(step.transition, EVENTS)))
    mean, root = predict(belief.mean.unsqueeze(-2), belief.scale_tril.unsqueeze(-3), *transition)  # (*lead, i, j, n)
    log_joint = belief.log_weights.unsqueeze(-1) + log_matrix
    if step.emission is not None:
        emission = Affine(*(part.unsqueeze(-2 - event) for part, event in zip(step.emission, EVENTS)))
        values, mask = step.values[..., None, None, :], step.mask[..., None, None, :]
        log_lik, mean, root = condition(mean, root, emission, values, mask)
        log_joint = log_joint + log_lik
    by_regime = log_sum(log_joint, -2)
    term = log_sum(by_regime, -1)
    origin = log_joint - torch.where(by_regime == -torch.inf, torch.zeros_like(by_regime), by_regime).unsqueeze(-2)
    return term, _Belief(by_regime - term.unsqueeze(-1), *_collapse_over(origin, mean, root, -2)), origin


def _imm_move(belief: _Belief, log_matrix: Tensor, step: SwitchingStep) -> tuple[Tensor, _Belief, Tensor]:
    log_joint = belief.log_weights.unsqueeze(-1) + log_matrix
    predicted = log_sum(log_joint, -2)
    origin = log_joint - torch.where(predicted == -torch.inf, torch.zeros_like(predicted), predicted).unsqueeze(-2)
    lead = origin.shape[:-2]
    n, K = belief.mean.shape[-1], origin.shape[-1]
    mean = belief.mean.unsqueeze(-2).expand(lead + (K, K, n))
    root = belief.scale_tril.unsqueeze(-3).expand(lead + (K, K, n, n))
    mean, root = predict(*_collapse_over(origin, mean, root, -2), *step.transition)
    log_joint, mean, root = _update(predicted, mean, root, step)
    term = log_sum(log_joint, -1)
    return term, _Belief(log_joint - term.unsqueeze(-1), mean, root), origin


def _collapse_over(log_weights: Tensor, mean: Tensor, root: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Collapse along a dim of the pairs ``(*lead, i, j)``; what has no weight at all gets equal weights."""
    log_weights, mean, root = (
        x.movedim(dim - event, -1 - event) for x, event in zip((log_weights, mean, root), (0, 1, 2))
    )
    none = (log_weights == -torch.inf).all(-1, keepdim=True)
    equal = torch.full_like(log_weights, 1 / log_weights.shape[-1]).log()
    return collapse(torch.where(none, equal, log_weights), mean, root)


def kim_smoother(model: Any, data: TimeSeries) -> SwitchingSmoothed:
    """The smoother of Kim: backwards over pairs of regimes, then one Gaussian a regime.

    .. math::
        P(s_k = i, s_{k+1} = j \\mid y) \\approx P(s_{k+1} = j \\mid y)\\, P(s_k = i \\mid s_{k+1} = j, y_{\\le k+1}),
        \\qquad p(x_k \\mid s_k = i, s_{k+1} = j, y) \\text{ by Rauch-Tung-Striebel}

    The regime's backward law is conditioned on one observation more than Kim's, which the filter's pairs give for
    nothing. Arguments, gradients and errors as :func:`kim_filter`; a padded step repeats the last laws.

    Source: Kim (1994), "Dynamic linear models with Markov-switching", section 3.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.SwitchingInitial(ssm.dynamics.CategoricalInitial(2), [ssm.dynamics.NormalInitial(2)] * 2),
    ...     ssm.dynamics.SwitchingLinear(ssm.dynamics.MarkovChain(2), [ssm.dynamics.LinearNormal(2) for _ in "ab"]),
    ...     ssm.emissions.SwitchingLinear([ssm.emissions.LinearNormal(2, 1)] * 2))
    >>> result = ssm.infer.kim_smoother(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> result.probs.shape, result.mean.shape
    (torch.Size([3, 4, 2]), torch.Size([3, 4, 2]))
    """
    system = switching_system(model, data, "kim_smoother")
    filtered, origin = _filter(system, _kim_move)
    G, c, D = _pair_conditionals(system, filtered)
    last = system.num_times - 1
    belief = _Belief(*(filtered[i].select(-1 - e, last) for i, e in ((1, 1), (4, 2), (5, 3))))
    beliefs, pairs = [belief], []
    for k in range(last - 1, -1, -1):
        pair = belief.log_weights.unsqueeze(-2) + origin[..., k, :, :]
        mean, root = predict(
            belief.mean.unsqueeze(-3),
            belief.scale_tril.unsqueeze(-4),
            G[..., k, :, :],
            c[..., k, :],
            D[..., k, :, :],
        )
        log_weights = log_sum(pair, -1)
        onward = pair - torch.where(log_weights == -torch.inf, torch.zeros_like(log_weights), log_weights).unsqueeze(-1)
        new = _Belief(log_weights, *_collapse_over(onward, mean, root, -1))
        if (real := system.real(k + 1)) is not None:
            real = real.expand(system.lead)
            new = _Belief(*(torch.where(_over(real, x), x, old) for x, old in zip(new, belief)))
            still = torch.diag_embed(belief.log_weights.exp())
            pairs.append(torch.where(_over(real, still), pair.exp(), still))
        else:
            pairs.append(pair.exp())
        belief = new
        beliefs.append(belief)
    log_weights, means, roots = (torch.stack(parts[::-1], -1 - e) for parts, e in zip(zip(*beliefs), (1, 2, 3)))
    K = system.num_regimes
    pairwise = torch.stack(pairs[::-1], -3) if pairs else log_weights.new_zeros(system.lead + (0, K, K))
    moments = collapse(log_weights, means, roots)
    return SwitchingSmoothed(log_weights.exp(), pairwise, *moments, means, roots, filtered.log_likelihood)


def _pair_conditionals(system: SwitchingSystem, filtered: SwitchingFiltered) -> tuple[Tensor, Tensor, Tensor]:
    """p(x_k | x_{k+1}, s_k = i, s_{k+1} = j, y_<=k), leading dims ``(*lead, i, j, time - 1)``."""
    mean = filtered.regime_mean.movedim(-2, -3).unsqueeze(-3)  # (*lead, i, 1, time, n)
    root = filtered.regime_scale_tril.movedim(-3, -4).unsqueeze(-4)
    moves = system.num_times - 1
    F, b, Q = (
        part.narrow(-2 - e, 0, min(moves, part.shape[-2 - e])).movedim(-1 - e, -2 - e).unsqueeze(-3 - e)
        for part, e in zip(system.transition, EVENTS)
    )
    return backward_conditionals_reference(FilterSteps(mean, mean, root, mean, root), F, b, Q)
