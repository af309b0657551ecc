"""A linear motion that a network corrects: the deep model that contains the linear one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.blocks._checks import check_positive, check_size
from pyro_ssm.blocks._conditioning import concatenate
from pyro_ssm.blocks._gaussian import corrected_normal, corrections
from pyro_ssm.blocks.linear import linear
from pyro_ssm.blocks.mlp import MLP
from pyro_ssm.components import AffineGaussian, Gaussian, Transition, gap, require

__all__ = ["CorrectedTransition"]


class CorrectedTransition(Transition, Gaussian):
    """A linear-Gaussian transition whose noise a network shifts and scales,

    .. math::
        z_{k+1} = A_k z_k + b_k + L_k e_k, \\qquad e_k \\sim N(f(x_k), \\text{diag}(g(x_k)^2)), \\\\
        (f, a) = \\text{MLP}(x), \\qquad g = \\text{floor} + (1 - \\text{floor}) \\log(1 + (e - 1)\\, e^a),

    where :math:`A_k, b_k, L_k` are those of ``base`` and :math:`x_k` is the state with the inputs, the memory and
    (``uses_gap``) the logarithm of the gap beside it. The last layer of the network starts at zero, where f = 0 and
    g = 1: the model starts as the linear one, to the last bit of its mean, and a correction is measured in standard
    deviations of its noise. So fit the linear model exactly first (``infer.Marginal``), and let ``base`` have its
    parameters: what is learnt from there on is what the linear model lacks.

    Args:
        base: the linear part, a transition that is ``AffineGaussian``; its parameters are learnt, too, unless it is
            told ``requires_grad_(False)``. They are named ``base.matrix`` and so on.
        hidden: sizes of the network's hidden layers: a number, a sequence, or ``()`` for an affine map.
        input_dim: size of the inputs that the network sees (``base`` has its own); 0 ignores them.
        memory_dim: size of the memory's summary; 0 ignores it.
        uses_gap: whether the network sees the logarithm of the time gap (one more feature).
        activation: of the hidden layers (see ``blocks.activation_function``).
        floor: least factor of the noise, in (0, 1).

    Raises:
        TypeError: ``base`` is not an affine Gaussian transition.
        ValueError: a size is wrong; or, when called, the state, inputs or memory have another size or are missing.

    >>> import torch
    >>> from pyro_ssm.dynamics import CorrectedTransition, LinearNormal
    >>> base = LinearNormal(state_dim=2, covariance="full")
    >>> state, times = torch.randn(4, 2), torch.arange(5, dtype=torch.float64)
    >>> law = CorrectedTransition(base, hidden=8)(state, times[:-1], times[1:], None)
    >>> torch.equal(law.mean, base(state, times[:-1], times[1:], None).mean)
    True
    """

    def __init__(
        self,
        base: Transition,
        hidden: int | Sequence[int],
        input_dim: int = 0,
        memory_dim: int = 0,
        uses_gap: bool = False,
        activation: str | Callable[[Tensor], Tensor] = "tanh",
        floor: float = 1e-3,
    ) -> None:
        super().__init__()
        if not isinstance(base, Transition):
            raise TypeError(f"`base` must be a components.Transition, got {type(base).__name__}")
        require(base, AffineGaussian, "CorrectedTransition", "MLPTransition or GatedTransition, which need no base")
        self.base = base
        self.state_dim = base.state_dim
        self.input_dim = check_size("input_dim", input_dim, least=0)
        self.memory_dim = check_size("memory_dim", memory_dim, least=0)
        self.uses_gap = uses_gap
        self.floor = check_positive("floor", floor)
        if floor >= 1:
            raise ValueError(f"`floor` is a share of the noise of `base` and must be below 1, got {floor}")
        features = self.state_dim + input_dim + memory_dim + uses_gap
        self.network = MLP(features, hidden, 2 * self.state_dim, activation)
        with torch.no_grad():
            self.network.layers[-1].weight.zero_()
            self.network.layers[-1].bias.zero_()

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Any:
        """The law of the next states; ``state`` ``(..., time, state)``."""
        x = concatenate(self, state, inputs, memory, gap(time, next_time, state) if self.uses_gap else None)
        matrix, offset, scale_tril = self.base.affine(time, next_time, inputs, memory=memory)
        return corrected_normal(linear(state, matrix, offset), scale_tril, *corrections(self.network(x), self.floor))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return (
            f"state_dim={self.state_dim}, input_dim={self.input_dim}, memory_dim={self.memory_dim}, "
            f"uses_gap={self.uses_gap}"
        )
