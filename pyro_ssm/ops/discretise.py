"""From a diagonal system in continuous time to one step of it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["discretise"]

_SMALL = 1e-2  # below this |x| the series of expm1(x) / x is exact to rounding in float64 after its seventh term


def discretise(x: Tensor, step: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """One step of :math:`\\dot h = A h + B u` as :math:`h' = \\bar a h + w B u`, for :math:`x = \\Delta A`.

    .. math::
        \\text{zoh}&: \\; \\bar a = e^{x}, \\; w = \\Delta \\frac{e^{x} - 1}{x} \\qquad
        \\text{bilinear}: \\; \\bar a = \\frac{1 + x/2}{1 - x/2}, \\; w = \\frac{\\Delta}{1 - x/2} \\\\
        \\text{euler}&: \\; \\bar a = e^{x}, \\; w = \\Delta \\quad \\text{(Mamba's: the input by an Euler step)}

    A step of 0 leaves the state exactly as it is. Differentiable everywhere, at :math:`x = 0` too.

    Args:
        x: :math:`\\Delta A`, real or complex.
        step: :math:`\\Delta`, broadcast against ``x``.
        method: ``"zoh"``, ``"bilinear"`` or ``"euler"``.

    Raises:
        ValueError: an unknown method.

    >>> import torch
    >>> from pyro_ssm.ops.discretise import discretise
    >>> discretise(torch.tensor([-1.0]), torch.tensor([1.0]), "bilinear")
    (tensor([0.3333]), tensor([0.6667]))
    """
    if method == "zoh":
        return x.exp(), step * _expm1_over(x)
    if method == "bilinear":
        below = (1 - x / 2).reciprocal()
        return (1 + x / 2) * below, step * below
    if method == "euler":
        return x.exp(), step
    raise ValueError(f"`method` must be 'zoh', 'bilinear' or 'euler', got {method!r}")


def _expm1_over(x: Tensor) -> Tensor:
    """:math:`(e^x - 1) / x`, 1 at 0."""
    small = x.abs() < _SMALL
    near = torch.where(small, x, torch.zeros_like(x))
    far = torch.where(small, torch.ones_like(x), x)
    series = 1 + near / 7
    for k in (6, 5, 4, 3, 2):
        series = 1 + near / k * series
    return torch.where(small, series, torch.expm1(far) / far)
