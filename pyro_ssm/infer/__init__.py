"""Inference: fitting, bounds, and what they need."""

from pyro_ssm.infer.annealing import kl_annealing, linear_annealing, warmup_cosine
from pyro_ssm.infer.diagnose import FitError
from pyro_ssm.infer.elbo import IWAE, FreeBits
from pyro_ssm.infer.fit import FitResult, fit
from pyro_ssm.infer.importance import ImportanceEstimate, LowerBound, evidence_lower_bound, importance_log_likelihood
from pyro_ssm.infer.local_parameters import local_parameters
from pyro_ssm.infer.prior import sample_prior

__all__ = [
    "IWAE",
    "FitError",
    "FitResult",
    "FreeBits",
    "ImportanceEstimate",
    "LowerBound",
    "evidence_lower_bound",
    "fit",
    "importance_log_likelihood",
    "kl_annealing",
    "linear_annealing",
    "local_parameters",
    "sample_prior",
    "warmup_cosine",
]
