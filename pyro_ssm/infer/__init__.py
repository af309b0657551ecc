"""Inference: fitting, bounds, and what they need."""

from pyro_ssm.infer.annealing import kl_annealing, linear_annealing, warmup_cosine
from pyro_ssm.infer.diagnose import FitError
from pyro_ssm.infer.discrete import (
    BestPath,
    HMMFiltered,
    HMMSmoothed,
    RegimeCarry,
    RegimeEnumeration,
    SwitchingFiltered,
    SwitchingSmoothed,
    SwitchingStep,
    SwitchingSystem,
    enumerate_regimes,
    hmm_filter,
    hmm_smoother,
    imm_filter,
    kim_filter,
    kim_smoother,
    regime_log_probs,
    regime_start,
    regime_step,
    sample_posterior_states,
    switching_system,
    viterbi,
)
from pyro_ssm.infer.elbo import IWAE, FreeBits
from pyro_ssm.infer.evaluating import evaluating
from pyro_ssm.infer.fit import FitResult, fit
from pyro_ssm.infer.gaussian import KalmanFiltered, KalmanSmoothed, kalman_filter, kalman_smoother, sample_posterior
from pyro_ssm.infer.importance import ImportanceEstimate, LowerBound, evidence_lower_bound, importance_log_likelihood
from pyro_ssm.infer.local_parameters import local_parameters
from pyro_ssm.infer.marginal import Marginal, MarginalLaw
from pyro_ssm.infer.prior import sample_prior

__all__ = [
    "IWAE",
    "BestPath",
    "FitError",
    "FitResult",
    "FreeBits",
    "HMMFiltered",
    "HMMSmoothed",
    "ImportanceEstimate",
    "KalmanFiltered",
    "KalmanSmoothed",
    "LowerBound",
    "Marginal",
    "MarginalLaw",
    "RegimeCarry",
    "RegimeEnumeration",
    "SwitchingFiltered",
    "SwitchingSmoothed",
    "SwitchingStep",
    "SwitchingSystem",
    "enumerate_regimes",
    "evaluating",
    "evidence_lower_bound",
    "fit",
    "hmm_filter",
    "hmm_smoother",
    "imm_filter",
    "importance_log_likelihood",
    "kalman_filter",
    "kalman_smoother",
    "kim_filter",
    "kim_smoother",
    "kl_annealing",
    "linear_annealing",
    "local_parameters",
    "regime_log_probs",
    "regime_start",
    "regime_step",
    "sample_posterior",
    "sample_posterior_states",
    "sample_prior",
    "switching_system",
    "viterbi",
    "warmup_cosine",
]
