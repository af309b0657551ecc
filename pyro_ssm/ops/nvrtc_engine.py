"""The CUDA kernels without nvcc: compiled by NVRTC when they are first needed, launched through the driver.

Machine code is kept on disk (:mod:`pyro_ssm.ops.kernel_cache`) by source, kernels, architecture and version of the
compiler. Where something is missing or refused, one warning says what, and torch does the work.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pyro_ssm.ops.cuda import DeviceEngine, cuda_off
from pyro_ssm.ops.cuda_driver import MULTIPROCESSORS, Driver, DriverError
from pyro_ssm.ops.kernel_cache import cache_folder, cached
from pyro_ssm.ops.launches import Memory, Offset, Program, launches, programs
from pyro_ssm.ops.nvrtc import OPTIONS, Nvrtc, NvrtcError, device_source, find_nvrtc

__all__ = ["PROBE", "NvrtcEngine", "RuntimeKernels", "nvrtc_reason", "runtime_kernels"]

SOURCES = Path(__file__).with_name("csrc") / "cuda"
_PREFIX = "pyro_ssm_"
PROBE = Program("library", ("nothing",))  # the smallest kernel: whether machine code gets to the device at all

_lock = threading.RLock()
_kernels: dict[int, RuntimeKernels | str] = {}  # of each device; a string: why there are none
_reasons: dict[tuple[int, str, int], str] = {}


class RuntimeKernels:
    """The kernels of one device, each program compiled at most once.

    Args:
        compiler: NVRTC.
        driver: of the device.
        index: of the device.
        folder: for machine code.

    Raises:
        NvrtcError: the compiler refuses.
        DriverError: the driver refuses.
        OSError: the sources are not installed.

    >>> from pyro_ssm.ops.nvrtc_engine import RuntimeKernels
    >>> RuntimeKernels.__name__
    'RuntimeKernels'
    """

    def __init__(self, compiler: Nvrtc, driver: Driver, index: int, folder: Path) -> None:
        self.compiler, self.driver, self.index, self.folder = compiler, driver, index, folder
        driver.enter(index)
        self.multiprocessors = driver.attribute(index, MULTIPROCESSORS)
        self.target = compiler.target(driver.capability(index))
        self.kernels: dict[str, Any] = {}
        self.load(PROBE)

    def load(self, program: Program) -> None:
        """Have the kernels of a program ready."""
        if all(kernel in self.kernels for kernel in program.kernels):
            return
        name, version = f"{program.source}.cu", ".".join(map(str, self.compiler.version))
        text = device_source(SOURCES / name)
        key = [text, *program.kernels, self.target, version, *OPTIONS]
        code = cached(self.folder, key, lambda: self.compiler.compile(text, name, program.kernels, self.target))
        self.driver.enter(self.index)
        handles = self.driver.load(code.image, [code.names[kernel] for kernel in program.kernels])
        self.kernels.update(zip(program.kernels, handles, strict=True))

    def __str__(self) -> str:
        version = ".".join(map(str, self.compiler.version))
        return f"compiled at first use by NVRTC {version} for {self.target}, kept in {self.folder}"


def runtime_kernels(index: int) -> RuntimeKernels | str:
    """The kernels of a device, or why there are none; never an exception.

    >>> import torch
    >>> from pyro_ssm.ops.nvrtc_engine import runtime_kernels
    >>> torch.cuda.is_available() or isinstance(runtime_kernels(0), str)
    True
    """
    off = cuda_off()
    if off:
        return off
    with _lock:
        if index not in _kernels:
            try:
                _kernels[index] = RuntimeKernels(find_nvrtc(), Driver(), index, cache_folder())
            except (NvrtcError, DriverError, OSError) as error:
                _kernels[index] = _told(str(error))
        return _kernels[index]


def _told(reason: str) -> str:
    warnings.warn(
        f"pyro_ssm: the CUDA operators could not be compiled; CUDA tensors go through torch, slower and with the same "
        f"results. {reason} (`python -m pyro_ssm info` tells more, PYRO_SSM_COMPILED=0 silences this)",
        RuntimeWarning,
        stacklevel=2,
    )
    return reason


@torch.compiler.assume_constant_result
def nvrtc_reason(index: int, function: str, code: int) -> str:
    """Why a function cannot run on a device by kernels compiled at run time; an empty string where it can.

    The first call for a function compiles its kernels, which takes seconds where no earlier process has done so.

    Args:
        index: of the device.
        function: ``"pyro_ssm_linear_scan_forward"``, ...
        code: the first field of its struct.

    >>> import torch
    >>> from pyro_ssm.ops.nvrtc_engine import nvrtc_reason
    >>> torch.cuda.is_available() or nvrtc_reason(0, "pyro_ssm_linear_scan_forward", 0)
    'no CUDA device'
    """
    key = (index, function, code)
    reason = _reasons.get(key)
    if reason is not None:
        return reason
    found = runtime_kernels(index)
    if isinstance(found, str):
        return found
    with _lock:
        reason = ""
        try:
            for program in programs(function.removeprefix(_PREFIX), code):
                found.load(program)
        except (NvrtcError, DriverError, OSError) as error:
            reason = _told(str(error))
        _reasons[key] = reason
    return reason


class NvrtcEngine(DeviceEngine):
    """The kernels compiled at run time on one device, for functions of which :func:`nvrtc_reason` has nothing to say.

    Args:
        index: of the device.

    >>> from pyro_ssm.ops.nvrtc_engine import NvrtcEngine
    >>> NvrtcEngine(0).parallel_for
    0
    """

    @property
    def kernels(self) -> RuntimeKernels:
        """Those of the device.

        Raises:
            RuntimeError: there are none.
        """
        found = runtime_kernels(self.index)
        if isinstance(found, str):
            raise RuntimeError(f"there are no kernels for {self.device}: {found}")
        return found

    def run(self, function: str, fields: Sequence[int]) -> None:
        """Queue the kernels of a function on the current stream.

        Raises:
            RuntimeError: CUDA refused; the message is CUDA's.
        """
        kernels, memory = self.kernels, Memory()
        queue = launches(function.removeprefix(_PREFIX), fields, kernels.multiprocessors, memory)
        with self._stream() as stream, self._workspace(memory.used + 1) as workspace:
            start = workspace.data_ptr()
            kernels.driver.enter(self.index)
            for kernel, blocks, rows, threads, task in queue:
                there = [start + x if type(x) is Offset else x for x in task]
                try:
                    kernels.driver.launch(kernels.kernels[kernel], blocks, rows, threads, there, stream)
                except DriverError as error:
                    raise RuntimeError(f"{function}: {error}") from None
