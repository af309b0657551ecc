"""Inference: fitting, bounds, and what they need."""

from pyro_ssm.infer import gaussian
from pyro_ssm.infer.annealing import kl_annealing, linear_annealing, warmup_cosine
from pyro_ssm.infer.diagnose import FitError
from pyro_ssm.infer.elbo import IWAE, FreeBits
from pyro_ssm.infer.evaluating import evaluating
from pyro_ssm.infer.fit import FitResult, fit
from pyro_ssm.infer.gaussian import (
    DiffuseFiltered,
    KalmanFiltered,
    KalmanSmoothed,
    kalman_filter,
    kalman_smoother,
    sample_posterior,
)
from pyro_ssm.infer.importance import ImportanceEstimate, LowerBound, evidence_lower_bound, importance_log_likelihood
from pyro_ssm.infer.local_parameters import local_parameters
from pyro_ssm.infer.marginal import Marginal, MarginalLaw
from pyro_ssm.infer.parameter_groups import ParameterGroups, parameter_groups
from pyro_ssm.infer.prior import sample_prior

__all__ = [
    "IWAE",
    "DiffuseFiltered",
    "FitError",
    "FitResult",
    "FreeBits",
    "ImportanceEstimate",
    "KalmanFiltered",
    "KalmanSmoothed",
    "LowerBound",
    "Marginal",
    "MarginalLaw",
    "ParameterGroups",
    "evaluating",
    "evidence_lower_bound",
    "fit",
    "gaussian",
    "importance_log_likelihood",
    "kalman_filter",
    "kalman_smoother",
    "kl_annealing",
    "linear_annealing",
    "local_parameters",
    "parameter_groups",
    "sample_posterior",
    "sample_prior",
    "warmup_cosine",
]
