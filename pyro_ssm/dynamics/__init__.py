"""How the state starts and moves."""

from pyro_ssm.dynamics.corrected import CorrectedTransition
from pyro_ssm.dynamics.initial import NormalInitial
from pyro_ssm.dynamics.linear import LinearNormal
from pyro_ssm.dynamics.neural import FunctionTransition, GatedTransition, MLPTransition
from pyro_ssm.dynamics.ornstein_uhlenbeck import OrnsteinUhlenbeck, StationaryInitial

__all__ = [
    "CorrectedTransition",
    "FunctionTransition",
    "GatedTransition",
    "LinearNormal",
    "MLPTransition",
    "NormalInitial",
    "OrnsteinUhlenbeck",
    "StationaryInitial",
]
