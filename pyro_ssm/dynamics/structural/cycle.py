"""A wave of no fixed length: the business cycle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_ssm.blocks._gaussian import diagonal_normal
from pyro_ssm.blocks.parameters import positive_parameter
from pyro_ssm.components import Initial
from pyro_ssm.dynamics.diffuse import DiffuseInitial
from pyro_ssm.dynamics.structural.motion import StationaryMotion, diagonal_root, set_damping, set_scale
from pyro_ssm.dynamics.structural.seasonal import rotation

__all__ = ["Cycle"]


class Cycle(StationaryMotion):
    """A stochastic damped cycle: a wave whose amplitude and phase wander,

    .. math::
        \\begin{pmatrix} \\psi_{k+1} \\\\ \\psi^*_{k+1} \\end{pmatrix} = \\rho
        \\begin{pmatrix} \\cos \\lambda & \\sin \\lambda \\\\ -\\sin \\lambda & \\cos \\lambda \\end{pmatrix}
        \\begin{pmatrix} \\psi_k \\\\ \\psi^*_k \\end{pmatrix} + s \\begin{pmatrix} \\kappa_k \\\\ \\kappa^*_k
        \\end{pmatrix}, \\qquad \\lambda = \\frac{2 \\pi}{\\text{period}},

    with stationary variance :math:`s^2 / (1 - \\rho^2)`.

    Args:
        period: first value of ``period``, in steps, above 2.
        damping: first value of ``damping`` :math:`\\rho`, between 0 and 1; None: 1, and a diffuse start.
        scale: first value of ``scale`` s, in units of the series; None: no noise (then the start is diffuse).
        floor: lower bound of the learnable scale.

    Parameters: ``period`` ``(1,)``, ``damping`` ``(1,)``, ``scale`` ``(1,)``. The usual start is stationary.

    Raises:
        ValueError: ``period`` is not above 2, ``damping`` not between 0 and 1, or ``scale`` not positive.

    Source: Harvey (1989), "Forecasting, Structural Time Series Models and the Kalman Filter", section 2.3.3.

    >>> import torch
    >>> from pyro_ssm.dynamics.structural import Cycle
    >>> Cycle(period=20.0, damping=0.6, scale=0.8).stationary()(torch.zeros(1), None).variance.detach()
    tensor([[1., 1.]])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"period": 1, "damping": 1, "scale": 1}
    label = "cycle"
    state_dim = 2

    def __init__(
        self,
        period: float | Tensor = 20.0,
        damping: float | Tensor | None = 0.9,
        scale: float | Tensor | None = 1.0,
        floor: float = 1e-6,
    ) -> None:
        super().__init__()
        self.period = positive_parameter("period", period, 1, 2.0)
        set_damping(self, "damping", damping)
        set_scale(self, "scale", scale, floor)
        self.is_stationary = damping is not None and scale is not None

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A damped rotation, and the same noise in both coordinates."""
        angle = 2 * math.pi / self.period.squeeze(-1)
        return self.damping.unsqueeze(-1) * rotation(angle), diagonal_root(self.scale, self.scale)

    def stationary_law(self, inputs: Tensor | None) -> Any:
        """:math:`N(0, s^2 / (1 - \\rho^2) I)`."""
        if not self.is_stationary:
            raise ValueError("a cycle without damping or noise has no stationary law. Use a diffuse or a normal start")
        scale = self.scale / ((1 - self.damping) * (1 + self.damping)).sqrt()
        scale = scale.expand(scale.shape[:-1] + (2,))
        return diagonal_normal(torch.zeros_like(scale), scale)

    def usual_start(self) -> Initial:
        """Stationary where there is damping and noise, else diffuse."""
        return self.stationary() if self.is_stationary else DiffuseInitial(2)
