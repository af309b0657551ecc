"""Resampling given one choice: what conditional SMC draws beside the path that it keeps.

A scheme is ``scheme(weights, chosen, uniforms) -> ancestors``: ``weights`` ``(N, *batch)``, not negative; ``chosen``
``(*batch)`` int64, the ancestor of particle 0; ``uniforms`` ``(rows, *batch)`` float64 in [0, 1), as many rows as
:data:`CONDITIONAL_SCHEMES` says; ``ancestors`` ``(N, *batch)`` int64, the first of them ``chosen``.

Each scheme is the law of a vector of ancestors in which *every single one* has law W, given its first entry. The
stratified and the systematic scheme number their points from a random one on, cyclically, which gives them that
property. It follows that ``chosen`` may first be drawn from any law proportional to :math:`W_i f_i` (ancestor sampling)
and the others then given it: the pair is a draw from the tilted joint law.

Source: Andrieu, Doucet and Holenstein (2010), "Particle Markov chain Monte Carlo methods" (multinomial); Chopin and
Singh (2015), "On particle Gibbs sampling", section 5 (systematic).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.ops.resampling import at_unsorted_points

__all__ = [
    "CONDITIONAL_SCHEMES",
    "ConditionalScheme",
    "conditional_multinomial",
    "conditional_stratified",
    "conditional_systematic",
]


def conditional_multinomial(weights: Tensor, chosen: Tensor, uniforms: Tensor) -> Tensor:
    """Independent draws beside the chosen one.

    Args:
        weights: ``(N, *batch)``.
        chosen: ``(*batch)``.
        uniforms: ``(N, *batch)``.

    >>> import torch
    >>> from pyro_ssm.ops.conditional_resampling import conditional_multinomial
    >>> conditional_multinomial(torch.tensor([0.5, 0.0, 0.5]), torch.tensor(2), torch.full((3,), 0.1).double())
    tensor([2, 0, 0])
    """
    return _first_is(chosen, at_unsorted_points(weights, uniforms))


def conditional_stratified(weights: Tensor, chosen: Tensor, uniforms: Tensor) -> Tensor:
    """One uniform in each of N strata; particle 0 has that of the stratum in which a point of its ancestor fell.

    Args:
        weights: ``(N, *batch)``.
        chosen: ``(*batch)``.
        uniforms: ``(N, *batch)``.

    >>> import torch
    >>> from pyro_ssm.ops.conditional_resampling import conditional_stratified
    >>> conditional_stratified(torch.tensor([0.5, 0.0, 0.5]), torch.tensor(2), torch.full((3,), 0.5).double())
    tensor([2, 0, 2])
    """
    num = len(weights)
    stratum = (_point_of(weights, chosen, uniforms[0]) * num).long().clamp(max=num - 1)
    return _first_is(chosen, at_unsorted_points(weights, ((stratum + _places(weights)) % num + uniforms) / num))


def conditional_systematic(weights: Tensor, chosen: Tensor, uniforms: Tensor) -> Tensor:
    """N equidistant points on a circle, one of which falls on the chosen ancestor.

    .. math:: V \\sim U[W_1 + \\dots + W_{i - 1},\\; W_1 + \\dots + W_i), \\qquad p_m = (V + m / N) \\bmod 1

    Args:
        weights: ``(N, *batch)``.
        chosen: ``(*batch)``, i.
        uniforms: ``(1, *batch)``.

    >>> import torch
    >>> from pyro_ssm.ops.conditional_resampling import conditional_systematic
    >>> weights = torch.tensor([0.5, 0.0, 0.25, 0.25])
    >>> conditional_systematic(weights, torch.tensor(2), torch.tensor([0.3], dtype=torch.float64))
    tensor([2, 3, 0, 0])
    """
    point = _point_of(weights, chosen, uniforms[0])
    return _first_is(chosen, at_unsorted_points(weights, (point + _places(weights) / len(weights)) % 1.0))


class ConditionalScheme(NamedTuple):
    """A conditional resampling scheme and the uniforms that it needs.

    >>> from pyro_ssm.ops.conditional_resampling import CONDITIONAL_SCHEMES
    >>> CONDITIONAL_SCHEMES["systematic"].rows(1000)
    1
    """

    ancestors: Callable[[Tensor, Tensor, Tensor], Tensor]
    rows: Callable[[int], int]


#: by name
CONDITIONAL_SCHEMES = {
    "multinomial": ConditionalScheme(conditional_multinomial, lambda num: num),
    "stratified": ConditionalScheme(conditional_stratified, lambda num: num),
    "systematic": ConditionalScheme(conditional_systematic, lambda num: 1),
}


def _point_of(weights: Tensor, chosen: Tensor, uniform: Tensor) -> Tensor:
    """A point that falls on the chosen particle, ``(*batch)`` in [0, 1)."""
    cumulative = weights.cumsum(0, dtype=torch.float64)
    upper = cumulative.gather(0, chosen.unsqueeze(0))[0]
    width = weights.gather(0, chosen.unsqueeze(0))[0].double()
    return ((upper - (1 - uniform) * width) / cumulative[-1]).clamp(0, 1 - 2.0**-53)


def _places(weights: Tensor) -> Tensor:
    """0 to N - 1, ``(N, 1, ...)``."""
    return torch.arange(len(weights), device=weights.device).reshape((-1,) + (1,) * (weights.dim() - 1))


def _first_is(chosen: Tensor, ancestors: Tensor) -> Tensor:
    return torch.cat([chosen.unsqueeze(0), ancestors[1:]])
