"""A pattern that comes back every period."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.dynamics.structural.motion import Motion, set_scale

__all__ = ["Seasonal"]


class Seasonal(Motion):
    """A seasonal pattern that may change slowly, in dummy or in trigonometric form.

    Dummy form (``harmonics=None``): the effects of a whole period add up to noise,

    .. math:: \\gamma_{k+1} = -\\sum_{j=1}^{m-1} \\gamma_{k+1-j} + s\\, \\varepsilon_k,

    with state :math:`(\\gamma_k, \\dots, \\gamma_{k-m+2})`. Trigonometric form: a sum of waves, each a rotation by
    :math:`\\lambda_j = 2 \\pi j / m` with noise on both its coordinates,

    .. math::
        \\gamma_k = \\sum_{j=1}^{h} \\gamma_{j,k}, \\qquad
        \\begin{pmatrix} \\gamma_{j,k+1} \\\\ \\gamma^*_{j,k+1} \\end{pmatrix} =
        \\begin{pmatrix} \\cos \\lambda_j & \\sin \\lambda_j \\\\ -\\sin \\lambda_j & \\cos \\lambda_j \\end{pmatrix}
        \\begin{pmatrix} \\gamma_{j,k} \\\\ \\gamma^*_{j,k} \\end{pmatrix} + s\\, \\varepsilon_{j,k},

    where the wave of two steps (:math:`\\lambda = \\pi`) has one coordinate.

    Args:
        period: m, in steps; a whole number in dummy form, any number above 2 in trigonometric form (52.18 weeks).
        harmonics: how many waves, at most ``period / 2``; None: dummy form.
        scale: first value of ``scale`` s, in units of the series; None: a pattern that does not change.
        floor: lower bound of the learnable parameter.

    Parameters: ``scale`` ``(1,)``. The usual start is diffuse.

    Raises:
        ValueError: the period is too short or not whole, or there are too many harmonics.

    Source: Harvey (1989), "Forecasting, Structural Time Series Models and the Kalman Filter", section 2.3.4.

    >>> from pyro_ssm.dynamics.structural import Seasonal
    >>> Seasonal(12).state_dim, Seasonal(12, harmonics=6).state_dim, Seasonal(52.18, harmonics=3).state_dim
    (11, 11, 6)
    """

    event_dims: ClassVar[Mapping[str, int]] = {"scale": 1}
    label = "seasonal"

    def __init__(
        self,
        period: float,
        harmonics: int | None = None,
        scale: float | Tensor | None = 0.1,
        floor: float = 1e-6,
    ) -> None:
        super().__init__()
        self.period, self.harmonics = period, harmonics
        matrix, row = _dummies(period) if harmonics is None else _waves(period, harmonics)
        self.state_dim = len(row)
        self.register_buffer("matrix", matrix, persistent=False)
        self._row = row
        set_scale(self, "scale", scale, floor)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The fixed matrix, and noise in the newest effect or in every coordinate."""
        shaken = torch.ones(self.state_dim, dtype=self.scale.dtype, device=self.scale.device)
        if self.harmonics is None:
            shaken[1:] = 0.0
        return self.matrix.to(self.scale), torch.diag_embed(self.scale * shaken)

    def row(self) -> Tensor:
        """The newest effect, or the first coordinate of every wave."""
        return torch.tensor(self._row)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"period={self.period}, harmonics={self.harmonics}, state_dim={self.state_dim}"


def _dummies(period: float) -> tuple[Tensor, list[float]]:
    if period != int(period) or period < 2:
        raise ValueError(
            f"`period` must be a whole number of at least 2 steps in dummy form, got {period}. "
            "Give `harmonics` for the trigonometric form, which takes any period"
        )
    n = int(period) - 1
    matrix = torch.diag(torch.ones(n - 1, dtype=torch.float64), -1)
    matrix[0] = -1.0
    return matrix, [1.0] + [0.0] * (n - 1)


def _waves(period: float, harmonics: int) -> tuple[Tensor, list[float]]:
    check_size("harmonics", harmonics)
    if not period >= 2:
        raise ValueError(f"`period` must be at least 2 steps, got {period}")
    if 2 * harmonics > period:
        raise ValueError(f"`harmonics` must be at most half the period {period}, got {harmonics}")
    blocks, row = [], []
    for j in range(1, harmonics + 1):
        if 2 * j == period:
            blocks.append(torch.tensor([[-1.0]], dtype=torch.float64))
            row += [1.0]
        else:
            blocks.append(rotation(torch.tensor(2 * math.pi * j / period, dtype=torch.float64)))
            row += [1.0, 0.0]
    return torch.block_diag(*blocks), row


def rotation(angle: Tensor) -> Tensor:
    """``((cos, sin), (-sin, cos))`` of an angle ``(...)``, ``(..., 2, 2)``."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
