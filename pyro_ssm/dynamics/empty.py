"""The state of a model that has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.blocks._gaussian import diagonal_normal
from pyro_ssm.components import Gaussian, Initial, Transition

__all__ = ["EmptyInitial", "EmptyTransition"]


class EmptyInitial(Initial, Gaussian):
    """The law of a state of no dimensions, whose density is 1.

    A :class:`~pyro_ssm.models.StateSpaceModel` with it (and :class:`EmptyTransition`) has no site ``"z"``: its memory
    of past observations is all that it knows, and the site ``"y"`` is the product of its one-step predictions. It is
    fitted with ``guide=None``.

    Shapes:
        The law has batch ``(..., 1)`` (that of ``time``) and event ``(0,)``.

    >>> import torch
    >>> from pyro_ssm.dynamics import EmptyInitial
    >>> law = EmptyInitial()(torch.zeros(7, 1).double(), None)
    >>> law.event_shape, law.log_prob(law.sample()).abs().sum()
    (torch.Size([0]), tensor(0.))
    """

    state_dim = 0

    def forward(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        return _empty(time, memory)


class EmptyTransition(Transition, Gaussian):
    """The step of a state of no dimensions (see :class:`EmptyInitial`).

    >>> import torch
    >>> from pyro_ssm.dynamics import EmptyTransition
    >>> EmptyTransition()(torch.zeros(3, 0), torch.arange(3.0), torch.arange(3.0) + 1, None).event_shape
    torch.Size([0])
    """

    state_dim = 0

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Any:
        return _empty(time, state)


def _empty(time: Tensor, like: Tensor | None) -> Any:
    shape = time.shape if like is None else torch.broadcast_shapes(time.shape, like.shape[:-1])
    dtype = torch.get_default_dtype() if like is None else like.dtype
    nothing = torch.empty((*shape, 0), dtype=dtype, device=time.device)
    return diagonal_normal(nothing, nothing)
