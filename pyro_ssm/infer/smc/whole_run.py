"""What a run leaves whose steps are not made one by one in Python."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pyro_ssm.infer.smc.stepper import Cloud

__all__ = ["WholeRun"]


class WholeRun(NamedTuple):
    """The results of compiled or captured steps.

    >>> from pyro_ssm.infer.smc.whole_run import WholeRun
    >>> WholeRun._fields
    ('log_likelihood', 'cloud', 'ess', 'resampled')
    """

    log_likelihood: Tensor  # (*batch, time)
    cloud: Cloud  # after the last step
    ess: Tensor  # (*batch, time)
    resampled: Tensor  # bool (*batch, time)
