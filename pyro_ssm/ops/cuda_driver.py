"""CUDA's driver, which every machine with a GPU has: modules of machine code, and launches of their kernels."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

__all__ = ["Driver", "DriverError"]

NAME = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
MULTIPROCESSORS, MAJOR, MINOR = 16, 75, 76  # CU_DEVICE_ATTRIBUTE_...
INVALID_CONFIGURATION = 9  # what the library of nvcc answers to a grid that is too large
MOST_BLOCKS, MOST_ROWS = 0x7FFFFFFF, 65535

_POINTER, _INT, _UNSIGNED = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
_INT_OUT = ctypes.POINTER(_INT)
_SIGNATURES: dict[str, tuple] = {
    "cuInit": (_UNSIGNED,),
    "cuDeviceGet": (_INT_OUT, _INT),
    "cuDeviceGetAttribute": (_INT_OUT, _INT, _INT),
    "cuDevicePrimaryCtxRetain": (_POINTER, _INT),
    "cuCtxSetCurrent": (_POINTER,),
    "cuModuleLoadData": (_POINTER, ctypes.c_char_p),
    "cuModuleGetFunction": (_POINTER, _POINTER, ctypes.c_char_p),
    "cuLaunchKernel": (_POINTER, *[_UNSIGNED] * 7, _POINTER, _POINTER, _POINTER),
    "cuGetErrorString": (_INT, ctypes.POINTER(ctypes.c_char_p)),
}


class DriverError(RuntimeError):
    """The driver is not there, or refused.

    >>> from pyro_ssm.ops.cuda_driver import DriverError
    >>> issubclass(DriverError, RuntimeError)
    True
    """


class Driver:
    """The driver's library.

    Contexts are the primary ones of their devices, which are torch's too.

    Args:
        path: of the library.

    Raises:
        DriverError: it cannot be loaded.

    >>> from pyro_ssm.ops.cuda_driver import Driver, DriverError
    >>> try:
    ...     Driver("nowhere.so")
    ... except DriverError as error:
    ...     "nowhere.so" in str(error)
    True
    """

    def __init__(self, path: str = NAME) -> None:
        try:
            self.functions: Any = ctypes.CDLL(path)
            for name, arguments in _SIGNATURES.items():
                getattr(self.functions, name).argtypes = arguments
        except (OSError, AttributeError) as error:
            raise DriverError(f"the driver of CUDA could not be loaded from {path} ({error})") from None
        self._call("cuInit", 0)
        self.contexts: dict[int, Any] = {}

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.functions, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self.functions.cuGetErrorString(status, ctypes.byref(text))
            raise DriverError(f"{name}: CUDA error {status}, {(text.value or b'unknown').decode()}")

    def attribute(self, index: int, which: int) -> int:
        """A property of a device."""
        device, value = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), index)
        self._call("cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    def capability(self, index: int) -> int:
        """Of a device: 90 for 9.0."""
        return 10 * self.attribute(index, MAJOR) + self.attribute(index, MINOR)

    def enter(self, index: int) -> None:
        """Make a device's context the current one of this thread."""
        context = self.contexts.get(index)
        if context is None:
            device, context = ctypes.c_int(), _POINTER()
            self._call("cuDeviceGet", ctypes.byref(device), index)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self.contexts[index] = context  # for good, as torch does
        self._call("cuCtxSetCurrent", context)

    def load(self, image: bytes, names: Sequence[str]) -> list[Any]:
        """Kernels of a module, in the current context, for good."""
        module = _POINTER()
        self._call("cuModuleLoadData", ctypes.byref(module), image)
        kernels = []
        for name in names:
            kernel = _POINTER()
            self._call("cuModuleGetFunction", ctypes.byref(kernel), module, name.encode())
            kernels.append(kernel)
        return kernels

    def launch(self, kernel: Any, blocks: int, rows: int, threads: int, task: Sequence[int], stream: int) -> None:
        """Queue a kernel that takes one struct of eight-byte fields on a stream of the current context.

        Raises:
            DriverError: the driver refused.
        """
        if blocks <= 0 or rows <= 0:
            return
        if blocks > MOST_BLOCKS or rows > MOST_ROWS:
            raise DriverError(f"CUDA error {INVALID_CONFIGURATION}, a grid of {blocks} x {rows} blocks is too large")
        struct = (ctypes.c_int64 * len(task))(*task)
        arguments = (_POINTER * 1)(ctypes.addressof(struct))
        self._call("cuLaunchKernel", kernel, blocks, rows, 1, threads, 1, 1, 0, stream, arguments, None)
