"""Exact and approximate inference with Gaussian laws: the Kalman family."""

from pyro_ssm.infer.gaussian import online
from pyro_ssm.infer.gaussian.forecast import GaussianForecast, forecast
from pyro_ssm.infer.gaussian.kalman import kalman_filter, kalman_smoother, sample_posterior
from pyro_ssm.infer.gaussian.results import DiffuseFiltered, KalmanFiltered, KalmanSmoothed

__all__ = [
    "DiffuseFiltered",
    "GaussianForecast",
    "KalmanFiltered",
    "KalmanSmoothed",
    "forecast",
    "kalman_filter",
    "kalman_smoother",
    "online",
    "sample_posterior",
]
