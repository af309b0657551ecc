"""The compiled selective scan, its dual form and the short convolution equal their loops; so does plain torch."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.ops import (
    causal_conv1d,
    causal_conv1d_reference,
    compiled,
    selective_scan,
    selective_scan_reference,
    selective_torch,
    ssd,
    ssd_reference,
)
from pyro_ssm.ops.convolve_kernel import CAUSAL_CONV1D
from pyro_ssm.ops.selective_kernel import SELECTIVE_SCAN
from tests.ops.test_structured_scans import as_tuple, assert_same, duality, gradients, masks, rand, selective

HAS_LIBRARY = compiled.library().functions is not None
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason=f"no compiled library: {compiled.library().reason}")
LENGTHS = [1, 2, 3, 4, 15, 16, 17, 35]


def convolution(lead=(2,), L=7, D=3, K=4):
    return {"x": rand(*lead, L, D), "weight": rand(D, K), "bias": rand(D), "initial": rand(*lead, K - 1, D)}


OPS = {
    "selective_scan": (selective_scan, selective_scan_reference, selective, {"softplus": True}),
    "ssd": (ssd, ssd_reference, duality, {}),
    "causal_conv1d": (causal_conv1d, causal_conv1d_reference, convolution, {}),
}
#: sizes that fill registers, do not, or spread heads over registers
SIZES = {
    "selective_scan": [{"D": 1, "N": 1}, {"D": 5, "N": 3}, {"D": 3, "N": 9}, {"D": 16, "N": 16}, {"D": 35, "N": 9}],
    "ssd": [{"H": 4, "P": 3, "G": 2, "N": 5}, {"H": 3, "P": 16, "G": 1, "N": 8}, {"H": 2, "P": 20, "G": 2, "N": 9},
            {"H": 3, "P": 1, "G": 3, "N": 4}, {"H": 6, "P": 5, "G": 1, "N": 1}],
    "causal_conv1d": [{"D": 1, "K": 1}, {"D": 5, "K": 2}, {"D": 130, "K": 4}, {"D": 3, "K": 7}],
}  # fmt: skip
CASES = [(name, i) for name in OPS for i in range(len(SIZES[name]))]


@pytest.mark.parametrize(
    ("engine", "L"),
    [(engine, L) for engine in ("compiled", "CUDA") for L in LENGTHS]
    + [("torch", 1), ("torch", 17)]
    + [("emulated CUDA", 3), ("emulated CUDA", 66)],
    indirect=["engine"],
)
@pytest.mark.parametrize(("name", "size"), CASES)
def test_values_and_gradients_equal_the_loop(name, size, L, engine):
    fast, plain, make, options = OPS[name]
    lead = (2,) if L % 2 else (9,)  # few rows are cut into parts, many are not
    steps = {"reset": torch.rand(*lead, L) < 0.3, "mask": torch.rand(*lead, L) < 0.7}
    for given in ({}, steps):
        args = {k: x.requires_grad_() for k, x in make(lead=lead, L=L, **SIZES[name][size]).items()}
        found, wanted = fast(**args, **options, **given), plain(**args, **options, **given)
        assert_same(found, wanted)
        for one, other in zip(gradients(found, args.values()), gradients(wanted, args.values()), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        with torch.no_grad():  # the way of plain calls, twice: checked, and by the plan of the first
            for _ in range(2):
                assert_same(fast(**args, **options, **given), wanted)


@pytest.mark.parametrize("drop", ["D", "z", "dt_bias", "gap", "initial"])
@pytest.mark.parametrize("softplus", [False, True])
def test_each_part_may_be_absent(drop, softplus, engine):
    args = {k: x.requires_grad_() for k, x in selective(L=19).items() if k != drop}
    found, wanted = (f(**args, softplus=softplus) for f in (selective_scan, selective_scan_reference))
    assert_same(found, wanted, 1e-10)
    for one, other in zip(gradients(found, args.values()), gradients(wanted, args.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", OPS)
def test_the_gradient_of_one_result_or_argument_alone(name):
    fast, plain, make, options = OPS[name]
    args = make(L=18)
    for which in (0, 1):
        for wanted in args:
            given = {k: x.clone().requires_grad_(k == wanted) for k, x in args.items()}
            out = [f(**given, **options)[which].square().sum() for f in (fast, plain)]
            if not out[1].requires_grad:
                assert not out[0].requires_grad or torch.autograd.grad(out[0], given[wanted])[0].abs().max() == 0
                continue
            grads = [torch.autograd.grad(x, given[wanted], allow_unused=True)[0] for x in out]
            if grads[1] is None:
                assert grads[0] is None or grads[0].abs().max() == 0
            else:
                torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPS)
def test_first_and_second_derivatives_with_masks(name):
    fast, _, make, options = OPS[name]
    small = {"selective_scan": {"D": 2, "N": 2}, "ssd": {"H": 2, "P": 2, "G": 1, "N": 2}, "causal_conv1d": {"D": 2}}
    args = make(lead=(1,), L=3, **small[name])
    steps = {"mask": torch.tensor([True, False, True]), "reset": torch.tensor([False, False, True])}
    names, values = list(args), [x.requires_grad_() for x in args.values()]

    def f(*inputs):
        return fast(**dict(zip(names, inputs, strict=True)), **options, **steps)

    assert gradcheck(f, values, check_batched_grad=True)
    assert gradgradcheck(f, values)


@pytest.mark.parametrize("L", [1, 21])
@pytest.mark.parametrize("name", OPS)
def test_leading_dims_broadcast_as_in_a_loop(name, L, engine):
    """Draws of parameters (3, 1, ...) against series (2, ...), non-contiguous, one argument shared."""
    fast, _, make, options = OPS[name]
    args = make(lead=(2,), L=L)
    timeless = {"selective_scan": ("A", "D", "dt_bias"), "ssd": ("A", "D"), "causal_conv1d": ("weight", "bias")}[name]
    drawn = {k: torch.stack([x, 0.5 * x, 2 * x]) if k in timeless else x for k, x in args.items()}
    given = {k: x[:, None, None] if k in timeless else x.mT.contiguous().mT for k, x in drawn.items()}
    given["initial"] = given["initial"][0]  # without the batch
    given = {k: x.requires_grad_() for k, x in given.items()}
    found = fast(**given, **options)
    alone = [
        fast(**{k: x[i] if k in timeless else x for k, x in drawn.items()} | {"initial": args["initial"][0]}, **options)
        for i in range(3)
    ]
    assert_same(found, tuple(torch.stack(parts) for parts in zip(*alone, strict=True)))
    for grad, x in zip(gradients(found, given.values()), given.values(), strict=True):
        assert grad.shape == x.shape


@pytest.mark.parametrize("name", OPS)
def test_steps_are_the_sequence(name, engine):
    fast, _, make, options = OPS[name]
    args = make(L=20)
    whole = fast(**args, **options)
    timed = {"u", "dt", "B", "C", "z", "gap", "x"}
    state, outputs = args["initial"], []
    for t in range(20):
        part = {k: x[:, t : t + 1] if k in timed else x for k, x in args.items()} | {"initial": state}
        y, state = fast(**part, **options)
        outputs.append(y)
    assert_same((torch.cat(outputs, 1), state), whole)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [{"lead": (0,)}, {"L": 0}])
def test_no_series_and_no_steps(name, shape, engine):
    fast, _, make, options = OPS[name]
    args = {k: x.requires_grad_() for k, x in make(**shape).items()}
    found = fast(**args, **options)
    if shape.get("L") == 0:
        assert_same(found[1], args["initial"])
    grads = gradients(found, args.values())
    assert [g.shape for g in grads] == [x.shape for x in args.values()]
    assert all(g.abs().sum() == 0 for k, g in zip(args, grads, strict=True) if k != "initial")


@pytest.mark.parametrize("name", OPS)
def test_all_steps_masked(name, engine):
    """Whatever the arguments hold, the state stands exactly still and no gradient but the state's is there."""
    fast, _, make, options = OPS[name]
    args = make(L=18)
    timed = [k for k in args if k in ("u", "dt", "B", "C", "z", "gap", "x")]
    dirty = {k: (torch.full_like(x, float("nan")) if k in timed else x).requires_grad_() for k, x in args.items()}
    y, final = fast(**dirty, **options, mask=torch.zeros(2, 18, dtype=torch.bool))
    assert (y == 0).all() and torch.equal(final, args["initial"])
    for k, grad in zip(dirty, gradients((y, final), dirty.values()), strict=True):
        assert (grad == 0).all() or k == "initial"


