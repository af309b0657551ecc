"""What runs around a program: asked of Pyro's stack of effect handlers."""

from __future__ import annotations

import math

from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import _PYRO_STACK

from pyro_ssm.infer.annealing import kl_annealing

__all__ = ["annealing_factor", "is_annealed", "mcmc_begins"]


def mcmc_begins() -> bool:
    """Whether a kernel of ``pyro.infer.MCMC`` (NUTS, HMC, random walk) is setting itself up around the program.

    Such a kernel first runs the model once inside a handler that initialises sites and, within it, one that enumerates
    discrete ones; nothing else of Pyro's combines the two.

    >>> from pyro_ssm.infer.handler_stack import mcmc_begins
    >>> mcmc_begins()
    False
    """
    kinds = [type(handler) for handler in _PYRO_STACK]
    return InitMessenger in kinds and EnumMessenger in kinds


def is_annealed() -> bool:
    """Whether the program runs inside a :class:`~pyro_ssm.infer.kl_annealing` that changes anything.

    >>> from pyro_ssm.infer import kl_annealing
    >>> from pyro_ssm.infer.handler_stack import is_annealed
    >>> with kl_annealing(0.5):
    ...     print(is_annealed())
    True
    """
    return any(isinstance(handler, kl_annealing) and handler.beta != 1 for handler in _PYRO_STACK)


def annealing_factor(name: str) -> float:
    """The factor that the :class:`~pyro_ssm.infer.kl_annealing` around the program put on a latent site.

    >>> from pyro_ssm.infer import kl_annealing
    >>> from pyro_ssm.infer.handler_stack import annealing_factor
    >>> with kl_annealing(0.5):
    ...     print(annealing_factor("z"), annealing_factor("transition.rate"))
    0.5 1.0
    """
    handlers = [handler for handler in _PYRO_STACK if isinstance(handler, kl_annealing) and handler.selects(name)]
    return math.prod((handler.beta for handler in handlers), start=1.0)
