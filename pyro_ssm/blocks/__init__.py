"""Deterministic blocks: maps between tensors that parameterise components and guides."""

from pyro_ssm.blocks.linear import Linear, linear
from pyro_ssm.blocks.mlp import MLP, activation_function, with_normal_priors
from pyro_ssm.blocks.parameters import (
    CholeskyAbove,
    SoftplusAbove,
    cholesky_parameter,
    positive_parameter,
    softplus_above,
    vector_parameter,
)
from pyro_ssm.blocks.recurrent import RecurrentEncoder

__all__ = [
    "MLP",
    "CholeskyAbove",
    "Linear",
    "RecurrentEncoder",
    "SoftplusAbove",
    "activation_function",
    "cholesky_parameter",
    "linear",
    "positive_parameter",
    "softplus_above",
    "vector_parameter",
    "with_normal_priors",
]
