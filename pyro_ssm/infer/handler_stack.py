"""What runs around a program: asked of Pyro's stack of effect handlers."""

from __future__ import annotations

import math

from pyro.poutine.runtime import _PYRO_STACK

from pyro_ssm.infer.annealing import kl_annealing

__all__ = ["annealing_factor", "is_annealed"]


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
