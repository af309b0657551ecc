"""How the state starts and moves."""

from pyro_ssm.dynamics import structural
from pyro_ssm.dynamics.diffuse import DiffuseInitial
from pyro_ssm.dynamics.harmonic_oscillator import HarmonicOscillator
from pyro_ssm.dynamics.initial import KnownInitial, NormalInitial
from pyro_ssm.dynamics.integrated_wiener import IntegratedWiener
from pyro_ssm.dynamics.linear import LinearNormal
from pyro_ssm.dynamics.linear_sde import LinearSDE, LinearSDEProcess
from pyro_ssm.dynamics.matern import Matern
from pyro_ssm.dynamics.neural import FunctionTransition, GatedTransition, MLPTransition
from pyro_ssm.dynamics.ornstein_uhlenbeck import OrnsteinUhlenbeck
from pyro_ssm.dynamics.part import Part, Parts
from pyro_ssm.dynamics.stacked import Stacked, StackedDiffuseInitial, StackedInitial, stack_initials
from pyro_ssm.dynamics.stationary import Stationary, StationaryInitial

__all__ = [
    "DiffuseInitial",
    "FunctionTransition",
    "GatedTransition",
    "HarmonicOscillator",
    "IntegratedWiener",
    "KnownInitial",
    "LinearNormal",
    "LinearSDE",
    "LinearSDEProcess",
    "MLPTransition",
    "Matern",
    "NormalInitial",
    "OrnsteinUhlenbeck",
    "Part",
    "Parts",
    "Stacked",
    "StackedDiffuseInitial",
    "StackedInitial",
    "Stationary",
    "StationaryInitial",
    "stack_initials",
    "structural",
]
