"""The library behind the selective scan: its functions, threads, instruction sets, layouts and plans."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pyro_ssm.ops import compiled, selective_scan, selective_scan_reference
from pyro_ssm.ops.convolve_kernel import CAUSAL_CONV1D
from pyro_ssm.ops.diag_bank import DIAG_LTI
from pyro_ssm.ops.gap_bank import GAP_BANK
from pyro_ssm.ops.low_rank_bank import LOW_RANK_BANK
from pyro_ssm.ops.selective_kernel import SELECTIVE_SCAN
from tests.ops.test_selective_scan import OPS
from tests.ops.test_structured_scans import assert_same, gradients, selective

pytestmark = pytest.mark.skipif(
    compiled.library().functions is None, reason=f"no compiled library: {compiled.library().reason}"
)


def test_elementary_functions_are_within_units_in_the_last_place():
    """exp within 2, softplus and the logistic function within 4."""
    for dtype, wide, low, high in ((np.float32, np.float64, -87, 88), (np.float64, np.longdouble, -708, 709)):
        x = np.concatenate([np.linspace(low, high, 200001), np.linspace(-2, 2, 100001), [0.0]]).astype(dtype)
        exact = x.astype(wide)
        soft = np.where(exact > 20, exact, np.logaddexp(exact, 0))
        for what, wanted in enumerate((np.exp(exact), 1 / (1 + np.exp(-exact)), soft)):
            error = units(elementwise(what, x), wanted)
            assert error.max() <= (2 if what == 0 else 4), (dtype, what, float(error.max()))
        y = np.concatenate([np.geomspace(1e-30, 1, 100001), np.linspace(0, 40, 100001)]).astype(dtype)
        assert units(elementwise(3, y, np.ones_like(y)), -np.expm1(-y.astype(wide))).max() <= 4
        np.testing.assert_array_equal(elementwise(3, y, 2 * y), 2 * y * elementwise(3, y, np.ones_like(y)))
        ends = np.array([-np.inf, -1e30, 1e30, np.inf, np.nan, 0.0], dtype=dtype)
        np.testing.assert_array_equal(elementwise(0, ends), np.array([0, 0, np.inf, np.inf, np.nan, 1], dtype=dtype))


def elementwise(what, x, other=None):
    out, other = np.empty_like(x), x if other is None else other
    fields = [int(x.dtype == np.float64), what, len(x), 0, x.ctypes.data, other.ctypes.data, out.ctypes.data]
    assert compiled.library().functions.pyro_ssm_elementwise(ctypes.byref((ctypes.c_int64 * 7)(*fields))) == 0
    return out


def units(found, wanted):
    """Errors in units in the last place, of normal numbers."""
    normal = wanted > 2 * np.finfo(found.dtype).tiny
    return np.abs(found - wanted)[normal] / np.spacing(wanted[normal].astype(found.dtype))


def everything(threads=1):
    """Results and gradients of all operators in float32."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        for fast, _, make, options in OPS.values():
            args = {k: x.float().requires_grad_() for k, x in make(L=37, lead=(2,)).items()}
            out = fast(**args, **options)
            found += [*(x.detach() for x in out), *gradients(tuple(x.double() for x in out), args.values())]
        return found
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_does_not_matter():
    for one, other in zip(everything(1), everything(2), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "base"])
def test_instruction_sets_agree(isa, tmp_path):
    script = (
        "import sys\nimport torch\nfrom pyro_ssm.ops import compiled\n"
        "from tests.ops.test_selective_kernels import everything\n"
        "torch.save([compiled.library().isa, everything()], sys.argv[1])"
    )
    environment = os.environ | {"PYRO_SSM_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "x.pt")], check=True, env=environment)
    used, found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert used in (isa, "base")
    for one, other in zip(found, everything(), strict=True):
        assert (one - other).abs().max() <= 2e-6 * other.abs().max() + 1e-6


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at its first forward-mode call
def test_a_plan_is_used_only_where_it_holds(monkeypatch):
    args = selective(L=1)
    run = SELECTIVE_SCAN.run
    calls = []
    monkeypatch.setattr(SELECTIVE_SCAN, "run", lambda *given: (calls.append(1), run(*given))[1])
    SELECTIVE_SCAN.plans.clear()
    wanted = selective_scan(**args)
    assert_same(selective_scan(**args), wanted)
    assert len(calls) == 1
    assert_same(selective_scan(**args | {"u": 2 * args["u"]}), selective_scan_reference(**args | {"u": 2 * args["u"]}))
    assert len(calls) == 1  # other numbers, the same plan
    assert not torch.equal(selective_scan(**args, softplus=True)[0], wanted[0]) and len(calls) == 2
    y, _ = selective_scan(**args | {"u": args["u"].requires_grad_()})
    assert y.requires_grad and len(calls) == 3
    args["u"].requires_grad_(False)
    strided = args | {"u": args["u"].repeat(1, 1, 2)[..., ::2].contiguous().mT.contiguous().mT}
    assert_same(selective_scan(**strided), selective_scan_reference(**strided))
    found = torch.func.vmap(lambda u: selective_scan(**args | {"u": u})[0])(torch.stack([args["u"]] * 2))
    assert_same(found, torch.stack([wanted[0]] * 2))
    tangent = torch.func.jvp(lambda u: selective_scan(**args | {"u": u})[0], (args["u"],), (args["u"],))[1]
    assert tangent.abs().sum() > 0
    monkeypatch.setattr(compiled, "_library", compiled.Library(None, "switched off by the test", "", 0))
    before = len(calls)
    assert_same(selective_scan(**args), wanted)
    assert len(calls) == before + 1


def test_a_negated_view_is_read_with_its_sign():
    """The imaginary part of a conjugate shares its memory with the sign changed."""
    args = selective(L=5)
    view = torch.complex(torch.zeros_like(args["u"]), -args["u"]).conj().imag
    assert view.is_neg()
    wanted = selective_scan(**args)
    for _ in range(2):
        assert_same(selective_scan(**args | {"u": view}), wanted)
    y, _ = selective_scan(**args | {"u": args["u"].requires_grad_()})
    outer = torch.complex(torch.zeros_like(y), -torch.ones_like(y)).conj().imag
    found, wanted = (torch.autograd.grad(y, args["u"], g, retain_graph=True) for g in (outer, torch.ones_like(y)))
    assert_same(found, wanted)


def test_layouts_agree_with_the_library():
    functions = compiled.library().functions
    for name, operator, extra in (
        ("selective", SELECTIVE_SCAN, 10 + 4 + 12),
        ("convolve", CAUSAL_CONV1D, 5 + 3 + 6),
        ("diag_lti", DIAG_LTI, 5 + 4 + 7),
        ("low_rank_bank", LOW_RANK_BANK, 6 + 4 + 9),
        ("gap_bank", GAP_BANK, 6 + 4 + 8),
    ):
        strides = sum(3 if x.timed else 2 for x in operator.arguments)
        size = getattr(functions, f"pyro_ssm_{name}_args_size")
        size.restype = ctypes.c_int64
        assert size() == 8 * (strides + extra)
