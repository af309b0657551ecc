"""Neural Gaussian motion: gated and feed-forward networks, and a mean that is a known function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_ssm.blocks._checks import check_positive, check_size
from pyro_ssm.blocks._conditioning import concatenate
from pyro_ssm.blocks._gaussian import diagonal_normal
from pyro_ssm.blocks.linear import Linear
from pyro_ssm.blocks.positive import softplus_above
from pyro_ssm.components import Gaussian, Transition, gap

__all__ = ["GatedTransition"]


class GatedTransition(Transition, Gaussian):
    """The gated transition of deep Markov models: a network that can fall back on a linear map, state by state,

    .. math::
        g &= \\sigma(W_g\\, r(V_g x)), \\qquad h = W_h\\, r(V_h x), \\\\
        \\mu &= (1 - g) \\odot (W_\\mu x) + g \\odot h, \\qquad
        s = \\text{floor} + \\log(1 + e^{W_s r(h)}), \\\\
        z_{k+1} &\\sim N(\\mu, \\text{diag}(s^2)),

    where :math:`r` is relu, biases are not written, and :math:`x` is the state with the inputs, the memory and
    (``uses_gap``) the logarithm of the gap beside it. :math:`W_\\mu` starts as the identity on the state.

    Args:
        state_dim: size of the state.
        hidden_dim: hidden units of the gate, and as many of the proposed mean.
        input_dim: size of the inputs; 0 ignores them.
        memory_dim: size of the memory's summary; 0 ignores it.
        uses_gap: whether the networks see the logarithm of the time gap (one more feature).
        floor: least standard deviation.

    Raises:
        ValueError: a size is wrong; or, when called, the state, inputs or memory have another size or are missing.

    Source: Krishnan, Shalit and Sontag (2017), "Structured inference networks for nonlinear state space models",
    section 5; the softplus gives the standard deviation.

    >>> import torch
    >>> from pyro_ssm.dynamics import GatedTransition
    >>> times = torch.arange(5, dtype=torch.float64)
    >>> law = GatedTransition(state_dim=2, hidden_dim=8)(torch.zeros(7, 4, 2), times[:-1], times[1:], None)
    >>> law.batch_shape, law.event_shape
    (torch.Size([7, 4]), torch.Size([2]))
    """

    def __init__(
        self,
        state_dim: int,
        hidden_dim: int,
        input_dim: int = 0,
        memory_dim: int = 0,
        uses_gap: bool = False,
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.state_dim = check_size("state_dim", state_dim)
        self.hidden_dim = check_size("hidden_dim", hidden_dim)
        self.input_dim = check_size("input_dim", input_dim, least=0)
        self.memory_dim = check_size("memory_dim", memory_dim, least=0)
        self.uses_gap = uses_gap
        self.floor = check_positive("floor", floor)
        features = state_dim + input_dim + memory_dim + uses_gap
        self.hidden = Linear(features, 2 * hidden_dim)  # the hidden layers of gate and proposal, in one product
        self.gate = Linear(hidden_dim, state_dim)
        self.proposal = Linear(hidden_dim, state_dim)
        self.linear = Linear(features, state_dim)
        self.raw_scale = Linear(state_dim, state_dim)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(state_dim, features))
            self.linear.bias.zero_()

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Any:
        """The law of the next states; ``state`` ``(..., time, state)``."""
        x = concatenate(self, state, inputs, memory, gap(time, next_time, state) if self.uses_gap else None)
        for_gate, for_proposal = F.relu(self.hidden(x)).chunk(2, dim=-1)
        gate = torch.sigmoid(self.gate(for_gate))
        proposal = self.proposal(for_proposal)
        loc = torch.lerp(self.linear(x), proposal, gate)
        return diagonal_normal(loc, softplus_above(self.raw_scale(F.relu(proposal)), self.floor))

    def extra_repr(self) -> str:
        return (
            f"state_dim={self.state_dim}, hidden_dim={self.hidden_dim}, input_dim={self.input_dim}, "
            f"memory_dim={self.memory_dim}, uses_gap={self.uses_gap}"
        )
