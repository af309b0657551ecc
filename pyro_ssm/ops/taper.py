"""Tapers for the localisation of ensemble covariances."""

from __future__ import annotations

from torch import Tensor

__all__ = ["gaspari_cohn"]


def gaspari_cohn(distance: Tensor, radius: float | Tensor) -> Tensor:
    """The correlation function of compact support by Gaspari and Cohn, zero beyond twice the radius.

    .. math::
        \\rho(r) = \\begin{cases}
            1 - \\tfrac53 r^2 + \\tfrac58 r^3 + \\tfrac12 r^4 - \\tfrac14 r^5, & 0 \\le r \\le 1, \\\\
            4 - 5 r + \\tfrac53 r^2 + \\tfrac58 r^3 - \\tfrac12 r^4 + \\tfrac1{12} r^5 - \\tfrac2{3 r},
            & 1 < r \\le 2, \\\\
            0, & r > 2,
        \\end{cases} \\qquad r = d / c

    The matrix of :math:`\\rho` at the distances of points on a line, in a plane or in space is positive semidefinite,
    and so is its entrywise product with a covariance matrix (Schur). Distances along a circle need a radius well below
    its circumference.

    Args:
        distance: any shape, not negative.
        radius: half the distance at which the taper vanishes, in the units of ``distance``, positive.

    Returns:
        As ``distance``, between 0 and 1; twice differentiable with respect to the distance.

    Raises:
        ValueError: a distance is negative, or the radius not positive.

    Source: Gaspari and Cohn (1999), "Construction of correlation functions in two and three dimensions", eq. 4.10.

    >>> import torch
    >>> from pyro_ssm.ops import gaspari_cohn
    >>> gaspari_cohn(torch.tensor([0.0, 1.0, 2.0, 3.0]), radius=1.0)
    tensor([1.0000, 0.2083, 0.0000, 0.0000])
    """
    if not bool((distance >= 0).all()):
        raise ValueError("`distance` must not be negative or NaN")
    r = distance / radius
    if not bool((r >= 0).all()) or not bool((r < float("inf")).all()):
        raise ValueError(f"`radius` must be positive, got {radius}")
    near, far = r.clamp(max=1.0), r.clamp(min=1.0, max=2.0)
    inner = 1 + near**2 * (-5 / 3 + near * (5 / 8 + near * (1 / 2 - near / 4)))
    outer = 4 + far * (-5 + far * (5 / 3 + far * (5 / 8 + far * (-1 / 2 + far / 12)))) - 2 / (3 * far)
    return inner.where(r <= 1, outer.clamp(min=0.0)).where(r < 2, r.new_zeros(()))
