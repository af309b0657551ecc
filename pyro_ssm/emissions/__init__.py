"""What is seen."""

from pyro_ssm.emissions.binary import Bernoulli
from pyro_ssm.emissions.categorical import Categorical
from pyro_ssm.emissions.continuous import Normal, StudentT
from pyro_ssm.emissions.count import NegativeBinomial, Poisson
from pyro_ssm.emissions.function import FunctionNormal
from pyro_ssm.emissions.linear import LinearNormal
from pyro_ssm.emissions.radial import RBFNormal

__all__ = [
    "Bernoulli",
    "Categorical",
    "FunctionNormal",
    "LinearNormal",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "RBFNormal",
    "StudentT",
]
