"""The analysis step of ensemble Kalman filters: tensors in, tensors out.

An ensemble ``(N, ..., n)`` stands for a law by its mean and its *anomalies*, the columns of
:math:`X = [x_1 - \\bar x, \\dots, x_N - \\bar x] / \\sqrt{N - 1}`, a square root of its covariance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ssm.ops.kalman import hide_rows, matvec
from pyro_ssm.ops.linalg import solve_lower, tria

__all__ = ["anomalies", "ensemble_smoother_gain", "ensemble_update", "relax_spread"]

Tapers = tuple[Tensor, Tensor]  # of Cov(x, y) (n, p) and of Cov(y) (p, p)


def anomalies(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the anomalies of an ensemble.

    .. math:: \\bar x = \\frac1N \\sum x_i, \\qquad X X^T = \\frac1{N - 1} \\sum (x_i - \\bar x)(x_i - \\bar x)^T

    Args:
        x: ``(N, ..., n)``.

    Returns:
        ``(..., n)`` and ``(..., n, N)``.

    >>> import torch
    >>> from pyro_ssm.ops.ensemble import anomalies
    >>> anomalies(torch.tensor([[1.0], [3.0]]))
    (tensor([2.]), tensor([[-1.,  1.]]))
    """
    mean = x.mean(0)
    return mean, ((x - mean) / (x.shape[0] - 1) ** 0.5).movedim(0, -1)


