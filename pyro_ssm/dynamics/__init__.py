"""How the state starts and moves."""

from pyro_ssm.dynamics.initial import NormalInitial
from pyro_ssm.dynamics.linear import LinearNormal
from pyro_ssm.dynamics.neural import FunctionTransition, GatedTransition, MLPTransition

__all__ = ["FunctionTransition", "GatedTransition", "LinearNormal", "MLPTransition", "NormalInitial"]
