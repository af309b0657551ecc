"""Inference: fitting, bounds, and what they need."""

from pyro_ssm.infer.annealing import kl_annealing, linear_annealing, warmup_cosine
from pyro_ssm.infer.diagnose import FitError
from pyro_ssm.infer.elbo import IWAE, FreeBits
from pyro_ssm.infer.evaluating import evaluating
from pyro_ssm.infer.expectation_maximisation import EMResult, em
from pyro_ssm.infer.fit import FitResult, fit
from pyro_ssm.infer.gaussian import KalmanFiltered, KalmanSmoothed, kalman_filter, kalman_smoother, sample_posterior
from pyro_ssm.infer.importance import ImportanceEstimate, LowerBound, evidence_lower_bound, importance_log_likelihood
from pyro_ssm.infer.information import ObservedInformation, StandardErrors, observed_information, standard_errors
from pyro_ssm.infer.local_parameters import local_parameters
from pyro_ssm.infer.marginal import Marginal, MarginalLaw
from pyro_ssm.infer.prior import sample_prior

__all__ = [
    "IWAE",
    "EMResult",
    "FitError",
    "FitResult",
    "FreeBits",
    "ImportanceEstimate",
    "KalmanFiltered",
    "KalmanSmoothed",
    "LowerBound",
    "Marginal",
    "MarginalLaw",
    "ObservedInformation",
    "StandardErrors",
    "em",
    "evaluating",
    "evidence_lower_bound",
    "fit",
    "importance_log_likelihood",
    "kalman_filter",
    "kalman_smoother",
    "kl_annealing",
    "linear_annealing",
    "local_parameters",
    "observed_information",
    "sample_posterior",
    "sample_prior",
    "standard_errors",
    "warmup_cosine",
]
