"""The network that the neural emissions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from pyro_ssm.blocks._checks import check_choice, check_size
from pyro_ssm.blocks._conditioning import concatenate
from pyro_ssm.blocks.mlp import MLP
from pyro_ssm.components import Emission

__all__ = ["NetworkEmission"]

_LARGEST_EXPONENT = 40.0  # exp(40) is 2e17: beyond any count, and far from overflow in float32


class NetworkEmission(Emission):
    """An emission whose natural parameters are outputs of one network of the state, the inputs and the memory."""

    def __init__(
        self,
        state_dim: int,
        obs_dim: int,
        hidden: int | Sequence[int],
        input_dim: int,
        memory_dim: int,
        activation: str | Callable[[Tensor], Tensor],
        outputs_per_obs: int = 1,
    ) -> None:
        super().__init__()
        self.state_dim = check_size("state_dim", state_dim, least=0 if memory_dim else 1)
        self.obs_dim = check_size("obs_dim", obs_dim)
        self.input_dim = check_size("input_dim", input_dim, least=0)
        self.memory_dim = check_size("memory_dim", memory_dim, least=0)
        self.network = MLP(state_dim + input_dim + memory_dim, hidden, outputs_per_obs * obs_dim, activation)

    def _outputs(self, state: Tensor, inputs: Tensor | None, memory: Tensor | None) -> Tensor:
        """``(..., time, outputs_per_obs * obs)``."""
        return self.network(concatenate(self, state, inputs, memory))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return (
            f"state_dim={self.state_dim}, obs_dim={self.obs_dim}, input_dim={self.input_dim}, "
            f"memory_dim={self.memory_dim}"
        )


def check_link(link: str) -> str:
    """``link`` if it names a positive link function."""
    return check_choice("link", link, ("softplus", "exp"))


def positive(value: Tensor, link: str, floor: float) -> Tensor:
    """``floor`` plus the softplus or the exponential of ``value``; the exponent is held below 40."""
    return floor + (F.softplus(value) if link == "softplus" else value.clamp(max=_LARGEST_EXPONENT).exp())
