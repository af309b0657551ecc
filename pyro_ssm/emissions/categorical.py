"""One of several classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyro import distributions as dist
from torch import Tensor

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.distributions.codes import CategoricalCodes
from pyro_ssm.emissions._network import NetworkEmission

__all__ = ["Categorical"]


class Categorical(NetworkEmission):
    """Each entry of an observation is one of several classes,

    .. math:: P(y_{ki} = c) = \\text{softmax}_c(f_{i c}(z_k, u_k, m_k)), \\qquad c = 0, \\dots, C - 1.

    Observations are numbers that hold integers; draws have the dtype of the network.

    Args:
        state_dim: size of the state.
        obs_dim: size of an observation: how many categorical variables are seen at a time.
        hidden: sizes of the hidden layers; ``()`` is an affine map.
        input_dim: size of the inputs; 0 ignores them.
        memory_dim: size of the memory's summary; 0 ignores it.
        activation: of the hidden layers (see ``blocks.activation_function``).
        num_classes: how many classes each variable has, at least 2.

    Raises:
        ValueError: a size is wrong; or, when called, the state, inputs or memory have another size or are missing.

    >>> import torch
    >>> from pyro_ssm.emissions import Categorical
    >>> law = Categorical(state_dim=2, obs_dim=1, num_classes=4)(torch.zeros(5, 2), torch.arange(5.0), None)
    >>> law.batch_shape, law.event_shape, law.sample().dtype
    (torch.Size([5]), torch.Size([1]), torch.float32)
    """

    def __init__(
        self,
        state_dim: int,
        obs_dim: int,
        hidden: int | Sequence[int] = (),
        input_dim: int = 0,
        memory_dim: int = 0,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        *,
        num_classes: int,
    ) -> None:
        check_size("num_classes", num_classes, least=2)
        super().__init__(state_dim, obs_dim, hidden, input_dim, memory_dim, activation, outputs_per_obs=num_classes)
        self.num_classes = num_classes

    def forward(self, state: Tensor, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the observations; ``state`` ``(..., time, state)``."""
        logits = self._outputs(state, inputs, memory).unflatten(-1, (self.obs_dim, self.num_classes))
        return dist.Independent(CategoricalCodes(logits=logits, validate_args=False), 1, validate_args=False)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{super().extra_repr()}, num_classes={self.num_classes}"
