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
from pyro_ssm.ops.cuda import CudaEngine, DeviceEngine
from pyro_ssm.ops.cuda_driver import MULTIPROCESSORS, Driver
from pyro_ssm.ops.launches import programs
from pyro_ssm.ops.nvrtc import Compiled
from pyro_ssm.ops.nvrtc_engine import PROBE, NvrtcEngine, RuntimeKernels

HERE = Path(__file__).parent
SOURCES = Path(cuda.__file__).with_name("csrc") / "cuda"
GUARD = 4096
#: all that can be asked of a run-time compiler: of each function, the codes of its numbers
CODES = {"linear_scan": range(6), "selective": range(2), "convolve": range(2), "diag_lti": range(2)}
PROGRAMS = sorted(
    {PROBE}
    | {
        program
        for name, codes in CODES.items()
        for code in codes
        for way in ("forward", "backward")
        for program in programs(f"{name}_{way}", code)
    }
)
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


@cache
def emulated_library():
    """The functions, or a string: why there are none."""
    if os.name == "nt" or COMPILER is None:
        return "no C++ compiler with ucontext"
    folder = Path(tempfile.mkdtemp(prefix="emulated-cuda-"))
    sources = [str(HERE / "emulator" / name) for name in ("emulator.cpp", "driver.cpp")]
    for path in sorted(SOURCES.glob("*.cu")):
        kernels = sorted({kernel for program in PROGRAMS if program.source == path.stem for kernel in program.kernels})
        known = "".join(f'static const bool known_{i} = emulated::known("{x}", {x});\n' for i, x in enumerate(kernels))
        # what a run-time compiler would be asked for
        (folder / path.name).write_text(f'#include "{path}"\n{known}')
        sources.append(str(folder / path.name))
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    flags += ["-Wno-unused-variable", "-I", str(HERE / "emulator")]  # known_0, ...: they are made, not read
    command = [COMPILER, *flags, "-x", "c++", *sources, "-o", str(folder / "emulated.so")]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the CUDA sources do not compile with the emulator:\n{result.stderr}")
    found = cuda.load_cuda(folder / "emulated.so")
    driver = Driver(str(folder / "emulated.so"))
    shutil.rmtree(folder)
    assert found.functions is not None, found.reason
    found.functions.emulate.argtypes = [ctypes.c_int64, ctypes.c_int64]
    found.functions.emulated_log.restype = ctypes.c_char_p
    found.functions.driver = driver
    return found.functions


class _OnCpu(DeviceEngine):
    """Kernels on tensors of the CPU. Their workspace is full of NaN, and what they write behind it is found out."""

    def __init__(self, functions):
        self.library, self.index, self.device = functions, 0, torch.device("cpu")

    @contextmanager
    def _stream(self):
        yield 0

    @contextmanager
    def _workspace(self, size):
        memory = torch.full((size + GUARD,), 255, dtype=torch.uint8, device="cpu")
        yield memory
        assert (memory[size:] == 255).all(), "a kernel wrote beyond its workspace"


class EmulatedEngine(_OnCpu, CudaEngine):
    """As the library that nvcc builds."""

    @property
    def functions(self):
        return self.library


class EmulatedCompiler:
    """In the place of NVRTC: the emulated driver knows kernels by their plain names."""

    version, architectures = (13, 0), (80, 90)

    def __init__(self):
        self.asked = []

    def target(self, capability):
        return f"sm_{capability}"

    def compile(self, text, name, kernels, target):
        self.asked.append((name, target))
        return Compiled(b"emulated " + name.encode(), {kernel: kernel for kernel in kernels})


class EmulatedNvrtcEngine(_OnCpu, NvrtcEngine):
    """As kernels compiled at run time; each call is first made by the library of nvcc, in the same memory."""

    kernels = None

    def __init__(self, functions, folder):
        super().__init__(functions)
        self.kernels = RuntimeKernels(EmulatedCompiler(), functions.driver, 0, folder)

    @contextmanager
    def _workspace(self, size):
        assert size == self.memory.numel()
        yield self.memory

    def run(self, function, fields):
        name, _, way = function.removeprefix("pyro_ssm_").rpartition("_")
        for program in programs(f"{name}_{way}", fields[0]):
            self.kernels.load(program)
        self.kernels.multiprocessors = self.kernels.driver.attribute(0, MULTIPROCESSORS)
        struct = (ctypes.c_int64 * len(fields))(*fields)
        size = getattr(self.library, f"pyro_ssm_{name}_workspace")(struct, int(way == "backward"), 0)
        with super()._workspace(size) as memory:
            self.library.emulated_forget()
            assert getattr(self.library, function)(struct, memory.data_ptr(), 0, 0) == 0
            wanted = self.library.emulated_log().decode()
            memory[:size] = 255
            self.library.emulated_forget()
            self.memory = memory[:size]
            super().run(function, fields)
        assert wanted and self.library.emulated_log().decode() == wanted


def emulate(functions, multiprocessors, order=0):
    """How large the device is (few multiprocessors: time is cut into few chunks), and in which order threads run."""
    functions.emulate(multiprocessors, order)
