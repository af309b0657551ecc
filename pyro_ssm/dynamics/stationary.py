"""The law that a process forgets towards, as a start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.components import Gaussian, Initial, Transition

__all__ = ["Stationary", "StationaryInitial"]


class Stationary:
    """Capability of a transition: it has a stationary law, ``stationary_law(inputs)``, and a start in it.

    >>> from pyro_ssm.dynamics import OrnsteinUhlenbeck, Stationary
    >>> isinstance(OrnsteinUhlenbeck(1), Stationary)
    True
    """

    def stationary_law(self, inputs: Tensor | None) -> Any:
        """The Gaussian law ``(state,)`` that a step leaves as it is; ``inputs`` ``(..., 1, input)`` held for ever."""
        raise NotImplementedError(f"{type(self).__name__} must define stationary_law(inputs)")

    def stationary(self) -> StationaryInitial:
        """The initial law that this process forgets towards; it shares this transition's parameters."""
        return StationaryInitial(self)


class StationaryInitial(Initial, Gaussian):
    """The stationary law of a transition, sharing its parameters,

    .. math:: z_1 \\sim N(m_\\infty, P_\\infty), \\qquad P_\\infty = A P_\\infty A^T + Q.

    With it, and without inputs, an unobserved first time changes nothing: the law at the second is the same. With
    inputs, the first ones are taken to have held for ever. In a model, the parameters keep the transition's names.

    Args:
        transition: the process; give the same object to the model as its transition.

    Raises:
        TypeError: ``transition`` has no stationary law.
        ValueError: when called, with parameters under which the process is not stationary.

    >>> import torch
    >>> from pyro_ssm.dynamics import OrnsteinUhlenbeck
    >>> transition = OrnsteinUhlenbeck(state_dim=2, rate=2.0)
    >>> transition.stationary()(torch.zeros(1, dtype=torch.float64), None).variance.detach()
    tensor([[0.2500, 0.2500]])
    """

    def __init__(self, transition: Any) -> None:
        super().__init__()
        if not (isinstance(transition, Stationary) and isinstance(transition, Transition)):
            raise TypeError(
                f"`transition` must be a Transition with a stationary law (OrnsteinUhlenbeck, LinearSDE, "
                f"structural.AR ...), got {type(transition).__name__}. Use dynamics.NormalInitial"
            )
        self.state_dim = transition.state_dim
        self.transition = transition

    def forward(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the first state; ``time`` ``(..., 1)``, ``inputs`` ``(..., 1, input)`` or None."""
        law = self.transition.stationary_law(inputs)
        return law.expand(torch.broadcast_shapes(law.batch_shape, time.shape))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"state_dim={self.state_dim}"