@needs_library
@pytest.mark.parametrize("name", OPS)
def test_long_series(name, monkeypatch):
    """65 537 steps: compiled = torch, and float32 within 1e-5 of float64, gradients too (relative to the largest)."""
    fast, _, make, options = OPS[name]
    small = {"selective_scan": {"D": 2, "N": 3}, "ssd": {"H": 2, "P": 2, "G": 1, "N": 2}, "causal_conv1d": {"D": 2}}
    args = {k: x.requires_grad_() for k, x in make(lead=(1,), L=65537, **small[name]).items()}
    found = fast(**args, **options)
    grads = gradients(found, args.values())
    low = {k: x.detach().float().requires_grad_() for k, x in args.items()}
    single = fast(**low, **options)
    low_grads = gradients(tuple(x.double() for x in single), low.values())
    for one, other in zip((*single, *low_grads), (*found, *grads), strict=True):
        error = float(((one.double() - other).abs().max() / other.abs().max()).detach())
        assert error < 1e-5, error
    monkeypatch.setattr(compiled, "_library", compiled.Library(None, "switched off by the test", "", 0))
    with torch.no_grad():
        assert_same(found, fast(**args, **options), 1e-9)


@pytest.mark.parametrize("name", ["selective_scan", "ssd"])
def test_what_is_kept_is_linear_in_time_and_not_all_states(name):
    """Nothing of L * D * N is kept for the backward pass."""
    fast, _, make, options = OPS[name]
    L = 512
    sizes = {"selective_scan": {"D": 32, "N": 16}, "ssd": {"H": 2, "P": 16, "G": 1, "N": 16}}[name]
    kept = []
    args = {k: x.requires_grad_() for k, x in make(lead=(1,), L=L, **sizes).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        y, _ = fast(**args, **options)
    assert max(kept) <= L * 32 * 16 // 16
    y.sum().backward()


@needs_library
@pytest.mark.parametrize("name", ["selective_scan", "causal_conv1d"])  # ssd is the same operator
def test_registered_operators(name):
    fast, _, make, options = OPS[name]
    operator = CAUSAL_CONV1D if name == "causal_conv1d" else SELECTIVE_SCAN
    taken = {}

    def take(*arguments):
        taken["arguments"] = operator._flat(arguments)[0]
        return original(*arguments)

    original, operator.run = operator.run, take
    try:
        fast(**{k: x.requires_grad_() for k, x in make(L=19).items()}, **options, **masks("ssd", (2,), 19))
    finally:
        del operator.run
    arguments = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
                 for x in taken["arguments"]]  # fmt: skip
    torch.library.opcheck(getattr(torch.ops.pyro_ssm, operator.name), (*arguments, True))


