"""Exact inference in linear-Gaussian models: the Kalman filter, the smoother and posterior paths.

Pure functions of a model and its data. A model is linear-Gaussian when its initial law is ``Gaussian`` and its
transition and emission are ``AffineGaussian``; missing entries, irregular and own time grids, inputs, ragged batches
and batches of parameters go through the same call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.gaussian.diffuse import Filtering, conditionals, run_filter, run_terms
from pyro_ssm.infer.gaussian.results import DiffuseFiltered, KalmanFiltered, KalmanSmoothed
from pyro_ssm.infer.gaussian.system import (
    linear_gaussian_system,
    noise_is_singular,
    require_density,
    require_finite,
    require_finite_terms,
)
from pyro_ssm.models.linear_gaussian import System
from pyro_ssm.ops.kalman import FilterSteps, matvec
from pyro_ssm.ops.kalman_filter import kalman_filter as filter_steps
from pyro_ssm.ops.kalman_filter import kalman_log_likelihood as filter_terms
from pyro_ssm.ops.kalman_parallel import (
    SingularStep,
    backward_sample_parallel,
    kalman_filter_parallel,
    kalman_smoother_parallel,
)
from pyro_ssm.ops.kalman_smoother import backward_sample
from pyro_ssm.ops.kalman_smoother import kalman_smoother as smooth_steps

__all__ = [
    "KalmanFiltered",
    "KalmanSmoothed",
    "kalman_filter",
    "kalman_log_likelihood",
    "kalman_smoother",
    "sample_posterior",
]

T = TypeVar("T")
METHODS = ("auto", "sequential", "parallel")
LONG = 128  # times from which on "auto" scans on a GPU: a loop of fewer launches is as fast


def kalman_filter(model: Any, data: TimeSeries, *, method: str = "auto") -> KalmanFiltered | DiffuseFiltered:
    """The Kalman filter in square-root form: exact laws of each state given the data up to it.

    .. math:: p(z_k \\mid y_{\\le k}) = N(m_k, L_k L_k^T), \\qquad
        \\log p(y) = \\sum_k \\log p(y_k \\mid y_{<k})

    A missing entry is integrated out: the result is that of the model without the entry, also when the observation
    noise is correlated. A padded step adds exactly 0 and carries the last law. On a refined grid the results live at
    the latent times, with a ``log_likelihood`` of 0 between observations.

    A diffuse start (:class:`~pyro_ssm.components.Diffuse`) is taken exactly, not by a large variance. The
    log-likelihood is then :math:`\\lim_{\\kappa \\to \\infty} \\log p(y) + \\tfrac{q}{2} \\log \\kappa`, with q
    the number of directions that the data determines and all constants :math:`\\log 2 \\pi` kept; conventions without
    those of the q determining observations lie :math:`\\tfrac{q}{2} \\log 2 \\pi` higher.

    Args:
        model: a :class:`~pyro_ssm.models.StateSpaceModel`, bound, or unbound and without random parameters (inside
            a Pyro trace its random parameters are drawn). Parameters with sample dims give results with sample dims.
        data: with values.
        method: ``"sequential"`` is a loop over time, ``"parallel"`` an associative scan in logarithmically many steps
            with several times the work; ``"auto"`` scans on CUDA from 128 times on and loops otherwise, always on a
            CPU. They agree to rounding.

    Returns:
        :class:`KalmanFiltered`, or :class:`DiffuseFiltered` after a diffuse start (the same, and what is still
        diffuse). Differentiable with respect to parameters and values, to second order where no covariance is singular.

    Raises:
        TypeError: a component is not linear-Gaussian, or the model has a memory.
        ValueError: the data has no values; shapes of the model's matrices do not fit; an unknown method; or the
            parallel form meets an observation without noise (see :func:`~pyro_ssm.ops.kalman_filter_parallel`).
        torch.linalg.LinAlgError: an observed vector has a singular law, so that there is no density, or the model's
            matrices are not finite. It names the time.

    Sources: Kalman (1960), "A new approach to linear filtering and prediction problems"; Kailath, Sayed and Hassibi
    (2000), "Linear Estimation", ch. 12 (array forms).

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.gaussian import kalman_filter
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> result = kalman_filter(model, data)
    >>> result.log_likelihood.shape, result.filtered_mean.shape
    (torch.Size([3, 4]), torch.Size([3, 4, 2]))
    """
    _, system = linear_gaussian_system(model, data, "kalman_filter")
    filtering = _run(system, method, "kalman_filter")
    lead = filtering.steps.log_likelihood.shape[:-1]
    parts = (_expand(part, lead, event) for part, event in zip(filtering.steps, (1, 2, 3, 2, 3), strict=True))
    result = KalmanFiltered(*parts)
    if filtering.phase is None:
        return result
    return DiffuseFiltered(*result, *filtering.diffuse(system.values.dtype))


def kalman_log_likelihood(model: Any, data: TimeSeries, *, method: str = "auto") -> Tensor:
    """The log-likelihoods of :func:`kalman_filter` alone, many times faster: no law of a state is written.

    .. math:: \\log p(y_k \\mid y_{<k})

    Arguments, missing entries, padding, diffuse starts, gradients to second order and errors as :func:`kalman_filter`.
    ``infer.Marginal`` and ``infer.standard_errors`` use it where their filter is ``kalman_filter``, by way of
    ``kalman_filter.log_likelihood`` (see :func:`~pyro_ssm.infer.filter_terms.log_likelihood_terms`). Where an
    observation has no noise in some direction, the whole filter runs: its laws tell whether there is a density.

    Returns:
        ``(*batch, time)``; exactly 0 where nothing is observed.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.gaussian import kalman_log_likelihood
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> kalman_log_likelihood(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))).shape
    torch.Size([3, 4])
    """
    caller = "kalman_log_likelihood"
    _, system = linear_gaussian_system(model, data, caller)
    _check_method(method, caller)
    if _scans(system, method) or noise_is_singular(system):
        return _run(system, method, caller).steps.log_likelihood
    try:
        terms = run_terms(system, _terms)
    except torch.linalg.LinAlgError:
        require_finite(system, caller)  # says more than that a step is singular
        raise
    require_finite_terms(terms, system, caller)
    return terms


#: What needs the log-likelihoods of a filter alone asks for this attribute first.
kalman_filter.log_likelihood = kalman_log_likelihood  # type: ignore[attr-defined]


def kalman_smoother(model: Any, data: TimeSeries, *, method: str = "auto") -> KalmanSmoothed:
    """The Rauch-Tung-Striebel smoother in square-root form: exact laws of each state given all data.

    .. math:: p(z_k \\mid y_{1:T}) = N(\\hat m_k, \\hat L_k \\hat L_k^T)

    Arguments, missing entries, padding (a padded step repeats the last law), refined grids, gradients and errors as
    :func:`kalman_filter`. After a diffuse start the laws are the limits of those for :math:`\\kappa \\to \\infty`.

    Raises:
        ValueError: also where the data does not determine a diffuse start, so that there is no limit.

    Source: Rauch, Tung and Striebel (1965), "Maximum likelihood estimates of linear dynamic systems".

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.gaussian import kalman_smoother
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> result = kalman_smoother(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> result.mean.shape, result.lag_one_covariance.shape
    (torch.Size([3, 4, 2]), torch.Size([3, 3, 2, 2]))
    """
    _, system = linear_gaussian_system(model, data, "kalman_smoother")
    filtering = _run(system, method, "kalman_smoother")
    steps, laws = filtering.steps, conditionals(system, filtering, "kalman_smoother")
    smooth = kalman_smoother_parallel if _scans(system, method) else smooth_steps
    mean, scale_tril = smooth(steps, laws)
    lead = steps.log_likelihood.shape[:-1]
    return KalmanSmoothed(
        _expand(mean, lead, 2),
        _expand(scale_tril, lead, 3),
        _expand(steps.log_likelihood, lead, 1),
        _expand(laws.gain, lead, 3),
    )


def sample_posterior(
    model: Any, data: TimeSeries, sample_shape: torch.Size | tuple[int, ...] = (), *, method: str = "auto"
) -> Tensor:
    """Draws of the whole path given all data: filter forwards, sample backwards.

    .. math:: z_T \\sim p(z_T \\mid y_{1:T}), \\qquad z_k \\sim p(z_k \\mid z_{k+1}, y_{\\le k})

    Arguments, missing entries and errors as :func:`kalman_smoother`; a padded step repeats the last state. Draws come
    from torch's global generator and are reparametrised: differentiable in parameters and values.

    Args:
        model: as for :func:`kalman_filter`.
        data: with values.
        sample_shape: leftmost dims of independent draws.
        method: as for :func:`kalman_filter`; the same noise gives the same path to rounding.

    Returns:
        ``(*sample_shape, *batch, time, state)``.

    Sources: Carter and Kohn (1994), "On Gibbs sampling for state space models"; Fruhwirth-Schnatter (1994), "Data
    augmentation and dynamic linear models".

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.gaussian import sample_posterior
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> sample_posterior(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)), (10,)).shape
    torch.Size([10, 3, 4, 2])
    """
    _, system = linear_gaussian_system(model, data, "sample_posterior")
    filtering = _run(system, method, "sample_posterior")
    steps, laws = filtering.steps, conditionals(system, filtering, "sample_posterior")
    shape = torch.Size(sample_shape) + steps.log_likelihood.shape[:-1]
    num_times, state = steps.filtered_mean.shape[-2:]
    noise = torch.randn(shape + (num_times, state), dtype=system.mean.dtype, device=system.mean.device)
    root = steps.filtered_scale_tril[..., -1, :, :]
    last = steps.filtered_mean[..., -1, :] + matvec(root, noise[..., -1, :])
    draw = backward_sample_parallel if _scans(system, method) else backward_sample
    return draw(laws, last, noise[..., :-1, :])


def _filter(system: System) -> FilterSteps:
    return _call(filter_steps, system)


def _terms(system: System) -> Tensor:
    return _call(filter_terms, system)


def _filter_parallel(system: System) -> FilterSteps:
    return _call(kalman_filter_parallel, system)


def _call(operator: Callable[..., T], system: System) -> T:
    return operator(
        system.values,
        system.mask,
        system.mean,
        system.scale_tril,
        *system.transition,
        *system.emission,
        num_times=system.num_times,
        observed_index=system.observed_index,
        step_mask=system.step_mask,
    )


def _filter_by_device(system: System) -> FilterSteps:
    try:
        return _filter_parallel(system)
    except SingularStep:  # an observation without noise: the loop can
        return _filter(system)


def _scans(system: System, method: str) -> bool:
    """Whether smoother and draws scan over time."""
    return method == "parallel" or (method == "auto" and system.values.is_cuda and system.num_times >= LONG)


def _check_method(method: str, caller: str) -> None:
    if method not in METHODS:
        raise ValueError(f"{caller}: `method` must be one of {', '.join(map(repr, METHODS))}, got {method!r}")


def _run(system: System, method: str, caller: str) -> Filtering:
    _check_method(method, caller)
    filter: Callable[[System], FilterSteps] = _filter_parallel if method == "parallel" else _filter
    if method == "auto" and _scans(system, method):
        filter = _filter_by_device
    try:
        filtering = run_filter(system, filter)
    except torch.linalg.LinAlgError:
        require_finite(system, caller)  # says more than that a step is singular
        raise
    first = 0 if filtering.phase is None else filtering.phase.log_likelihood.shape[-1]
    require_density(filtering.steps, system, caller, first)
    return filtering


def _expand(tensor: Tensor, lead: torch.Size, event: int) -> Tensor:
    return tensor.expand(lead + tensor.shape[-event:])
