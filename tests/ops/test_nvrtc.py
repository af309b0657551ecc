"""The CUDA kernels without nvcc: what the run-time compiler is given, what is kept on disk, how kernels are launched.

Launches are those of the library that nvcc builds, number by number: an emulated device runs both in the same memory.
"""

import ctypes
import os
import re
import warnings
from types import SimpleNamespace

import pytest
import torch

from pyro_ssm.ops import (
    batched_operator,
    cuda,
    engine,
    kernel_cache,
    linear_scan,
    nvrtc,
    nvrtc_engine,
    recurrence_kernel,
)
from pyro_ssm.ops.cuda_driver import Driver, DriverError
from pyro_ssm.ops.info import info
from pyro_ssm.ops.launches import programs
from pyro_ssm.ops.nvrtc import Compiled, Nvrtc, NvrtcError, device_source, find_nvrtc
from pyro_ssm.ops.nvrtc_engine import SOURCES, NvrtcEngine, RuntimeKernels, nvrtc_reason, runtime_kernels
from tests.ops.conftest import use
from tests.ops.emulated_cuda import PROGRAMS, EmulatedCompiler, EmulatedNvrtcEngine, emulate, emulated_library
from tests.ops.test_cuda_kernels import CASES, run, steps_of


@pytest.fixture
def library(monkeypatch):
    """The emulated device."""
    use("emulated CUDA", monkeypatch)
    functions = emulated_library()
    yield functions
    emulate(functions, 132)


@pytest.fixture
def on_nvrtc(library, monkeypatch, tmp_path):
    """Operators run by kernels compiled at run time."""
    found = EmulatedNvrtcEngine(library, tmp_path)
    for module in (batched_operator, recurrence_kernel):
        monkeypatch.setattr(module, "engine_of", lambda x, *_: found if x.is_cpu else None)
    return found


