"""The CUDA sources, compiled by a C++ compiler against an emulated runtime: the kernels of the GPU run on the CPU."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from pyro_ssm.ops import cuda
from pyro_ssm.ops.cuda import CudaEngine

HERE = Path(__file__).parent
SOURCES = Path(cuda.__file__).with_name("csrc") / "cuda"
GUARD = 4096
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


@cache
def emulated_library():
    """The functions, or a string: why there are none."""
    if os.name == "nt" or COMPILER is None:
        return "no C++ compiler with ucontext"
    folder = Path(tempfile.mkdtemp(prefix="emulated-cuda-"))
    sources = [*map(str, sorted(SOURCES.glob("*.cu"))), str(HERE / "emulator" / "emulator.cpp")]
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    command = [COMPILER, *flags, "-I", str(HERE / "emulator"), "-x", "c++", *sources, "-o", str(folder / "emulated.so")]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the CUDA sources do not compile with the emulator:\n{result.stderr}")
    found = cuda.load_cuda(folder / "emulated.so")
    shutil.rmtree(folder)
    assert found.functions is not None, found.reason
    found.functions.emulate.argtypes = [ctypes.c_int64, ctypes.c_int64]
    return found.functions


class EmulatedEngine(CudaEngine):
    """Kernels on tensors of the CPU. Their workspace is full of NaN, and what they write behind it is found out."""

    functions = None

    def __init__(self, functions):
        self.functions, self.index, self.device = functions, 0, torch.device("cpu")

    @contextmanager
    def _stream(self):
        yield 0

    @contextmanager
    def _workspace(self, size):
        memory = torch.full((size + GUARD,), 255, dtype=torch.uint8, device="cpu")
        yield memory
        assert (memory[size:] == 255).all(), "a kernel wrote beyond its workspace"


def emulate(functions, multiprocessors, order=0):
    """How large the device is (few multiprocessors: time is cut into few chunks), and in which order threads run."""
    functions.emulate(multiprocessors, order)
