"""Smoothed weights of a filter's particles: forward filtering, backward smoothing of marginal laws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_ssm.infer.smc.backward import backward_log_weights
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.stepper import Cloud

__all__ = ["marginal_weights"]


def marginal_weights(fk: FeynmanKac, clouds: Sequence[Cloud]) -> Tensor:
    """The weights that make every cloud of a filter one of the smoother.

    .. math:: W_{k \\mid T}^i = \\sum_j W_{k+1 \\mid T}^j\\,
        \\frac{W_k^i\\, m(x_k^i, x_{k+1}^j)}{\\sum_l W_k^l\\, m(x_k^l, x_{k+1}^j)}

    N squared operations a step and series, in blocks that bound memory. A series that has ended keeps its weights.

    Args:
        fk: with ``log_backward``.
        clouds: of all steps, as :class:`~pyro_ssm.infer.smc.Genealogy` keeps them.

    Returns:
        ``(N, *batch, time)``, summing to 1 over particles.

    Source: Doucet, Godsill and Andrieu (2000), "On sequential Monte Carlo sampling methods for Bayesian filtering",
    section IV.C.

    >>> import torch
    >>> from pyro_ssm.infer.smc import Cloud, FeynmanKac
    >>> from pyro_ssm.infer.smc.marginal_smoother import marginal_weights
    >>> walk = FeynmanKac(None, None, None, 2, log_backward=lambda k, x, y: -0.5 * (y - x) ** 2)
    >>> first = Cloud(torch.tensor([0.0, 50.0]), torch.tensor([0.5, 0.5]).log(), 0)
    >>> second = Cloud(torch.tensor([0.0, 50.0]), torch.tensor([0.9, 0.1]).log(), 1)
    >>> marginal_weights(walk, [first, second])
    tensor([[0.9000, 0.9000],
            [0.1000, 0.1000]])
    """
    weights = clouds[-1].weights
    found = [weights]
    for k in range(len(clouds) - 1, 0, -1):
        previous, later = clouds[k - 1], weights
        weights = torch.zeros_like(later)
        for block, pairs in backward_log_weights(fk, previous, clouds[k].particles, k):
            weights = weights + (pairs.softmax(0) * later[block]).sum(1)
        if fk.step_mask is not None:
            weights = torch.where(fk.step_mask[..., k], weights, later)
        weights = weights / weights.sum(0)
        found.append(weights)
    return torch.stack(found[::-1], -1)
