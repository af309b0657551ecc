"""Exact and approximate inference with Gaussian laws: the Kalman family."""

from pyro_ssm.infer.gaussian import online
from pyro_ssm.infer.gaussian.approximate import GaussianFiltered, GaussianSmoothed
from pyro_ssm.infer.gaussian.ensemble import (
    EnsembleFiltered,
    EnsembleSmoothed,
    Localisation,
    ensemble_kalman_filter,
    ensemble_kalman_smoother,
)
from pyro_ssm.infer.gaussian.extended import extended_kalman_filter, extended_kalman_smoother
from pyro_ssm.infer.gaussian.forecast import GaussianForecast, forecast
from pyro_ssm.infer.gaussian.iterated import iterated_posterior_linearisation_smoother
from pyro_ssm.infer.gaussian.kalman import (
    kalman_filter,
    kalman_log_likelihood,
    kalman_smoother,
    sample_posterior,
)
from pyro_ssm.infer.gaussian.results import DiffuseFiltered, KalmanFiltered, KalmanSmoothed
from pyro_ssm.infer.gaussian.sigma_points import (
    cubature_kalman_filter,
    cubature_kalman_smoother,
    gauss_hermite_kalman_filter,
    gauss_hermite_kalman_smoother,
    unscented_kalman_filter,
    unscented_kalman_smoother,
)

__all__ = [
    "DiffuseFiltered",
    "EnsembleFiltered",
    "EnsembleSmoothed",
    "GaussianFiltered",
    "GaussianForecast",
    "GaussianSmoothed",
    "KalmanFiltered",
    "KalmanSmoothed",
    "Localisation",
    "cubature_kalman_filter",
    "cubature_kalman_smoother",
    "ensemble_kalman_filter",
    "ensemble_kalman_smoother",
    "extended_kalman_filter",
    "extended_kalman_smoother",
    "forecast",
    "gauss_hermite_kalman_filter",
    "gauss_hermite_kalman_smoother",
    "iterated_posterior_linearisation_smoother",
    "kalman_filter",
    "kalman_log_likelihood",
    "kalman_smoother",
    "online",
    "sample_posterior",
    "unscented_kalman_filter",
    "unscented_kalman_smoother",
]
