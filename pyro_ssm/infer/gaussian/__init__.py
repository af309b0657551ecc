"""Exact and approximate inference with Gaussian laws: the Kalman family."""

from pyro_ssm.infer.gaussian.kalman import (
    KalmanFiltered,
    KalmanSmoothed,
    kalman_filter,
    kalman_smoother,
    sample_posterior,
)

__all__ = ["KalmanFiltered", "KalmanSmoothed", "kalman_filter", "kalman_smoother", "sample_posterior"]
