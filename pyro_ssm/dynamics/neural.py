"""Neural Gaussian motion: gated and feed-forward networks, and a mean that is a known function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_ssm.blocks._checks import check_positive, check_size
from pyro_ssm.blocks._conditioning import StateFunction, check_function, concatenate, function_value
from pyro_ssm.blocks._gaussian import diagonal_normal, noise_law, set_noise
from pyro_ssm.blocks.linear import Linear
from pyro_ssm.blocks.mlp import MLP
from pyro_ssm.blocks.parameters import softplus_above
from pyro_ssm.components import Gaussian, Transition, gap

__all__ = ["FunctionTransition", "GatedTransition", "MLPTransition"]


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
        """What ``repr`` shows."""
        return (
            f"state_dim={self.state_dim}, hidden_dim={self.hidden_dim}, input_dim={self.input_dim}, "
            f"memory_dim={self.memory_dim}, uses_gap={self.uses_gap}"
        )


class MLPTransition(Transition, Gaussian):
    """A feed-forward Gaussian transition,

    .. math::
        (f, a) = \\text{MLP}(x), \\qquad z_{k+1} \\sim N(z_k + f, \\text{diag}(s^2)), \\qquad
        s = \\text{floor} + \\log(1 + e^a),

    where :math:`x` is the state with the inputs, the memory and (``uses_gap``) the logarithm of the gap beside it.
    Without ``residual`` the mean is :math:`f`.

    Args:
        state_dim: size of the state.
        hidden: sizes of the hidden layers: a number, a sequence, or ``()`` for an affine map.
        input_dim: size of the inputs; 0 ignores them.
        memory_dim: size of the memory's summary; 0 ignores it.
        residual: whether the network's output is added to the state.
        uses_gap: whether the network sees the logarithm of the time gap (one more feature).
        activation: of the hidden layers (see ``blocks.activation_function``).
        floor: least standard deviation.

    Raises:
        ValueError: a size is wrong; or, when called, the state, inputs or memory have another size or are missing.

    >>> import torch
    >>> from pyro_ssm.dynamics import MLPTransition
    >>> times = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    >>> law = MLPTransition(state_dim=2, hidden=8, uses_gap=True)(torch.zeros(2, 2), times[:-1], times[1:], None)
    >>> bool((law.mean[0] == law.mean[1]).any())       # same state, another gap
    False
    """

    def __init__(
        self,
        state_dim: int,
        hidden: int | Sequence[int],
        input_dim: int = 0,
        memory_dim: int = 0,
        residual: bool = True,
        uses_gap: bool = False,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.state_dim = check_size("state_dim", state_dim)
        self.input_dim = check_size("input_dim", input_dim, least=0)
        self.memory_dim = check_size("memory_dim", memory_dim, least=0)
        self.residual = residual
        self.uses_gap = uses_gap
        self.floor = check_positive("floor", floor)
        self.network = MLP(state_dim + input_dim + memory_dim + uses_gap, hidden, 2 * state_dim, activation)

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Any:
        """The law of the next states; ``state`` ``(..., time, state)``."""
        x = concatenate(self, state, inputs, memory, gap(time, next_time, state) if self.uses_gap else None)
        loc, raw_scale = self.network(x).chunk(2, dim=-1)
        return diagonal_normal(state + loc if self.residual else loc, softplus_above(raw_scale, self.floor))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return (
            f"state_dim={self.state_dim}, input_dim={self.input_dim}, memory_dim={self.memory_dim}, "
            f"residual={self.residual}, uses_gap={self.uses_gap}"
        )


class FunctionTransition(Transition, Gaussian):
    """A Gaussian transition around a known function,

    .. math:: z_{k+1} \\sim N(f(z_k, u_k),\\; L L^T).

    For grey-box models: what is known of the motion is written down, and its unknown constants are parameters of a
    ``PyroModule``, to learn or to give priors (bind names them ``function.name``).

    Args:
        state_dim: size of the state.
        function: ``f(state, inputs)`` from ``(..., time, state)`` to the same shape; a ``PyroModule`` (parameters found
            by ``bind``), another module, or a plain function. It gets ``inputs`` as the data has them (or None). It
            must broadcast: drawn constants have leading dims ``(*draws, *plates, 1, 1)`` that the state may lack.
        scale: first value of the noise's standard deviations (a number, ``(state,)``, or a whole factor if full).
        floor: lower bound of the learnable standard deviations.
        covariance: ``"diagonal"`` (parameter ``scale`` ``(state,)``) or ``"full"`` (parameter ``scale_tril``).

    Raises:
        TypeError: ``function`` cannot be called.
        ValueError: a size is wrong; or, when called, the state or the function's value has another size.

    >>> import torch
    >>> from pyro_ssm.dynamics import FunctionTransition
    >>> times = torch.arange(5, dtype=torch.float64)
    >>> transition = FunctionTransition(1, lambda z, u: 2 * torch.sin(z) + z, scale=5.0**0.5)
    >>> transition(torch.ones(4, 1), times[:-1], times[1:], None).mean[0]
    tensor([2.6829])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"scale": 1, "scale_tril": 2}

    def __init__(
        self,
        state_dim: int,
        function: StateFunction,
        scale: float | Tensor = 0.5,
        floor: float = 1e-4,
        covariance: str = "diagonal",
    ) -> None:
        super().__init__()
        self.state_dim = check_size("state_dim", state_dim)
        self.function = check_function(function)
        set_noise(self, state_dim, covariance, scale, floor)

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Any:
        """The law of the next states; ``state`` ``(..., time, state)``."""
        return noise_law(self, function_value(self, state, inputs, self.state_dim, "the next state"))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"state_dim={self.state_dim}, covariance={self.covariance!r}"
