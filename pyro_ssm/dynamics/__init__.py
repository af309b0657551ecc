"""How the state starts and moves."""

from pyro_ssm.dynamics.diffuse import DiffuseInitial
from pyro_ssm.dynamics.durations import CategoricalDuration, NegativeBinomialDuration, PoissonDuration
from pyro_ssm.dynamics.finite import CategoricalInitial, MarkovChain
from pyro_ssm.dynamics.initial import NormalInitial
from pyro_ssm.dynamics.linear import LinearNormal
from pyro_ssm.dynamics.markov_jump import MarkovJump
from pyro_ssm.dynamics.neural import FunctionTransition, GatedTransition, MLPTransition
from pyro_ssm.dynamics.ornstein_uhlenbeck import OrnsteinUhlenbeck, StationaryInitial
from pyro_ssm.dynamics.semi_markov import SemiMarkov, SemiMarkovInitial
from pyro_ssm.dynamics.switching import SwitchingInitial, SwitchingLinear

__all__ = [
    "CategoricalDuration",
    "CategoricalInitial",
    "DiffuseInitial",
    "FunctionTransition",
    "GatedTransition",
    "LinearNormal",
    "MLPTransition",
    "MarkovChain",
    "MarkovJump",
    "NegativeBinomialDuration",
    "NormalInitial",
    "OrnsteinUhlenbeck",
    "PoissonDuration",
    "SemiMarkov",
    "SemiMarkovInitial",
    "StationaryInitial",
    "SwitchingInitial",
    "SwitchingLinear",
]
