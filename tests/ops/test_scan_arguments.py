"""Every scan tells which argument does not fit before it computes; halves and autocast change nothing else."""

import pytest
import torch

from pyro_ssm import ops
from tests.ops.test_selective_scan import convolution
from tests.ops.test_structured_scans import duality, rand, selective


def c(*shape):
    return torch.complex(rand(*shape), rand(*shape))


def stable(D=3, N=4):
    return torch.complex(-rand(D, N).exp(), rand(D, N))


def dense(lead=(2,), L=6, D=3, N=4):
    return {"u": rand(*lead, L, D), "A": rand(D, N, N) / 4, "B": rand(D, N), "C": rand(D, N),
            "initial": rand(*lead, D, N), "kernel": rand(L, D)}  # fmt: skip


def low_rank(lead=(2,), L=6, D=3, N=4, timed=False):
    step = rand(*lead, L, D).exp() / 9 if timed else rand(*lead, D).exp() / 9
    return {"u": rand(*lead, L, D), "step": step, "eigenvalues": stable(D, N), "P": c(D, N, 1), "B": c(D, N),
            "C": c(D, N), "initial": c(*lead, D, N), "reset": torch.zeros(*lead, L, dtype=torch.bool)}  # fmt: skip


def diagonal(lead=(2,), L=6, D=3, N=4):
    return {"u": rand(*lead, L, D), "step": rand(*lead, L, D).exp(), "A": stable(D, N), "B": c(D, N), "C": c(D, N),
            "initial": c(*lead, D, N), "reset": torch.zeros(*lead, L, dtype=torch.bool)}  # fmt: skip


def kernel(D=3, N=4):
    return {"A": stable(D, N), "B": c(D, N), "C": c(D, N), "step": rand(D).exp(), "length": 6}


def dplr(D=3, N=4):
    return {"eigenvalues": stable(D, N), "P": c(D, N, 1), "B": c(D, N), "C": c(D, N), "step": rand(D).exp() / 9,
            "length": 6}  # fmt: skip


def masked(make):
    def made(**sizes):
        args = make(**sizes)
        return args | {key: torch.ones(2, sizes.get("L", 7), dtype=torch.bool) for key in ("mask", "reset")}

    return made


#: of each function: its arguments, those that may have any size in a last dim, and those that set the sizes of others
SCANS = {
    "selective_scan": (masked(selective), {}),
    "ssd": (masked(duality), {"B": "groups"}),
    "causal_conv1d": (masked(convolution), {}),
    "dense_lti": (dense, {}),
    "dplr_scan": (lambda: low_rank(timed=True), {"P": "the rank"}),
    "dplr_lti": (low_rank, {"P": "the rank"}),
    "diag_lti": (diagonal, {}),
    "ssm_kernel": (kernel, {}),
    "dplr_kernel": (dplr, {"P": "the rank"}),
    "cauchy": (lambda: {"v": c(4), "poles": c(4), "nodes": c(6)}, {"nodes": "any number"}),
    "fft_conv": (lambda: {"u": rand(2, 6, 3), "kernel": rand(6, 3)}, {}),
}
TENSORS = [(name, key) for name, (make, _) in SCANS.items() for key, x in make().items() if torch.is_tensor(x)]


def call(name, args):
    return getattr(ops, name)(**args)


@pytest.mark.parametrize("name", SCANS)
def test_arguments_that_fit_are_taken(name):
    call(name, SCANS[name][0]())


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_the_argument_of_another_size_or_kind_is_named(name, key):
    """A last dim one longer; the wrong numbers; a list; another device; a batch that does not broadcast."""
    make, free = SCANS[name]
    args = make()
    x = args[key]

    def refused(error, given, match=rf"^{name}: .*`{key}`"):
        with pytest.raises(error, match=match):
            call(name, args | {key: given})

    longer = torch.cat([x, x[..., :1]], -1)
    if key in free:
        call(name, args | {key: x})
    else:
        any_other = rf"^{name}: .*must (be|divide)"  # where this argument sets a size, the others do not fit
        refused(ValueError, longer, any_other)
    refused(TypeError, (x.real if x.is_complex() else x).to(torch.int64))
    refused(TypeError, x.tolist(), rf"^{name}: `{key}` must be a tensor, got list")
    if x.dtype is torch.bool:
        refused(TypeError, x.double())
    elif name != "dense_lti" or key in ("u", "kernel"):
        refused(TypeError, x.real if x.is_complex() else x.to(torch.complex128))
    refused(ValueError, x.to("meta"), rf"^{name}: `\w+` is on")
    batched = [k for k, v in args.items() if torch.is_tensor(v) and v.shape[:1] == (2,)]
    if key in batched and len(batched) > 1:
        refused(ValueError, torch.cat([x, x[:1]]), rf"^{name}: the leading dims .* of `\w+` do not broadcast")


def test_fewer_dims_are_told():
    with pytest.raises(ValueError, match=r"selective_scan: `u` must be \(\.\.\., time, D\), got shape \(6,\)"):
        ops.selective_scan(**selective(L=6) | {"u": rand(6)})


@pytest.mark.parametrize("length", [-1, 0])
def test_a_length_that_is_no_length(length):
    with pytest.raises(ValueError, match="`length` must be at least 1"):
        ops.dplr_kernel(**dplr() | {"length": length})
    if length < 0:
        with pytest.raises(ValueError, match="`length` must not be negative"):
            ops.ssm_kernel(**kernel() | {"length": length})


NARROW = ["dense_lti", "dplr_scan", "dplr_lti", "diag_lti", "fft_conv"]


def narrowed(args, dtype):
    """Inputs in a half, parameters in single precision."""
    single = {torch.float64: torch.float32, torch.complex128: torch.complex64}
    single = {key: x.to(single.get(x.dtype, x.dtype)) for key, x in args.items()}
    return single | {"u": single["u"].to(dtype)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NARROW)
def test_halves_are_computed_in_float32(name, dtype):
    args = narrowed(SCANS[name][0](), dtype)
    found, wanted = call(name, args), call(name, args | {"u": args["u"].float()})
    found, wanted = (x if isinstance(x, tuple) else (x,) for x in (found, wanted))
    assert found[0].dtype is dtype
    torch.testing.assert_close(found[0], wanted[0].to(dtype), rtol=0, atol=0)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", NARROW)
def test_autocast_narrows_nothing(name):
    args = narrowed(SCANS[name][0](), torch.float32)
    wanted = call(name, args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(name, args)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dplr_scan", "dplr_lti"])
@pytest.mark.parametrize("wide", ["u", "C", "initial"])
def test_one_double_makes_all_double(name, wide):
    args = narrowed(SCANS[name][0](), torch.float32)
    double = {key: x.to(torch.complex128 if x.is_complex() else torch.float64) if key != "reset" else x
              for key, x in args.items()}  # fmt: skip
    found, wanted = call(name, args | {wide: double[wide]}), call(name, double)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
