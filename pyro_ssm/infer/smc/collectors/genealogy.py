"""The genealogy: all clouds and who descends from whom."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.infer.smc.collectors.base import Collector
from pyro_ssm.infer.smc.collectors.fixed_lag import require_ancestors
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.stepper import Cloud, Step
from pyro_ssm.infer.smc.tree import take
from pyro_ssm.ops.resampling import systematic

__all__ = ["Ancestry", "Genealogy"]


class Ancestry(NamedTuple):
    """What :class:`Genealogy` keeps: every cloud, and each particle's ancestor in the cloud before.

    >>> from pyro_ssm.infer.smc import Ancestry
    >>> Ancestry._fields
    ('clouds', 'ancestors', 'states')
    """

    clouds: list[Cloud]  # T of them
    ancestors: list[Tensor | None]  # int64 (N, *batch), of step k in step k - 1; None: each its own (and at the first)
    states: Tensor  # (time, N, *batch, state)

    def paths(self) -> Tensor:
        """The ancestral path of each final particle, ``(N, *batch, time, state)``; weigh by the last cloud's weights.

        Early states of different paths coincide: those of few particles survive.
        """
        return self.trace(None)

    def sample_paths(self, num_samples: int) -> Tensor:
        """Equally weighted draws of ancestral paths, ``(num_samples, *batch, time, state)``, systematic in the weights.

        Raises:
            ValueError: more than N draws, or fewer than 1.
        """
        weights = self.clouds[-1].weights
        if not 1 <= num_samples <= len(weights):
            raise ValueError(f"`num_samples` must be between 1 and the {len(weights)} particles, got {num_samples}")
        shift = torch.rand((1,) + weights.shape[1:], dtype=torch.float64, device=weights.device)
        chosen = systematic(weights, shift)
        shuffled = torch.rand(chosen.shape, device=weights.device).argsort(0)[:num_samples]
        return self.trace(chosen.gather(0, shuffled))

    def trace(self, last: Tensor | None) -> Tensor:
        """The ancestral paths of given particles of the last cloud, int64 ``(M, *batch)``; None: of all, in order."""
        batch = self.clouds[-1].log_weights.shape[1:]
        line, path = last, []
        for k in range(len(self.states) - 1, -1, -1):
            path.append(self.states[k] if line is None else take(self.states[k], line, batch))
            if self.ancestors[k] is not None:
                line = self.ancestors[k] if line is None else take(self.ancestors[k], line, batch)
        return torch.stack(path[::-1], -2)


class Genealogy(Collector):
    """Keeps every cloud and its ancestors: memory grows with time.

    Gives paths (:meth:`Ancestry.paths`), and to backward smoothers what they need.

    Args:
        name: of the result.

    Raises:
        ValueError: in a run, a resampling without ancestors.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> fk = ssm.infer.bootstrap(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> found = ssm.infer.particle_filter(fk, 100, collectors=[ssm.infer.smc.Genealogy()]).collected["genealogy"]
    >>> found.paths().shape, found.sample_paths(7).shape
    (torch.Size([100, 3, 4, 2]), torch.Size([7, 3, 4, 2]))
    """

    def __init__(self, name: str = "genealogy") -> None:
        self.name = name

    def start(self, fk: FeynmanKac, num_particles: int) -> None:
        self._state: Any = fk.state
        self._clouds: list[Cloud] = []
        self._ancestors: list[Tensor | None] = []

    def collect(self, step: Step) -> None:
        require_ancestors(self, step)
        self._clouds.append(step.cloud)
        self._ancestors.append(step.ancestors if len(self._ancestors) else None)

    def result(self) -> Ancestry:
        states = torch.stack([self._state(cloud.particles) for cloud in self._clouds])
        return Ancestry(self._clouds, self._ancestors, states)
