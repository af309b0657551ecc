"""Sigma-point filters and smoothers: unscented, cubature and Gauss-Hermite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.gaussian.approximate import GaussianFiltered, GaussianSmoothed, gaussian_filter, gaussian_smoother
from pyro_ssm.infer.gaussian.linearise import Regression
from pyro_ssm.infer.gaussian.nonlinear import NonlinearSystem, nonlinear_system
from pyro_ssm.ops.quadrature import SigmaPoints, cubature_rule, gauss_hermite_rule, unscented_rule

__all__ = [
    "cubature_kalman_filter",
    "cubature_kalman_smoother",
    "gauss_hermite_kalman_filter",
    "gauss_hermite_kalman_smoother",
    "unscented_kalman_filter",
    "unscented_kalman_smoother",
]


def unscented_kalman_filter(
    model: Any, data: TimeSeries, alpha: float = 1.0, beta: float = 0.0, kappa: float | None = None
) -> GaussianFiltered:
    """The unscented Kalman filter: each law is replaced by its regression on 2 n + 1 points, in square-root form.

    .. math::
        p(z_{k+1} \\mid z_k) \\approx N(A_k z_k + b_k, \\Omega_k), \\qquad
        A_k = \\operatorname{Cov}(f, z)\\, P_k^{-1}, \\quad
        \\Omega_k = \\operatorname{Cov} f - A_k P_k A_k^T + E[Q(z) Q(z)^T]

    with expectations over the points of :func:`~pyro_ssm.ops.unscented_rule` around the filtered law, and the emission
    likewise around the predicted law (its points are drawn afresh). No derivative of the model is needed, and noise
    that depends on the state is averaged. Covariances cannot become indefinite: parameters of the rule that would allow
    it are refused.

    Missing entries, padding, refined grids and sample dims as in :func:`extended_kalman_filter`.

    Args:
        model: as for :func:`extended_kalman_filter`; functions see one more sample dim (the points).
        data: with values.
        alpha: spread of the points.
        beta: what is known about fourth moments.
        kappa: second spread; None takes ``max(3 - n, 0)``.

    Returns:
        ``exact`` is False. Differentiable in parameters and values; the gradient is that of the approximate
        log-likelihood. Nothing is random.

    Raises:
        TypeError: a component is not ``Gaussian``, or the model has a memory.
        ValueError: the data has no values, the rule is not admissible, or a law of the model is not finite (with its
            time and series).

    Sources: Julier and Uhlmann (1997), "A new extension of the Kalman filter to nonlinear systems"; van der Merwe and
    Wan (2001), "The square-root unscented Kalman filter".

    >>> import functools, torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer import Marginal, unscented_kalman_filter
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1),
    ...     ssm.dynamics.FunctionTransition(1, lambda z, u: z + torch.sin(z)),
    ...     ssm.emissions.LinearNormal(1, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> unscented_kalman_filter(model, data).filtered_mean.shape
    torch.Size([3, 4, 1])
    >>> program = Marginal(model, filter=functools.partial(unscented_kalman_filter, alpha=0.5, beta=2.0))
    """
    system = nonlinear_system(model, data, "unscented_kalman_filter")
    return gaussian_filter(system, _regression(system, lambda n: unscented_rule(n, alpha, beta, kappa)))


def unscented_kalman_smoother(
    model: Any, data: TimeSeries, alpha: float = 1.0, beta: float = 0.0, kappa: float | None = None
) -> GaussianSmoothed:
    """The unscented Rauch-Tung-Striebel smoother: back through the regressions of the filter.

    .. math:: p(z_k \\mid y_{1:T}) \\approx N(\\hat m_k, \\hat L_k \\hat L_k^T)

    Arguments, gradients and errors as :func:`unscented_kalman_filter`; a padded step repeats the last law.

    Source: Särkkä (2008), "Unscented Rauch-Tung-Striebel smoother".

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer import unscented_kalman_smoother
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1),
    ...     ssm.dynamics.FunctionTransition(1, lambda z, u: z + torch.sin(z)),
    ...     ssm.emissions.LinearNormal(1, 1))
    >>> unscented_kalman_smoother(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))).mean.shape
    torch.Size([3, 4, 1])
    """
    system = nonlinear_system(model, data, "unscented_kalman_smoother")
    return gaussian_smoother(system, _regression(system, lambda n: unscented_rule(n, alpha, beta, kappa)))


def cubature_kalman_filter(model: Any, data: TimeSeries) -> GaussianFiltered:
    """The cubature Kalman filter: the sigma-point filter with 2 n points of equal weight.

    The unscented filter with ``alpha=1, beta=0, kappa=0``, and nothing to tune. See :func:`unscented_kalman_filter` for
    the equation, missing entries, gradients and errors, and :func:`~pyro_ssm.ops.cubature_rule` for the points.

    Source: Arasaratnam and Haykin (2009), "Cubature Kalman filters".

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer import cubature_kalman_filter
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1),
    ...     ssm.dynamics.FunctionTransition(1, lambda z, u: z + torch.sin(z)),
    ...     ssm.emissions.LinearNormal(1, 1))
    >>> cubature_kalman_filter(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))).filtered_mean.shape
    torch.Size([3, 4, 1])
    """
    system = nonlinear_system(model, data, "cubature_kalman_filter")
    return gaussian_filter(system, _regression(system, cubature_rule))


def cubature_kalman_smoother(model: Any, data: TimeSeries) -> GaussianSmoothed:
    """The cubature Rauch-Tung-Striebel smoother.

    As :func:`unscented_kalman_smoother` with ``alpha=1, beta=0, kappa=0``.

    Source: Arasaratnam and Haykin (2011), "Cubature Kalman smoothers".

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer import cubature_kalman_smoother
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1),
    ...     ssm.dynamics.FunctionTransition(1, lambda z, u: z + torch.sin(z)),
    ...     ssm.emissions.LinearNormal(1, 1))
    >>> cubature_kalman_smoother(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))).mean.shape
    torch.Size([3, 4, 1])
    """
    system = nonlinear_system(model, data, "cubature_kalman_smoother")
    return gaussian_smoother(system, _regression(system, cubature_rule))


def gauss_hermite_kalman_filter(model: Any, data: TimeSeries, order: int = 3) -> GaussianFiltered:
    """The Gauss-Hermite Kalman filter: the sigma-point filter with ``order ** n`` points, for few states.

    As the order grows its moments become those of the assumed-density filter: all that is then approximate is that each
    law is held Gaussian. See :func:`unscented_kalman_filter` for the equation, missing entries, gradients and errors,
    and :func:`~pyro_ssm.ops.gauss_hermite_rule` for the points.

    Args:
        model: as for :func:`extended_kalman_filter`.
        data: with values.
        order: nodes a coordinate; the cost is ``order ** n`` evaluations a step.

    Source: Ito and Xiong (2000), "Gaussian filters for nonlinear filtering problems".

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer import gauss_hermite_kalman_filter
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1),
    ...     ssm.dynamics.FunctionTransition(1, lambda z, u: z + torch.sin(z)),
    ...     ssm.emissions.LinearNormal(1, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> gauss_hermite_kalman_filter(model, data, order=10).filtered_mean.shape
    torch.Size([3, 4, 1])
    """
    system = nonlinear_system(model, data, "gauss_hermite_kalman_filter")
    return gaussian_filter(system, _regression(system, lambda n: gauss_hermite_rule(n, order)))


def gauss_hermite_kalman_smoother(model: Any, data: TimeSeries, order: int = 3) -> GaussianSmoothed:
    """The Gauss-Hermite Rauch-Tung-Striebel smoother.

    Arguments as :func:`gauss_hermite_kalman_filter`, the rest as :func:`unscented_kalman_smoother`.

    Source: Särkkä and Hartikainen (2010), "On Gaussian optimal smoothing of non-linear state space models".

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer import gauss_hermite_kalman_smoother
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1),
    ...     ssm.dynamics.FunctionTransition(1, lambda z, u: z + torch.sin(z)),
    ...     ssm.emissions.LinearNormal(1, 1))
    >>> gauss_hermite_kalman_smoother(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))).mean.shape
    torch.Size([3, 4, 1])
    """
    system = nonlinear_system(model, data, "gauss_hermite_kalman_smoother")
    return gaussian_smoother(system, _regression(system, lambda n: gauss_hermite_rule(n, order)))


def _regression(system: NonlinearSystem, rule: Callable[[int], SigmaPoints]) -> Regression:
    return Regression(rule(system.mean.shape[-1]).like(system.mean))
