"""A law that is known by its draws alone: a function of standard normal noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["SimulatedLaw"]


class SimulatedLaw(TorchDistribution):
    """The law of :math:`x = \\Phi(\\varepsilon)`, :math:`\\varepsilon \\sim N(0, I)`: draws, and no density.

    Args:
        transform: standard normals ``(*lead, noise)`` to values ``(*lead, event)``; lead ends in the batch.
        noise_dim: size of the noise.
        event_dim: size of a value.
        batch_shape: leading dims of a draw.
        like: a tensor of the dtype and device of the noise.
        reason: why there is no density, and what to do; ends the error of ``log_prob``.

    Raises:
        NotImplementedError: ``log_prob``.

    Draws are differentiable in what the transform depends on; noise is torch's.

    >>> import torch
    >>> from pyro_ssm.distributions import SimulatedLaw
    >>> law = SimulatedLaw(lambda e: e.square(), 2, 2, (3,), torch.zeros(1), "Use another.")
    >>> law.rsample((5,)).shape
    torch.Size([5, 3, 2])
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = True

    def __init__(
        self,
        transform: Callable[[Tensor], Tensor],
        noise_dim: int,
        event_dim: int,
        batch_shape: torch.Size | tuple[int, ...],
        like: Tensor,
        reason: str,
    ) -> None:
        self._transform, self._noise_dim, self._like, self._reason = transform, noise_dim, like, reason
        super().__init__(torch.Size(batch_shape), torch.Size([event_dim]), validate_args=False)

    @property
    def support(self) -> Any:  # type: ignore[override]
        """Real vectors."""
        return constraints.independent(constraints.real, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SimulatedLaw:
        return SimulatedLaw(
            self._transform, self._noise_dim, self.event_shape[0], torch.Size(batch_shape), self._like, self._reason
        )

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        noise = torch.randn(shape + (self._noise_dim,), dtype=self._like.dtype, device=self._like.device)
        return self._transform(noise).expand(shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError(f"this law can be drawn from, but has no density: {self._reason}")
