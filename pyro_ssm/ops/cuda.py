"""The compiled operators of CUDA devices: a second library beside the CPU's, loaded when a CUDA tensor first needs it.

Like the first (:mod:`pyro_ssm.ops.compiled`) it knows nothing of torch: it takes the same structs, with addresses on
the device, its index and a stream. Memory for intermediate results is torch's. Sums are taken in a fixed order:
results do not change from run to run.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = [
    "CUDA_ABI",
    "CudaEngine",
    "CudaLibrary",
    "DeviceEngine",
    "cuda_library",
    "cuda_off",
    "cuda_reason",
    "has_kernels",
    "load_cuda",
]

CUDA_ABI = 31  # of csrc/cuda/library.cu: pyro_ssm_cuda_abi()
PATH = Path(__file__).with_name("_cuda.dll" if os.name == "nt" else "_cuda.so")
#: each has pyro_ssm_NAME_workspace, pyro_ssm_NAME_forward and pyro_ssm_NAME_backward
NAMES = ("linear_scan", "selective", "convolve", "diag_lti")


def has_kernels(function: str) -> bool:
    """Whether a function is one of those that there are for CUDA devices, by whatever compiler.

    Args:
        function: ``"pyro_ssm_linear_scan_forward"``, ...

    >>> from pyro_ssm.ops.cuda import has_kernels
    >>> has_kernels("pyro_ssm_diag_lti_forward"), has_kernels("pyro_ssm_gap_bank_forward")
    (True, False)
    """
    return function.removeprefix("pyro_ssm_").rpartition("_")[0] in NAMES


class CudaLibrary(NamedTuple):
    """The state of the CUDA library in this process.

    >>> from pyro_ssm.ops.cuda import CudaLibrary, cuda_library
    >>> isinstance(cuda_library(), CudaLibrary)
    True
    """

    functions: Any  # None where there is no usable library
    reason: str  # why not; "" otherwise


_library: CudaLibrary | None = None
_reasons: dict[int, str] = {}  # of each device


def cuda_library() -> CudaLibrary:
    """The library, loaded at the first call on a machine with a CUDA device; never an exception.

    >>> from pyro_ssm.ops.cuda import cuda_library
    >>> found = cuda_library()
    >>> (found.functions is None) == bool(found.reason)
    True
    """
    global _library
    if _library is None:
        _library = _find(PATH)
    return _library


def _find(path: Path) -> CudaLibrary:
    off = cuda_off()
    return CudaLibrary(None, off) if off else load_cuda(path)


def cuda_off() -> str:
    """Why this process runs no CUDA kernels of whatever origin; an empty string where it can.

    >>> import torch
    >>> from pyro_ssm.ops.cuda import cuda_off
    >>> torch.cuda.is_available() or bool(cuda_off())
    True
    """
    if os.environ.get("PYRO_SSM_COMPILED", "1") == "0":
        return "switched off by PYRO_SSM_COMPILED=0"
    if torch.version.hip is not None:
        return "this torch is for AMD devices"
    return "" if torch.cuda.is_available() else "no CUDA device"


def load_cuda(path: Path) -> CudaLibrary:
    """The library at a path, whether or not there is a device.

    >>> from pathlib import Path
    >>> from pyro_ssm.ops.cuda import load_cuda
    >>> load_cuda(Path("nowhere.so")).reason
    'not built: `pip install` found no nvcc, or was told not to use it'
    """
    if not path.exists():
        return CudaLibrary(None, "not built: `pip install` found no nvcc, or was told not to use it")
    try:
        functions = ctypes.CDLL(str(path))
        functions.pyro_ssm_cuda_abi.restype = ctypes.c_int64
        found = functions.pyro_ssm_cuda_abi()
        functions.pyro_ssm_cuda_error.restype = ctypes.c_char_p
        functions.pyro_ssm_cuda_usable.argtypes = [ctypes.c_int64]
        for name in NAMES if found == CUDA_ABI else ():
            count = getattr(functions, f"pyro_ssm_{name}_workspace")
            count.restype, count.argtypes = ctypes.c_int64, [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
            for way in ("forward", "backward"):
                run = getattr(functions, f"pyro_ssm_{name}_{way}")
                run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    except (OSError, AttributeError) as error:
        return CudaLibrary(None, f"{path.name} could not be loaded ({error}); install again")
    if found != CUDA_ABI:
        return CudaLibrary(None, f"{path.name} is of another version ({found}, wanted {CUDA_ABI}); install again")
    return CudaLibrary(functions, "")


@torch.compiler.assume_constant_result
def cuda_reason(index: int) -> str:
    """Why the library cannot run on a device; an empty string where they can.

    >>> import torch
    >>> from pyro_ssm.ops.cuda import cuda_reason
    >>> torch.cuda.is_available() or bool(cuda_reason(0))
    True
    """
    functions, reason = cuda_library()
    if functions is None:
        return reason
    if index not in _reasons:
        status = functions.pyro_ssm_cuda_usable(index)
        text = functions.pyro_ssm_cuda_error(status).decode() if status else ""
        _reasons[index] = f"the library does not run on cuda:{index} ({text}); install again there" if status else ""
    return _reasons[index]


class DeviceEngine:
    """What runs kernels on one CUDA device: its stream and its memory are torch's.

    Args:
        index: of the device.

    >>> from pyro_ssm.ops.cuda import DeviceEngine
    >>> DeviceEngine(1).device
    device(type='cuda', index=1)
    """

    parallel_for = 0

    def __init__(self, index: int) -> None:
        self.index, self.device = index, torch.device("cuda", index)

    @contextmanager
    def _stream(self) -> Iterator[int]:
        """The handle of the stream that torch uses on the device now, with that device as the current one."""
        with torch.cuda.device(self.index):
            yield torch.cuda.current_stream().cuda_stream

    @contextmanager
    def _workspace(self, size: int) -> Iterator[torch.Tensor]:
        # torch hands the memory out again only to work that is queued behind the kernels
        yield torch.empty(size, dtype=torch.uint8, device=self.device)


class CudaEngine(DeviceEngine):
    """The library on one device.

    Args:
        index: of the device.

    >>> from pyro_ssm.ops.cuda import CudaEngine
    >>> CudaEngine(0).parallel_for
    0
    """

    @property
    def functions(self) -> Any:
        """Those of the library."""
        return cuda_library().functions

    def run(self, function: str, fields: Sequence[int]) -> None:
        """Queue the kernels of a function on the current stream.

        Raises:
            RuntimeError: CUDA refused; the message is CUDA's.
        """
        name, _, way = function.rpartition("_")
        struct, functions = (ctypes.c_int64 * len(fields))(*fields), self.functions
        with self._stream() as stream:
            size = getattr(functions, f"{name}_workspace")(struct, int(way == "backward"), self.index)
            if size < 0:
                raise RuntimeError(f"{function}: {self.device} cannot be used")
            with self._workspace(size) as workspace:
                status = getattr(functions, function)(struct, workspace.data_ptr(), self.index, stream)
        if status:
            raise RuntimeError(f"{function}: CUDA error {status}, {functions.pyro_ssm_cuda_error(status).decode()}")