@needs_library
@pytest.mark.parametrize("name", OPS)
def test_compiled_graphs(name):
    fast, _, make, options = OPS[name]
    args = {k: x.requires_grad_() for k, x in make(L=19).items()}
    steps = masks("ssd", (2,), 19)

    def f(**given):
        y, final = fast(**given, **options, **steps)
        return y * 2, final

    graph = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    found, wanted = graph(**args), f(**args)
    assert_same(found, wanted)
    for one, other in zip(gradients(found, args.values()), gradients(wanted, args.values()), strict=True):
        torch.testing.assert_close(one, other)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", OPS)
def test_halves_are_computed_in_float32(name, engine):
    fast, _, make, options = OPS[name]
    args = {k: x.to(torch.bfloat16) for k, x in make(L=40).items()}
    exact = fast(**{k: x.double() for k, x in args.items()}, **options)
    args = {k: x.requires_grad_() for k, x in args.items()}
    y, final = fast(**args, **options)
    assert y.dtype == torch.bfloat16
    assert (final.double() - exact[1]).abs().max() < 1e-5 * exact[1].abs().max()
    assert (y.double() - exact[0]).abs().max() < 2**-8 * exact[0].abs().max()
    for grad in torch.autograd.grad(y.float().square().sum(), list(args.values())):
        assert grad.dtype == torch.bfloat16
    with torch.autocast(y.device.type, dtype=torch.bfloat16):  # nothing is narrowed
        again = fast(**{k: x.float() for k, x in args.items()}, **options)
    assert again[0].dtype == torch.float32
    assert (again[0].double() - exact[0]).abs().max() < 1e-5 * exact[0].abs().max()


