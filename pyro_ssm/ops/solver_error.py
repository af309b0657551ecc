"""The error of a differential equation that cannot be solved."""

from __future__ import annotations

__all__ = ["SolverError"]


class SolverError(FloatingPointError):
    """A solution that is not finite, or a step that cannot be taken: says at what time, for which series, at what norm.

    Under Pyro's HMC and NUTS, where a trajectory may run into such values of the parameters, a model counts it as a
    divergence.

    >>> from pyro_ssm.ops import SolverError
    >>> issubclass(SolverError, FloatingPointError)
    True
    """
