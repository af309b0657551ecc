"""Diagnostics: results for ArviZ, and pictures."""

from pyro_ssm.diagnostics.datasets import to_datasets
from pyro_ssm.diagnostics.ess import plot_ess
from pyro_ssm.diagnostics.inference_data import to_inference_data
from pyro_ssm.diagnostics.plots import plot_forecast, plot_states

__all__ = ["plot_ess", "plot_forecast", "plot_states", "to_datasets", "to_inference_data"]
