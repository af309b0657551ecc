"""The Ornstein-Uhlenbeck process, exact over gaps of any length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._conditioning import check_state, inputs_of
from pyro_ssm.blocks._gaussian import diagonal_normal, with_time
from pyro_ssm.blocks.linear import linear
from pyro_ssm.blocks.parameters import positive_parameter, vector_parameter
from pyro_ssm.components import Affine, AffineGaussian, Transition, gap
from pyro_ssm.dynamics.stationary import Stationary

__all__ = ["OrnsteinUhlenbeck"]

_LEAST_VARIANCE = 1e-20  # only a gap of zero goes below; a root of zero would be a NaN in the gradient


class _Moments(NamedTuple):
    """The law after a gap is ``N(decay * z + shift, scale**2)``; each ``(..., time, state or 1)``."""

    decay: Tensor
    shift: Tensor
    scale: Tensor


class OrnsteinUhlenbeck(Stationary, AffineGaussian, Transition):
    """Mean-reverting motion in continuous time, coordinate by coordinate,

    .. math::
        dz = -r (z - m - B u)\\, dt + q\\, dW,

    whose law over a gap :math:`\\Delta` is exact (inputs are held within a gap), with :math:`m_k = m + B u_k`:

    .. math::
        z_{k+1} \\sim N\\left(m_k + e^{-r \\Delta} (z_k - m_k),\\; \\frac{q^2}{2 r} (1 - e^{-2 r \\Delta})\\right).

    Two gaps in a row are one long gap (Chapman-Kolmogorov), so an unobserved time changes nothing.

    Args:
        state_dim: size of the state.
        input_dim: size of the inputs; 0 ignores them.
        rate: first value of ``rate``, in 1 / time.
        mean: first value of ``mean``.
        diffusion: first value of ``diffusion``, in state / sqrt(time).
        floor: lower bound of the learnable ``rate`` and ``diffusion``.

    Parameters: ``rate`` ``(state,)``, ``mean`` ``(state,)``, ``diffusion`` ``(state,)``, ``input_matrix``
    ``(state, input)`` (from zero). A prior over a scalar stands for all coordinates.

    Raises:
        ValueError: a size is wrong; or, when called, the state or inputs have another size or are missing.

    Source: Uhlenbeck and Ornstein (1930), "On the theory of the Brownian motion", equations 8 and 9 for the velocity.

    >>> import torch
    >>> from pyro_ssm.dynamics import OrnsteinUhlenbeck
    >>> times = torch.tensor([0.0, 0.5, 1000.0], dtype=torch.float64)
    >>> law = OrnsteinUhlenbeck(state_dim=1)(torch.ones(2, 1), times[:-1], times[1:], None)
    >>> law.mean.detach().squeeze(-1), law.variance.detach().squeeze(-1)
    (tensor([0.6065, 0.0000]), tensor([0.3161, 0.5000]))
    """

    event_dims: ClassVar[Mapping[str, int]] = {"rate": 1, "mean": 1, "diffusion": 1, "input_matrix": 2}

    def __init__(
        self,
        state_dim: int,
        input_dim: int = 0,
        rate: float | Tensor = 1.0,
        mean: float | Tensor = 0.0,
        diffusion: float | Tensor = 1.0,
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.state_dim = check_size("state_dim", state_dim)
        self.input_dim = check_size("input_dim", input_dim, least=0)
        self.rate = positive_parameter("rate", rate, state_dim, floor)
        self.mean = vector_parameter("mean", mean, state_dim)
        self.diffusion = positive_parameter("diffusion", diffusion, state_dim, floor)
        if input_dim:
            self.input_matrix = nn.Parameter(torch.zeros(state_dim, input_dim))

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Any:
        """The law of the next states; ``state`` ``(..., time, state)``, ``inputs`` ``(..., time, input)`` or None."""
        check_state(self, state)
        decay, shift, scale = self._moments(gap(time, next_time, state), inputs)
        return diagonal_normal(decay * state + shift, scale)

    def affine(self, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Affine:
        """The law above as matrices: decay, :math:`(1 - e^{-r \\Delta}) m_k`, and standard deviations."""
        decay, shift, scale = (self._full(moment) for moment in self._moments(gap(time, next_time, self.mean), inputs))
        return Affine(torch.diag_embed(decay), shift, torch.diag_embed(scale))

    def stationary_law(self, inputs: Tensor | None) -> Any:
        """:math:`N(m + B u, q^2 / 2 r)`, ``(..., state)``."""
        loc = self._mean_level(inputs)
        return diagonal_normal(loc.expand(loc.shape[:-1] + (self.state_dim,)), self._stationary_variance().sqrt())

    def _moments(self, gap: Tensor, inputs: Tensor | None) -> _Moments:
        rate = self.rate
        shift = -torch.expm1(-rate * gap) * self._mean_level(inputs)  # expm1: right for short gaps
        variance = self._stationary_variance() * -torch.expm1(-2 * rate * gap)
        return _Moments(torch.exp(-rate * gap), shift, variance.clamp(min=_LEAST_VARIANCE).sqrt())

    def _mean_level(self, inputs: Tensor | None) -> Tensor:
        """:math:`m + B u`, ``(state,)`` or ``(..., time, state)``."""
        u = inputs_of(self, inputs, self.mean)
        return self.mean if u is None else linear(u, self.input_matrix, self.mean)

    def _stationary_variance(self) -> Tensor:
        return self.diffusion**2 / (2 * self.rate)

    def _full(self, value: Tensor) -> Tensor:
        """``value`` with a time axis and all coordinates."""
        value = with_time(value, 1)
        return value.expand(value.shape[:-1] + (self.state_dim,))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"state_dim={self.state_dim}, input_dim={self.input_dim}"
