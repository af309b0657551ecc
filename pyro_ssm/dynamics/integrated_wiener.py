"""Smooth curves without a level of their own: the Wiener process integrated over and over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._gaussian import with_time
from pyro_ssm.blocks.parameters import positive_parameter
from pyro_ssm.components import Affine, Initial, gap
from pyro_ssm.dynamics.diffuse import DiffuseInitial
from pyro_ssm.dynamics.part import Part
from pyro_ssm.ops import tria

__all__ = ["IntegratedWiener"]


class IntegratedWiener(Part):
    """The ``order`` times integrated Wiener process: a curve whose ``order``-th derivative is a Brownian motion,

    .. math:: d f^{(q)} = s\\, dW, \\qquad z = (f, f', \\dots, f^{(q)}),

    whose law over a gap :math:`\\Delta` is, in closed form,

    .. math::
        \\Phi_{ij} = \\frac{\\Delta^{j - i}}{(j - i)!}, \\qquad
        Q_{ij} = s^2 \\frac{\\Delta^{2 q + 1 - i - j}}{(2 q + 1 - i - j)\\,(q - i)!\\,(q - j)!}.

    Order 1 is the cubic smoothing spline (constant velocity), order 2 constant acceleration. Its square root is exact
    for the shortest gaps. It has no stationary law: the usual start is diffuse.

    Args:
        order: how often the Wiener process is integrated, 0 or more; the state has one coordinate more.
        diffusion: first value of ``diffusion``, the scale s of the driving noise, in f / time^(order + 1/2).
        floor: lower bound of the learnable parameter.

    Parameters: ``diffusion`` ``(1,)``.

    Raises:
        ValueError: ``order`` is negative, or ``diffusion`` does not lie above the floor.

    Source: Wahba (1978), "Improper priors, spline smoothing and the problem of guarding against model errors in
    regression"; Wecker and Ansley (1983), "The signal extraction approach to nonlinear regression and spline
    smoothing".

    >>> import torch
    >>> from pyro_ssm.dynamics import IntegratedWiener
    >>> times = torch.tensor([0.0, 6.0], dtype=torch.float64)
    >>> matrix, offset, root = IntegratedWiener(order=1).affine(times[:-1], times[1:], None)
    >>> matrix, (root @ root.mT).detach()
    (tensor([[[1., 6.],
             [0., 1.]]]), tensor([[[72.0000, 18.0000],
             [18.0000,  6.0000]]]))
    """

    event_dims: ClassVar[Mapping[str, int]] = {"diffusion": 1}
    label = "integrated_wiener"

    def __init__(self, order: int = 1, diffusion: float | Tensor = 1.0, floor: float = 1e-4) -> None:
        super().__init__()
        self.order = check_size("order", order, least=0)
        self.state_dim = n = order + 1
        self.diffusion = positive_parameter("diffusion", diffusion, 1, floor)
        ahead = torch.arange(n) - torch.arange(n).unsqueeze(-1)  # j - i
        self.register_buffer("powers", ahead.clamp(min=0), persistent=False)
        inverse = [[1 / math.factorial(j - i) if j >= i else 0.0 for j in range(n)] for i in range(n)]
        self.register_buffer("taylor", torch.tensor(inverse), persistent=False)
        self.register_buffer("root", _unit_root(order), persistent=False)
        self.register_buffer("orders", torch.arange(order, -1, -1) + 0.5, persistent=False)

    def affine(self, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Affine:
        """:math:`(\\Phi, 0, S)` of each gap."""
        length = gap(time, next_time, self.diffusion).unsqueeze(-1)  # (..., time, 1, 1)
        matrix = length**self.powers * self.taylor.to(length)
        units = length.squeeze(-1) ** self.orders.to(length) * with_time(self.diffusion, 1)
        return Affine(matrix, units.new_zeros(1, self.state_dim), units.unsqueeze(-1) * self.root.to(units))

    def usual_start(self) -> Initial:
        """Diffuse."""
        return DiffuseInitial(self.state_dim)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"order={self.order}, state_dim={self.state_dim}"


def _unit_root(order: int) -> Tensor:
    """The lower square root over a unit gap, ``Q_ij`` above with ``s = 1``.

    Row i of a root that is not triangular: :math:`(1 - x)^{q - i} / (q - i)!` in orthonormal polynomials, which is the
    Cholesky factor of the Hilbert matrix; Q itself would have lost digits by order 5.
    """
    f, n = math.factorial, order + 1
    rows = []
    for i in range(n):
        j = order - i
        rows.append([math.sqrt(2 * k + 1) * f(j) / (f(j - k) * f(j + k + 1)) if k <= j else 0.0 for k in range(n)])
    return tria(torch.tensor(rows, dtype=torch.float64))
