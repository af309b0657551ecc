"""Gaussian laws with one event dim, and the affine Gaussian map that transitions and emissions share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pyro import distributions as dist
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_choice, check_size
from pyro_ssm.blocks._conditioning import inputs_of
from pyro_ssm.blocks.linear import linear
from pyro_ssm.blocks.parameters import cholesky_parameter, positive_parameter
from pyro_ssm.components import Affine, AffineGaussian
from pyro_ssm.distributions import DiagonalNormal

__all__ = [
    "AffineNormal",
    "corrected_normal",
    "corrections",
    "diagonal_normal",
    "first_matrix",
    "noise_law",
    "noise_tril",
    "set_noise",
    "with_time",
]

_ONE = math.log(math.expm1(1.0))  # where a softplus is 1


def with_time(value: Tensor, event_dims: int) -> Tensor:
    """``value`` with a time axis of size 1 before its event dims, if it is a plain parameter without one."""
    return value.unsqueeze(0) if value.dim() == event_dims else value


def diagonal_normal(loc: Tensor, scale: Tensor) -> Any:
    """:math:`N(\\text{loc}, \\text{diag}(\\text{scale}^2))` with one event dim."""
    return DiagonalNormal(loc, scale)


def first_matrix(matrix: Tensor | None, shape: tuple[int, int], default: Callable[[], Tensor]) -> Tensor:
    """The first value of a parameter ``matrix``: what the user gave, or ``default()``."""
    start = default() if matrix is None else torch.as_tensor(matrix).to(torch.get_default_dtype())
    if start.shape != shape:
        raise ValueError(f"`matrix` must have shape {shape}, got {tuple(start.shape)}")
    return start


def corrections(outputs: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """A network's outputs ``(..., 2 n)`` as shift and factor of a noise ``(..., n)``: 0 and 1 where they are 0."""
    shift, raw = outputs.chunk(2, -1)
    return shift, floor + (1 - floor) * F.softplus(raw + _ONE)


def corrected_normal(loc: Tensor, scale_tril: Tensor, shift: Tensor, factor: Tensor) -> Any:
    """The law of :math:`\\text{loc} + L e` for :math:`e \\sim N(\\text{shift}, \\text{diag}(\\text{factor}^2))`."""
    loc, scale_tril = loc + linear(shift, scale_tril), scale_tril * factor.unsqueeze(-2)
    return dist.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)


def set_noise(component: Any, size: int, covariance: str, scale: float | Tensor, floor: float) -> None:
    """Give ``component`` its noise: a parameter ``scale`` (diagonal) or ``scale_tril`` (full)."""
    component.covariance = check_choice("covariance", covariance, ("diagonal", "full"))
    if covariance == "full":
        component.scale_tril = cholesky_parameter("scale", scale, size, floor)
    else:
        component.scale = positive_parameter("scale", scale, size, floor)


def noise_law(component: Any, loc: Tensor) -> Any:
    """The Gaussian law around ``loc`` with the component's noise."""
    if component.covariance == "full":
        return dist.MultivariateNormal(loc, scale_tril=component.scale_tril, validate_args=False)
    return diagonal_normal(loc, component.scale)


def noise_tril(component: Any, size: int) -> Tensor:
    """The Cholesky factor ``(..., 1, size, size)`` of the component's noise."""
    if component.covariance == "full":
        return with_time(component.scale_tril, 2)
    return torch.diag_embed(_wide(with_time(component.scale, 1), size))


def _wide(x: Tensor, size: int) -> Tensor:
    """``(..., size)`` of ``(..., size or 1)``."""
    return x if x.shape[-1] == size else x.expand(x.shape[:-1] + (size,))


class AffineNormal(AffineGaussian):
    """Mixin of the components :math:`x \\mapsto N(A x + B u + b, L L^T)` with their parameters and the capability.

    It is the body of ``dynamics.LinearNormal`` and ``emissions.LinearNormal``.
    """

    event_dims: ClassVar[Mapping[str, int]] = {
        "matrix": 2,
        "input_matrix": 2,
        "offset": 1,
        "scale": 1,
        "scale_tril": 2,
    }

    def _declare(
        self, matrix: Tensor, input_dim: int, covariance: str, scale: float | Tensor, floor: float, noise: bool = True
    ) -> None:
        size = matrix.shape[0]
        self.input_dim = check_size("input_dim", input_dim, least=0)
        self.matrix = nn.Parameter(matrix.clone())
        if input_dim:
            self.input_matrix = nn.Parameter(torch.zeros(size, input_dim))
        self.offset = nn.Parameter(torch.zeros(size))
        if noise:
            set_noise(self, size, covariance, scale, floor)

    def _shift(self, inputs: Tensor | None) -> Tensor:
        """:math:`B u + b`, ``(out,)`` or ``(..., time, out)``."""
        u = inputs_of(self, inputs, self.offset)
        return self.offset if u is None else linear(u, self.input_matrix, self.offset)

    def _law(self, x: Tensor, inputs: Tensor | None) -> Any:
        return noise_law(self, linear(x, self.matrix, self._shift(inputs)))

    def _affine(self, inputs: Tensor | None, size: int) -> Affine:
        shift = _wide(with_time(self._shift(inputs), 1), size)
        return Affine(with_time(self.matrix, 2), shift, noise_tril(self, size))
