"""Weighted quantiles of the cloud after each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.infer.smc.collectors.base import Collector
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.stepper import Step

__all__ = ["Quantiles", "weighted_quantiles"]


def weighted_quantiles(values: Tensor, weights: Tensor, levels: Sequence[float]) -> Tensor:
    """The least value whose cumulative weight reaches each level.

    .. math:: \\min\\{x : \\sum_n W_n 1[x_n \\le x] \\ge q\\}

    Args:
        values: ``(N, *batch, m)``.
        weights: ``(N, *batch)``, summing to 1.
        levels: in [0, 1].

    Returns:
        ``(levels, *batch, m)``.

    >>> import torch
    >>> from pyro_ssm.infer.smc.collectors.quantiles import weighted_quantiles
    >>> weighted_quantiles(torch.tensor([[3.0], [1.0], [2.0]]), torch.tensor([0.2, 0.5, 0.3]), [0.5, 0.7])
    tensor([[1.],
            [2.]])
    """
    ordered, order = values.sort(0)
    cumulative = weights.unsqueeze(-1).expand(values.shape).gather(0, order).cumsum(0, dtype=torch.float64)
    cumulative = cumulative / cumulative[-1:]
    # a hair below the level, so that rounding of equal weights does not skip a value
    places = [(cumulative < level - 1e-7 * level * (1 - level)).sum(0, keepdim=True) for level in levels]
    return ordered.gather(0, torch.cat(places).clamp(max=len(values) - 1))


class Quantiles(Collector):
    """Quantiles of the filter, coordinate by coordinate: ``(levels, *batch, time, m)``.

    Args:
        levels: in [0, 1].
        function: ``particles -> (N, *batch, m)``; default the state.
        name: of the result.

    Raises:
        TypeError: ``levels`` is no list.
        ValueError: a level outside [0, 1], or none at all.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> fk = ssm.infer.bootstrap(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> bands = ssm.infer.smc.Quantiles([0.05, 0.95])
    >>> ssm.infer.particle_filter(fk, 100, collectors=[bands]).collected["quantiles"].shape
    torch.Size([2, 3, 4, 2])
    """

    def __init__(
        self,
        levels: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95),
        function: Callable[[Any], Tensor] | None = None,
        name: str = "quantiles",
    ) -> None:
        if not isinstance(levels, Sequence) or isinstance(levels, str):
            raise TypeError(
                f"`levels` must be a list of numbers in [0, 1], got {levels!r}. Give Quantiles([0.05, 0.95])"
            )
        if not levels or not all(0 <= level <= 1 for level in levels):
            raise ValueError(f"`levels` must be numbers in [0, 1], and at least one, got {list(levels)}")
        self.levels, self.function, self.name = tuple(levels), function, name

    def start(self, fk: FeynmanKac, num_particles: int) -> None:
        self._of = self.function or fk.state
        self._found: list[Tensor] = []

    def collect(self, step: Step) -> None:
        self._found.append(weighted_quantiles(self._of(step.cloud.particles), step.weights, self.levels))

    def result(self) -> Tensor:
        return torch.stack(self._found, -2)
