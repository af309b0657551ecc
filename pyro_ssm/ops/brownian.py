"""Brownian motion on a grid: increments drawn once, the same however often and by whomever they are read."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BrownianPath"]


class BrownianPath:
    """The noise of a stochastic differential equation, as an object: a solver is a function of it.

    .. math:: \\Delta W_k = W(t_{k+1}) - W(t_k) \\sim N(0, (t_{k+1} - t_k) I)

    Schemes that are given the same object see the same noise; :meth:`coarsen` and :meth:`refine` give the *same* path
    on another grid, so that solutions with different steps can be compared path by path.

    Args:
        times: ``(time,)`` or ``(*batch, time)`` float64, increasing.
        increments: ``(*lead, time - 1, noise)``; leading dims broadcast with those of ``times``.
        seed: decides what lies between the times, for solvers that look there; by default drawn from torch's generator.

    Raises:
        ValueError: the number of increments is not one less than that of the times.

    >>> import torch
    >>> from pyro_ssm.ops import BrownianPath
    >>> times = torch.linspace(0, 1, 9, dtype=torch.float64)
    >>> noise = BrownianPath.draw(times, noise_dim=2, shape=(3,), generator=torch.Generator().manual_seed(0))
    >>> noise.increments.shape, noise.coarsen(4).increments.shape
    (torch.Size([3, 8, 2]), torch.Size([3, 2, 2]))
    >>> torch.allclose(noise.refine(5).coarsen(5).increments, noise.increments, atol=1e-6)
    True
    """

    def __init__(self, times: Tensor, increments: Tensor, seed: int | None = None) -> None:
        if increments.dim() < 2 or increments.shape[-2] != times.shape[-1] - 1:
            raise ValueError(
                f"`increments` must have shape (..., {times.shape[-1] - 1}, noise), one less than there are times, "
                f"got {tuple(increments.shape)}"
            )
        self.times, self.increments = times.to(torch.float64), increments
        self.seed = int(torch.randint(2**31 - 1, ())) if seed is None else seed

    @classmethod
    def draw(
        cls,
        times: Tensor,
        noise_dim: int,
        shape: torch.Size | tuple[int, ...] = (),
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> BrownianPath:
        """Increments ``(*shape, time - 1, noise_dim)`` drawn from ``generator`` (default: torch's global one).

        ``shape`` is all leading dims, those of own time grids included.
        """
        size = (*shape, times.shape[-1] - 1, noise_dim)
        normal = torch.randn(size, generator=generator, dtype=dtype, device=device)
        seed = int(torch.randint(2**31 - 1, (), generator=generator, device=None if generator is None else device))
        return cls.of_normal(times, normal, seed)

    @classmethod
    def of_normal(cls, times: Tensor, normal: Tensor, seed: int | None = None) -> BrownianPath:
        """The path with :math:`\\Delta W_k = \\sqrt{\\Delta_k}\\, \\varepsilon_k` of standard normals ``(*lead,
        time - 1, noise)``.
        """
        return cls(times, normal * _gaps(times, normal).sqrt(), seed)

    @property
    def noise_dim(self) -> int:
        """Number of independent Brownian motions."""
        return self.increments.shape[-1]

    @property
    def normal(self) -> Tensor:
        """The increments over the square root of their gaps: standard normals."""
        return self.increments / _gaps(self.times, self.increments).sqrt()

    @property
    def values(self) -> Tensor:
        """:math:`W(t_k) - W(t_1)`, ``(*lead, time, noise)``."""
        first = torch.zeros_like(self.increments[..., :1, :])
        return torch.cat([first, self.increments], -2).cumsum(-2)

    def coarsen(self, n: int) -> BrownianPath:
        """The same path at every n-th time (n must divide the number of gaps)."""
        gaps = self.times.shape[-1] - 1
        if n < 1 or gaps % n:
            raise ValueError(f"`n` must divide the number of gaps, {gaps}, got {n}")
        return BrownianPath(self.times[..., ::n], self.increments.unflatten(-2, (-1, n)).sum(-2), self.seed)

    def refine(self, n: int, *, generator: torch.Generator | None = None) -> BrownianPath:
        """The same path with n - 1 more times in each gap, drawn from the Brownian bridge.

        .. math:: \\delta W_i = \\tfrac1n \\Delta W + \\sqrt{\\delta}\\,(\\varepsilon_i - \\bar\\varepsilon),
            \\qquad \\delta = \\Delta / n
        """
        if n < 1:
            raise ValueError(f"`n` must be at least 1, got {n}")
        whole = self.increments.unsqueeze(-2)
        normal = torch.randn(
            whole.shape[:-2] + (n, self.noise_dim), generator=generator, dtype=whole.dtype, device=whole.device
        )
        short = (_gaps(self.times, whole) / n).unsqueeze(-1)
        increments = whole / n + short.sqrt() * (normal - normal.mean(-2, keepdim=True))
        starts, gaps = self.times[..., :-1, None], self.times.diff(dim=-1).unsqueeze(-1)
        inner = starts + gaps * torch.arange(n, dtype=torch.float64, device=self.times.device) / n
        times = torch.cat([inner.flatten(-2), self.times[..., -1:]], -1)
        return BrownianPath(times, increments.flatten(-3, -2), self.seed)


def _gaps(times: Tensor, like: Tensor) -> Tensor:
    """``(..., time - 1, 1)``, subtracted in float64."""
    return times.to(torch.float64).diff(dim=-1).to(like).unsqueeze(-1)
