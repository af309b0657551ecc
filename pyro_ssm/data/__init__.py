"""Data: `TimeSeries`, padding, bundled series and generators.

Example:
    >>> import torch
    >>> from pyro_ssm.data import TimeSeries
    >>> TimeSeries.from_sequences([torch.ones(2, 1), torch.ones(4, 1)])
    TimeSeries(batch=(2,), times=4, obs=1, observed=100.0%, lengths=2..4)
"""

from pyro_ssm.data.bundled import available, load
from pyro_ssm.data.generators import (
    krishnan_linear,
    krishnan_nonlinear,
    linear_gaussian,
    lorenz,
    lotka_volterra,
    stochastic_volatility,
)
from pyro_ssm.data.padding import continue_times, pad_sequences, step_mask, unpad_sequences
from pyro_ssm.data.time_series import TimeSeries

__all__ = [
    "TimeSeries",
    "available",
    "continue_times",
    "krishnan_linear",
    "krishnan_nonlinear",
    "linear_gaussian",
    "load",
    "lorenz",
    "lotka_volterra",
    "pad_sequences",
    "step_mask",
    "stochastic_volatility",
    "unpad_sequences",
]
