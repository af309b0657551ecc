"""The M-step of EM: a linear regression with uncertain regressors, fixed entries and Gaussian noise."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ResidualMoments", "coefficient_step", "residual_covariance"]

RANK_TOLERANCE = 1e-12  # relative to regressors of unit size, in float64


class ResidualMoments(NamedTuple):
    """Expected moments of the residual :math:`e = r - W_0 \\phi` of a regression at its present coefficients.

    They are sums over all steps of all series. Moments about the present fit, not about zero: a level of a million
    then costs no digits of a noise of one. With diagonal noise each row has its own, over the steps at which it was
    seen; with full noise all rows share ``steps`` and ``xx``, whose first dim is then 1.

    >>> from pyro_ssm.infer.expectation_maximisation.regression import ResidualMoments
    >>> ResidualMoments._fields
    ('steps', 'xx', 'ex', 'ee')
    """

    steps: Tensor  # (rows or 1,)  how many steps
    xx: Tensor  # (rows or 1, columns, columns)  sum of E[phi phi^T]
    ex: Tensor  # (rows, columns)  sum of E[e phi^T]
    ee: Tensor  # (rows, rows)  sum of E[e e^T]; with diagonal noise only its diagonal counts


def coefficient_step(moments: ResidualMoments, free: Tensor, covariance: Tensor, diagonal: bool) -> Tensor:
    """The change of the coefficients that maximises the expected log-likelihood, entries that are not free held.

    .. math:: \\min_{\\delta}\\; \\text{tr}\\, S^{-1} \\sum E (e - \\delta \\phi)(e - \\delta \\phi)^T, \\qquad
        \\delta_{ij} = 0 \\text{ where fixed}

    Where the rows have the same free columns, or S is diagonal, each row is solved alone, and the answer does not
    depend on S. Otherwise the rows are solved together, given S (a conditional maximisation; Holmes 2013, section 5).
    Where regressors are collinear, the smallest change is taken.

    Args:
        moments: rows p, columns q.
        free: bool ``(p, q)``.
        covariance: S ``(p, p)``, read only when rows must be solved together.
        diagonal: whether the noise is diagonal.

    Returns:
        :math:`\\delta` ``(p, q)``.

    >>> import torch
    >>> from pyro_ssm.infer.expectation_maximisation.regression import ResidualMoments, coefficient_step
    >>> one = torch.ones(1, 1)
    >>> moments = ResidualMoments(torch.ones(1), 4 * one[None], 2 * one, one)
    >>> coefficient_step(moments, one.bool(), one, diagonal=True)
    tensor([[0.5000]])
    """
    if diagonal or bool((free == free[:1]).all()):
        return _solve(moments.xx, moments.ex, free)
    weight = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    together = torch.kron(weight.contiguous(), moments.xx[0].contiguous())  # over delta, row by row
    return _solve(together, (weight @ moments.ex).flatten(), free.flatten()).view_as(free)


def _solve(A: Tensor, b: Tensor, free: Tensor) -> Tensor:
    """A x = b in the free entries, x = 0 elsewhere; A symmetric, positive semi-definite, of any rank."""
    zero = torch.zeros((), dtype=A.dtype, device=A.device)
    A = torch.where(free.unsqueeze(-1) & free.unsqueeze(-2), A, zero)
    size = A.diagonal(dim1=-2, dim2=-1).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    scaled = A / (size.unsqueeze(-1) * size.unsqueeze(-2))
    inverse = torch.linalg.pinv(scaled, rtol=RANK_TOLERANCE, hermitian=True)
    b = torch.where(free, b, zero)
    return torch.where(free, (inverse @ (b / size).unsqueeze(-1)).squeeze(-1) / size, zero)


def residual_covariance(moments: ResidualMoments, step: Tensor, diagonal: bool) -> Tensor:
    """The covariance of the noise that maximises the expected log-likelihood after ``step``.

    .. math:: S = \\frac{1}{n} \\sum E (e - \\delta \\phi)(e - \\delta \\phi)^T

    Args:
        moments: rows p, columns q.
        step: :math:`\\delta` ``(p, q)``.
        diagonal: whether the noise is diagonal.

    Returns:
        ``(p, p)``, or its diagonal ``(p,)``; NaN in a row that was never seen.

    >>> import torch
    >>> from pyro_ssm.infer.expectation_maximisation.regression import ResidualMoments, residual_covariance
    >>> one = torch.ones(1, 1)
    >>> moments = ResidualMoments(2 * torch.ones(1), 4 * one[None], 2 * one, 3 * one)
    >>> residual_covariance(moments, 0.5 * one, diagonal=False)
    tensor([[1.]])
    """
    if diagonal:
        explained = torch.einsum("ia,iab,ib->i", step, moments.xx.expand(len(step), -1, -1), step)
        return (moments.ee.diagonal() - 2 * (step * moments.ex).sum(-1) + explained) / moments.steps
    shared = step @ moments.ex.mT
    covariance = (moments.ee - shared - shared.mT + step @ moments.xx[0] @ step.mT) / moments.steps
    return 0.5 * (covariance + covariance.mT)
