"""Which transitions say how often something is observed."""

from __future__ import annotations

from typing import Any

from pyro_ssm.dynamics.neural_ode import NeuralODE
from pyro_ssm.dynamics.noisy_flow import NoisyFlow

__all__ = ["refuse_intensity", "timed_equation"]


def timed_equation(transition: Any) -> NeuralODE | None:
    """The equation whose ``log_intensity`` makes the times of a record part of what it tells; None without one.

    Raises:
        TypeError: such an equation is inside a transition that does not pass its intensity on.

    >>> import pyro_ssm as ssm
    >>> from pyro_ssm.dynamics.timed import timed_equation
    >>> ode = ssm.dynamics.NeuralODE(lambda t, z, u: -z, state_dim=1, log_intensity=lambda t, z, u: z)
    >>> timed_equation(ssm.dynamics.discretize(ode, "flow", noise_floor=0.1)) is ode
    True
    """
    ode = transition.ode if isinstance(transition, NoisyFlow) else transition
    if isinstance(ode, NeuralODE):
        return None if ode.log_intensity is None else ode
    for name, part in transition.named_modules():
        if isinstance(part, NeuralODE) and part.log_intensity is not None:
            raise TypeError(
                f"{type(transition).__name__.removeprefix('Bound')} does not pass on the `log_intensity` of its part "
                f"`{name}`: the times of observation would be ignored. Build that NeuralODE without it, or use it as "
                "the whole transition"
            )
    return None


def refuse_intensity(transition: Any, method: str) -> None:
    """Raise where the times of observation are part of the likelihood and ``method`` would leave them out.

    Raises:
        TypeError: the transition has an intensity.

    >>> import pyro_ssm as ssm
    >>> from pyro_ssm.dynamics.timed import refuse_intensity
    >>> refuse_intensity(ssm.dynamics.LinearNormal(2), "kalman_filter")
    """
    if timed_equation(transition) is not None:
        raise TypeError(
            f"{method} does not count the times of observation, which are part of this model's likelihood "
            "(`log_intensity`). Use a particle filter (infer.bootstrap, guided, locally_optimal), infer.fit with a "
            "guide, or build the NeuralODE without `log_intensity`"
        )
