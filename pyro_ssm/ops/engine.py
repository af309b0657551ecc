"""Who runs a compiled operator: the library of the CPU, that of the GPU, or kernels of the GPU compiled when needed."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_ssm.ops.compiled import library
from pyro_ssm.ops.cuda import CudaEngine, cuda_reason, has_kernels
from pyro_ssm.ops.nvrtc_engine import NvrtcEngine, nvrtc_reason

__all__ = ["CpuEngine", "Engine", "engine_of"]


@runtime_checkable
class Engine(Protocol):
    """What calls a function of a library with a struct of eight-byte fields.

    >>> from pyro_ssm.ops.engine import Engine
    >>> Engine.__name__
    'Engine'
    """

    @property
    def parallel_for(self) -> int:
        """For the field of that name: the address of torch's function, or 0."""

    def run(self, function: str, fields: Sequence[int]) -> None:
        """Call it, or raise."""


class CpuEngine(NamedTuple):
    """The library of the CPU.

    >>> from pyro_ssm.ops.engine import CpuEngine
    >>> CpuEngine(None, 0).parallel_for
    0
    """

    functions: Any
    parallel_for: int

    def run(self, function: str, fields: Sequence[int]) -> None:
        """Call a function of the library.

        Raises:
            MemoryError: there is not enough.
        """
        if getattr(self.functions, function)((ctypes.c_int64 * len(fields))(*fields)):
            raise MemoryError(f"{function}: not enough memory for the states of one chunk of steps")


def engine_of(x: Tensor, function: str, code: int) -> Engine | None:
    """The engine for a function and tensors where ``x`` is; None where plain torch must do it.

    Args:
        x: one of the tensors.
        function: ``"pyro_ssm_linear_scan_forward"``, ...
        code: the first field of its struct.

    >>> import torch
    >>> from pyro_ssm.ops.engine import engine_of
    >>> engine_of(torch.zeros(1, device="meta"), "pyro_ssm_linear_scan_forward", 0) is None
    True
    """
    device = x.device
    if device.type == "cpu":
        found = library()
        return None if found.functions is None else CpuEngine(found.functions, found.parallel_for)
    if device.type != "cuda" or not has_kernels(function):
        return None
    index = device.index if device.index is not None else torch.cuda.current_device()
    if not cuda_reason(index):
        return CudaEngine(index)
    return None if nvrtc_reason(index, function, code) else NvrtcEngine(index)
