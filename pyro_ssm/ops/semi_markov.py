"""Forward filtering, backward smoothing, best paths and path sampling of semi-Markov chains: tensors in, tensors out.

A state is a pair (j, r): the index and how many steps of its segment remain, r = 1, ..., D. A pair with r > 1 goes to
(j, r - 1); a pair with r = 1 to a new segment. One step costs K D + K^2 operations, not (K D)^2. Logarithms throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.ops.finite import log_sum

__all__ = [
    "SemiMarkovSteps",
    "SemiMarkovWeights",
    "semi_markov_best_path",
    "semi_markov_filter",
    "semi_markov_sample",
    "semi_markov_smoother",
]

Reduce = Callable[[Tensor, int], Tensor]


class SemiMarkovWeights(NamedTuple):
    """The log-weights of a semi-Markov model over one data set, leading dims broadcast.

    >>> from pyro_ssm.ops.semi_markov import SemiMarkovWeights
    >>> SemiMarkovWeights._fields
    ('log_initial', 'log_matrix', 'log_duration', 'log_emission', 'step_mask')
    """

    log_initial: Tensor  # (..., K)
    log_matrix: Tensor  # (..., K, K)
    log_duration: Tensor  # (..., K, D)
    log_emission: Tensor  # (..., time, K)
    step_mask: Tensor | None  # bool (..., time), False on padding


class SemiMarkovSteps(NamedTuple):
    """What the filter leaves at each time.

    >>> from pyro_ssm.ops.semi_markov import SemiMarkovSteps
    >>> SemiMarkovSteps._fields
    ('log_likelihood', 'log_filtered', 'log_entered')
    """

    log_likelihood: Tensor  # (..., time)
    log_filtered: Tensor  # (..., time, K, D)  log P(z_k = (j, r) | y_<=k)
    log_entered: Tensor  # (..., time - 1, K)  log P(a segment of j starts at k + 1 | y_<=k)


def _stack(*tensors: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*tensors), -1)


def _go_on(f: Tensor) -> Tensor:
    """(j, r) -> (j, r - 1), without what ends."""
    return torch.nn.functional.pad(f[..., 1:], (0, 1), value=-torch.inf)


def _finite(x: Tensor) -> Tensor:
    return torch.where(x == -torch.inf, torch.zeros((), dtype=x.dtype, device=x.device), x)


def _forward(w: SemiMarkovWeights, reduce: Reduce) -> SemiMarkovSteps:
    terms, filtered, entered = [], [], []
    emission = w.log_emission.unbind(-2)
    lead = torch.broadcast_shapes(
        w.log_initial.shape[:-1], w.log_matrix.shape[:-2], w.log_duration.shape[:-2], w.log_emission.shape[:-2]
    )
    f = w.log_initial.unsqueeze(-1) + w.log_duration
    for k, seen in enumerate(emission):
        if k == 0:
            predicted = f
        else:
            enter = reduce(f[..., 0].unsqueeze(-1) + w.log_matrix, -2)
            entered.append(enter)
            predicted = reduce(_stack(_go_on(f), enter.unsqueeze(-1) + w.log_duration), -1)
        a = predicted + seen.unsqueeze(-1)
        term = reduce(a.flatten(-2), -1)
        new = (a - _finite(term)[..., None, None]).expand(lead + a.shape[-2:])
        if k > 0 and w.step_mask is not None:
            real = w.step_mask[..., k]
            new = torch.where(real[..., None, None], new, f)
            term = torch.where(real, term, torch.zeros_like(term))
        f = new
        terms.append(term.expand(lead))
        filtered.append(f)
    K = f.shape[-2]
    entries = torch.stack([e.expand(lead + (K,)) for e in entered], -2) if entered else f.new_zeros(lead + (0, K))
    return SemiMarkovSteps(torch.stack(terms, -1), torch.stack(filtered, -3), entries)


def semi_markov_filter(weights: SemiMarkovWeights) -> SemiMarkovSteps:
    """The forward recursion over pairs of index and remaining steps.

    .. math::
        e_k(j) = \\log \\sum_i e^{f_{k-1}(i, 1) + A_{ij}}, \\qquad
        a_k(j, r) = \\log\\left(e^{f_{k-1}(j, r + 1)} + e^{e_k(j) + D_{jr}}\\right) + \\ell_k(j)

    with :math:`f_k = a_k` less its total, which is the term of the log-likelihood. Differentiable.

    >>> import torch
    >>> from pyro_ssm.ops.semi_markov import SemiMarkovWeights, semi_markov_filter
    >>> one = torch.zeros(1, 1)
    >>> steps = semi_markov_filter(SemiMarkovWeights(one[0], one, one, torch.tensor([[-1.0], [-2.0]]), None))
    >>> steps.log_likelihood
    tensor([-1., -2.])
    """
    return _forward(weights, log_sum)


def _parted(weights: SemiMarkovWeights, steps: SemiMarkovSteps) -> tuple[Tensor, Tensor]:
    """For each move: the share of (j, r) at k + 1 that has just started, and the law of the index before a start.

    ``(..., time - 1, K, D)`` and ``(..., time - 1, i, j)``.
    """
    before = steps.log_filtered[..., :-1, :, :]
    fresh = steps.log_entered.unsqueeze(-1) + weights.log_duration.unsqueeze(-3)
    started = (fresh - _finite(log_sum(_stack(_go_on(before), fresh), -1))).exp()
    origin = before[..., 0].unsqueeze(-1) + weights.log_matrix.unsqueeze(-3)
    return started, (origin - _finite(steps.log_entered).unsqueeze(-2)).exp()


def semi_markov_smoother(weights: SemiMarkovWeights, steps: SemiMarkovSteps) -> tuple[Tensor, Tensor]:
    """Probabilities given all data, backwards over time.

    .. math::
        \\gamma_k(j, r) &= (1 - b_{k+1}(j, r - 1))\\, \\gamma_{k+1}(j, r - 1), \\quad r > 1, \\\\
        \\gamma_k(i, 1) &= \\sum_j W_k(i, j) \\sum_r b_{k+1}(j, r)\\, \\gamma_{k+1}(j, r),

    where b is the share of a pair that has just started.

    Returns:
        Pairs ``(..., time, K, D)``, and the probability that a segment of j starts at each time, ``(..., time, K)``.

    >>> import torch
    >>> from pyro_ssm.ops.semi_markov import SemiMarkovWeights, semi_markov_filter, semi_markov_smoother
    >>> one = torch.zeros(1, 1)
    >>> weights = SemiMarkovWeights(one[0], one, one, torch.zeros(3, 1), None)
    >>> semi_markov_smoother(weights, semi_markov_filter(weights))[1].squeeze(-1)
    tensor([1., 1., 1.])
    """
    started, origin = _parted(weights, steps)
    num = steps.log_filtered.shape[-3]
    gamma = steps.log_filtered[..., -1, :, :].exp()
    probs, starts = [gamma], []
    for k in range(num - 2, -1, -1):
        b = started[..., k, :, :]
        born = (b * gamma).sum(-1)
        went_on = ((1 - b) * gamma)[..., :-1]
        ended = (origin[..., k, :, :] @ born.unsqueeze(-1)).squeeze(-1)
        new = torch.cat([ended.unsqueeze(-1), went_on], -1)
        if weights.step_mask is not None:
            real = weights.step_mask[..., k + 1]
            new = torch.where(real[..., None, None], new, gamma)
            born = torch.where(real[..., None], born, torch.zeros_like(born))
        gamma = new
        probs.append(gamma)
        starts.append(born)
    starts.append(gamma.sum(-1))
    return torch.stack(probs[::-1], -3), torch.stack(starts[::-1], -2)


def _backwards(weights: SemiMarkovWeights, last: Tensor, before: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """Paths of pairs from the last: ``before(k, j, r)`` says which index ended at k, or -1 where (j, r + 1) went on.

    ``last`` is a cell j D + r - 1; returns ``(..., time, 2)``.
    """
    D, num = weights.log_duration.shape[-1], weights.log_emission.shape[-2]
    j, r = torch.div(last, D, rounding_mode="floor"), last % D + 1
    path = [torch.stack([j, r], -1)]
    for k in range(num - 2, -1, -1):
        ended = before(k, j, r)
        new_j, new_r = torch.where(ended < 0, j, ended), torch.where(ended < 0, r + 1, torch.ones_like(r))
        if weights.step_mask is not None:
            real = weights.step_mask[..., k + 1]
            new_j, new_r = torch.where(real, new_j, j), torch.where(real, new_r, r)
        j, r = new_j, new_r
        path.append(torch.stack([j, r], -1))
    return torch.stack(path[::-1], -2)


def _cell(table: Tensor, j: Tensor, r: Tensor) -> Tensor:
    """table[j, r - 1] of ``(..., K, D)`` at ``(*sample, ...)``."""
    D = table.shape[-1]
    cells = table.flatten(-2)
    return cells.expand(j.shape + cells.shape[-1:]).gather(-1, (j * D + r - 1).unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def semi_markov_best_path(weights: SemiMarkovWeights) -> tuple[Tensor, Tensor]:
    """The most probable path of pairs, and its log-probability together with the data.

    Returns:
        Whole numbers ``(..., time, 2)`` and ``(...)``.

    >>> import torch
    >>> from pyro_ssm.ops.semi_markov import SemiMarkovWeights, semi_markov_best_path
    >>> one = torch.zeros(1, 1)
    >>> semi_markov_best_path(SemiMarkovWeights(one[0], one, one, torch.zeros(2, 1), None))[0].tolist()
    [[0, 1], [0, 1]]
    """
    steps = _forward(weights, torch.amax)
    went_on = _go_on(steps.log_filtered[..., :-1, :, :])
    fresh = steps.log_entered.unsqueeze(-1) + weights.log_duration.unsqueeze(-3)
    anew = fresh >= went_on
    origin = (steps.log_filtered[..., :-1, :, 0].unsqueeze(-1) + weights.log_matrix.unsqueeze(-3)).argmax(-2)

    def before(k: int, j: Tensor, r: Tensor) -> Tensor:
        ended = origin[..., k, :].expand(j.shape + origin.shape[-1:]).gather(-1, j.unsqueeze(-1)).squeeze(-1)
        return torch.where(_cell(anew[..., k, :, :], j, r), ended, -torch.ones_like(j))

    last = steps.log_filtered[..., -1, :, :].flatten(-2).argmax(-1)
    return _backwards(weights, last, before), steps.log_likelihood.sum(-1)


@torch.no_grad()
def semi_markov_sample(
    weights: SemiMarkovWeights, steps: SemiMarkovSteps, sample_shape: torch.Size | tuple[int, ...] = ()
) -> Tensor:
    """Paths of pairs given all data, drawn backwards; noise from torch's generator.

    Returns:
        Whole numbers ``(*sample_shape, ..., time, 2)``.

    >>> import torch
    >>> from pyro_ssm.ops.semi_markov import SemiMarkovWeights, semi_markov_filter, semi_markov_sample
    >>> one = torch.zeros(1, 1)
    >>> weights = SemiMarkovWeights(one[0], one, one, torch.zeros(2, 1), None)
    >>> semi_markov_sample(weights, semi_markov_filter(weights), (3,)).shape
    torch.Size([3, 2, 2])
    """
    started, origin = _parted(weights, steps)
    last = steps.log_filtered[..., -1, :, :].flatten(-2).exp()
    shape = torch.Size(sample_shape) + last.shape[:-1]

    def race(p: Tensor) -> Tensor:
        return (p / torch.empty_like(p).exponential_()).argmax(-1)

    def before(k: int, j: Tensor, r: Tensor) -> Tensor:
        columns = origin[..., k, :, :].mT  # (..., j, i)
        p = columns.expand(j.shape + columns.shape[-2:])
        p = p.gather(-2, j[..., None, None].expand(j.shape + (1, p.shape[-1]))).squeeze(-2)
        share = _cell(started[..., k, :, :], j, r)
        return torch.where(torch.rand_like(share) < share, race(p.contiguous()), -torch.ones_like(j))

    return _backwards(weights, race(last.expand(shape + last.shape[-1:]).contiguous()), before)