@pytest.mark.parametrize("masked", [False, True])
def test_the_loop_of_plain_torch(masked, monkeypatch):
    """Without library and graph, many states a step: a loop."""
    monkeypatch.setattr(compiled, "_library", compiled.Library(None, "switched off by the test", "", 0))
    monkeypatch.setattr(selective_torch, "_LOOPED_LANES", 1)
    args = selective(lead=(2,), L=9)
    steps = masks("ssd", (2,), 9) if masked else {}
    assert_same(
        selective_scan(**args, softplus=True, **steps), selective_scan_reference(**args, softplus=True, **steps)
    )
    drawn = selective_scan(**args | {"A": torch.stack([args["A"], 2 * args["A"]])[:, None, None]}, **steps)
    assert_same(tuple(x[0] for x in drawn), selective_scan(**args, **steps))


def test_wrong_arguments_are_told_before_a_kernel_runs():
    args, dual, conv = selective(L=6), duality(L=6), convolution(L=6)
    half = torch.ones(2, 5, dtype=torch.bool)
    for f, given, change, error, match in (
        (selective_scan, args, {"z": args["z"][:, :5]}, ValueError, "`z` must be .* time = 6, as `u` has it"),
        (selective_scan, args, {"D": rand(4)}, ValueError, "`D` must be"),
        (selective_scan, args, {"D": rand(2, 6, 3)}, ValueError, "size of 1 for time"),
        (selective_scan, args, {"dt_bias": rand(2)}, ValueError, "`dt_bias` must be"),
        (selective_scan, args, {"initial": rand(2, 3, 5)}, ValueError, "`initial` must be"),
        (selective_scan, args, {"gap": rand(2, 5)}, ValueError, "`gap` must be"),
        (selective_scan, args, {"gap": args["gap"].float()}, TypeError, "`gap` is torch.float32"),
        (selective_scan, args, {"u": args["u"].long()}, TypeError, "`u` must be real"),
        (selective_scan, args, {"z": args["z"].to("meta")}, ValueError, "`z` is on meta"),
        (ssd, dual, {"mask": half}, ValueError, "`mask` must be"),
        (ssd, dual, {"A": rand(3)}, ValueError, "`A` must be"),
        (ssd, dual, {"D": dual["D"].float()}, TypeError, "`D` is torch.float32"),
        (ssd, dual, {"initial": rand(2, 4, 3, 6)}, ValueError, "`initial` must be"),
        (causal_conv1d, conv, {"mask": half}, ValueError, "`mask` must be"),
        (causal_conv1d, conv, {"bias": rand(4)}, ValueError, "`bias` must be"),
        (causal_conv1d, conv, {"weight": conv["weight"].float()}, TypeError, "`weight` is torch.float32"),
        (causal_conv1d, conv, {"reset": torch.ones(2, 6)}, TypeError, "`reset` must be boolean"),
    ):
        with pytest.raises(error, match=match):
            f(**given | change)


def test_a_long_window_has_no_kernel_and_is_right():
    args = convolution(L=90, K=70)
    assert_same(as_tuple(causal_conv1d(**args)), causal_conv1d_reference(**args))
