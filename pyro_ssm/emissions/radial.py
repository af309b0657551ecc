"""What is seen is a linear map of the state and radial basis functions of it, with Gaussian noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._gaussian import first_matrix
from pyro_ssm.blocks._radial import RadialNormal
from pyro_ssm.components import Emission

__all__ = ["RBFNormal"]


class RBFNormal(RadialNormal, Emission):
    """A Gaussian emission whose mean is a linear map plus radial basis functions,

    .. math:: y_k = C z_k + V \\rho(z_k) + D u_k + d + R \\varepsilon_k, \\qquad
        \\rho_i(z) = \\exp\\Big(-\\tfrac12 \\sum_j \\frac{(z_j - c_{ij})^2}{w_{ij}^2}\\Big).

    It is linear in everything but the centres and widths, so ``infer.em`` with an extended Kalman smoother has a
    closed-form M-step. It starts as the linear map (V = 0).

    Args:
        state_dim: size of the state.
        obs_dim: size of an observation.
        centers: first value of the centres ``(number, state)``, where the states are expected.
        width: first value of the widths, a number or ``(number, state)``; about the distance of the centres.
        input_dim: size of the inputs; 0 ignores them.
        covariance: ``"diagonal"`` (parameter ``scale``) or ``"full"`` (parameter ``scale_tril``).
        matrix: first value of ``C`` ``(obs, state)``; None draws it from :math:`N(0, 1 / \\text{state})`.
        scale: first value of the noise's standard deviations (a number, ``(obs,)``, or a whole factor if full).
        floor: lower bound of the learnable standard deviations and widths.

    Parameters: ``matrix`` ``(obs, state)``, ``weights`` ``(obs, number)``, ``centers`` and ``width`` ``(number,
    state)``, ``input_matrix`` ``(obs, input)`` (from zero), ``offset`` ``(obs,)``, ``scale`` ``(obs,)`` or
    ``scale_tril`` ``(obs, obs)``.

    Raises:
        ValueError: a size is wrong; or, when called, the state or inputs have another size or are missing.

    Source: Ghahramani and Roweis (1999), "Learning nonlinear dynamical systems using an EM algorithm".

    >>> import torch
    >>> from pyro_ssm.emissions import RBFNormal
    >>> emission = RBFNormal(1, 3, centers=torch.zeros(1, 1), matrix=torch.ones(3, 1))
    >>> emission(torch.ones(4, 1), torch.arange(4.0), None).batch_shape
    torch.Size([4])
    """

    def __init__(
        self,
        state_dim: int,
        obs_dim: int,
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
        self.obs_dim = check_size("obs_dim", obs_dim)
        start = first_matrix(matrix, (obs_dim, state_dim), lambda: torch.randn(obs_dim, state_dim) / state_dim**0.5)
        self._declare(start, centers, width, input_dim, covariance, scale, floor)

    def forward(self, state: Tensor, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the observations; ``state`` ``(..., time, state)``, ``inputs`` ``(..., time, input)`` or None."""
        return self._law(state, inputs)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return (
            f"state_dim={self.state_dim}, obs_dim={self.obs_dim}, input_dim={self.input_dim}, "
            f"covariance={self.covariance!r}"
        )
