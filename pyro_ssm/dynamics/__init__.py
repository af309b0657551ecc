"""How the state starts and moves."""

from pyro_ssm.dynamics.initial import NormalInitial
from pyro_ssm.dynamics.linear import LinearNormal
from pyro_ssm.dynamics.neural import GatedTransition

__all__ = ["GatedTransition", "LinearNormal", "NormalInitial"]
