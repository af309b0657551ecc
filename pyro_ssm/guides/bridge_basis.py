"""Functions on [0, 1] that vanish at both ends, with their slopes: how a curve bends between two knots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_ssm.blocks import MLP, linear
from pyro_ssm.blocks._checks import check_size

__all__ = ["DeepKernelBasis", "legendre_basis", "polynomial_basis", "tanh_network"]


def legendre_basis(fraction: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Legendre polynomials :math:`P_i(2 w - 1)` and their slopes in w, each ``(..., size)``.

    >>> import torch
    >>> from pyro_ssm.guides.bridge_basis import legendre_basis
    >>> legendre_basis(torch.tensor(0.5), 3)[0]
    tensor([ 1.0000,  0.0000, -0.5000])
    """
    x, one = 2 * fraction - 1, torch.ones_like(fraction)
    values, slopes = [one, x], [torch.zeros_like(fraction), 2 * one]
    for i in range(1, size - 1):
        values.append(((2 * i + 1) * x * values[i] - i * values[i - 1]) / (i + 1))
        slopes.append(slopes[i - 1] + 2 * (2 * i + 1) * values[i])
    return torch.stack(values[:size], -1), torch.stack(slopes[:size], -1)


def polynomial_basis(fraction: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Bubbles :math:`\\beta_i(w) = 4 w (1 - w) P_i(2 w - 1)`, with Legendre polynomials :math:`P_i`, and their slopes.

    With the straight line between the ends they span all polynomials of degree ``size + 1``.

    Args:
        fraction: w ``(...)``.
        size: how many.

    Returns:
        :math:`\\beta` and :math:`\\beta'`, each ``(..., size)``.

    >>> import torch
    >>> from pyro_ssm.guides.bridge_basis import polynomial_basis
    >>> polynomial_basis(torch.tensor(0.5), 3)[0]
    tensor([ 1.0000,  0.0000, -0.5000])
    """
    (P, slopes), w = legendre_basis(fraction, size), fraction.unsqueeze(-1)
    return 4 * w * (1 - w) * P, 4 * (1 - 2 * w) * P + 4 * w * (1 - w) * slopes


class DeepKernelBasis(PyroModule):
    """Weights of kernel interpolation in a learnt time, pinned to 0 at both ends,

    .. math::
        \\beta(w) = 4 w (1 - w)\\; k(w, W) (k(W, W) + \\lambda I)^{-1}, \\qquad
        k(w, w') = \\exp(-\\tfrac12 |\\phi(w) - \\phi(w')|^2 / \\ell^2),

    for points W spread evenly inside (0, 1) and a network :math:`\\phi`.

    Args:
        size: number of points.
        hidden: hidden layers of the network.
        features: size of its result.

    >>> import torch
    >>> from pyro_ssm.guides.bridge_basis import DeepKernelBasis
    >>> values, slopes = DeepKernelBasis(3)(torch.tensor([0.0, 0.5, 1.0]))
    >>> values.shape, bool((values[::2] == 0).all())
    (torch.Size([3, 3]), True)
    """

    points: Tensor

    def __init__(self, size: int, hidden: int | Sequence[int] = 16, features: int = 4, jitter: float = 1e-4) -> None:
        super().__init__()
        self.size = check_size("size", size)
        self.jitter = jitter
        self.warp = MLP(1, hidden, features, "tanh")
        self.log_length = nn.Parameter(torch.tensor(-1.0))
        self.register_buffer("points", torch.arange(1, size + 1) / (size + 1))

    def forward(self, fraction: Tensor) -> tuple[Tensor, Tensor]:
        """``(...)`` to values and slopes ``(..., size)``."""
        centres, _ = self._time(self.points.to(fraction).unsqueeze(-1))
        gram, _ = self._kernel(centres, centres, centres)
        root = torch.linalg.cholesky(gram + self.jitter * torch.eye(self.size, dtype=gram.dtype, device=gram.device))
        w = fraction.reshape(-1, 1)
        kernel, kernel_slope = (torch.cholesky_solve(k.mT, root).mT for k in self._kernel(*self._time(w), centres))
        values = 4 * w * (1 - w) * kernel
        slopes = 4 * (1 - 2 * w) * kernel + 4 * w * (1 - w) * kernel_slope
        return values.unflatten(0, fraction.shape), slopes.unflatten(0, fraction.shape)

    def _time(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The learnt time, w itself beside the network's features, and its slope."""
        one = torch.ones_like(w)
        value, slope = tanh_network(self.warp, w, one)
        return torch.cat([w, value], -1), torch.cat([one, slope], -1)

    def _kernel(self, time: Tensor, slope: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """k and its slope in w, ``(n, points)``."""
        apart, precision = time.unsqueeze(-2) - centres, (-2 * self.log_length).exp()
        value = torch.exp(-0.5 * precision * apart.square().sum(-1))
        return value, -value * precision * (apart * slope.unsqueeze(-2)).sum(-1)


def tanh_network(network: MLP, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """A network with tanh layers and its derivative along ``slope``."""
    *hidden, last = network.layers
    for layer in hidden:
        x = torch.tanh(layer(x))
        slope = (1 - x.square()) * linear(slope, layer.weight)
    return last(x), linear(slope, last.weight)
