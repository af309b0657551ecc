"""Prediction: a model and a posterior to draws of what is missing or yet to come, and their scores."""

from pyro_ssm.predict.counterfactual import Counterfactual, counterfactual
from pyro_ssm.predict.decompose import Contribution, Decomposition, decompose
from pyro_ssm.predict.disaggregate import disaggregate
from pyro_ssm.predict.forecast import Forecast, forecast
from pyro_ssm.predict.impute import impute
from pyro_ssm.predict.posterior import PosteriorDraws, posterior_draws
from pyro_ssm.predict.scores import average, coverage, crps, heldout_log_score, interval, quantile

__all__ = [
    "Contribution",
    "Counterfactual",
    "Decomposition",
    "Forecast",
    "PosteriorDraws",
    "average",
    "counterfactual",
    "coverage",
    "crps",
    "decompose",
    "disaggregate",
    "forecast",
    "heldout_log_score",
    "impute",
    "interval",
    "posterior_draws",
    "quantile",
]
