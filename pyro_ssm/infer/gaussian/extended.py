"""The extended Kalman filter and smoother."""

from __future__ import annotations

from typing import Any

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.gaussian.approximate import GaussianFiltered, GaussianSmoothed, gaussian_filter, gaussian_smoother
from pyro_ssm.infer.gaussian.linearise import Taylor
from pyro_ssm.infer.gaussian.nonlinear import nonlinear_system

__all__ = ["extended_kalman_filter", "extended_kalman_smoother"]


def extended_kalman_filter(model: Any, data: TimeSeries) -> GaussianFiltered:
    """The extended Kalman filter: each law is replaced by its tangent at the mean, in square-root form.

    .. math::
        p(z_{k+1} \\mid z_k) \\approx N(f(m_k) + F_k (z_k - m_k),\\; Q(m_k) Q(m_k)^T), \\qquad
        F_k = \\frac{\\partial f}{\\partial z}(m_k),

    and the emission likewise at the predicted mean. Cheapest of the family, and right to first order in the spread of
    the state; where the functions bend within that spread take the sigma-point filters, and for an informative
    nonlinear emission :func:`iterated_posterior_linearisation_smoother`. Noise that depends on the state is taken at
    the mean. An affine component enters by its own matrices; on an affine model the result is that of
    :func:`kalman_filter`.

    Missing entries are integrated out of the linearised law, padded steps add exactly 0 and carry the last law, and a
    refined grid has a ``log_likelihood`` of 0 between observations, all as in :func:`kalman_filter`.

    Args:
        model: a :class:`~pyro_ssm.models.StateSpaceModel` whose components are ``Gaussian``, bound, or unbound and
            without random parameters. Parameters with sample dims give results with sample dims. Functions of the user
            are called with one more sample dim in front, under ``torch.func.jvp``: they must not change a tensor in
            place that they did not make.
        data: with values.

    Returns:
        ``exact`` is False. Differentiable in parameters and values, through the Jacobians too; the gradient is that of
        the approximate log-likelihood. Nothing is random.

    Raises:
        TypeError: a component is not ``Gaussian``, or the model has a memory.
        ValueError: the data has no values, or a law of the model is not finite (with its time and series).

    Source: Jazwinski (1970), "Stochastic processes and filtering theory", section 8.3; Särkkä and Svensson (2023),
    "Bayesian filtering and smoothing", 2nd ed., algorithm 7.3.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer import extended_kalman_filter
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1),
    ...     ssm.dynamics.FunctionTransition(1, lambda z, u: z + torch.sin(z)),
    ...     ssm.emissions.LinearNormal(1, 1))
    >>> result = extended_kalman_filter(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> result.log_likelihood.shape, result.exact
    (torch.Size([3, 4]), False)
    """
    return gaussian_filter(nonlinear_system(model, data, "extended_kalman_filter"), Taylor())


def extended_kalman_smoother(model: Any, data: TimeSeries) -> GaussianSmoothed:
    """The extended Rauch-Tung-Striebel smoother: back through the transitions that the filter linearised.

    .. math:: p(z_k \\mid y_{1:T}) \\approx N(\\hat m_k, \\hat L_k \\hat L_k^T)

    Arguments, missing entries, padding (a padded step repeats the last law), gradients and errors as
    :func:`extended_kalman_filter`.

    Source: Särkkä and Svensson (2023), "Bayesian filtering and smoothing", 2nd ed., algorithm 13.1.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer import extended_kalman_smoother
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1),
    ...     ssm.dynamics.FunctionTransition(1, lambda z, u: z + torch.sin(z)),
    ...     ssm.emissions.LinearNormal(1, 1))
    >>> result = extended_kalman_smoother(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> result.mean.shape, result.lag_one_covariance.shape
    (torch.Size([3, 4, 1]), torch.Size([3, 3, 1, 1]))
    """
    return gaussian_smoother(nonlinear_system(model, data, "extended_kalman_smoother"), Taylor())
