"""Linear Gaussian motion on a grid of steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._conditioning import check_state
from pyro_ssm.blocks._gaussian import AffineNormal, first_matrix
from pyro_ssm.components import Affine, Transition

__all__ = ["LinearNormal"]


class LinearNormal(AffineNormal, Transition):
    """A linear Gaussian transition,

    .. math:: z_{k+1} = A z_k + B u_k + b + L \\varepsilon_k, \\qquad \\varepsilon_k \\sim N(0, I).

    It counts steps: the length of a time gap does not enter (see :class:`OrnsteinUhlenbeck` for irregular times).
    A random walk is ``LinearNormal(n, matrix=torch.eye(n))`` with ``matrix.requires_grad_(False)``.

    Args:
        state_dim: size of the state.
        input_dim: size of the inputs; 0 ignores them.
        covariance: ``"diagonal"`` (parameter ``scale``) or ``"full"`` (parameter ``scale_tril``).
        matrix: first value of ``A`` ``(state, state)``; None takes 0.9 times the identity.
        scale: first value of the noise's standard deviations (a number, ``(state,)``, or a whole factor if full).
        floor: lower bound of the learnable standard deviations.

    Parameters: ``matrix`` ``(state, state)``, ``input_matrix`` ``(state, input)`` (from zero), ``offset`` ``(state,)``,
    ``scale`` ``(state,)`` or ``scale_tril`` ``(state, state)``.

    Raises:
        ValueError: a size is wrong; or, when called, the state or inputs have another size or are missing.

    >>> import torch
    >>> from pyro_ssm.dynamics import LinearNormal
    >>> times = torch.arange(5, dtype=torch.float64)
    >>> law = LinearNormal(state_dim=2)(torch.ones(4, 2), times[:-1], times[1:], None)
    >>> law.batch_shape, law.mean[0].tolist()
    (torch.Size([4]), [0.8999999761581421, 0.8999999761581421])
    """

    def __init__(
        self,
        state_dim: int,
        input_dim: int = 0,
        covariance: str = "diagonal",
        matrix: Tensor | None = None,
        scale: float | Tensor = 0.5,
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.state_dim = check_size("state_dim", state_dim)
        start = first_matrix(matrix, (state_dim, state_dim), lambda: 0.9 * torch.eye(state_dim))
        self._declare(start, input_dim, covariance, scale, floor)

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Any:
        """The law of the next states; ``state`` ``(..., time, state)``, ``inputs`` ``(..., time, input)`` or None."""
        check_state(self, state)
        return self._law(state, inputs)

    def affine(self, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Affine:
        """:math:`(A,\\; B u_k + b,\\; L)`, with a time axis of 1 where it does not vary."""
        return self._affine(inputs, self.state_dim)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"state_dim={self.state_dim}, input_dim={self.input_dim}, covariance={self.covariance!r}"
