"""White noise as a state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_ssm.blocks._gaussian import diagonal_normal
from pyro_ssm.dynamics.structural.motion import StationaryMotion, diagonal_root, set_scale

__all__ = ["Irregular"]


class Irregular(StationaryMotion):
    """White noise that belongs to the series itself,

    .. math:: x_{k+1} = s\\, \\varepsilon_k.

    Unlike the ``noise`` of an observation it is part of what is summed up where a value is the sum or the mean over a
    period (:class:`Aggregate`), and of what ``predict.decompose`` reads off.

    Args:
        scale: first value of ``scale`` s, in units of the series.
        floor: lower bound of the learnable parameter.

    Parameters: ``scale`` ``(1,)``. The usual start is stationary.

    >>> import torch
    >>> from pyro_ssm.dynamics.structural import Irregular
    >>> times = torch.arange(2.0).double()
    >>> Irregular(scale=3.0)(torch.ones(1, 1), times[:-1], times[1:], None).mean
    tensor([[0.]])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"scale": 1}
    label = "irregular"
    state_dim = 1

    def __init__(self, scale: float | Tensor = 1.0, floor: float = 1e-6) -> None:
        super().__init__()
        set_scale(self, "scale", scale, floor)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """``A = 0``, ``L = s``."""
        return torch.zeros_like(self.scale).unsqueeze(-1), diagonal_root(self.scale)

    def stationary_law(self, inputs: Tensor | None) -> Any:
        """:math:`N(0, s^2)`."""
        return diagonal_normal(torch.zeros_like(self.scale), self.scale)
