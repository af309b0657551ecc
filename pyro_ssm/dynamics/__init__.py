"""How the state starts and moves."""

from pyro_ssm.dynamics import structural
from pyro_ssm.dynamics.corrected import CorrectedTransition
from pyro_ssm.dynamics.diffuse import DiffuseInitial
from pyro_ssm.dynamics.discretisation import discretize
from pyro_ssm.dynamics.discretized import (
    AffineEulerMaruyama,
    EulerMaruyama,
    ExactLinear,
    LocalLinearisation,
    ODESteps,
    SimulatedSteps,
)
from pyro_ssm.dynamics.durations import CategoricalDuration, NegativeBinomialDuration, PoissonDuration
from pyro_ssm.dynamics.empty import EmptyInitial, EmptyTransition
from pyro_ssm.dynamics.field_penalty import FieldPenalty
from pyro_ssm.dynamics.finite import CategoricalInitial, MarkovChain
from pyro_ssm.dynamics.harmonic_oscillator import HarmonicOscillator
from pyro_ssm.dynamics.initial import KnownInitial, NormalInitial
from pyro_ssm.dynamics.integrated_wiener import IntegratedWiener
from pyro_ssm.dynamics.interpolation import InputPath, interpolate_inputs
from pyro_ssm.dynamics.linear import LinearNormal
from pyro_ssm.dynamics.linear_sde import LinearSDE, LinearSDEProcess
from pyro_ssm.dynamics.markov_jump import MarkovJump
from pyro_ssm.dynamics.matern import Matern
from pyro_ssm.dynamics.neural import FunctionTransition, GatedTransition, MLPTransition
from pyro_ssm.dynamics.neural_ode import NeuralODE
from pyro_ssm.dynamics.neural_sde import NeuralSDE
from pyro_ssm.dynamics.noisy_flow import NoisyFlow
from pyro_ssm.dynamics.ode_fields import GreyBox, SecondOrder
from pyro_ssm.dynamics.ornstein_uhlenbeck import OrnsteinUhlenbeck
from pyro_ssm.dynamics.part import Part, Parts
from pyro_ssm.dynamics.radial import RBFTransition
from pyro_ssm.dynamics.sde_fields import ConstantDiffusion, ElementwiseDiffusion, LinearDrift, MLPDiffusion, MLPDrift
from pyro_ssm.dynamics.semi_markov import SemiMarkov, SemiMarkovInitial
from pyro_ssm.dynamics.stacked import Stacked, StackedDiffuseInitial, StackedInitial, stack_initials
from pyro_ssm.dynamics.stationary import Stationary, StationaryInitial
from pyro_ssm.dynamics.switching import SwitchingInitial, SwitchingLinear
from pyro_ssm.dynamics.term_library import TermLibrary, with_sparse_prior

__all__ = [
    "AffineEulerMaruyama",
    "CategoricalDuration",
    "CategoricalInitial",
    "ConstantDiffusion",
    "CorrectedTransition",
    "DiffuseInitial",
    "ElementwiseDiffusion",
    "EmptyInitial",
    "EmptyTransition",
    "EulerMaruyama",
    "ExactLinear",
    "FieldPenalty",
    "FunctionTransition",
    "GatedTransition",
    "GreyBox",
    "HarmonicOscillator",
    "InputPath",
    "IntegratedWiener",
    "KnownInitial",
    "LinearDrift",
    "LinearNormal",
    "LinearSDE",
    "LinearSDEProcess",
    "LocalLinearisation",
    "MLPDiffusion",
    "MLPDrift",
    "MLPTransition",
    "MarkovChain",
    "MarkovJump",
    "Matern",
    "NegativeBinomialDuration",
    "NeuralODE",
    "NeuralSDE",
    "NoisyFlow",
    "NormalInitial",
    "ODESteps",
    "OrnsteinUhlenbeck",
    "Part",
    "Parts",
    "PoissonDuration",
    "RBFTransition",
    "SecondOrder",
    "SemiMarkov",
    "SemiMarkovInitial",
    "SimulatedSteps",
    "Stacked",
    "StackedDiffuseInitial",
    "StackedInitial",
    "Stationary",
    "StationaryInitial",
    "SwitchingInitial",
    "SwitchingLinear",
    "TermLibrary",
    "discretize",
    "interpolate_inputs",
    "stack_initials",
    "structural",
    "with_sparse_prior",
]
