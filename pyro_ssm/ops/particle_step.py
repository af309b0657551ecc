"""The compiled step of a filter whose particles move by an affine Gaussian law: weigh, resample, move in one call."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.compiled import library

__all__ = ["ParticleStep", "StepMemory", "particle_step_of"]

_SPARE = 4  # SPARE of csrc/resampling.h
_NAMES = """k n series dim log_weights weights pending total ess potential value density_loc
density_scale value_whole loc_whole scale_whole obs_dim densities active always least_ess resampling uniforms alive
resampled ancestors state noise matrix offset scale own moved"""


class ParticleStep(ctypes.Structure):
    """The fields of ``ParticleStep`` in csrc/particles.h, whose comments say what they are; addresses are integers.

    >>> from pyro_ssm.ops.particle_step import ParticleStep
    >>> ParticleStep(n=5).n
    5
    """

    _fields_ = [(name, ctypes.c_double if name == "least_ess" else ctypes.c_int64) for name in _NAMES.split()]


class StepMemory:
    """What the steps of a run read and write, and the struct that points to it.

    Args:
        num_times: steps of the run.
        shape: ``(N, *batch)``.
        state: ``(..., n)``, shows the size and the dtype of states.

    >>> import torch
    >>> from pyro_ssm.ops.particle_step import StepMemory
    >>> StepMemory(3, torch.Size([4, 2]), torch.zeros(4, 2, 1)).log_weights.exp()[0]
    tensor([0.2500, 0.2500])
    """

    def __init__(self, num_times: int, shape: torch.Size, state: Tensor) -> None:
        num, batch = shape[0], shape[1:]
        self.log_weights = state.new_full(shape, -math.log(num))
        self._weights, self._pending = state.new_empty(shape), state.new_zeros((2, *batch))
        self.total, self.ess = state.new_empty((2, num_times, *batch)).unbind(0)  # (time, *batch)
        self.resampled = torch.zeros((num_times, *batch), dtype=torch.bool)
        self._densities = state.new_empty(shape)
        self._ancestors = torch.empty(shape.numel() + _SPARE, dtype=torch.int32)
        self.struct = ParticleStep(n=num, series=batch.numel(), dim=state.shape[-1])
        for name, x in (
            ("log_weights", self.log_weights),
            ("weights", self._weights),
            ("pending", self._pending),
            ("total", self.total),
            ("ess", self.ess),
            ("resampled", self.resampled),
            ("densities", self._densities),
            ("ancestors", self._ancestors),
        ):
            setattr(self.struct, name, x.data_ptr())


def particle_step_of(dtype: torch.dtype) -> Any:
    """The compiled step, a function of the address of a :class:`ParticleStep`; None where there is none.

    >>> import torch
    >>> from pyro_ssm.ops.compiled import library
    >>> from pyro_ssm.ops.particle_step import particle_step_of
    >>> (particle_step_of(torch.float32) is None) == (library().functions is None), particle_step_of(torch.int64)
    (True, None)
    """
    functions = library().functions
    if functions is None or dtype not in (torch.float32, torch.float64) or torch.compiler.is_compiling():
        return None
    return functions.pyro_ssm_particle_step_f32 if dtype is torch.float32 else functions.pyro_ssm_particle_step_f64
