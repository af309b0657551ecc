"""Do the draws of a law follow its density? Tests with their own error bars."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, biject_to, constraints

__all__ = ["density_z_scores"]


def density_z_scores(law: Any, num_draws: int = 20_000) -> Tensor:
    """Standardised deviations between the draws of a law and its density; about standard normal if they agree.

    For a density p and any density q on its support,

    .. math:: E_{x \\sim p}\\left[\\frac{q(x)}{p(x)}\\right] = 1,

    which fails when p is not the law of the draws, or when its normalising constant is wrong. q runs over normal laws
    somewhat narrower than the draws, at their mean and shifted along each coordinate; a law on part of the line is
    carried to the whole first. For a discrete law the frequencies of the values are compared with their probabilities.

    Args:
        law: batch shape of one element, one event dim or two; it needs ``sample`` and ``log_prob``.
        num_draws: half of them place q, half test.

    Returns:
        One score per test function.

    Randomness: torch's generator.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.testing import density_z_scores
    >>> right = dist.Normal(torch.ones(2), 0.5).to_event(1)
    >>> bool(density_z_scores(right).abs().max() < 4.5)
    True
    """
    draws = law.sample(torch.Size([num_draws]))
    terms = law.log_prob(draws).detach().reshape(num_draws).double()
    support = law.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if getattr(support, "is_discrete", False):
        return _frequencies(draws.reshape(num_draws, -1), terms)
    if support is not constraints.real and support is not constraints.real_vector:
        carry = biject_to(law.support)
        free = carry.inv(draws)
        jacobian = carry.log_abs_det_jacobian(free, draws)
        terms = terms + jacobian.reshape(num_draws, -1).sum(-1)
        draws = free
    return _ratios(draws.detach().reshape(num_draws, -1).double(), terms)


def _ratios(draws: Tensor, terms: Tensor) -> Tensor:
    half = len(draws) // 2
    fitted, tested, terms = draws[:half], draws[half:], terms[half:]
    mean = fitted.mean(0)
    root = torch.linalg.cholesky(torch.atleast_2d(fitted.T.cov()))
    sd = fitted.std(0)
    dim = draws.shape[-1]
    width = math.sqrt(0.6)
    shifts = torch.cat([torch.zeros(1, dim), 0.4 * torch.eye(dim), -0.4 * torch.eye(dim)]).to(sd) * sd
    scores = []
    for shift in shifts:
        q = MultivariateNormal(mean + shift, scale_tril=width * root)
        ratio = (q.log_prob(tested) - terms).exp()
        scores.append((ratio.mean() - 1) / (ratio.std() / math.sqrt(half)).clamp_min(1e-12))
    return torch.stack(scores)


def _frequencies(draws: Tensor, terms: Tensor) -> Tensor:
    values, which, counts = torch.unique(draws, dim=0, return_inverse=True, return_counts=True)
    log_prob = torch.empty(len(values), dtype=terms.dtype).scatter_(0, which, terms)
    p, n = log_prob.exp(), len(draws)
    often = (counts >= 20) | (n * p >= 20)
    if not bool(often.any()):
        raise ValueError("too many values for a test of frequencies: take a law with a smaller event or less spread")
    p, counts = p[often], counts[often]
    scores = (counts - n * p) / (n * p * (1 - p)).clamp_min(1e-6).sqrt()
    total = log_prob.exp().sum()
    return torch.cat([scores, ((total - 1).clamp_min(0) * 1e4).reshape(1)])  # probabilities never sum to more than 1
