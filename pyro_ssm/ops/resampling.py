"""Resampling: from weights and uniforms to ancestors, for many series at once.

A scheme is ``scheme(weights, uniforms) -> ancestors``: ``weights`` ``(N, *batch)``, not negative, of any positive
total; ``uniforms`` ``(rows, *batch)`` float64 in [0, 1), as many rows as :data:`SCHEMES` says; ``ancestors``
``(N, *batch)`` int64. Every scheme is unbiased, :math:`E[\\#\\{j : a_j = i\\}] = N W_i`, and never chooses a particle
of weight zero. Cumulative sums are in float64 and offspring are counted where a closed form exists, so that float32
weights of a million particles lose nothing and no index leaves its range. Weights that are NaN or all zero give valid
indices without meaning. Nothing here is differentiable.

Sources: Douc, Cappe and Moulines (2005), "Comparison of resampling schemes for particle filtering" (multinomial,
stratified, systematic, residual); Gerber, Chopin and Whiteley (2019), "Negative association, ordering and convergence
of resampling methods" (SSP); Del Moral (2004), "Feynman-Kac formulae", section 2.5.2 (killing).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.ops.resampling_kernel import (
    POINTS,
    STRATIFIED,
    SYSTEMATIC,
    compiled_ancestors,
    compiled_of_counts,
    compiled_take,
)

__all__ = [
    "SCHEMES",
    "Scheme",
    "ancestors_of",
    "at_points",
    "at_unsorted_points",
    "chosen_particles",
    "killing",
    "multinomial",
    "resample_some",
    "residual",
    "ssp",
    "stratified",
    "systematic",
]

_ONE_UP = 1.0 + 2.0**-50  # so that the last particle with weight reaches N in spite of rounding


def systematic(weights: Tensor, uniforms: Tensor) -> Tensor:
    """One uniform, N equidistant points: offspring are counted in closed form.

    .. math:: \\#\\{j : a_j \\le i\\} = \\lfloor N (W_1 + \\dots + W_i) + u \\rfloor

    Each particle has :math:`\\lfloor N W_i \\rfloor` or :math:`\\lceil N W_i \\rceil` offspring.

    Args:
        weights: ``(N, *batch)``.
        uniforms: ``(1, *batch)``.

    >>> import torch
    >>> from pyro_ssm.ops.resampling import systematic
    >>> systematic(torch.tensor([0.5, 0.0, 0.25, 0.25]), torch.tensor([0.3], dtype=torch.float64))
    tensor([0, 0, 2, 3])
    """
    if (found := compiled_ancestors(SYSTEMATIC, weights, uniforms)) is not None:
        return found
    rows = _rows(weights)
    cumulative = _cumulative(rows)
    return _back(_ancestors(_whole(torch.addcmul(_rows(uniforms), cumulative, _scale(cumulative)))), weights.shape)


def stratified(weights: Tensor, uniforms: Tensor) -> Tensor:
    """One uniform in each of N strata, :math:`p_j = (j + u_j) / N`; counted in closed form.

    Args:
        weights: ``(N, *batch)``.
        uniforms: ``(N, *batch)``.

    >>> import torch
    >>> from pyro_ssm.ops.resampling import stratified
    >>> stratified(torch.tensor([0.5, 0.0, 0.25, 0.25]), torch.full((4,), 0.5, dtype=torch.float64))
    tensor([0, 0, 2, 3])
    """
    if (found := compiled_ancestors(STRATIFIED, weights, uniforms)) is not None:
        return found
    rows = _rows(weights)
    cumulative = _cumulative(rows)
    reached = cumulative * _scale(cumulative)  # in strata
    stratum = _whole(reached)
    point = _rows(uniforms).gather(-1, stratum.clamp(max=rows.shape[-1] - 1))
    return _back(_ancestors(stratum + (point < reached - stratum)), weights.shape)


def multinomial(weights: Tensor, uniforms: Tensor) -> Tensor:
    """N independent draws, in ascending order: sorted uniforms come from exponential spacings.

    Args:
        weights: ``(N, *batch)``.
        uniforms: ``(N + 1, *batch)``.

    >>> import torch
    >>> from pyro_ssm.ops.resampling import multinomial
    >>> multinomial(torch.tensor([0.5, 0.0, 0.25, 0.25]), torch.full((5,), 0.5, dtype=torch.float64))
    tensor([0, 0, 2, 3])
    """
    sums = _exponential_sums(uniforms)
    return at_points(weights, _back(sums[:, :-1] / sums[:, -1:], weights.shape))


def residual(weights: Tensor, uniforms: Tensor) -> Tensor:
    """:math:`\\lfloor N W_i \\rfloor` copies for certain; the rest multinomially from the fractions.

    Args:
        weights: ``(N, *batch)``.
        uniforms: ``(N + 1, *batch)``.

    >>> import torch
    >>> from pyro_ssm.ops.resampling import residual
    >>> residual(torch.tensor([0.5, 0.0, 0.25, 0.25]), torch.full((5,), 0.5, dtype=torch.float64))
    tensor([0, 0, 2, 3])
    """
    rows = _rows(weights)
    num = rows.shape[-1]
    expected = rows.double() * (num / rows.double().sum(-1, keepdim=True))
    sure = _whole(expected)
    left = (num - sure.sum(-1, keepdim=True)).clamp(0, num)  # R draws to make
    fractions = (expected - sure).clamp(min=0).cumsum(-1)
    sums = _exponential_sums(uniforms)
    points = sums[:, :-1] / sums.gather(-1, left)
    points = torch.where(torch.arange(num, device=left.device) < left, points, 2.0)
    share = (fractions / fractions[:, -1:] * _ONE_UP).contiguous()
    drawn = torch.minimum(torch.searchsorted(points, share), left)
    return _back(_ancestors(sure.cumsum(-1) + drawn), weights.shape)


def killing(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Particle i survives with probability :math:`W_i / \\max W`; one that does not is replaced by a multinomial draw.

    The only scheme here whose ancestors are not in ascending order: survivors keep their place.

    Args:
        weights: ``(N, *batch)``.
        uniforms: ``(2 N, *batch)``.

    >>> import torch
    >>> from pyro_ssm.ops.resampling import killing
    >>> killing(torch.tensor([0.5, 0.0, 0.25, 0.25]), torch.full((8,), 0.4, dtype=torch.float64))
    tensor([0, 0, 2, 3])
    """
    rows, uniforms = _rows(weights), _rows(uniforms)
    num = rows.shape[-1]
    cumulative = _cumulative(rows)
    total = cumulative[:, -1:]
    point = torch.minimum(uniforms[:, num:] * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, point.contiguous(), right=True).clamp(max=num - 1)
    survives = uniforms[:, :num] * rows.amax(-1, keepdim=True) < rows
    return _back(torch.where(survives, torch.arange(num, device=rows.device), drawn), weights.shape)


