"""Fixtures of the tests of operators."""

import pytest
import torch

from pyro_ssm.ops import batched_operator, compiled, cuda, recurrence_kernel
from tests.ops.emulated_cuda import EmulatedEngine, emulated_library


@pytest.fixture(
    params=["compiled", "torch", "emulated CUDA", "CUDA"],
)
def engine(request, monkeypatch):
    """The same test on the CPU with the compiled library and without it, on a GPU, and with the kernels of a GPU."""
    use(request.param, monkeypatch)
    yield request.param
    if request.param == "CUDA":
        torch.set_default_device(None)  # a device, even the CPU, would leave a mode that torch.compile cannot trace


def use(engine, monkeypatch):
    """What tensors are made on by default, and who runs their operators; skips where that is not to be had."""
    if engine == "torch":
        switch_off(monkeypatch)
    elif engine == "compiled":
        if compiled.library().functions is None:
            pytest.skip(f"the compiled library is not in use: {compiled.library().reason}")
    elif engine == "CUDA":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if cuda.cuda_reason(torch.cuda.current_device()):
            pytest.skip(f"the CUDA library is not in use: {cuda.cuda_reason(torch.cuda.current_device())}")
        torch.set_default_device("cuda")
    else:
        functions = emulated_library()
        if isinstance(functions, str):
            pytest.skip(functions)
        switch_off(monkeypatch)

        def emulated(x, function, code):
            return EmulatedEngine(functions) if x.is_cpu and cuda.has_kernels(function) else None

        for module in (batched_operator, recurrence_kernel):
            monkeypatch.setattr(module, "engine_of", emulated)


def switch_off(monkeypatch):
    monkeypatch.setattr(compiled, "_library", compiled.Library(None, "switched off by the test", "", 0))
