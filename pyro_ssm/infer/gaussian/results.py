"""What the Kalman family returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["DiffuseFiltered", "KalmanFiltered", "KalmanSmoothed"]


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


class DiffuseFiltered(NamedTuple):
    """What :func:`kalman_filter` returns for a model with a diffuse start.

    Where ``filtered_diffuse`` is not 0 the law is improper, :math:`N(m, L L^T + \\kappa D D^T)` with
    :math:`\\kappa \\to \\infty`: its mean and square root then belong to one of many ways of writing it, and only
    contrasts of the state that D does not touch are known.

    >>> from pyro_ssm.infer.gaussian import DiffuseFiltered
    >>> DiffuseFiltered._fields[-2:]
    ('filtered_diffuse', 'predicted_diffuse')
    """

    log_likelihood: Tensor  # (*batch, time)  the diffuse one; exactly 0 where nothing is observed
    filtered_mean: Tensor  # (*batch, time, state)
    filtered_scale_tril: Tensor  # (*batch, time, state, state)
    predicted_mean: Tensor  # (*batch, time, state)
    predicted_scale_tril: Tensor  # (*batch, time, state, state)
    filtered_diffuse: Tensor  # (*batch, time, state, q)  exactly 0 once the law is proper
    predicted_diffuse: Tensor  # (*batch, time, state, q)

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
