"""What is seen."""

from pyro_ssm.emissions.binary import Bernoulli
from pyro_ssm.emissions.continuous import Normal
from pyro_ssm.emissions.linear import LinearNormal

__all__ = ["Bernoulli", "LinearNormal", "Normal"]
