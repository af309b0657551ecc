"""Weighted moments of the cloud after each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.infer.smc.collectors.base import Collector
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.stepper import Step

__all__ = ["FilteredMoments", "Moments", "weighted_mean"]


class FilteredMoments(NamedTuple):
    """What :class:`Moments` finds.

    >>> from pyro_ssm.infer.smc import FilteredMoments
    >>> FilteredMoments._fields
    ('mean', 'covariance')
    """

    mean: Tensor  # (*batch, time, m)
    covariance: Tensor  # (*batch, time, m, m)

    @property
    def variance(self) -> Tensor:
        """``(*batch, time, m)``."""
        return self.covariance.diagonal(dim1=-2, dim2=-1)


def weighted_mean(weights: Tensor, values: Tensor) -> Tensor:
    """:math:`\\sum_n W_n f(x_n)`; weights ``(N, *batch)``, values ``(N, *batch, m)``, result ``(*batch, m)``.

    >>> import torch
    >>> from pyro_ssm.infer.smc.collectors.moments import weighted_mean
    >>> weighted_mean(torch.tensor([0.25, 0.75]), torch.tensor([[0.0], [4.0]]))
    tensor([3.])
    """
    return (weights.unsqueeze(-1) * values).sum(0)


class Moments(Collector):
    """Mean and covariance of the filter, :math:`E[f(x_k) \\mid y_{\\le k}]`.

    Args:
        function: f, ``particles -> (N, *batch, m)``; default the state.
        name: of the result.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> fk = ssm.infer.bootstrap(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> found = ssm.infer.particle_filter(fk, 100, collectors=[ssm.infer.smc.Moments()]).collected["moments"]
    >>> found.mean.shape, found.covariance.shape
    (torch.Size([3, 4, 2]), torch.Size([3, 4, 2, 2]))
    """

    def __init__(self, function: Callable[[Any], Tensor] | None = None, name: str = "moments") -> None:
        self.function, self.name = function, name

    def start(self, fk: FeynmanKac, num_particles: int) -> None:
        self._of = self.function or fk.state
        self._means: list[Tensor] = []
        self._covariances: list[Tensor] = []

    def collect(self, step: Step) -> None:
        values = self._of(step.cloud.particles)
        mean = weighted_mean(step.weights, values)
        centred = values - mean
        weighed = step.weights.unsqueeze(-1) * centred
        self._means.append(mean)
        self._covariances.append(torch.einsum("n...i,n...j->...ij", weighed, centred))

    def result(self) -> FilteredMoments:
        return FilteredMoments(torch.stack(self._means, -2), torch.stack(self._covariances, -3))
