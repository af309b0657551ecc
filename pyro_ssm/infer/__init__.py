"""Inference: fitting, bounds, and what they need."""

from pyro_ssm.infer.annealing import kl_annealing, linear_annealing, warmup_cosine
from pyro_ssm.infer.diagnose import FitError
from pyro_ssm.infer.elbo import IWAE, FreeBits
from pyro_ssm.infer.evaluating import evaluating
from pyro_ssm.infer.expectation_maximisation import EMResult, em
from pyro_ssm.infer.fit import FitResult, fit
from pyro_ssm.infer.gaussian import (
    EnsembleFiltered,
    EnsembleSmoothed,
    GaussianFiltered,
    GaussianSmoothed,
    KalmanFiltered,
    KalmanSmoothed,
    Localisation,
    cubature_kalman_filter,
    cubature_kalman_smoother,
    ensemble_kalman_filter,
    ensemble_kalman_smoother,
    extended_kalman_filter,
    extended_kalman_smoother,
    gauss_hermite_kalman_filter,
    gauss_hermite_kalman_smoother,
    iterated_posterior_linearisation_smoother,
    kalman_filter,
    kalman_smoother,
    sample_posterior,
    unscented_kalman_filter,
    unscented_kalman_smoother,
)
from pyro_ssm.infer.importance import ImportanceEstimate, LowerBound, evidence_lower_bound, importance_log_likelihood
from pyro_ssm.infer.information import ObservedInformation, StandardErrorsResult, observed_information, standard_errors
from pyro_ssm.infer.local_parameters import local_parameters
from pyro_ssm.infer.marginal import Marginal, MarginalLaw
from pyro_ssm.infer.prior import sample_prior

__all__ = [
    "IWAE",
    "EMResult",
    "EnsembleFiltered",
    "EnsembleSmoothed",
    "FitError",
    "FitResult",
    "FreeBits",
    "GaussianFiltered",
    "GaussianSmoothed",
    "ImportanceEstimate",
    "KalmanFiltered",
    "KalmanSmoothed",
    "Localisation",
    "LowerBound",
    "Marginal",
    "MarginalLaw",
    "ObservedInformation",
    "StandardErrorsResult",
    "cubature_kalman_filter",
    "cubature_kalman_smoother",
    "em",
    "ensemble_kalman_filter",
    "ensemble_kalman_smoother",
    "evaluating",
    "evidence_lower_bound",
    "extended_kalman_filter",
    "extended_kalman_smoother",
    "fit",
    "gauss_hermite_kalman_filter",
    "gauss_hermite_kalman_smoother",
    "importance_log_likelihood",
    "iterated_posterior_linearisation_smoother",
    "kalman_filter",
    "kalman_smoother",
    "kl_annealing",
    "linear_annealing",
    "local_parameters",
    "observed_information",
    "sample_posterior",
    "sample_prior",
    "standard_errors",
    "unscented_kalman_filter",
    "unscented_kalman_smoother",
    "warmup_cosine",
]
