"""Deterministic blocks: maps between tensors that parameterise components and guides."""

from pyro_ssm.blocks.bidirectional import Bidirectional
from pyro_ssm.blocks.evolving import EvolvingBlock
from pyro_ssm.blocks.evolving_memory import EvolvingMemory
from pyro_ssm.blocks.gru_d import GRUD
from pyro_ssm.blocks.gru_ode_bayes import GRUODEBayes
from pyro_ssm.blocks.h3 import H3, LiquidS4
from pyro_ssm.blocks.linear import Linear, linear
from pyro_ssm.blocks.linoss import LinOSS
from pyro_ssm.blocks.mamba import Mamba, Mamba2
from pyro_ssm.blocks.memory import BlockMemory
from pyro_ssm.blocks.mlp import MLP, activation_function, with_normal_priors
from pyro_ssm.blocks.neural_cde import NeuralCDE
from pyro_ssm.blocks.norm import Norm
from pyro_ssm.blocks.ode_rnn import GRUODE, ODERNN
from pyro_ssm.blocks.parameters import (
    CholeskyAbove,
    SoftplusAbove,
    cholesky_parameter,
    positive_parameter,
    softplus_above,
    vector_parameter,
)
from pyro_ssm.blocks.recurrent import RecurrentEncoder
from pyro_ssm.blocks.s4 import LSSL, S4
from pyro_ssm.blocks.s4d import DSS, S4D, diagonal_initial
from pyro_ssm.blocks.s5 import LRU, S5
from pyro_ssm.blocks.stack import ResidualStack
from pyro_ssm.blocks.structured import StructuredBlock

__all__ = [
    "DSS",
    "GRUD",
    "GRUODE",
    "H3",
    "LRU",
    "LSSL",
    "MLP",
    "ODERNN",
    "S4",
    "S4D",
    "S5",
    "Bidirectional",
    "BlockMemory",
    "CholeskyAbove",
    "EvolvingBlock",
    "EvolvingMemory",
    "GRUODEBayes",
    "LinOSS",
    "Linear",
    "LiquidS4",
    "Mamba",
    "Mamba2",
    "NeuralCDE",
    "Norm",
    "RecurrentEncoder",
    "ResidualStack",
    "SoftplusAbove",
    "StructuredBlock",
    "activation_function",
    "cholesky_parameter",
    "diagonal_initial",
    "linear",
    "positive_parameter",
    "softplus_above",
    "vector_parameter",
    "with_normal_priors",
]
