"""The sinh-arcsinh map: a standard normal variable with location, scale, skewness and weight of tails."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

__all__ = ["SinhArcsinh"]


class SinhArcsinh(Transform):
    """The elementwise map of noise to states

    .. math:: F(\\varepsilon) = m + s \\sinh(\\tau \\operatorname{asinh}\\varepsilon + a),

    which is :math:`m + s \\varepsilon` at :math:`a = 0, \\tau = 1`. Its inverse and its slope are in closed form.

    Args:
        loc: m.
        log_scale: :math:`\\log s`.
        skew: a; a positive one gives a longer right tail.
        log_tail: :math:`\\log \\tau`; a positive one gives heavier tails.

    All have the shape of the noise, or broadcast to it. Differentiable in everything.

    Source: Jones and Pewsey (2009), "Sinh-arcsinh distributions", Biometrika 96, section 2.

    >>> import torch
    >>> from pyro_ssm.distributions import SinhArcsinh
    >>> zero = torch.zeros(1)
    >>> move = SinhArcsinh(zero, zero, 0.5 + zero, zero)
    >>> torch.allclose(move.inv(move(torch.tensor([1.5]))), torch.tensor([1.5]))
    True
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(self, loc: Tensor, log_scale: Tensor, skew: Tensor, log_tail: Tensor) -> None:
        super().__init__()
        self.loc, self.log_scale, self.skew, self.log_tail = loc, log_scale, skew, log_tail

    def __eq__(self, other: object) -> bool:
        names = ("loc", "log_scale", "skew", "log_tail")
        return isinstance(other, SinhArcsinh) and all(getattr(self, n) is getattr(other, n) for n in names)

    def angle(self, noise: Tensor) -> Tensor:
        """:math:`\\tau \\operatorname{asinh} \\varepsilon + a`."""
        return self.log_tail.exp() * noise.asinh() + self.skew

    def slope(self, noise: Tensor) -> Tensor:
        """:math:`F'(\\varepsilon) > 0`."""
        return self.log_abs_det_jacobian(noise, None).exp()

    def curve(self, noise: Tensor) -> Tensor:
        """:math:`F''(\\varepsilon) / F'(\\varepsilon)`."""
        root = (1 + noise.square()).sqrt()
        return self.log_tail.exp() * self.angle(noise).tanh() / root - noise / root.square()

    def score(self, noise: Tensor) -> Tensor:
        """:math:`\\partial_z \\log q(z)` at :math:`z = F(\\varepsilon)`."""
        return -(noise + self.curve(noise)) / self.slope(noise)

    def _call(self, x: Tensor) -> Tensor:
        return self.loc + self.log_scale.exp() * self.angle(x).sinh()

    def _inverse(self, y: Tensor) -> Tensor:
        angle = ((y - self.loc) * (-self.log_scale).exp()).asinh()
        return ((angle - self.skew) * (-self.log_tail).exp()).sinh()

    def log_abs_det_jacobian(self, x: Tensor, y: Any) -> Tensor:
        angle = self.angle(x).abs()
        log_cosh = angle + torch.nn.functional.softplus(-2 * angle) - math.log(2)
        return self.log_scale + self.log_tail + log_cosh - 0.5 * x.square().log1p()
