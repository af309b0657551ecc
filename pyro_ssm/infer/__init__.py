"""Inference: fitting, bounds, and what they need."""

from pyro_ssm.infer.annealing import kl_annealing, linear_annealing, warmup_cosine
from pyro_ssm.infer.diagnose import FitError
from pyro_ssm.infer.fit import FitResult, fit
from pyro_ssm.infer.local_parameters import local_parameters

__all__ = ["FitError", "FitResult", "fit", "kl_annealing", "linear_annealing", "local_parameters", "warmup_cosine"]
