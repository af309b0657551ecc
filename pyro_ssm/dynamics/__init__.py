"""How the state starts and moves."""

from pyro_ssm.dynamics.initial import NormalInitial
from pyro_ssm.dynamics.linear import LinearNormal
from pyro_ssm.dynamics.neural import FunctionTransition, GatedTransition, MLPTransition
from pyro_ssm.dynamics.ornstein_uhlenbeck import OrnsteinUhlenbeck, StationaryInitial
from pyro_ssm.dynamics.radial import RBFTransition

__all__ = [
    "FunctionTransition",
    "GatedTransition",
    "LinearNormal",
    "MLPTransition",
    "NormalInitial",
    "OrnsteinUhlenbeck",
    "RBFTransition",
    "StationaryInitial",
]