def ssp(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Srinivasan's sampling process: counts are :math:`\\lfloor N W_i \\rfloor` or one more, negatively associated.

    The fractions :math:`p, q` of two particles meet: below :math:`p + q = 1` one of them takes all, above it one of
    them becomes a whole offspring; the rest meets the next. Here the meetings form a tree, so that a level of it is one
    operation: pivotal sampling keeps its negative association in any order of meetings that is fixed beforehand
    (Dubhashi, Jonasson and Ranjan 2007, "Positive influence and negative dependence").

    Args:
        weights: ``(N, *batch)``.
        uniforms: ``(N, *batch)``.

    >>> import torch
    >>> from pyro_ssm.ops.resampling import ssp
    >>> ssp(torch.tensor([0.5, 0.0, 0.25, 0.25]), torch.full((4,), 0.5, dtype=torch.float64))
    tensor([0, 0, 2, 3])
    """
    rows, uniforms = _rows(weights), _rows(uniforms)
    num = rows.shape[-1]
    expected = rows.double() * (num / rows.double().sum(-1, keepdim=True))
    counts = _whole(expected)
    rest, who = expected - counts, torch.arange(num, device=rows.device).expand(rows.shape)
    used = 0
    while rest.shape[-1] > 1:
        pairs = rest.shape[-1] // 2
        p, q, u = rest[:, 0 : 2 * pairs : 2], rest[:, 1 : 2 * pairs : 2], uniforms[:, used : used + pairs]
        used += pairs
        total = p + q
        above = total >= 1
        first_stays = torch.where(above, u * (2 - total) >= 1 - q, u * total < p)
        first, second = who[:, 0 : 2 * pairs : 2], who[:, 1 : 2 * pairs : 2]
        counts = counts.scatter_add(-1, torch.where(first_stays, second, first), above.long())
        odd = slice(2 * pairs, None)
        rest = torch.cat([torch.where(above, total - 1, total), rest[:, odd]], -1)
        who = torch.cat([torch.where(first_stays, first, second), who[:, odd]], -1)
    # the last fraction is whole but for rounding: it makes the counts sum to N
    counts = counts.scatter_add(-1, who, num - counts.sum(-1, keepdim=True))
    return _back(_ancestors(counts.clamp(0, num).cumsum(-1)), weights.shape)


def at_points(weights: Tensor, points: Tensor) -> Tensor:
    """The inverse of the weights' distribution function at ascending points in [0, 1).

    .. math:: a_j = \\min\\{i : W_1 + \\dots + W_i > p_j\\}

    Args:
        weights: ``(N, *batch)``.
        points: ``(N, *batch)`` float64, ascending along the first dim.

    >>> import torch
    >>> from pyro_ssm.ops.resampling import at_points
    >>> at_points(torch.tensor([0.5, 0.0, 0.5]), torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64))
    tensor([0, 0, 2])
    """
    if (found := compiled_ancestors(POINTS, weights, points)) is not None:
        return found
    cumulative = _cumulative(_rows(weights))
    share = (cumulative / cumulative[:, -1:] * _ONE_UP).contiguous()
    return _back(_ancestors(torch.searchsorted(_rows(points).contiguous(), share)), weights.shape)


def at_unsorted_points(weights: Tensor, points: Tensor) -> Tensor:
    """The same at any number of points, in any order: at uniform ones, independent draws.

    Args:
        weights: ``(N, *batch)``.
        points: float64 ``(M, *batch)`` in [0, 1).

    Returns:
        int64 ``(M, *batch)``.

    >>> import torch
    >>> from pyro_ssm.ops.resampling import at_unsorted_points
    >>> at_unsorted_points(torch.tensor([0.5, 0.0, 0.5]), torch.tensor([0.9, 0.1, 0.5, 0.0], dtype=torch.float64))
    tensor([2, 0, 2, 0])
    """
    cumulative = _cumulative(_rows(weights))
    total = cumulative[:, -1:]
    point = torch.minimum(_rows(points) * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, point.contiguous(), right=True).clamp(max=len(weights) - 1)
    return _back(index, points.shape)


def ancestors_of(counts: Tensor) -> Tensor:
    """The ancestors, in ascending order, that have given numbers of offspring.

    Args:
        counts: ``(N, *batch)`` int64 that sum to N over the first dim.

    >>> import torch
    >>> from pyro_ssm.ops.resampling import ancestors_of
    >>> ancestors_of(torch.tensor([2, 0, 1]))
    tensor([0, 0, 2])
    """
    return _back(_ancestors(_rows(counts).cumsum(-1)), counts.shape)


class Scheme(NamedTuple):
    """A resampling scheme and the uniforms that it needs.

    >>> from pyro_ssm.ops.resampling import SCHEMES
    >>> SCHEMES["systematic"].rows(1000), SCHEMES["multinomial"].rows(1000)
    (1, 1001)
    """

    ancestors: Callable[[Tensor, Tensor], Tensor]
    rows: Callable[[int], int]


#: by name
SCHEMES = {
    "killing": Scheme(killing, lambda num: 2 * num),
    "multinomial": Scheme(multinomial, lambda num: num + 1),
    "residual": Scheme(residual, lambda num: num + 1),
    "ssp": Scheme(ssp, lambda num: num),
    "stratified": Scheme(stratified, lambda num: num),
    "systematic": Scheme(systematic, lambda num: 1),
}


_COMPILED = {systematic: SYSTEMATIC, stratified: STRATIFIED}


def resample_some(
    scheme: Callable[[Tensor, Tensor], Tensor], weights: Tensor, uniforms: Tensor, need: Tensor
) -> Tensor:
    """The ancestors by a scheme in the series that need it; in the others each particle is its own.

    Args:
        scheme: one of this module's.
        weights: ``(N, *batch)``.
        uniforms: ``(rows, *batch)``.
        need: bool ``(*batch)``.

    >>> import torch
    >>> from pyro_ssm.ops.resampling import resample_some, systematic
    >>> weights, u = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.zeros(1, 2, dtype=torch.float64)
    >>> resample_some(systematic, weights, u, torch.tensor([True, False]))
    tensor([[1, 0],
            [1, 1]])
    """
    if scheme in _COMPILED and (found := compiled_ancestors(_COMPILED[scheme], weights, uniforms, need)) is not None:
        return found
    itself = torch.arange(len(weights), device=weights.device).reshape((-1,) + (1,) * (weights.dim() - 1))
    return torch.where(need, scheme(weights, uniforms), itself)


def chosen_particles(x: Tensor, ancestors: Tensor, batch: torch.Size) -> Tensor:
    """The particles ``ancestors``, series by series.

    Args:
        x: ``(N, *batch, ...)``.
        ancestors: int64 ``(M, *batch)``.
        batch: the shape of the series.

    Returns:
        ``(M, *batch, ...)``; differentiable in ``x``.

    >>> import torch
    >>> from pyro_ssm.ops.resampling import chosen_particles
    >>> chosen_particles(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1, 0], [1, 1]]), torch.Size([2]))
    tensor([[3., 2.],
            [3., 4.]])
    """
    series, event = batch.numel(), x.shape[1 + len(batch) :]
    if x.shape[1 : 1 + len(batch)] != batch:
        x = x.expand(x.shape[:1] + batch + event)
    if (found := compiled_take(x, ancestors, series)) is not None:
        return found.view(ancestors.shape + event)
    flat = ancestors.reshape(-1)
    if series > 1:  # row n, series b lies at n * series + b
        flat = (ancestors.reshape(-1, series) * series + torch.arange(series, device=ancestors.device)).reshape(-1)
    # one number a particle: a flat gather is several times faster than one of rows
    rows = x.reshape(-1) if event.numel() == 1 else x.reshape(x.shape[0] * series, -1)
    return rows.index_select(0, flat).reshape(ancestors.shape + event)


# ------------------------------------------------------------------------------- one series a row, particles last


def _rows(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.reshape(tensor.shape[0], -1).mT


def _back(rows: Tensor, shape: torch.Size) -> Tensor:
    return rows.squeeze(0) if len(shape) == 1 else rows.mT.reshape(shape)


def _cumulative(rows: Tensor) -> Tensor:
    return torch.cumsum(rows, -1, dtype=torch.float64)


def _scale(cumulative: Tensor) -> Tensor:
    return (cumulative.shape[-1] * _ONE_UP) / cumulative[:, -1:]


def _whole(x: Tensor) -> Tensor:
    """The integer part, within [0, N] whatever x is (NaN becomes an integer that depends on the machine)."""
    return x.long().clamp_(0, x.shape[-1])


def _exponential_sums(uniforms: Tensor) -> Tensor:
    """Partial sums of exponential variables: divided by a later one they are sorted uniforms (Renyi)."""
    return torch.log1p(-_rows(uniforms)).neg().cumsum(-1)


def _ancestors(upto: Tensor) -> Tensor:
    """a_j = #{i : upto_i <= j}, where ``upto`` counts the offspring of particles 0 to i, ``(series, N)`` ascending."""
    series, num = upto.shape
    upto = upto.clamp_(max=num)
    upto.select(-1, -1).fill_(num)  # also where weights are NaN
    if (found := compiled_of_counts(upto)) is not None:
        return found
    marks = torch.zeros(series * num + 1, dtype=torch.int64, device=upto.device)
    if series == 1:
        marks.scatter_add_(0, upto[0], torch.ones_like(upto[0]))
        return marks[:-1].cumsum(0).unsqueeze(0)
    # one count over all series: each of them adds exactly N, so that it starts at its own offset
    start = (torch.arange(series, device=upto.device) * num).unsqueeze(-1)
    flat = (upto + start).reshape(-1)
    marks.scatter_add_(0, flat, torch.ones_like(flat))
    return marks[:-1].cumsum(0).view(series, num) - start
