"""The Matérn process: a Gaussian process prior as a linear stochastic differential equation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pyro_ssm.blocks.parameters import positive_parameter
from pyro_ssm.dynamics.linear_sde import LinearSDEProcess

__all__ = ["Matern"]

# nu -> last row of F and L ** 2, in units of lambda and variance; lower square root of the stationary covariance
_ROWS = {0.5: (-1.0,), 1.5: (-1.0, -2.0), 2.5: (-1.0, -3.0, -3.0)}
_DIFFUSION = {0.5: 2.0, 1.5: 4.0, 2.5: 16.0 / 3.0}
_ROOTS = {
    0.5: ((1.0,),),
    1.5: ((1.0, 0.0), (0.0, 1.0)),
    2.5: ((1.0, 0.0, 0.0), (0.0, 3**-0.5, 0.0), (-1.0 / 3.0, 0.0, 8**0.5 / 3.0)),
}


class Matern(LinearSDEProcess):
    """A Gaussian process with a Matérn kernel, as a state-space model: f and its first derivatives,

    .. math::
        k(\\tau) = \\sigma^2 e^{-\\lambda \\tau} \\times \\begin{cases}
        1 & \\nu = 1/2 \\\\ 1 + \\lambda \\tau & \\nu = 3/2 \\\\
        1 + \\lambda \\tau + \\lambda^2 \\tau^2 / 3 & \\nu = 5/2 \\end{cases}
        \\qquad \\lambda = \\frac{\\sqrt{2 \\nu}}{\\ell}

    The state is :math:`(f, f', \\dots)`, ``nu + 1/2`` coordinates; the first is seen. With :meth:`stationary` as its
    start and a Gaussian emission, the Kalman filter's likelihood is that of the dense Gaussian process, at a cost that
    grows linearly with the number of times, however irregular.

    Args:
        nu: smoothness: 0.5 (Ornstein-Uhlenbeck), 1.5 (once differentiable) or 2.5 (twice).
        lengthscale: first value of ``lengthscale``, in time.
        variance: first value of ``variance`` of f.
        floor: lower bound of the learnable parameters.

    Parameters: ``lengthscale`` ``(1,)``, ``variance`` ``(1,)``.

    Raises:
        ValueError: ``nu`` is another number, or a value does not lie above the floor.

    Source: Hartikainen and Särkkä (2010), "Kalman filtering and smoothing solutions to temporal Gaussian process
    regression models"; Särkkä and Solin (2019), "Applied Stochastic Differential Equations", section 12.3.

    >>> import torch
    >>> from pyro_ssm.dynamics import Matern
    >>> gp = Matern(nu=2.5, lengthscale=2.0, variance=3.0)
    >>> gp.stationary()(torch.zeros(1), None).variance.detach()
    tensor([[3.0000, 1.2500, 4.6875]])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"lengthscale": 1, "variance": 1}
    label = "matern"

    def __init__(
        self, nu: float = 1.5, lengthscale: float | Tensor = 1.0, variance: float | Tensor = 1.0, floor: float = 1e-4
    ) -> None:
        super().__init__()
        if nu not in _ROWS:
            raise ValueError(f"`nu` must be one of 0.5, 1.5, 2.5, got {nu}")
        self.nu, self.state_dim = float(nu), len(_ROWS[nu])
        self.lengthscale = positive_parameter("lengthscale", lengthscale, 1, floor)
        self.variance = positive_parameter("variance", variance, 1, floor)

    def system(self) -> tuple[Tensor, Tensor]:
        """The companion matrix of :math:`(d/dt + \\lambda)^{\\nu + 1/2}` and noise in the last coordinate."""
        rate, n = self._rate(), self.state_dim
        powers = torch.cat([rate**j for j in range(n, 0, -1)], -1)
        last = powers * torch.tensor(_ROWS[self.nu], dtype=rate.dtype, device=rate.device)
        shift = torch.diag(rate.new_ones(n - 1), 1)[:-1]
        F = torch.cat([shift.expand(last.shape[:-1] + shift.shape), last.unsqueeze(-2)], -2)
        noise = (_DIFFUSION[self.nu] * self.variance * rate ** (2 * n - 1)).sqrt()
        L = torch.cat([noise.new_zeros(noise.shape[:-1] + (n - 1,)), noise], -1).unsqueeze(-1)
        return F, L

    def stationary_covariance_root(self) -> Tensor:
        """In closed form: the j-th derivative has units :math:`\\sigma \\lambda^j`."""
        rate = self._rate()
        units = self.variance.sqrt() * torch.cat([rate**j for j in range(self.state_dim)], -1)
        return units.unsqueeze(-1) * torch.tensor(_ROOTS[self.nu], dtype=rate.dtype, device=rate.device)

    def _rate(self) -> Tensor:
        return math.sqrt(2 * self.nu) / self.lengthscale

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"nu={self.nu}, state_dim={self.state_dim}"
