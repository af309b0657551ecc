"""Exact inference in linear-Gaussian models: the Kalman filter, the smoother and posterior paths.

Pure functions of a model and its data. A model is linear-Gaussian when its initial law is ``Gaussian`` and its
transition and emission are ``AffineGaussian``; missing entries, irregular and own time grids, inputs, ragged batches
and batches of parameters go through the same call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.gaussian.system import System, linear_gaussian_system
from pyro_ssm.ops.kalman import (
    Conditionals,
    FilterSteps,
    backward_conditionals,
    backward_sample_reference,
    kalman_smoother_reference,
    matvec,
)
from pyro_ssm.ops.kalman_filter import kalman_filter as filter_steps

__all__ = ["KalmanFiltered", "KalmanSmoothed", "kalman_filter", "kalman_smoother", "sample_posterior"]


class KalmanFiltered(NamedTuple):
    """What :func:`kalman_filter` returns; ``*batch`` is ``(*draws, *batch)`` of parameters and data together.

    >>> from pyro_ssm.infer.gaussian import KalmanFiltered
    >>> KalmanFiltered._fields[0]
    'log_likelihood'
    """

    log_likelihood: Tensor  # (*batch, time)  log p(y_k | y_<k); exactly 0 where nothing is observed
    filtered_mean: Tensor  # (*batch, time, state)  E[z_k | y_<=k]
    filtered_scale_tril: Tensor  # (*batch, time, state, state)
    predicted_mean: Tensor  # (*batch, time, state)  E[z_k | y_<k]
    predicted_scale_tril: Tensor  # (*batch, time, state, state)

    @property
    def exact(self) -> bool:
        """True: the likelihood and the laws are the model's own, not an approximation."""
        return True


class KalmanSmoothed(NamedTuple):
    """What :func:`kalman_smoother` returns.

    >>> from pyro_ssm.infer.gaussian import KalmanSmoothed
    >>> KalmanSmoothed._fields
    ('mean', 'scale_tril', 'log_likelihood', 'gain')
    """

    mean: Tensor  # (*batch, time, state)  E[z_k | y]
    scale_tril: Tensor  # (*batch, time, state, state)
    log_likelihood: Tensor  # (*batch, time)  log p(y_k | y_<k)
    gain: Tensor  # (*batch, time - 1, state, state)  d E[z_k | z_{k+1}, y] / d z_{k+1}

    @property
    def exact(self) -> bool:
        """True: the likelihood and the laws are the model's own, not an approximation."""
        return True

    @property
    def lag_one_covariance(self) -> Tensor:
        """:math:`Cov(z_k, z_{k+1} \\mid y)`, ``(*batch, time - 1, state, state)``."""
        root = self.scale_tril[..., 1:, :, :]
        return self.gain @ root @ root.mT


def kalman_filter(model: Any, data: TimeSeries) -> KalmanFiltered:
    """The Kalman filter in square-root form: exact laws of each state given the data up to it.

    .. math:: p(z_k \\mid y_{\\le k}) = N(m_k, L_k L_k^T), \\qquad
        \\log p(y) = \\sum_k \\log p(y_k \\mid y_{<k})

    A missing entry is integrated out: the result is that of the model without the entry, also when the observation
    noise is correlated. A padded step adds exactly 0 and carries the last law. On a refined grid the results live at
    the latent times, with a ``log_likelihood`` of 0 between observations.

    Args:
        model: a :class:`~pyro_ssm.models.StateSpaceModel`, bound, or unbound and without random parameters (inside
            a Pyro trace its random parameters are drawn). Parameters with sample dims give results with sample dims.
        data: with values.

    Returns:
        Differentiable with respect to parameters and values, to second order where no covariance is singular.

    Raises:
        TypeError: a component is not linear-Gaussian, or the model has a memory.
        ValueError: the data has no values.

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
    steps = _filter(system)
    lead = steps.log_likelihood.shape[:-1]
    return KalmanFiltered(*(_expand(part, lead, event) for part, event in zip(steps, (1, 2, 3, 2, 3), strict=True)))


def kalman_smoother(model: Any, data: TimeSeries) -> KalmanSmoothed:
    """The Rauch-Tung-Striebel smoother in square-root form: exact laws of each state given all data.

    .. math:: p(z_k \\mid y_{1:T}) = N(\\hat m_k, \\hat L_k \\hat L_k^T)

    Arguments, missing entries, padding (a padded step repeats the last law), refined grids, gradients and errors as
    :func:`kalman_filter`.

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
    steps = _filter(system)
    conditionals = _conditionals(system, steps)
    mean, scale_tril = kalman_smoother_reference(steps, conditionals)
    lead = steps.log_likelihood.shape[:-1]
    return KalmanSmoothed(
        _expand(mean, lead, 2),
        _expand(scale_tril, lead, 3),
        _expand(steps.log_likelihood, lead, 1),
        _expand(conditionals.gain, lead, 3),
    )


def sample_posterior(model: Any, data: TimeSeries, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
    """Draws of the whole path given all data: filter forwards, sample backwards.

    .. math:: z_T \\sim p(z_T \\mid y_{1:T}), \\qquad z_k \\sim p(z_k \\mid z_{k+1}, y_{\\le k})

    Arguments, missing entries and errors as :func:`kalman_filter`; a padded step repeats the last state. Draws come
    from torch's global generator and are reparametrised: differentiable in parameters and values.

    Args:
        model: as for :func:`kalman_filter`.
        data: with values.
        sample_shape: leftmost dims of independent draws.

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
    steps = _filter(system)
    shape = torch.Size(sample_shape) + steps.log_likelihood.shape[:-1]
    num_times, state = steps.filtered_mean.shape[-2:]
    noise = torch.randn(shape + (num_times, state), dtype=system.mean.dtype, device=system.mean.device)
    root = steps.filtered_scale_tril[..., -1, :, :]
    last = steps.filtered_mean[..., -1, :] + matvec(root, noise[..., -1, :])
    return backward_sample_reference(_conditionals(system, steps), last, noise[..., :-1, :])


def _filter(system: System) -> FilterSteps:
    return filter_steps(
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


def _conditionals(system: System, steps: FilterSteps) -> Conditionals:
    moves = system.num_times - 1
    matrix, offset, scale_tril = system.transition
    transition = matrix[..., :moves, :, :], offset[..., :moves, :], scale_tril[..., :moves, :, :]
    return backward_conditionals(steps, *transition, step_mask=system.step_mask)


def _expand(tensor: Tensor, lead: torch.Size, event: int) -> Tensor:
    return tensor.expand(lead + tensor.shape[-event:])
