"""What is seen."""

from pyro_ssm.emissions.binary import Bernoulli
from pyro_ssm.emissions.categorical import Categorical
from pyro_ssm.emissions.continuous import Normal, StudentT
from pyro_ssm.emissions.count import NegativeBinomial, Poisson
from pyro_ssm.emissions.linear import LinearNormal
from pyro_ssm.emissions.noise import KnownNoise, NoiseFunction, StandardErrors
from pyro_ssm.emissions.structured import Structured

__all__ = [
    "Bernoulli",
    "Categorical",
    "KnownNoise",
    "LinearNormal",
    "NegativeBinomial",
    "NoiseFunction",
    "Normal",
    "Poisson",
    "StandardErrors",
    "Structured",
    "StudentT",
]
