"""Yes or no."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyro import distributions as dist
from torch import Tensor

from pyro_ssm.emissions._network import NetworkEmission

__all__ = ["Bernoulli"]


class Bernoulli(NetworkEmission):
    """Binary observations whose log-odds are a network's outputs,

    .. math:: y_{ki} \\sim \\text{Bernoulli}(\\sigma(f_i(z_k, u_k, m_k))).

    Args:
        state_dim: size of the state.
        obs_dim: size of an observation.
        hidden: sizes of the hidden layers; ``()`` is an affine map.
        input_dim: size of the inputs; 0 ignores them.
        memory_dim: size of the memory's summary; 0 ignores it.
        activation: of the hidden layers (see ``blocks.activation_function``).

    Raises:
        ValueError: a size is wrong; or, when called, the state, inputs or memory have another size or are missing.

    >>> import torch
    >>> from pyro_ssm.emissions import Bernoulli
    >>> law = Bernoulli(state_dim=2, obs_dim=3, hidden=8)(torch.zeros(5, 2), torch.arange(5.0), None)
    >>> law.batch_shape, law.event_shape
    (torch.Size([5]), torch.Size([3]))
    """

    def __init__(
        self,
        state_dim: int,
        obs_dim: int,
        hidden: int | Sequence[int] = (),
        input_dim: int = 0,
        memory_dim: int = 0,
        activation: str | Callable[[Tensor], Tensor] = "relu",
    ) -> None:
        super().__init__(state_dim, obs_dim, hidden, input_dim, memory_dim, activation)

    def forward(self, state: Tensor, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the observations; ``state`` ``(..., time, state)``."""
        logits = self._outputs(state, inputs, memory)
        return dist.Independent(dist.Bernoulli(logits=logits, validate_args=False), 1, validate_args=False)
