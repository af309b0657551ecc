"""Radial basis functions and their exact moments under a Gaussian."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RadialMoments", "radial_basis", "radial_moments"]


class RadialMoments(NamedTuple):
    """What :func:`radial_moments` returns.

    >>> from pyro_ssm.ops.radial import RadialMoments
    >>> RadialMoments._fields
    ('value', 'slope', 'product')
    """

    value: Tensor  # (..., K)  E[rho_i]
    slope: Tensor  # (..., K, n)  E[d rho_i / dx]
    product: Tensor  # (..., K, K)  E[rho_i rho_j]


def radial_basis(x: Tensor, centers: Tensor, width: Tensor) -> Tensor:
    """Gaussian bumps of unit height,

    .. math:: \\rho_i(x) = \\exp\\Big(-\\tfrac12 \\sum_j \\frac{(x_j - c_{ij})^2}{w_{ij}^2}\\Big).

    Args:
        x: ``(..., n)``.
        centers: ``(..., K, n)``, in the units of ``x``.
        width: as ``centers``, positive, in the units of ``x``.

    Returns:
        ``(..., K)``; differentiable in everything.

    >>> import torch
    >>> from pyro_ssm.ops import radial_basis
    >>> radial_basis(torch.tensor([0.0]), torch.tensor([[0.0], [2.0]]), torch.ones(2, 1))
    tensor([1.0000, 0.1353])
    """
    return (-0.5 * ((x.unsqueeze(-2) - centers) / width).square().sum(-1)).exp()


def radial_moments(mean: Tensor, covariance: Tensor, centers: Tensor, width: Tensor) -> RadialMoments:
    """Exact moments of radial basis functions of :math:`x \\sim N(m, P)`, with :math:`D_i = \\text{diag}(w_i^2)`:

    .. math::
        E[\\rho_i] &= |I + P D_i^{-1}|^{-1/2}
            \\exp\\big(-\\tfrac12 (c_i - m)^T (P + D_i)^{-1} (c_i - m)\\big), \\\\
        E[\\nabla \\rho_i] &= E[\\rho_i]\\, (P + D_i)^{-1} (c_i - m), \\\\
        E[\\rho_i \\rho_j] &= \\exp\\big(-\\tfrac12 (c_i - c_j)^T (D_i + D_j)^{-1} (c_i - c_j)\\big)\\, E[\\rho_{ij}],

    where :math:`\\rho_{ij}` is the bump of precision :math:`D_i^{-1} + D_j^{-1}` whose centre is the weighted mean of
    :math:`c_i` and :math:`c_j`. The covariance of :math:`\\rho_i` with anything that is jointly Gaussian with x is
    its covariance with x times the slope (Stein's identity).

    Args:
        mean: ``(..., n)``.
        covariance: ``(..., n, n)``, positive semi-definite.
        centers: ``(K, n)``.
        width: ``(K, n)``, positive.

    Returns:
        :class:`RadialMoments`; differentiable in everything.

    Source: Ghahramani and Roweis (1999), "Learning nonlinear dynamical systems using an EM algorithm", section 3.

    >>> import torch
    >>> from pyro_ssm.ops import radial_moments
    >>> one = torch.ones(1, 1)
    >>> radial_moments(torch.zeros(1), one, one, one).value  # (1 / 2)^{1/2} exp(-1 / 4)
    tensor([0.5507])
    """
    value, pull = _expected(mean, covariance, centers, width)
    left, right = width.square().unsqueeze(1), width.square().unsqueeze(0)  # D_i and D_j, (K, 1, n) and (1, K, n)
    apart = centers.unsqueeze(1) - centers.unsqueeze(0)
    height = (-0.5 * (apart.square() / (left + right)).sum(-1)).exp()
    between = (right * centers.unsqueeze(1) + left * centers.unsqueeze(0)) / (left + right)
    narrow = (left * right / (left + right)).sqrt()
    pairs, _ = _expected(mean, covariance, between.flatten(0, 1), narrow.flatten(0, 1))
    return RadialMoments(value, value.unsqueeze(-1) * pull, height * pairs.unflatten(-1, height.shape))


def _expected(mean: Tensor, covariance: Tensor, centers: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """:math:`E[\\rho_i]` ``(..., K)`` and :math:`(P + D_i)^{-1} (c_i - m)` ``(..., K, n)``."""
    root = torch.linalg.cholesky(covariance.unsqueeze(-3) + width.square().diag_embed())
    away = (centers - mean.unsqueeze(-2)).unsqueeze(-1)
    pull = torch.cholesky_solve(away, root)
    log_size = root.diagonal(dim1=-2, dim2=-1).log().sum(-1) - width.log().sum(-1)
    return (-0.5 * (away * pull).sum((-2, -1)) - log_size).exp(), pull.squeeze(-1)