def ensemble_update(
    x: Tensor,
    h: Tensor,
    y: Tensor,
    mask: Tensor,
    R: Tensor,
    noise: Tensor | None = None,
    tapers: Tapers | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """An ensemble given an observation :math:`y = h(x) + R \\epsilon`.

    With anomalies X of the states and Y of their images, :math:`C = X Y^T` and :math:`S S^T = Y Y^T + R R^T`,

    .. math::
        \\text{perturbed:} \\quad & x_i' = x_i + C (S S^T)^{-1} (y - h_i - \\eta_i), \\\\
        \\text{deterministic:} \\quad & \\bar x' = \\bar x + C (S S^T)^{-1} (y - \\bar h), \\qquad
        X' = X - C S^{-T} (S + R)^{-1} Y.

    The second gives the mean and covariance of Kalman's update of the ensemble's own mean and covariance exactly, if h
    is linear: for triangular roots, :math:`X' X'^T = X X^T - C (S S^T)^{-1} C^T`. It keeps the anomalies centred, and
    needs triangular solves only. Missing rows are left out (:func:`~pyro_ssm.ops.kalman.hide_rows`).

    Args:
        x: ``(N, ..., n)``; h: ``(N, ..., p)``, their images without noise.
        y, mask: ``(..., p)``; what stands at a masked entry is not read.
        R: ``(..., p, p)`` lower triangular.
        noise: :math:`\\eta`, draws of the observation noise ``(N, ..., p)``; None is deterministic.
        tapers: factors ``(n, p)`` and ``(p, p)``, entry by entry, of C and of :math:`Y Y^T` (localisation).

    Returns:
        The members ``(N, ..., n)``, the whitened innovation of the mean ``(..., p)`` and the diagonal of S, as
        :func:`~pyro_ssm.ops.kalman.update`. Differentiable.

    Sources: Burgers, van Leeuwen and Evensen (1998), "Analysis scheme in the ensemble Kalman filter"; Andrews (1968),
    "A square root formulation of the Kalman covariance equations"; Whitaker and Hamill (2002), "Ensemble data
    assimilation without perturbed observations"; Houtekamer and Mitchell (2001), on localisation.

    >>> import torch
    >>> from pyro_ssm.ops.ensemble import ensemble_update
    >>> x = torch.tensor([[-1.0], [0.0], [1.0]])               # mean 0, variance 1
    >>> after, _, _ = ensemble_update(x, x, torch.ones(1), torch.tensor([True]), torch.ones(1, 1))
    >>> after.mean(0), after.var(0)
    (tensor([0.5000]), tensor([0.5000]))
    """
    mean, X = anomalies(x)
    middle, Y = anomalies(h)
    y, Y, d, R = hide_rows(mask, y, Y, middle, R)
    C = X @ Y.mT
    R = R.expand(Y.shape[:-1] + R.shape[-1:])
    if tapers is None:
        S = tria(torch.cat([Y, R], -1))
    else:
        C = tapers[0] * C
        S = torch.linalg.cholesky(tapers[1] * (Y @ Y.mT) + R @ R.mT)
    G = torch.linalg.solve_triangular(S, C.mT, upper=False).mT
    e = solve_lower(S, y - d)
    if noise is not None:
        innovation = torch.where(mask, y - h - noise, torch.zeros((), dtype=h.dtype, device=h.device))
        members = x + matvec(G, solve_lower(S, innovation))
    else:
        K = torch.linalg.solve_triangular(S + R, G, upper=False, left=False)
        members = (mean + matvec(G, e)) + (x.shape[0] - 1) ** 0.5 * (X - K @ Y).movedim(-1, 0)
    return members, e, S.diagonal(dim1=-2, dim2=-1)


def relax_spread(before: Tensor, after: Tensor, amount: float) -> Tensor:
    """Give an updated ensemble back a part of the spread that the update took, coordinate by coordinate.

    .. math:: x_i' = \\bar x + \\Bigl(1 + \\alpha \\frac{\\sigma_b - \\sigma_a}{\\sigma_a}\\Bigr) (x_i - \\bar x)

    Args:
        before, after: ``(N, ..., n)``, with deviations :math:`\\sigma_b` and :math:`\\sigma_a`.
        amount: :math:`\\alpha`; 0 changes nothing, 1 restores the spread.

    Source: Whitaker and Hamill (2012), "Evaluating methods to account for system errors in ensemble data assimilation".

    >>> import torch
    >>> from pyro_ssm.ops.ensemble import relax_spread
    >>> relax_spread(torch.tensor([[-2.0], [2.0]]), torch.tensor([[4.0], [6.0]]), 0.5).squeeze(-1)
    tensor([3.5000, 6.5000])
    """
    spread = torch.linalg.vector_norm(before - before.mean(0), dim=0)
    mean = after.mean(0)
    left = torch.linalg.vector_norm(after - mean, dim=0)
    ratio = torch.where(left > 0, spread / torch.where(left > 0, left, torch.ones_like(left)), torch.ones_like(left))
    return mean + (1 + amount * (ratio - 1)) * (after - mean)


def ensemble_smoother_gain(now: Tensor, then: Tensor, taper: Tensor | None = None) -> tuple[Tensor, ...]:
    """The regression of an ensemble on the same members at the next time.

    .. math:: J = X_k X_{k+1}^{+}, \\qquad \\text{or} \\quad
        J = (\\rho \\circ X_k X_{k+1}^T) (\\rho \\circ X_{k+1} X_{k+1}^T)^{+} \\text{ with a taper}

    Args:
        now: ``(N, ..., n)`` filtered at k; then: ``(N, ..., n)`` the members predicted from them.
        taper: ``(n, n)``.

    Returns:
        Matrices whose product is J: one ``(..., n, n)``, or, for fewer members than states and no taper, its factors
        ``(..., n, N)`` and ``(..., N, n)``. Differentiable where the rank does not change.

    Source: Raanes (2016), "On the ensemble Rauch-Tung-Striebel smoother and its equivalence to the ensemble Kalman
    smoother".

    >>> import torch
    >>> from pyro_ssm.ops.ensemble import ensemble_smoother_gain
    >>> x = torch.tensor([[1.0], [2.0], [4.0]])
    >>> ensemble_smoother_gain(x, 2 * x + 1)
    (tensor([[0.5000]]),)
    """
    X, Z = anomalies(now)[1], anomalies(then)[1]
    size = torch.linalg.vector_norm(Z.detach(), dim=-1, keepdim=True)  # rows of unequal units must not look like a rank
    size = torch.where(size > 0, size, torch.ones_like(size))
    Z = Z / size
    if taper is not None:
        covariance = taper * (Z @ Z.mT)
        return ((taper * (X @ Z.mT)) @ torch.linalg.pinv(covariance, rtol=_rtol(Z), hermitian=True) / size.mT,)
    inverse = _pseudo_inverse(Z) / size.mT
    return (X @ inverse,) if X.shape[-2] <= X.shape[-1] else (X, inverse)


def _pseudo_inverse(Z: Tensor) -> Tensor:
    """:math:`Z^+ = Z^T (Z Z^T)^+ = (Z^T Z)^+ Z^T`, by the smaller of the two roots."""
    rows, columns = Z.shape[-2:]
    P = torch.linalg.pinv(tria(Z if rows <= columns else Z.mT), rtol=_rtol(Z))
    return (P @ Z).mT @ P if rows <= columns else P.mT @ (P @ Z.mT)


def _rtol(Z: Tensor) -> float:
    return 10 * max(Z.shape[-2:]) * torch.finfo(Z.dtype).eps
