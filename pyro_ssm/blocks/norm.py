"""Normalisation over features, whose scale and shift may be drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_choice, check_size

__all__ = ["Norm"]

_EPSILON = 1e-5


class Norm(PyroModule):
    """Layer normalisation, or division by the root mean square, over the last dimension.

    .. math::
        y = g \\odot \\frac{x - \\bar x}{\\sqrt{\\operatorname{var} x + 10^{-5}}} + b \\quad \\text{(layer)}, \\qquad
        y = g \\odot \\frac{x}{\\sqrt{\\overline{x^2} + 10^{-5}}} \\quad \\text{(rms)}

    Args:
        features: size of the last dimension.
        kind: ``"layer"`` or ``"rms"``.

    >>> import torch
    >>> from pyro_ssm.blocks import Norm
    >>> Norm(2, "rms")(torch.tensor([[3.0, -3.0]])).detach()
    tensor([[ 1.0000, -1.0000]])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"weight": 1, "bias": 1}

    def __init__(self, features: int, kind: str = "layer") -> None:
        super().__init__()
        self.features, self.kind = check_size("features", features), check_choice("kind", kind, ("layer", "rms"))
        self.weight = nn.Parameter(torch.ones(features))
        if kind == "layer":
            self.bias = nn.Parameter(torch.zeros(features))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., time, features)``."""
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPSILON) * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self.features}, kind={self.kind!r}"
