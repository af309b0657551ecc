"""The step of a particle filter without a look at the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.noise import Noise
from pyro_ssm.infer.smc.resample import Resampling
from pyro_ssm.infer.smc.step_index import StepIndex, row
from pyro_ssm.infer.smc.stepper import Stepper

__all__ = ["DeviceStepper"]


class DeviceStepper(Stepper):
    """The step of a filter as a function of tensors alone: with the index of the last cloud on the device.

    A step whose index is a tensor makes no choice by anything that is on the device, so that Python does the same at
    every such step.

    >>> import torch
    >>> from pyro_ssm.infer.smc import AncestorResampling, Cloud, FeynmanKac, PseudoRandom
    >>> from pyro_ssm.infer.smc.device_stepper import DeviceStepper
    >>> fk = FeynmanKac(lambda draw, shape: torch.randn(shape), lambda k, x, draw: x, lambda k, previous, x: -x**2, 3)
    >>> stepper = DeviceStepper(fk, 10, AncestorResampling(), 0.5, PseudoRandom())
    >>> first = stepper.init()
    >>> stepper.step(first._replace(cloud=first.cloud._replace(k=torch.tensor([1])))).k
    tensor([2])
    """

    def __init__(
        self, fk: FeynmanKac, num_particles: int, resampling: Resampling, ess_threshold: float, noise: Noise
    ) -> None:
        super().__init__(fk, num_particles, resampling, ess_threshold, noise)
        alive, active = fk.step_mask, fk.active
        if alive is not None and active is not None:
            active = active & alive
        self._masks = alive, alive if active is None else active
        self._all = all(now is None for now in self._alive), all(now is None for now in self._active)
        self.is_idle = False  # whether nobody sees anything at the step, which the host knows beforehand

    @property
    def idle(self) -> list[bool]:
        """At which steps nobody sees anything."""
        return [now is False for now in self._active]

    @property
    def num_alive(self) -> int:
        """The number of steps after which all series have ended."""
        return 1 + max(k for k, now in enumerate(self._alive) if now is not False or k == 0)

    def _conditions(self, k: StepIndex) -> tuple[Any, Any]:
        if not isinstance(k, Tensor):
            return super()._conditions(k)
        alive, active = (None if whole else row(mask, k) for mask, whole in zip(self._masks, self._all, strict=True))
        return alive, False if self.is_idle else active
