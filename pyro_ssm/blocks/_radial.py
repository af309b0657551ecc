"""A linear map plus radial basis functions, with Gaussian noise: the body of two components."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pyro.nn import PyroParam
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._conditioning import check_state, inputs_of
from pyro_ssm.blocks._gaussian import noise_law, set_noise
from pyro_ssm.blocks.linear import linear
from pyro_ssm.blocks.parameters import SoftplusAbove
from pyro_ssm.components import Gaussian
from pyro_ssm.ops import radial_basis

__all__ = ["RadialNormal"]


class RadialNormal(Gaussian):
    """Mixin of the components :math:`x \\mapsto N(A x + V \\rho(x) + B u + b, L L^T)` with their parameters."""

    width: Any  # a tensor, when it is read
    event_dims: ClassVar[Mapping[str, int]] = {
        "matrix": 2,
        "weights": 2,
        "centers": 2,
        "width": 2,
        "input_matrix": 2,
        "offset": 1,
        "scale": 1,
        "scale_tril": 2,
    }

    def _declare(
        self,
        matrix: Tensor,
        centers: Tensor,
        width: float | Tensor,
        input_dim: int,
        covariance: str,
        scale: float | Tensor,
        floor: float,
    ) -> None:
        rows, state_dim = matrix.shape
        centers = torch.as_tensor(centers).to(torch.get_default_dtype()).detach()
        if centers.dim() != 2 or centers.shape[-1] != state_dim or len(centers) == 0:
            raise ValueError(
                f"`centers` must have shape (number of centres, {state_dim}), one row a centre, "
                f"got {tuple(centers.shape)}"
            )
        width = torch.as_tensor(width, dtype=centers.dtype).detach()
        try:
            width = width.expand(centers.shape)
        except RuntimeError:
            raise ValueError(
                f"`width` must be a number or broadcast to {tuple(centers.shape)}, got shape {tuple(width.shape)}"
            ) from None
        self.input_dim = check_size("input_dim", input_dim, least=0)
        self.matrix = nn.Parameter(matrix.clone())
        self.weights = nn.Parameter(torch.zeros(rows, len(centers)))
        self.centers = nn.Parameter(centers.clone())
        if not bool((width > floor).all()):
            raise ValueError(f"`width` must lie above the floor {floor}, got {float(width.min())}")
        self.width = PyroParam(width.clone(), constraint=SoftplusAbove(floor), event_dim=2)
        if input_dim:
            self.input_matrix = nn.Parameter(torch.zeros(rows, input_dim))
        self.offset = nn.Parameter(torch.zeros(rows))
        set_noise(self, rows, covariance, scale, floor)

    def _law(self, state: Tensor, inputs: Tensor | None) -> Any:
        check_state(self, state)
        u = inputs_of(self, inputs, self.offset)
        loc = linear(state, self.matrix, self.offset)
        loc = loc + linear(radial_basis(state, self.centers, self.width), self.weights)
        return noise_law(self, loc if u is None else loc + linear(u, self.input_matrix))
