"""A level that wanders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pyro_ssm.dynamics.structural.motion import Motion, diagonal_root, set_scale

__all__ = ["Level"]


class Level(Motion):
    """A random walk: with noise on top, the local level model,

    .. math:: \\mu_{k+1} = \\mu_k + s\\, \\varepsilon_k.

    Args:
        scale: first value of ``scale`` s, in units of the series; None: a constant level.
        floor: lower bound of the learnable parameter.

    Parameters: ``scale`` ``(1,)``. The usual start is diffuse.

    Source: Harvey (1989), "Forecasting, Structural Time Series Models and the Kalman Filter", section 2.3.

    >>> import torch
    >>> from pyro_ssm.dynamics.structural import Level
    >>> times = torch.arange(3.0).double()
    >>> Level(scale=2.0)(torch.ones(2, 1), times[:-1], times[1:], None).variance.detach().squeeze(-1)
    tensor([4., 4.])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"scale": 1}
    label = "level"
    state_dim = 1

    def __init__(self, scale: float | Tensor | None = 1.0, floor: float = 1e-6) -> None:
        super().__init__()
        set_scale(self, "scale", scale, floor)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """``A = 1``, ``L = s``."""
        return torch.ones_like(self.scale).unsqueeze(-1), diagonal_root(self.scale)