# ------------------------------------------------------------------------------------------ launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("multiprocessors", "L"), [(132, 1), (132, 67), (1, 35), (2, 300)])
@pytest.mark.parametrize("name", CASES)
def test_launches_are_those_of_the_library(name, multiprocessors, L, dtype, library, on_nvrtc):
    """Each call compares them (EmulatedNvrtcEngine); its results are those of the loop."""
    emulate(library, multiprocessors)
    fast, plain, make, options, sizes = CASES[name]
    for size in sizes if L < 300 else sizes[:1]:
        args = make(L=L, **size)
        for steps in ({}, steps_of(name, L)) if L < 300 else ({},):
            found = run(fast, args, options | steps, dtype)
            if dtype is torch.float64:
                for one, other in zip(found, run(plain, args, options | steps), strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_launches_of_complex_numbers_and_of_shared_coefficients(library, on_nvrtc):
    for dtype in (torch.complex64, torch.complex128):
        a, b = (0.5 * torch.randn(2, 99, 3, dtype=dtype)).requires_grad_(), torch.randn(2, 99, 3, dtype=dtype)
        linear_scan(a, b).abs().sum().backward()
    for lead in ((), (2,)):
        a = torch.rand(*lead, 1, 3).requires_grad_()  # one for all times: summed
        linear_scan(a, torch.randn(2, 300, 3)).sum().backward()


def test_only_what_is_wanted_is_launched(library, on_nvrtc):
    fast, _, make, options, sizes = CASES["selective_scan"]
    for wanted in ("u", "A", "B", "initial"):
        args = {key: x.float().requires_grad_(key == wanted) for key, x in make(L=40, **sizes[-1]).items()}
        fast(**args, **options)[0].sum().backward()
    fast, _, make, options, sizes = CASES["causal_conv1d"]
    for wanted in ("x", "weight", "bias", "initial"):
        args = {key: x.float().requires_grad_(key == wanted) for key, x in make(L=9, **sizes[-1]).items()}
        fast(**args, **options)[0].sum().backward()


def test_a_wrong_grid_is_found_out(library, on_nvrtc, monkeypatch):
    """The comparison can fail."""
    from pyro_ssm.ops import launches

    monkeypatch.setattr(launches, "_MOST_CHUNKS", 3)
    with pytest.raises(AssertionError):
        linear_scan(torch.rand(300, 3), torch.randn(300, 3))


def test_a_refusal_of_the_driver_is_an_error_that_says_so(library, on_nvrtc, monkeypatch):
    monkeypatch.setattr(on_nvrtc.kernels.driver.functions, "cuLaunchKernel", lambda *_: 700)
    with pytest.raises(RuntimeError, match="pyro_ssm_linear_scan_forward: cuLaunchKernel: CUDA error 700"):
        linear_scan(torch.rand(3, 3), torch.randn(3, 3))
    with pytest.raises(DriverError, match="too large"):
        on_nvrtc.kernels.driver.launch(None, 1, 65536, 128, [0], 0)


# ------------------------------------------------------------------------------------------ kept on disk


def test_each_program_is_compiled_once(library, tmp_path):
    compilers = EmulatedCompiler(), EmulatedCompiler()
    (program, *_) = programs("convolve_forward", 0)
    for compiler in compilers:
        kernels = RuntimeKernels(compiler, library.driver, 0, tmp_path)
        kernels.load(program)
        kernels.load(program)
        assert set(program.kernels) < set(kernels.kernels)
    assert compilers[0].asked == [("library.cu", "sm_90"), ("causal_conv1d.cu", "sm_90")]
    assert compilers[1].asked == []  # from the disk
    other = EmulatedCompiler()
    other.version = (13, 1)
    RuntimeKernels(other, library.driver, 0, tmp_path)
    assert other.asked == [("library.cu", "sm_90")]


def test_a_kept_file_that_is_not_whole_is_made_again(tmp_path):
    whole = Compiled(b"code\nof\0a kernel", {"f": "_Z1f"})
    assert kernel_cache.cached(tmp_path, ["key"], lambda: whole) == whole
    (path,) = tmp_path.iterdir()
    assert kernel_cache.cached(tmp_path, ["another key"], lambda: Compiled(b"", {})).image == b""
    for broken in (path.read_bytes()[:-1], b"", b"{}\n", b"[1]\ncode", b"\xff"):
        path.write_bytes(broken)
        assert kernel_cache.cached(tmp_path, ["key"], lambda: whole) == whole
        assert kernel_cache.cached(tmp_path, ["key"], lambda: 1 / 0) == whole
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_that_cannot_be_written_to_keeps_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    whole = Compiled(b"code", {})
    assert kernel_cache.cached(tmp_path / "file" / "kernels", ["key"], lambda: whole) == whole

    def refuse(*_):
        raise OSError("no room")

    monkeypatch.setattr(os, "replace", refuse)
    assert kernel_cache.cached(tmp_path / "kernels", ["key"], lambda: whole) == whole
    assert list((tmp_path / "kernels").iterdir()) == []


def test_where_machine_code_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("PYRO_SSM_CACHE", str(tmp_path))
    assert kernel_cache.cache_folder() == tmp_path / "kernels"
    monkeypatch.delenv("PYRO_SSM_CACHE")
    if os.name != "nt":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert kernel_cache.cache_folder() == tmp_path / "pyro_ssm" / "kernels"


# ------------------------------------------------------------------------------------------ the way there


@pytest.fixture
def device(library, monkeypatch, tmp_path):
    """What looks like a machine with a CUDA device and no library of nvcc; `device.compiler` is its NVRTC."""
    found = SimpleNamespace(compiler=EmulatedCompiler())
    monkeypatch.setenv("PYRO_SSM_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cuda, "_library", cuda.CudaLibrary(None, "not built"))
    monkeypatch.setattr(nvrtc_engine, "find_nvrtc", lambda: found.compiler)
    monkeypatch.setattr(nvrtc_engine, "Driver", lambda: library.driver)
    for name in ("_kernels", "_reasons"):
        monkeypatch.setattr(nvrtc_engine, name, {})
    return found


X = SimpleNamespace(device=torch.device("cuda", 0))
SCAN = "pyro_ssm_linear_scan_forward"


def test_without_the_library_kernels_are_compiled_when_they_are_needed(device, tmp_path):
    assert "CUDA: in use, compiled at first use by NVRTC 13.0 for sm_90, kept in" in info().explanation
    assert info().cuda == "" and str(tmp_path) in info().explanation
    assert device.compiler.asked == [("library.cu", "sm_90")]
    for _ in range(2):
        found = engine.engine_of(X, SCAN, 0)
        assert isinstance(found, NvrtcEngine) and found.device == X.device
    assert device.compiler.asked[1:] == [("linear_scan.cu", "sm_90")]
    engine.engine_of(X, "pyro_ssm_selective_backward", 0)
    assert [name for name, _ in device.compiler.asked[2:]] == ["selective_scan.cu", "selective_gradient.cu"]


def test_the_library_of_nvcc_comes_first(device, monkeypatch):
    status = {0: 0, 1: 209}
    functions = SimpleNamespace(pyro_ssm_cuda_usable=status.get, pyro_ssm_cuda_error=lambda error: b"no kernel image")
    monkeypatch.setattr(cuda, "_library", cuda.CudaLibrary(functions, ""))
    monkeypatch.setattr(cuda, "_reasons", {})
    assert isinstance(engine.engine_of(X, SCAN, 0), cuda.CudaEngine)
    assert "CUDA: in use, built by nvcc" in info().explanation
    assert device.compiler.asked == []


def test_no_compiler_is_one_warning_and_torch(device, monkeypatch):
    def refuse():
        raise NvrtcError("NVRTC was not found")

    monkeypatch.setattr(nvrtc_engine, "find_nvrtc", refuse)
    with pytest.warns(RuntimeWarning, match="go through torch, slower .*NVRTC was not found") as told:
        for _ in range(2):
            assert engine.engine_of(X, SCAN, 0) is None
            assert engine.engine_of(X, "pyro_ssm_convolve_forward", 1) is None
    assert len(told) == 1
    assert info().cuda == "not built; NVRTC was not found"
    assert "CUDA: not in use, not built; NVRTC was not found." in info().explanation


def test_a_source_that_does_not_compile_is_one_warning_and_torch_for_its_operator(device, monkeypatch):
    compile_, refused = device.compiler.compile, []

    def refuse(text, name, kernels, target):
        if name == "linear_scan.cu":
            refused.append(name)
            raise NvrtcError("NVRTC could not compile linear_scan.cu")
        return compile_(text, name, kernels, target)

    monkeypatch.setattr(device.compiler, "compile", refuse)
    with pytest.warns(RuntimeWarning, match="could not compile linear_scan.cu") as told:
        for _ in range(2):
            assert engine.engine_of(X, SCAN, 0) is None
    assert len(told) == len(refused) == 1
    assert isinstance(engine.engine_of(X, "pyro_ssm_convolve_forward", 0), NvrtcEngine)


def test_machine_code_that_the_driver_refuses(device, monkeypatch):
    monkeypatch.setattr(
        device.compiler, "compile", lambda text, name, kernels, target: Compiled(b"?", {"nothing": "n"})
    )
    with pytest.warns(RuntimeWarning, match="device kernel image is invalid"):
        assert engine.engine_of(X, SCAN, 0) is None


def test_sources_that_are_not_installed(device, monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc_engine, "SOURCES", tmp_path)
    with pytest.warns(RuntimeWarning, match="library.cu"):
        assert engine.engine_of(X, SCAN, 0) is None


def test_switched_off(device, monkeypatch):
    monkeypatch.setenv("PYRO_SSM_COMPILED", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nvrtc_reason(0, SCAN, 0) == runtime_kernels(0) == "switched off by PYRO_SSM_COMPILED=0"
    assert device.compiler.asked == []


def test_the_question_is_answered_inside_a_graph(device, monkeypatch):
    """The first call of an operator may be in one: what it compiles is no part of the graph."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # torch.compile believes it
    monkeypatch.setattr(nvrtc_engine, "cuda_off", lambda: "")

    def f(x):
        return x + (0 if nvrtc_reason(0, SCAN, 0) else 1)

    assert torch.compile(f, fullgraph=True, backend="eager")(torch.zeros(2)).tolist() == [1, 1]
    assert device.compiler.asked == [("library.cu", "sm_90"), ("linear_scan.cu", "sm_90")]


def test_a_driver_that_is_not_there():
    with pytest.raises(DriverError, match="could not be loaded"):
        Driver("no-such-driver.so")


# ------------------------------------------------------------------------------------------ the compiler


def test_sources_need_no_header_and_nothing_of_the_cpu():
    for path in SOURCES.glob("*.cu"):
        text = device_source(path) + "\n"
        text = re.sub(r"^#if !defined\(__CUDACC_RTC__\)\n.*?^#endif\n", "", text, flags=re.M | re.S)
        assert not re.search(r"#include|cudaError_t|cudaLaunchKernel|Workspace", text), path.name
        assert "__global__" in text


def test_every_kernel_of_every_source_is_in_a_program():
    """What the launches of the library name, a run-time compiler is asked for."""
    for path in SOURCES.glob("*.cu"):
        defined = set(re.findall(r"__global__ void(?:\s+__launch_bounds__\([^)]*\))?\s+(\w+)\(", device_source(path)))
        defined |= set(re.findall(r"\n__global__ void __launch_bounds__\([^)]*\) (\w+)\(", device_source(path)))
        asked = {kernel.partition("<")[0] for x in PROGRAMS if x.source == path.stem for kernel in x.kernels}
        assert asked <= defined and defined - asked <= {"add_parts"}, path.name


@pytest.fixture(scope="module")
def compiler():
    try:
        return find_nvrtc()
    except NvrtcError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "program",
    [
        pytest.param(
            x,
            marks=() if x.source in ("library", "causal_conv1d") else pytest.mark.slow,
            id=f"{x.source}-{x.kernels[0]}",
        )
        for x in PROGRAMS
    ],
)
def test_every_kernel_compiles(compiler, program, capability):
    target = compiler.target(capability)
    assert target == f"sm_{capability}"
    found = compiler.compile(device_source(SOURCES / f"{program.source}.cu"), "x.cu", program.kernels, target)
    assert found.log == "" and found.image.startswith(b"\x7fELF")
    assert set(found.names) == set(program.kernels)
    for kernel, name in found.names.items():
        base = kernel.partition("<")[0]
        assert f"{len(base)}{base}" in name and name.encode() in found.image


def test_a_device_that_the_compiler_does_not_know(compiler):
    """A newer one gets code that its driver finishes, an older one none."""
    newest = max(compiler.architectures)
    assert compiler.target(newest + 5) == f"compute_{newest}"
    found = compiler.compile("template <class T> __global__ void f(T* x) { *x = 1; }", "f", ["f<int>"], "compute_90")
    assert b".entry" in found.image and found.names["f<int>"].encode() in found.image
    with pytest.raises(NvrtcError, match="no longer compiles for sm_1"):
        compiler.target(1)


def test_what_does_not_compile_says_why(compiler):
    with pytest.raises(NvrtcError, match=r"could not compile bad.cu for sm_90(.|\n)*undeclared_name"):
        compiler.compile("__global__ void f(int* x) { *x = undeclared_name; }", "bad.cu", ["f"], "sm_90")


def test_where_the_compiler_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(nvrtc.torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    tried = []

    def attempt(path):
        tried.append(getattr(path, "name", path))
        raise NvrtcError(f"no {path}")

    monkeypatch.setattr(nvrtc, "Nvrtc", attempt)
    with pytest.raises(NvrtcError, match="pip install nvidia-cuda-nvrtc`"):
        find_nvrtc()
    (tmp_path / "lib").mkdir()
    for name in ("libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.alt.so.13", "libnvrtc-builtins.so.13.0"):
        (tmp_path / "lib" / name).touch()
    tried.clear()
    with pytest.raises(NvrtcError, match="libnvrtc.so.13"):
        find_nvrtc()
    assert tried[:2] == ["libnvrtc.so.13", "libnvrtc.so.12"] and len(tried) == 3


def test_a_library_that_is_no_compiler(tmp_path):
    path = tmp_path / "libnvrtc.so.13"
    path.write_bytes(b"not a library")
    with pytest.raises(NvrtcError, match="could not be loaded"):
        Nvrtc(path)
    with pytest.raises(NvrtcError, match="nvrtcVersion"):
        Nvrtc(ctypes.CDLL(None)._name or torch._C.__file__)
