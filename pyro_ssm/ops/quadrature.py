"""Sigma points: small sets of weighted points that stand for a standard normal law.

For :math:`x \\sim N(m, L L^T)` the points are :math:`m + L \\xi_s`. A rule gives the mean and the covariance of any
function of x as weighted sums that are *differences of function values, squared and added*: no rule here can return an
indefinite covariance, also where the classical unscented weights are negative.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SigmaPoints", "cubature_rule", "gauss_hermite_rule", "unscented_rule"]

_MOST_POINTS = 100_000


class SigmaPoints(NamedTuple):
    """A quadrature rule for the standard normal law in n dimensions, with S points; the first lies nearest the origin.

    .. math::
        E f &\\approx \\sum_s w_s f(\\xi_s), \\\\
        \\operatorname{Cov} f &\\approx \\sum_s v_s\\, r_s r_s^T, \\qquad r_s = f(\\xi_s) - \\sum_j c_j f(\\xi_j), \\\\
        E f \\xi^T &\\approx \\sum_s v_s\\, f(\\xi_s)\\, \\xi_s^T,

    with :math:`\\sum w = \\sum c = 1`, :math:`v \\ge 0`, :math:`\\sum v_s \\xi_s = 0` and
    :math:`\\sum v_s \\xi_s \\xi_s^T = I`. Where all weights are positive, :math:`w = v = c`.

    >>> from pyro_ssm.ops import SigmaPoints
    >>> SigmaPoints._fields
    ('points', 'mean_weights', 'spread_weights', 'centre_weights')
    """

    points: Tensor  # (S, n)
    mean_weights: Tensor  # (S,)  w
    spread_weights: Tensor  # (S,)  v
    centre_weights: Tensor  # (S,)  c

    def like(self, tensor: Tensor) -> SigmaPoints:
        """The same rule in the dtype and on the device of ``tensor``."""
        return SigmaPoints(*(part.to(tensor) for part in self))


def cubature_rule(n: int) -> SigmaPoints:
    """The spherical-radial cubature rule of third degree: 2 n points of equal weight.

    .. math:: \\xi_{\\pm i} = \\pm \\sqrt{n}\\, e_i, \\qquad w = \\frac{1}{2 n}

    Exact for polynomials of degree 3 and less.

    Args:
        n: dimension.

    Returns:
        float64 on the CPU.

    Source: Arasaratnam and Haykin (2009), "Cubature Kalman filters", section IV.

    >>> from pyro_ssm.ops import cubature_rule
    >>> cubature_rule(1).points.squeeze(-1)
    tensor([ 1., -1.], dtype=torch.float64)
    """
    _check_size("n", n, 1)
    points = math.sqrt(n) * _axes(n)
    return _positive(points, points.new_full((2 * n,), 1 / (2 * n)))


def unscented_rule(n: int, alpha: float = 1.0, beta: float = 0.0, kappa: float | None = None) -> SigmaPoints:
    """The scaled unscented rule: the centre and 2 n points.

    .. math::
        \\xi_{\\pm i} = \\pm \\alpha \\sqrt{n + \\kappa}\\, e_i, \\qquad
        w_{\\pm i} = \\frac{1}{2 \\alpha^2 (n + \\kappa)}, \\qquad w_0 = 1 - \\sum w_{\\pm i},

    and :math:`w_0 + 1 - \\alpha^2 + \\beta` in the place of :math:`w_0` for covariances. That weight may be negative;
    the same covariance is written here without it. With :math:`\\delta_s = f(\\xi_s) - f(0)`,
    :math:`\\bar\\delta = \\sum w_s \\delta_s` and :math:`W = \\sum w_{\\pm i}`,

    .. math::
        \\operatorname{Cov} f \\approx
        \\sum_{s \\ne 0} w_s (\\delta_s - \\bar\\delta)(\\delta_s - \\bar\\delta)^T
        + (w_0 + 1 - \\alpha^2 + \\beta)\\, \\bar\\delta \\bar\\delta^T
        = \\sum_{s \\ne 0} w_s (\\delta_s - t \\bar\\delta)(\\delta_s - t \\bar\\delta)^T,
        \\qquad W t^2 - 2 t + \\alpha^2 - \\beta = 0,

    which has a real solution t exactly where no function has an indefinite covariance:
    :math:`\\alpha^2 \\kappa + \\beta n \\ge 0`.

    ``alpha=1, beta=0, kappa=0`` is the cubature rule; ``kappa = 3 - n`` matches fourth moments along the axes (for
    ``n = 1`` it is the Gauss-Hermite rule of order 3). A small ``alpha`` makes the rule a difference quotient at the
    centre; in float32 keep it above 0.05 or so.

    Args:
        n: dimension.
        alpha: spread of the points, positive.
        beta: what is known about fourth moments; 2 is usual for a small ``alpha``.
        kappa: second spread; None takes ``max(3 - n, 0)``.

    Returns:
        float64 on the CPU.

    Raises:
        ValueError: ``alpha`` or ``n + kappa`` is not positive, or the rule has functions of indefinite covariance.

    Sources: Julier and Uhlmann (1997), "A new extension of the Kalman filter to nonlinear systems"; Julier (2002), "The
    scaled unscented transformation".

    >>> from pyro_ssm.ops import unscented_rule
    >>> unscented_rule(1).mean_weights
    tensor([0.6667, 0.1667, 0.1667], dtype=torch.float64)
    """
    _check_size("n", n, 1)
    kappa = max(3.0 - n, 0.0) if kappa is None else float(kappa)
    if not alpha > 0:
        raise ValueError(f"`alpha` must be positive, got {alpha}")
    if not n + kappa > 0:
        raise ValueError(f"n + kappa must be positive, got n={n}, kappa={kappa}")
    if alpha**2 * kappa + beta * n < 0:
        raise ValueError(
            f"alpha={alpha}, beta={beta}, kappa={kappa} in n={n} dimensions gives some functions an indefinite "
            "covariance: alpha^2 kappa + beta n must not be negative. Take kappa=0 and beta>=0 (alpha=1, beta=0 is the "
            "cubature rule)"
        )
    spread = alpha**2 * (n + kappa)
    W = n / spread
    t = (alpha**2 - beta) / (1 + math.sqrt(max(0.0, 1 - W * (alpha**2 - beta))))
    points = torch.cat([torch.zeros(1, n, dtype=torch.float64), math.sqrt(spread) * _axes(n)])
    outer = torch.full((2 * n,), 1 / (2 * spread), dtype=torch.float64)

    def weights(centre: float, factor: float) -> Tensor:
        return torch.cat([outer.new_full((1,), centre), factor * outer])

    return SigmaPoints(points, weights(1 - W, 1.0), weights(0.0, 1.0), weights(1 - t * W, t))


def gauss_hermite_rule(n: int, order: int = 3) -> SigmaPoints:
    """The product of n Gauss-Hermite rules: ``order ** n`` points.

    .. math:: \\int f(x) N(x; 0, 1) dx = \\sum_{i=1}^{p} w_i f(x_i) \\quad \\text{for polynomials of degree } 2 p - 1,

    the nodes being the eigenvalues of the Jacobi matrix of the Hermite polynomials and the weights the squared first
    entries of its eigenvectors; in n dimensions exact where each coordinate's degree is at most ``2 order - 1``.

    Args:
        n: dimension.
        order: nodes a coordinate, at least 2.

    Returns:
        float64 on the CPU.

    Raises:
        ValueError: more than 100 000 points.

    Sources: Golub and Welsch (1969), "Calculation of Gauss quadrature rules"; Ito and Xiong (2000), "Gaussian filters
    for nonlinear filtering problems", section III.

    >>> from pyro_ssm.ops import gauss_hermite_rule
    >>> rule = gauss_hermite_rule(1, order=3)
    >>> torch.allclose(rule.points[:, 0] ** 2, torch.tensor([0.0, 3.0, 3.0], dtype=torch.float64))
    True
    """
    _check_size("n", n, 1)
    _check_size("order", order, 2)
    if order**n > _MOST_POINTS:
        raise ValueError(
            f"a Gauss-Hermite rule of order {order} in {n} dimensions has {order}^{n} = {order**n} points, more than "
            f"{_MOST_POINTS}. Lower `order`, or take the cubature or unscented rule, which have about 2 n points"
        )
    below = torch.arange(1, order, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(below, 1) + torch.diag(below, -1))
    nodes = (nodes - nodes.flip(0)) / 2  # symmetric to the last bit
    weights = vectors[0].square()
    weights = (weights + weights.flip(0)) / 2
    choice = torch.tensor(list(itertools.product(range(order), repeat=n)))
    points, products = nodes[choice], weights[choice].prod(-1)
    nearest = points.square().sum(-1).argsort(stable=True)
    return _positive(points[nearest], products[nearest])


def _axes(n: int) -> Tensor:
    """The rows e_1, ..., e_n, -e_1, ..., -e_n."""
    eye = torch.eye(n, dtype=torch.float64)
    return torch.cat([eye, -eye]) + 0.0  # no negative zeros


def _positive(points: Tensor, weights: Tensor) -> SigmaPoints:
    return SigmaPoints(points, weights, weights, weights)


def _check_size(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}")
