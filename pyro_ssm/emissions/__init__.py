"""What is seen."""

from pyro_ssm.emissions.binary import Bernoulli
from pyro_ssm.emissions.categorical import Categorical
from pyro_ssm.emissions.continuous import Normal, StudentT
from pyro_ssm.emissions.coordinates import Coordinates
from pyro_ssm.emissions.count import NegativeBinomial, Poisson
from pyro_ssm.emissions.design import DesignNormal
from pyro_ssm.emissions.function import FunctionNormal
from pyro_ssm.emissions.linear import LinearNormal
from pyro_ssm.emissions.noise import KnownNoise, NoiseFunction, StandardErrors
from pyro_ssm.emissions.radial import RBFNormal
from pyro_ssm.emissions.structured import Structured
from pyro_ssm.emissions.switching import SwitchingLinear
from pyro_ssm.emissions.table import ByState, CategoricalTable, NormalTable, PoissonTable, StateTable, StudentTTable

__all__ = [
    "Bernoulli",
    "ByState",
    "Categorical",
    "CategoricalTable",
    "Coordinates",
    "DesignNormal",
    "FunctionNormal",
    "KnownNoise",
    "LinearNormal",
    "NegativeBinomial",
    "NoiseFunction",
    "Normal",
    "NormalTable",
    "Poisson",
    "PoissonTable",
    "RBFNormal",
    "StandardErrors",
    "StateTable",
    "Structured",
    "StudentT",
    "StudentTTable",
    "SwitchingLinear",
]
