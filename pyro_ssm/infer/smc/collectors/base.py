"""What collectors have in common."""

from __future__ import annotations

from typing import Any

from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.stepper import Step

__all__ = ["Collector"]


class Collector:
    """Something recorded along a run of :func:`~pyro_ssm.infer.particle_filter`, which knows nothing of it.

    A subclass sets ``name``, the key of its result, and defines ``start`` (which forgets an earlier run), ``collect``,
    called after each step, and ``result``.

    >>> import torch
    >>> from pyro_ssm.infer.smc import Collector, FeynmanKac
    >>> from pyro_ssm.infer import particle_filter
    >>> class Largest(Collector):
    ...     name = "largest"
    ...     def start(self, fk, num_particles):
    ...         self.found = []
    ...     def collect(self, step):
    ...         self.found.append(step.weights.max(0).values)
    ...     def result(self):
    ...         return torch.stack(self.found, -1)
    >>> fk = FeynmanKac(lambda draw, shape: torch.randn(shape), lambda k, x, draw: x, lambda k, previous, x: -x**2, 2)
    >>> particle_filter(fk, 10, collectors=[Largest()]).collected["largest"].shape
    torch.Size([2])
    """

    name: str

    def start(self, fk: FeynmanKac, num_particles: int) -> None:
        """Begin a run."""
        raise NotImplementedError(f"{type(self).__name__} must define start(fk, num_particles)")

    def collect(self, step: Step) -> None:
        """Look at the cloud after a step."""
        raise NotImplementedError(f"{type(self).__name__} must define collect(step)")

    def result(self) -> Any:
        """What was found, when the run is over."""
        raise NotImplementedError(f"{type(self).__name__} must define result()")
