"""How good draws of the future are: scores per entry, coverage, quantiles."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal, Normal
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import masked
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.predict.forecast import rollout
from pyro_ssm.predict.future import future_of
from pyro_ssm.predict.posterior import draw_chunks
from pyro_ssm.predict.record import record_of

__all__ = ["average", "coverage", "crps", "heldout_log_score", "interval", "quantile"]


def crps(draws: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Continuous ranked probability score of each entry, estimated without bias from draws; lower is better.

    .. math:: \\operatorname{CRPS} = E|X - y| - \\tfrac{1}{2} E|X - X'| \\approx
        \\frac{1}{S} \\sum_i |x_i - y| - \\frac{1}{S (S - 1)} \\sum_i (2 i - S - 1)\\, x_{(i)}

    in the units of ``values``. The second sum, over sorted draws, is the mean of :math:`|x_i - x_j| / 2` over all pairs
    of *different* draws (the "fair" score), at the cost of a sort. With one draw it is the absolute error.

    Source: T. Gneiting, A. E. Raftery (2007), Strictly proper scoring rules, section 4.2; M. Zamo, P. Naveau (2018),
    Estimation of the continuous ranked probability score with limited information, section 2 (the PWM estimator).

    Args:
        draws: ``(S, *batch, time, obs)``.
        values: ``(*batch, time, obs)``.
        mask: as ``values``, True where the entry counts; None: everywhere.

    Returns:
        As ``values``; exactly 0 where the mask is False. :func:`average` is its mean over entries that count.

    Raises:
        ValueError: the shapes do not fit.

    >>> import torch
    >>> from pyro_ssm.predict import crps
    >>> crps(torch.tensor([[0.0], [2.0]]), torch.tensor([3.0]))
    tensor([1.])
    """
    _check(draws, values, mask)
    number = draws.shape[0]
    score = (draws - values).abs().mean(0)
    if number > 1:
        rank = torch.arange(1 - number, number, 2, dtype=draws.dtype, device=draws.device)
        spread = torch.tensordot(rank, draws.sort(0).values, dims=1)
        score = score - spread / (number * (number - 1))
    return score if mask is None else torch.where(mask, score, torch.zeros_like(score))


