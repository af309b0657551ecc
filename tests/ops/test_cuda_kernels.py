"""The kernels of the GPU, run on the CPU (tests/ops/emulator): their arithmetic, chunks, sums and barriers. And the way
there: which tensors go to them, and what happens where the library is not."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from pyro_ssm.ops import (
    compiled,
    cuda,
    diag_lti,
    diag_lti_reference,
    engine,
    linear_scan,
    linear_scan_reference,
    recurrence_kernel,
    scan2x2,
)
from pyro_ssm.ops.convolve_kernel import CAUSAL_CONV1D
from pyro_ssm.ops.diag_bank import DIAG_LTI
from pyro_ssm.ops.selective_kernel import SELECTIVE_SCAN
from tests.ops.conftest import use
from tests.ops.emulated_cuda import emulate, emulated_library
from tests.ops.test_selective_scan import OPS as SELECTIVE
from tests.ops.test_structured_scans import OPS, as_tuple, assert_same, bank, gradients, scan


@pytest.fixture
def device(monkeypatch):
    """The emulated device; `device(multiprocessors, order)` makes it another one."""
    use("emulated CUDA", monkeypatch)
    functions = emulated_library()
    yield lambda multiprocessors, order=0: emulate(functions, multiprocessors, order)
    emulate(functions, 132)


def run(f, args, options, dtype=torch.float64):
    """Results and gradients."""
    args = {k: wide(x.detach(), dtype).requires_grad_() for k, x in args.items()}
    out = as_tuple(f(**args, **options))
    return [*(x.detach() for x in out), *gradients(tuple(wide(x, torch.float64) for x in out), args.values())]


def wide(x, real):
    """In a precision, complex or not."""
    return x.to(real.to_complex() if x.is_complex() else real)


def regular_bank(lead=(2,), L=7, D=3, N=4):
    """One step for all times, and matrices whose product over many steps is not nothing."""
    args = bank(lead, L, D, N, regular=True)
    return args | {"A": 0.1 * args["A"]}


CASES = {
    "linear_scan": (*OPS["linear_scan"], [{"D": 3}, {"D": 150}]),
    "linear_scan, reverse": (*OPS["linear_scan, reverse"], [{"D": 3}]),
    "linear_scan, last": (*OPS["linear_scan, last"], [{"D": 3}]),
    "scan2x2": (*OPS["scan2x2"], [{"D": 3}, {"D": 70}]),
    "selective_scan": (*SELECTIVE["selective_scan"], [{"D": 1, "N": 1}, {"D": 5, "N": 3}, {"D": 18, "N": 17}]),
    "ssd": (*SELECTIVE["ssd"], [{"H": 4, "P": 3, "G": 2, "N": 5}, {"H": 2, "P": 20, "G": 1, "N": 17}]),
    "causal_conv1d": (*SELECTIVE["causal_conv1d"], [{"D": 1, "K": 1}, {"D": 5, "K": 2}, {"D": 130, "K": 4}]),
    "diag_lti": (
        diag_lti,
        diag_lti_reference,
        regular_bank,
        {},
        [{"D": 9, "N": 3}, {"D": 3, "N": 18}],
    ),
}
SKIPPING = ("selective_scan", "ssd", "causal_conv1d")


def steps_of(name, L):
    found = {"reset": torch.rand(2, L) < 0.05}
    return found | {"mask": torch.rand(2, L) < 0.7} if name in SKIPPING else found


# one chunk of time on the small device wherever there are several lanes, several on the large one
@pytest.mark.parametrize(("multiprocessors", "L"), [(132, 1), (132, 67), (1, 35)])
@pytest.mark.parametrize(("name", "size"), [(name, i) for name in CASES for i in range(len(CASES[name][-1]))])
def test_values_and_gradients_equal_the_loop(name, size, multiprocessors, L, device):
    fast, plain, make, options, sizes = CASES[name]
    device(multiprocessors)
    args = make(L=L, **sizes[size])
    for steps in ({}, steps_of(name, L)):
        found, wanted = run(fast, args, options | steps), run(plain, args, options | steps)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["linear_scan", "scan2x2", "selective_scan", "ssd", "causal_conv1d", "diag_lti"])
def test_kernels_in_float32_equal_those_of_the_cpu(name, device, monkeypatch):
    """Numbers one by one here, registers of many there: the same arithmetic."""
    fast, _, make, options, sizes = CASES[name]
    args, steps = make(L=67, **sizes[-1]), steps_of(name, 67)
    found = run(fast, args, options | steps, torch.float32)
    monkeypatch.undo()
    if compiled.library().functions is None:
        pytest.skip(f"the compiled library is not in use: {compiled.library().reason}")
    for one, other in zip(found, run(fast, args, options | steps, torch.float32), strict=True):
        assert (one - other).abs().max() <= 5e-6 * other.abs().max() + 1e-7


@pytest.mark.parametrize("name", CASES)
def test_the_order_in_which_threads_run_does_not_matter(name, device):
    """No race, and sums in a fixed order: not a bit changes."""
    fast, _, make, options, sizes = CASES[name]
    args, steps = make(L=50, **sizes[-1]), steps_of(name, 50)
    found = []
    for order in (0, 1, 2):
        device(132, order)
        found.append(run(fast, args, options | steps))
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_scans_in_chunks(dtype, device):
    a, b, h = (torch.randn(*shape, dtype=torch.complex128) for shape in ((2, 99, 3), (2, 99, 3), (2, 3)))
    args = [(0.7 * a).to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), h.to(dtype).requires_grad_()]
    exact = [x.detach().to(torch.complex128).requires_grad_() for x in args]
    for steps in ({}, {"reset": torch.rand(2, 99) < 0.05}, {"reverse": True}):
        found, wanted = linear_scan(*args, **steps), linear_scan_reference(*exact, **steps)
        weight = torch.randn_like(wanted)
        pairs = [(found, wanted)]
        pairs += zip(
            torch.autograd.grad(found, args, weight.to(dtype)), torch.autograd.grad(wanted, exact, weight), strict=True
        )
        for one, other in pairs:
            assert (one - other).abs().max() <= 50 * torch.finfo(dtype).eps * other.abs().max()


def test_nothing_passes_a_reset_between_chunks(device):
    """Not even what is infinite: in the chunk of the reset the product of coefficients overflows."""
    args = scan(lead=(), L=99, D=2)
    a, b = args["a"].float(), args["b"].float()
    a[40:44] = 1e20
    b[:36] = float("inf")
    reset = torch.zeros(99, dtype=torch.bool)
    reset[60] = True
    found = linear_scan(a, b, reset=reset)
    torch.testing.assert_close(found[60:], linear_scan_reference(a[60:], b[60:]))
    assert not found[:60].isfinite().all()
    zeros = linear_scan(torch.full((99, 1), 1e3), torch.zeros(99, 1))
    assert (zeros == 0).all()


@pytest.mark.parametrize("shared", [False, True])
def test_a_coefficient_of_all_times_in_chunks(shared, device):
    a, b, h = (
        1 - 0.1 * torch.rand(1, 1 if shared else 3).double(),
        torch.randn(2, 300, 3).double(),
        torch.randn(3).double(),
    )
    args = {"a": a, "b": b, "initial": h}
    for one, other in zip(run(linear_scan, args, {}), run(linear_scan_reference, args, {}), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_many_groups_of_states_and_no_steps(device):
    """More states than one round has, and the final state of no step."""
    fast, plain, make, options, _ = CASES["selective_scan"]
    args = make(lead=(1,), L=40, D=2, N=40)
    for one, other in zip(run(fast, args, options), run(plain, args, options), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    for name in SKIPPING:
        fast, _, make, options, _ = CASES[name]
        args = {k: x.requires_grad_() for k, x in make(L=0).items()}
        out = fast(**args, **options)
        assert_same(out[1], args["initial"])
        for key, grad in zip(args, gradients(out, args.values()), strict=True):
            assert key == "initial" or (grad == 0).all()


# ------------------------------------------------------------------------------------------ the way there


SCAN = ("pyro_ssm_linear_scan_forward", 0)


def test_which_tensors_go_to_the_gpu(monkeypatch):
    there = SimpleNamespace(device=torch.device("cuda", 1))
    monkeypatch.setattr(cuda, "_reasons", {})
    if not torch.cuda.is_available():
        assert cuda.cuda_reason(0) == "no CUDA device" and engine.engine_of(there, *SCAN) is None
    status = {0: 0, 1: 209}
    functions = SimpleNamespace(pyro_ssm_cuda_usable=status.get, pyro_ssm_cuda_error=lambda error: b"no kernel image")
    monkeypatch.setattr(cuda, "_library", cuda.CudaLibrary(functions, ""))
    assert engine.engine_of(there, *SCAN) is None and "no kernel image" in cuda.cuda_reason(1)
    found = engine.engine_of(SimpleNamespace(device=torch.device("cuda", 0)), *SCAN)
    assert isinstance(found, cuda.CudaEngine) and found.device == torch.device("cuda", 0)
    monkeypatch.setattr(cuda, "_library", cuda.CudaLibrary(None, "not built"))
    assert engine.engine_of(SimpleNamespace(device=torch.device("cuda", 0)), *SCAN) is None


def test_operators_without_an_engine_are_torch(monkeypatch):
    """What a CUDA tensor meets where there is no library."""
    for module in ("pyro_ssm.ops.batched_operator", "pyro_ssm.ops.recurrence_kernel"):
        monkeypatch.setattr(f"{module}.engine_of", lambda *_: None)
    monkeypatch.setattr(compiled, "_library", compiled.Library(None, "switched off by the test", "", 0))
    for name in CASES:
        fast, plain, make, options, sizes = CASES[name]
        args = make(L=19, **sizes[0])
        for one, other in zip(run(fast, args, options), run(plain, args, options), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_refusal_of_cuda_is_an_error_that_says_so(device, monkeypatch):
    args = scan()
    monkeypatch.setattr(recurrence_kernel, "_CODES", dict.fromkeys(recurrence_kernel._CODES, 99))
    with pytest.raises(RuntimeError, match="linear_scan_forward: cpu cannot be used"):
        linear_scan(**args)


def test_the_library_of_this_machine_loads_without_a_device():
    if not cuda.PATH.exists():
        pytest.skip(f"{cuda.PATH.name} is not built: no nvcc")
    found = cuda.load_cuda(cuda.PATH)
    assert found.reason == ""
    check_layouts(found.functions)
    if not torch.cuda.is_available():
        status = found.functions.pyro_ssm_cuda_usable(0)
        assert status and found.functions.pyro_ssm_cuda_error(status)


def check_layouts(functions):
    sizes = {"linear_scan": recurrence_kernel.FIELDS}
    for name, operator, extra in (
        ("selective", SELECTIVE_SCAN, 10 + 4 + 12),
        ("convolve", CAUSAL_CONV1D, 5 + 3 + 6),
        ("diag_lti", DIAG_LTI, 5 + 4 + 7),
    ):
        sizes[name] = sum(3 if x.timed else 2 for x in operator.arguments) + extra
    for name, fields in sizes.items():
        size = getattr(functions, f"pyro_ssm_{name}_args_size")
        size.restype = ctypes.c_int64
        assert size() == 8 * fields


def test_layouts_agree_with_the_kernels(device):
    check_layouts(emulated_library())


def test_a_library_that_cannot_be_used_is_left_aside(tmp_path, monkeypatch):
    assert "not built" in cuda.load_cuda(tmp_path / "_cuda.so").reason
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    assert "could not be loaded" in cuda.load_cuda(broken).reason
    monkeypatch.setenv("PYRO_SSM_COMPILED", "0")
    assert "PYRO_SSM_COMPILED" in cuda._find(broken).reason


def test_pairs_of_one_matrix_in_chunks(device):
    matrix = 0.4 * torch.randn(1, 3, 2, 2).double()
    args = {"matrix": matrix, "drive": torch.randn(2, 99, 3, 2).double(), "initial": torch.randn(2, 3, 2).double()}
    plain = OPS["scan2x2"][1]
    for one, other in zip(run(scan2x2, args, {}), run(plain, args, {}), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
