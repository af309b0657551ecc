"""The compiled step of a filter whose particles move by diagonal normal laws: weigh, resample, move in one call."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.compiled import library

__all__ = ["ParticleStep", "StepMemory", "particle_step_of"]

_SPARE = 8  # SPARE of csrc/resampling.h
_NAMES = """k n series dim fresh log_weights weights pending total ess potential value density_loc
density_scale value_whole loc_whole scale_whole obs_dim densities active kept_log_weights kept_ancestors always
least_ess resampling uniforms drawn alive resampled ancestors state noise mean matrix offset scale own each_scale moved
seed uniform_seed parallel_for"""


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
        rows: how many uniforms a series needs.

    >>> import torch
    >>> from pyro_ssm.ops.particle_step import StepMemory
    >>> StepMemory(3, torch.Size([4, 2]), torch.zeros(4, 2, 1), 1).total.shape
    torch.Size([3, 2])
    """

    def __init__(self, num_times: int, shape: torch.Size, state: Tensor, rows: int) -> None:
        num, batch = shape[0], shape[1:]
        self.log_weights = state.new_empty(shape)  # equal ones are not written
        self._weights, self._pending = state.new_empty(shape), state.new_zeros((2, *batch))
        self._drawn = torch.empty((rows, *batch), dtype=torch.float64)
        self.total, self.ess = state.new_empty((2, num_times, *batch)).unbind(0)  # (time, *batch)
        self.resampled = torch.zeros((num_times, *batch), dtype=torch.bool)
        self._densities = state.new_empty(shape.numel() + _SPARE)
        self._ancestors = torch.empty(shape.numel() + _SPARE, dtype=torch.int32)
        self.struct = ParticleStep(n=num, series=batch.numel(), dim=state.shape[-1], fresh=1)
        for name, x in (
            ("log_weights", self.log_weights),
            ("weights", self._weights),
            ("pending", self._pending),
            ("total", self.total),
            ("ess", self.ess),
            ("resampled", self.resampled),
            ("densities", self._densities),
            ("drawn", self._drawn),
            ("ancestors", self._ancestors),
        ):
            setattr(self.struct, name, x.data_ptr())

    def draws(self, dtype: torch.dtype) -> bool:
        """Have the steps draw their own numbers, from two of torch's global generator, if they can: float32 normals."""
        if dtype is not torch.float32:
            return False
        self.struct.seed, self.struct.uniform_seed = torch.randint(-(2**63), 2**63 - 1, (2,)).tolist()
        self.struct.parallel_for = library().parallel_for if torch.get_num_threads() > 1 else 0
        return True


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
