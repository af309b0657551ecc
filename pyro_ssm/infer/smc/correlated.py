"""The numbers of particle filters that move a little from one run to the next."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_ssm.infer.smc.noise import FixedNoise

__all__ = ["CorrelatedNoise"]


class CorrelatedNoise:
    """All numbers that the particle filters of S members draw from, as standard normals.

    .. math:: u' = \\rho\\, u + \\sqrt{1 - \\rho^2}\\, \\epsilon, \\qquad \\epsilon \\sim N(0, I)

    leaves their law as it is (Crank-Nicolson), and makes the two estimates of the likelihood alike, so that the noise
    of their ratio falls. Resampling should sort particles along Hilbert's curve, or a small move of one particle
    changes all ancestors after it.

    Args:
        normals: ``(time, N, S, *batch, dim)``, for the states.
        levels: ``(time, rows, S, *batch)``, for resampling; as uniforms their distribution function.

    Source: Deligiannidis, Doucet and Pitt (2018), "The correlated pseudo-marginal method", J. R. Statist. Soc. B 80,
    section 2.

    >>> import torch
    >>> from pyro_ssm.infer.smc.correlated import CorrelatedNoise
    >>> noise = CorrelatedNoise.draw((4, 10, 3), 2, 1, torch.float32, torch.device("cpu"))
    >>> near = noise.near(0.99)
    >>> near.normals.shape, bool((near.normals - noise.normals).std() < 0.2)
    (torch.Size([4, 10, 3, 2]), True)
    """

    def __init__(self, normals: Tensor, levels: Tensor) -> None:
        self.normals, self.levels = normals, levels

    @classmethod
    def draw(
        cls, shape: tuple[int, ...], dim: int, rows: int, dtype: torch.dtype, device: torch.device
    ) -> CorrelatedNoise:
        """Independent numbers of ``shape`` ``(time, N, S, *batch)``, for states of ``dim`` numbers."""
        levels = torch.randn((shape[0], rows) + tuple(shape[2:]), dtype=torch.float64, device=device)
        return cls(torch.randn(tuple(shape) + (dim,), dtype=dtype, device=device), levels)

    def near(self, correlation: float) -> CorrelatedNoise:
        """The numbers moved."""
        across = math.sqrt(1 - correlation**2)
        return CorrelatedNoise(
            correlation * self.normals + across * torch.randn_like(self.normals),
            correlation * self.levels + across * torch.randn_like(self.levels),
        )

    def fixed(self) -> FixedNoise:
        """As the noise of a particle filter."""
        return FixedNoise(self.normals, torch.special.ndtr(self.levels).clamp(max=1 - 2.0**-53))

    def take(self, index: Tensor) -> CorrelatedNoise:
        """The numbers of the members ``index``."""
        return CorrelatedNoise(self.normals.index_select(2, index), self.levels.index_select(2, index))

    def where(self, accepted: Tensor, other: CorrelatedNoise) -> CorrelatedNoise:
        """Those of ``other`` where ``accepted`` ``(S,)`` holds."""

        def choose(own: Tensor, others: Tensor) -> Tensor:
            return torch.where(accepted.reshape((1, 1, -1) + (1,) * (own.dim() - 3)), others, own)

        return CorrelatedNoise(choose(self.normals, other.normals), choose(self.levels, other.levels))
