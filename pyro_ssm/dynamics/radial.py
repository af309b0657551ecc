"""Motion by a linear map and radial basis functions: nonlinear, and yet linear in what is to be learnt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._gaussian import first_matrix
from pyro_ssm.blocks._radial import RadialNormal
from pyro_ssm.components import Transition

__all__ = ["RBFTransition"]


class RBFTransition(RadialNormal, Transition):
    """A Gaussian transition whose mean is a linear map plus radial basis functions,

    .. math:: z_{k+1} = A z_k + V \\rho(z_k) + B u_k + b + L \\varepsilon_k, \\qquad
        \\rho_i(z) = \\exp\\Big(-\\tfrac12 \\sum_j \\frac{(z_j - c_{ij})^2}{w_{ij}^2}\\Big).

    It is linear in everything but the centres and widths, so ``infer.em`` with an extended Kalman smoother has a
    closed-form M-step. It starts as the linear map (V = 0). It counts steps: the length of a gap does not enter.

    Args:
        state_dim: size of the state.
        centers: first value of the centres ``(number, state)``, where the states are expected.
        width: first value of the widths, a number or ``(number, state)``; about the distance of the centres.
        input_dim: size of the inputs; 0 ignores them.
        covariance: ``"diagonal"`` (parameter ``scale``) or ``"full"`` (parameter ``scale_tril``).
        matrix: first value of ``A`` ``(state, state)``; None takes 0.9 times the identity.
        scale: first value of the noise's standard deviations (a number, ``(state,)``, or a whole factor if full).
        floor: lower bound of the learnable standard deviations and widths.

    Parameters: ``matrix`` ``(state, state)``, ``weights`` ``(state, number)``, ``centers`` and ``width``
    ``(number, state)``, ``input_matrix`` ``(state, input)`` (from zero), ``offset`` ``(state,)``, ``scale``
    ``(state,)`` or ``scale_tril`` ``(state, state)``.

    Raises:
        ValueError: a size is wrong; or, when called, the state or inputs have another size or are missing.

    Source: Ghahramani and Roweis (1999), "Learning nonlinear dynamical systems using an EM algorithm".

    >>> import torch
    >>> from pyro_ssm.dynamics import RBFTransition
    >>> times = torch.arange(5, dtype=torch.float64)
    >>> law = RBFTransition(1, centers=torch.linspace(-2, 2, 5).unsqueeze(-1))(
    ...     torch.zeros(7, 4, 1), times[:-1], times[1:], None)
    >>> law.batch_shape, law.event_shape
    (torch.Size([7, 4]), torch.Size([1]))
    """

    def __init__(
        self,
        state_dim: int,
        centers: Tensor,
        width: float | Tensor = 1.0,
        input_dim: int = 0,
        covariance: str = "diagonal",
        matrix: Tensor | None = None,
        scale: float | Tensor = 0.5,
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.state_dim = check_size("state_dim", state_dim)
        start = first_matrix(matrix, (state_dim, state_dim), lambda: 0.9 * torch.eye(state_dim))
        self._declare(start, centers, width, input_dim, covariance, scale, floor)

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Any:
        """The law of the next states; ``state`` ``(..., time, state)``, ``inputs`` ``(..., time, input)`` or None."""
        return self._law(state, inputs)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"state_dim={self.state_dim}, input_dim={self.input_dim}, covariance={self.covariance!r}"
