"""Laws over whole paths and records; masked observations."""

from pyro_ssm.distributions.driven_noise import DrivenNoise
from pyro_ssm.distributions.euler_path import EulerDraw, EulerPath
from pyro_ssm.distributions.exogenous import Exogenous, exogenous
from pyro_ssm.distributions.girsanov import GirsanovPath
from pyro_ssm.distributions.history import History
from pyro_ssm.distributions.linear_gaussian_path import LinearGaussianPath, PathMarginals
from pyro_ssm.distributions.linear_gaussian_ssm import LinearGaussianSSM
from pyro_ssm.distributions.markov_kl import markov_kl_steps
from pyro_ssm.distributions.markov_path import MarkovPath
from pyro_ssm.distributions.masked import MaskedLaw, masked
from pyro_ssm.distributions.moments import gaussian_moments
from pyro_ssm.distributions.observations import Observations
from pyro_ssm.distributions.regimes import RegimeNormal
from pyro_ssm.distributions.simulated import SimulatedLaw
from pyro_ssm.distributions.singular_normal import SingularNormal, affine_law
from pyro_ssm.distributions.sinh_arcsinh import SinhArcsinh
from pyro_ssm.distributions.started_path import StartedPath

__all__ = [
    "DrivenNoise",
    "EulerDraw",
    "EulerPath",
    "Exogenous",
    "GirsanovPath",
    "History",
    "LinearGaussianPath",
    "LinearGaussianSSM",
    "MarkovPath",
    "MaskedLaw",
    "Observations",
    "PathMarginals",
    "RegimeNormal",
    "SimulatedLaw",
    "SingularNormal",
    "SinhArcsinh",
    "StartedPath",
    "affine_law",
    "exogenous",
    "gaussian_moments",
    "markov_kl_steps",
    "masked",
]