def average(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over the entries that count, a scalar.

    >>> import torch
    >>> from pyro_ssm.predict import average
    >>> average(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    if mask is None:
        return scores.mean()
    mask = mask.expand(scores.shape)
    return torch.where(mask, scores, torch.zeros_like(scores)).sum() / mask.sum()


def quantile(draws: Tensor, level: float) -> Tensor:
    """The quantile of the draws over their first dim, linear between order statistics; of any number of entries.

    >>> import torch
    >>> from pyro_ssm.predict import quantile
    >>> quantile(torch.tensor([0.0, 1.0, 4.0]), 0.75)
    tensor(2.5000)
    """
    if not 0 <= level <= 1:
        raise ValueError(f"`level` is {level}, but a probability between 0 and 1 is wanted")
    position = level * (draws.shape[0] - 1)
    below = math.floor(position)
    above = min(below + 1, draws.shape[0] - 1)
    ordered = draws.sort(0).values
    return torch.lerp(ordered[below], ordered[above], position - below)


def interval(draws: Tensor, level: float = 0.9) -> tuple[Tensor, Tensor]:
    """The ends of the central interval that holds ``level`` of the draws.

    >>> import torch
    >>> from pyro_ssm.predict import interval
    >>> interval(torch.arange(101.0), 0.9)
    (tensor(5.), tensor(95.))
    """
    return quantile(draws, 0.5 - level / 2), quantile(draws, 0.5 + level / 2)


def coverage(draws: Tensor, values: Tensor, mask: Tensor | None = None, level: float = 0.9) -> Tensor:
    """The share of the entries that fall into their central interval of ``level``; near ``level`` if all is well.

    Args:
        draws: ``(S, *batch, time, obs)``.
        values: ``(*batch, time, obs)``.
        mask: as ``values``, True where the entry counts; None: everywhere.
        level: of the interval.

    >>> import torch
    >>> from pyro_ssm.predict import coverage
    >>> coverage(torch.arange(101.0)[:, None], torch.tensor([50.0]), level=0.5)
    tensor(1.)
    """
    _check(draws, values, mask)
    lower, upper = interval(draws, level)
    return average(((lower <= values) & (values <= upper)).to(draws.dtype), mask)


def heldout_log_score(
    model: StateSpaceModel,
    posterior: Any,
    data_before: TimeSeries,
    data_after: TimeSeries,
    num_samples: int | None = None,
    *,
    chunk: int | None = None,
) -> Tensor:
    """Log predictive density of each held-out entry, given all data before; higher is better.

    .. math:: \\log p(y_{h, i} \\mid y_{1:T}) \\approx \\log \\frac1S \\sum_s p(y_{h, i} \\mid z^{(s)}_h),
        \\qquad z^{(s)}_h \\sim p(z_h \\mid y_{1:T})

    in nats: a mixture of the emission's own densities, no kernel estimate. Each entry is scored on its own (its
    marginal); entries of ``data_after`` are not conditioned on each other. The estimate is consistent, and biased down
    by O(1 / S), much where few draws come near the value.

    Args:
        model: the state-space model.
        posterior: given ``data_before``; what :func:`~pyro_ssm.predict.posterior_draws` takes.
        data_before: what the posterior was given.
        data_after: later times of the same series (``data.split(at)`` makes both), with the inputs that hold then.
        num_samples: S; default: all draws that there are, 200 for guides and None.
        chunk: draws at a time.

    Returns:
        ``(*batch, H, obs)``, exactly 0 where nothing was observed.

    Raises:
        ValueError: as :func:`~pyro_ssm.predict.forecast`; or ``data_after`` has no values.
        TypeError: entries of this emission have no density of their own.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.predict import heldout_log_score
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> before, after = ssm.TimeSeries(torch.arange(6.0), torch.zeros(3, 6, 1)).split(4)
    >>> heldout_log_score(model, None, before, after, num_samples=10).shape
    torch.Size([3, 2, 1])
    """
    values, mask = record_of(data_after, "data_after")
    inputs, at = data_after.inputs, data_after.observed_index
    if inputs is not None and at is not None:
        inputs = inputs.index_select(-2, at)
    future = future_of(data_before, data_after.observed_times, inputs)
    scores, number = [], 0
    for draws in draw_chunks(model, posterior, data_before, num_samples, chunk):
        start, terms = 0, []
        for step in rollout(model, draws, data_before, future):
            now = slice(start, start := start + step.states.shape[-2])
            terms.append(_entry_log_prob(step.law, values[..., now, :], mask[..., now, :]))
        scores.append(torch.cat(terms, -2).logsumexp(0))
        number += draws.states.shape[0]
    score = torch.stack(scores).logsumexp(0) - math.log(number)
    return torch.where(mask, score, torch.zeros_like(score))


def _entry_log_prob(law: Any, values: Tensor, mask: Tensor) -> Tensor:
    """Log density of each entry by itself (the marginals of a normal vector)."""
    if isinstance(law, (MultivariateNormal, LowRankMultivariateNormal)):
        law = Independent(Normal(law.mean, law.variance.sqrt(), validate_args=False), 1)
    return masked(law, mask).log_prob_entries(values)


def _check(draws: Tensor, values: Tensor, mask: Tensor | None) -> None:
    if draws.dim() != values.dim() + 1 or draws.shape[1:] != values.shape:
        raise ValueError(
            f"`draws` has shape {tuple(draws.shape)} and `values` {tuple(values.shape)}, but "
            f"(S, *{tuple(values.shape)}) is wanted: one dim of draws, leftmost"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != values.shape):
        raise ValueError(f"`mask` must be boolean of shape {tuple(values.shape)}, got {mask.dtype} {tuple(mask.shape)}")
