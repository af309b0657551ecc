"""Gaussians with a block-tridiagonal precision: Markov paths in information form."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PathMoments", "block_tridiagonal_moments"]


class PathMoments(NamedTuple):
    """Moments of a Gaussian path.

    >>> from pyro_ssm.ops.block_tridiagonal import PathMoments
    >>> PathMoments._fields
    ('mean', 'covariance', 'lag_one', 'entropy')
    """

    mean: Tensor  # (..., time, n)
    covariance: Tensor  # (..., time, n, n)
    lag_one: Tensor  # (..., time - 1, n, n)  Cov(x_k, x_{k+1})
    entropy: Tensor  # (...)


def block_tridiagonal_moments(diagonal: Tensor, upper: Tensor, linear: Tensor) -> PathMoments:
    """Moments of :math:`p(x) \\propto \\exp(-\\tfrac12 x^T \\Lambda x + h^T x)` by block elimination.

    .. math::
        S_k = J_k - B_{k-1}^T S_{k-1}^{-1} B_{k-1}, \\qquad
        x_k \\mid x_{k+1} \\sim N\\left(S_k^{-1}(g_k - B_k x_{k+1}), S_k^{-1}\\right)

    Args:
        diagonal: the blocks J ``(..., time, n, n)``, symmetric.
        upper: the blocks :math:`B_k = \\Lambda_{k, k+1}` ``(..., time - 1, n, n)``.
        linear: h ``(..., time, n)``.

    Raises:
        torch.linalg.LinAlgError: the precision is not positive definite.

    >>> import torch
    >>> from pyro_ssm.ops.block_tridiagonal import block_tridiagonal_moments
    >>> moments = block_tridiagonal_moments(torch.full((2, 1, 1), 2.0), torch.full((1, 1, 1), -1.0), torch.ones(2, 1))
    >>> moments.mean.squeeze(-1), moments.covariance.flatten()
    (tensor([1.0000, 1.0000]), tensor([0.6667, 0.6667]))
    """
    num, n = linear.shape[-2:]
    roots: list[Tensor] = []
    shifts: list[Tensor] = []
    for k in range(num):
        S, g = diagonal[..., k, :, :], linear[..., k, :]
        if k:
            B = upper[..., k - 1, :, :]
            S = S - B.mT @ torch.cholesky_solve(B, roots[-1])
            g = g - (B.mT @ torch.cholesky_solve(shifts[-1].unsqueeze(-1), roots[-1])).squeeze(-1)
        roots.append(torch.linalg.cholesky(S))
        shifts.append(g)
    eye = torch.eye(n, dtype=linear.dtype, device=linear.device)
    covariance = torch.cholesky_solve(eye.expand(roots[-1].shape), roots[-1])
    mean = torch.cholesky_solve(shifts[-1].unsqueeze(-1), roots[-1]).squeeze(-1)
    means, covariances, lags = [mean], [covariance], []
    for k in range(num - 2, -1, -1):
        G = -torch.cholesky_solve(upper[..., k, :, :], roots[k])
        mean = torch.cholesky_solve(shifts[k].unsqueeze(-1), roots[k]).squeeze(-1) + (G @ mean.unsqueeze(-1)).squeeze(
            -1
        )
        lags.append(G @ covariance)
        covariance = torch.cholesky_solve(eye.expand(roots[k].shape), roots[k]) + G @ covariance @ G.mT
        means.append(mean)
        covariances.append(covariance)
    half_log_det = torch.stack(roots, -3).diagonal(dim1=-2, dim2=-1).log().sum((-1, -2))
    lag = torch.stack(lags[::-1], -3) if lags else covariance.new_zeros(covariance.shape[:-2] + (0, n, n))
    entropy = 0.5 * num * n * (1 + math.log(2 * math.pi)) - half_log_det
    return PathMoments(torch.stack(means[::-1], -2), torch.stack(covariances[::-1], -3), lag, entropy)
