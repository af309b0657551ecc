"""What is seen is linear in the state, with Gaussian noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._conditioning import check_state
from pyro_ssm.blocks._gaussian import AffineNormal
from pyro_ssm.components import Affine, Emission

__all__ = ["LinearNormal"]


class LinearNormal(AffineNormal, Emission):
    """A linear Gaussian emission,

    .. math:: y_k = C z_k + D u_k + d + R \\varepsilon_k, \\qquad \\varepsilon_k \\sim N(0, I).

    Args:
        state_dim: size of the state.
        obs_dim: size of an observation.
        input_dim: size of the inputs; 0 ignores them.
        covariance: ``"diagonal"`` (parameter ``scale``) or ``"full"`` (parameter ``scale_tril``).
        matrix: first value of ``C`` ``(obs, state)``; None draws it from :math:`N(0, 1 / \\text{state})`.
        scale: first value of the noise's standard deviations (a number, ``(obs,)``, or a whole factor if full).
        floor: lower bound of the learnable standard deviations.

    Parameters: ``matrix`` ``(obs, state)``, ``input_matrix`` ``(obs, input)`` (from zero), ``offset`` ``(obs,)``,
    ``scale`` ``(obs,)`` or ``scale_tril`` ``(obs, obs)``.

    Raises:
        ValueError: a size is wrong; or, when called, the state or inputs have another size or are missing.

    >>> import torch
    >>> from pyro_ssm.emissions import LinearNormal
    >>> emission = LinearNormal(state_dim=2, obs_dim=3, matrix=torch.ones(3, 2))
    >>> emission(torch.ones(4, 2), torch.arange(4.0), None).mean[0]
    tensor([2., 2., 2.], grad_fn=<SelectBackward0>)
    """

    def __init__(
        self,
        state_dim: int,
        obs_dim: int,
        input_dim: int = 0,
        covariance: str = "diagonal",
        matrix: Tensor | None = None,
        scale: float | Tensor = 0.5,
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.state_dim = check_size("state_dim", state_dim)
        self.obs_dim = check_size("obs_dim", obs_dim)
        if matrix is None:
            start = torch.randn(obs_dim, state_dim) / state_dim**0.5
        else:
            start = torch.as_tensor(matrix).to(torch.get_default_dtype())
        if start.shape != (obs_dim, state_dim):
            raise ValueError(f"`matrix` must have shape ({obs_dim}, {state_dim}), got {tuple(start.shape)}")
        self._declare(start, input_dim, covariance, scale, floor)

    def forward(self, state: Tensor, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the observations; ``state`` ``(..., time, state)``, ``inputs`` ``(..., time, input)`` or None."""
        check_state(self, state)
        return self._law(state, inputs)

    def affine(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Affine:
        """:math:`(C,\\; D u_k + d,\\; R)`, with a time axis of 1 where it does not vary."""
        return self._affine(inputs, self.obs_dim)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return (
            f"state_dim={self.state_dim}, obs_dim={self.obs_dim}, input_dim={self.input_dim}, "
            f"covariance={self.covariance!r}"
        )
