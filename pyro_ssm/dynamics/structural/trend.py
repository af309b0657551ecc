"""A level with a slope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pyro_ssm.dynamics.structural.motion import Motion, diagonal_root, set_damping, set_scale

__all__ = ["Trend"]


class Trend(Motion):
    """The local linear trend: a level that moves by a slope that wanders,

    .. math::
        \\mu_{k+1} &= \\mu_k + \\beta_k + s_\\mu \\varepsilon_k, \\\\
        \\beta_{k+1} &= \\phi \\beta_k + s_\\beta \\eta_k, \\qquad z = (\\mu, \\beta).

    ``level_scale=None`` is the smooth trend (an integrated random walk), ``slope_scale=None`` a random walk with drift,
    both None a straight line; with ``damping`` the slope dies away and forecasts level off.

    Args:
        level_scale: first value of ``level_scale``, in units of the series; None: no such noise.
        slope_scale: first value of ``slope_scale``, in units of the series a step; None: no such noise.
        damping: first value of ``damping`` :math:`\\phi`, between 0 and 1; None: 1.
        floor: lower bound of the learnable scales.

    Parameters: ``level_scale`` ``(1,)``, ``slope_scale`` ``(1,)``, ``damping`` ``(1,)``. The usual start is diffuse.

    Raises:
        ValueError: a scale is not positive, or ``damping`` does not lie between 0 and 1.

    Source: Harvey (1989), "Forecasting, Structural Time Series Models and the Kalman Filter", sections 2.3 and 6.1.

    >>> import torch
    >>> from pyro_ssm.dynamics.structural import Trend
    >>> times = torch.arange(2.0).double()
    >>> Trend(damping=0.5)(torch.tensor([[1.0, 2.0]]), times[:-1], times[1:], None).mean.detach()
    tensor([[3., 1.]])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"level_scale": 1, "slope_scale": 1, "damping": 1}
    label = "trend"
    state_dim = 2

    def __init__(
        self,
        level_scale: float | Tensor | None = 1.0,
        slope_scale: float | Tensor | None = 0.1,
        damping: float | Tensor | None = None,
        floor: float = 1e-6,
    ) -> None:
        super().__init__()
        set_scale(self, "level_scale", level_scale, floor)
        set_scale(self, "slope_scale", slope_scale, floor)
        set_damping(self, "damping", damping)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """``A = ((1, 1), (0, phi))``, ``L = diag(s_mu, s_beta)``."""
        ones = torch.ones_like(self.damping)
        level = torch.cat([ones, ones], -1)
        slope = torch.cat([torch.zeros_like(ones), self.damping], -1)
        return torch.stack([level, slope], -2), diagonal_root(self.level_scale, self.slope_scale)
