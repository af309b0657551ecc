"""How often something is observed, as a function of the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyro.nn import PyroModule
from torch import Tensor

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._conditioning import concatenate
from pyro_ssm.blocks.mlp import MLP

__all__ = ["LogIntensity"]


class LogIntensity(PyroModule):
    """A network's logarithm of the rates of observation, :math:`\\log \\lambda_i(t, z, u) = \\text{MLP}_i(z, u)`.

    For ``NeuralODE(..., log_intensity=LogIntensity(...))``, which makes the times of a record part of what it tells.

    Args:
        state_dim: size of the state.
        channels: 1 for the times at which anything is observed, or the number of columns of the observations.
        hidden: hidden layers of the network.
        input_dim: columns of the inputs that it sees; 0 ignores them.
        activation: of the network; a smooth one keeps the order of the solver.

    >>> import torch
    >>> from pyro_ssm.dynamics import LogIntensity
    >>> LogIntensity(2, channels=3)(torch.zeros(5, 1), torch.zeros(4, 5, 2), None).shape
    torch.Size([4, 5, 3])
    """

    memory_dim = 0

    def __init__(
        self,
        state_dim: int,
        channels: int = 1,
        hidden: int | Sequence[int] = (32,),
        input_dim: int = 0,
        activation: str | Callable[[Tensor], Tensor] = "tanh",
    ) -> None:
        super().__init__()
        self.state_dim = check_size("state_dim", state_dim)
        self.input_dim = check_size("input_dim", input_dim, least=0)
        self.channels = check_size("channels", channels)
        self.network = MLP(state_dim + input_dim, hidden, channels, activation)

    def forward(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        """``(..., time, channels)`` of states ``(..., time, state)``."""
        return self.network(concatenate(self, state, inputs, None))
