"""The law of a state at a time as a moving map of noise: what a posterior equation is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from pyro.distributions import MultivariateNormal, TransformedDistribution
from torch import Tensor

from pyro_ssm.blocks._gaussian import diagonal_normal
from pyro_ssm.distributions import SinhArcsinh
from pyro_ssm.ops.kalman import matvec

__all__ = ["AbstractMarginal", "DiagonalMarginal", "FullMarginal", "Motion", "SinhArcsinhMarginal"]


class Motion(NamedTuple):
    """A state :math:`z = F_t(\\varepsilon)`, its velocity :math:`\\partial_t F_t(\\varepsilon)` at fixed noise, and the
    score :math:`\\nabla \\log q_t(z)`; each ``(..., time, state)``.

    >>> from pyro_ssm.guides.marginals import Motion
    >>> Motion._fields
    ('state', 'velocity', 'score')
    """

    state: Tensor
    velocity: Tensor
    score: Tensor


class AbstractMarginal(ABC):
    """The laws :math:`z_t = F_t(\\varepsilon)`, :math:`\\varepsilon \\sim N(0, I)`, at some times, and how they move.

    The probability flows with the velocity :math:`\\partial_t F`; the equation with diffusion g that has these very
    marginals is :math:`dz = (\\partial_t F + \\tfrac12 \\nabla \\cdot g g^T + \\tfrac12 g g^T \\nabla \\log q_t)\\, dt
    + g\\, dW`.

    >>> from pyro_ssm.guides.marginals import AbstractMarginal, DiagonalMarginal
    >>> issubclass(DiagonalMarginal, AbstractMarginal)
    True
    """

    @abstractmethod
    def motion(self, noise: Tensor) -> Motion:
        """State, velocity and score for noise ``(..., time, state)``."""

    @abstractmethod
    def law(self) -> Any:
        """The laws themselves, batch ``(..., time)``, event ``(state,)``."""


class DiagonalMarginal(AbstractMarginal):
    """:math:`z = m_t + s_t \\odot \\varepsilon`.

    Args:
        value: m and :math:`\\log s` side by side, ``(..., time, 2 state)``.
        rate: their time derivatives.

    >>> import torch
    >>> from pyro_ssm.guides.marginals import DiagonalMarginal
    >>> marginal = DiagonalMarginal(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 2.0]]))
    >>> marginal.motion(torch.tensor([[3.0]]))
    Motion(state=tensor([[4.]]), velocity=tensor([[6.5000]]), score=tensor([[-3.]]))
    """

    def __init__(self, value: Tensor, rate: Tensor) -> None:
        self.loc, self.log_scale = value.chunk(2, -1)
        self._rates = rate.chunk(2, -1)
        self.scale = self.log_scale.exp()

    @staticmethod
    def width(state_dim: int) -> int:
        """How many numbers describe one marginal."""
        return 2 * state_dim

    def motion(self, noise: Tensor) -> Motion:
        loc_rate, log_scale_rate = self._rates
        spread = self.scale * noise
        return Motion(self.loc + spread, loc_rate + log_scale_rate * spread, -noise / self.scale)

    def state(self, noise: Tensor) -> Tensor:
        """:math:`F(\\varepsilon)`."""
        return self.loc + self.scale * noise

    def slope(self, noise: Tensor) -> Tensor:
        """:math:`F'(\\varepsilon)`."""
        return self.scale

    def noise_of(self, state: Tensor) -> Tensor:
        """:math:`F^{-1}(z)`."""
        return (state - self.loc) / self.scale

    def near(self, noise: Tensor, spread: Tensor) -> Any:
        """The law of z for :math:`\\varepsilon \\sim N(\\text{noise}, \\text{spread}^2)`."""
        return diagonal_normal(self.state(noise), self.scale * spread)

    def law(self) -> Any:
        return diagonal_normal(self.loc, self.scale)


class FullMarginal(AbstractMarginal):
    """:math:`z = m_t + L_t R_t \\varepsilon`, where the rotation R turns with the antisymmetric speed W,

    .. math:: \\partial_t F = \\dot m + (\\dot L + L W)\\, \\varepsilon \\quad\\text{(in the frame where } R = I).

    R changes no marginal and is what a family of marginals leaves open of the equation: with it, all linear equations
    are reached.

    Args:
        value: m, the logarithm of the diagonal of L, its lower part, and the lower part of W.
        rate: their time derivatives.

    >>> import torch
    >>> from pyro_ssm.guides.marginals import FullMarginal
    >>> FullMarginal(torch.zeros(1, 6), torch.zeros(1, 6)).motion(torch.ones(1, 2)).score
    tensor([[-1., -1.]])
    """

    def __init__(self, value: Tensor, rate: Tensor) -> None:
        n = next(d for d in range(1, value.shape[-1] + 1) if self.width(d) == value.shape[-1])
        sizes = [n, n, n * (n - 1) // 2, n * (n - 1) // 2]
        self.loc, log_diagonal, lower, spin = value.split(sizes, -1)
        self._loc_rate, log_diagonal_rate, lower_rate, _ = rate.split(sizes, -1)
        self.scale = log_diagonal.exp()
        self.scale_tril = _lower(lower, n) + self.scale.diag_embed()
        self._tril_rate = _lower(lower_rate, n) + (log_diagonal_rate * self.scale).diag_embed()
        half = _lower(spin, n)
        self.spin = half - half.mT

    @staticmethod
    def width(state_dim: int) -> int:
        """How many numbers describe one marginal."""
        return state_dim * (state_dim + 1)

    def motion(self, noise: Tensor) -> Motion:
        velocity = self._loc_rate + matvec(self._tril_rate + self.scale_tril @ self.spin, noise)
        return Motion(self.loc + matvec(self.scale_tril, noise), velocity, -self.whiten(noise, transpose=True))

    def whiten(self, vector: Tensor, transpose: bool = False) -> Tensor:
        """:math:`L^{-1} x`, or :math:`L^{-T} x`."""
        root = self.scale_tril.mT if transpose else self.scale_tril
        lead = torch.broadcast_shapes(root.shape[:-2], vector.shape[:-1])
        root, column = root.expand(lead + root.shape[-2:]), vector.expand(lead + vector.shape[-1:]).unsqueeze(-1)
        return torch.linalg.solve_triangular(root, column, upper=transpose).squeeze(-1)

    def law(self) -> Any:
        return MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False)


class SinhArcsinhMarginal(AbstractMarginal):
    """:math:`z = m_t + s_t \\sinh(\\tau_t \\operatorname{asinh}\\varepsilon + a_t)`: skewed, with tails.

    Args:
        value: m, :math:`\\log s`, a and :math:`\\log \\tau` side by side, ``(..., time, 4 state)``.
        rate: their time derivatives.

    Source: Jones and Pewsey (2009), "Sinh-arcsinh distributions".

    >>> import torch
    >>> from pyro_ssm.guides.marginals import SinhArcsinhMarginal
    >>> SinhArcsinhMarginal(torch.zeros(1, 4), torch.zeros(1, 4)).motion(torch.ones(1, 1)).state
    tensor([[1.]])
    """

    def __init__(self, value: Tensor, rate: Tensor) -> None:
        self.map = SinhArcsinh(*value.chunk(4, -1))
        self._rates = rate.chunk(4, -1)

    @staticmethod
    def width(state_dim: int) -> int:
        """How many numbers describe one marginal."""
        return 4 * state_dim

    def motion(self, noise: Tensor) -> Motion:
        loc_rate, log_scale_rate, skew_rate, log_tail_rate = self._rates
        angle, scale = self.map.angle(noise), self.map.log_scale.exp()
        turned = skew_rate + log_tail_rate * (angle - self.map.skew)
        spread = scale * angle.sinh()
        velocity = loc_rate + log_scale_rate * spread + scale * angle.cosh() * turned
        return Motion(self.map.loc + spread, velocity, self.map.score(noise))

    def state(self, noise: Tensor) -> Tensor:
        """:math:`F(\\varepsilon)`."""
        return self.map(noise)

    def slope(self, noise: Tensor) -> Tensor:
        """:math:`F'(\\varepsilon)`."""
        return self.map.slope(noise)

    def noise_of(self, state: Tensor) -> Tensor:
        """:math:`F^{-1}(z)`."""
        return self.map.inv(state)

    def law(self) -> Any:
        noise = diagonal_normal(torch.zeros_like(self.map.loc), torch.ones_like(self.map.loc))
        return TransformedDistribution(noise, [self.map], validate_args=False)

    def near(self, noise: Tensor, spread: Tensor) -> Any:
        """The normal law of z for :math:`\\varepsilon \\sim N(\\text{noise}, \\text{spread}^2)`, a small spread: the
        linear part of F, and Itô's correction of the mean.

        The law of F itself has a skewness that does not belong to an Euler step: over a path it would cost the bound a
        constant however fine the grid.
        """
        scale = self.map.slope(noise) * spread
        return diagonal_normal(self.map(noise) + 0.5 * self.map.curve(noise) * scale * spread, scale)


def _lower(entries: Tensor, n: int) -> Tensor:
    """Entries of the strictly lower triangle ``(..., n (n - 1) / 2)`` as a matrix."""
    row, column = torch.tril_indices(n, n, -1, device=entries.device)
    flat = entries.new_zeros(entries.shape[:-1] + (n * n,))
    return flat.index_copy(-1, row * n + column, entries).unflatten(-1, (n, n))
