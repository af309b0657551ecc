"""The selective scan, state-space duality, banks of diagonal systems and pairs: each equal to its plain loop."""

from importlib import import_module

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.ops import (
    diag_lti,
    diag_lti_reference,
    linear_scan,
    linear_scan_reference,
    scan2x2,
    scan2x2_reference,
    selective_scan,
    selective_scan_reference,
    ssd,
    ssd_reference,
)


@pytest.fixture(autouse=True)
def states(request, monkeypatch):
    """Small problems keep their states; a case "recomputed" computes them again, as large problems do."""
    case = getattr(request.node, "callspec", None)
    if case is not None and str(case.params.get("name")).endswith("recomputed"):
        monkeypatch.setattr(import_module("pyro_ssm.ops.recompute"), "_KEPT_ELEMENTS", 0)


LENGTHS = [1, 2, 7, 131]


def rand(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def selective(lead=(2,), L=7, D=3, N=4, extras=True, dtype=torch.float64):
    args = {
        "u": rand(*lead, L, D),
        "dt": rand(*lead, L, D),
        "A": -rand(D, N).exp(),
        "B": rand(*lead, L, N),
        "C": rand(*lead, L, N),
    }
    if extras:
        args |= {"D": rand(D), "z": rand(*lead, L, D), "dt_bias": rand(D), "initial": rand(*lead, D, N)}
        args |= {"gap": rand(*lead, L).exp()}
    return {name: x.to(dtype) for name, x in args.items()}


def duality(lead=(2,), L=7, H=4, P=3, G=2, N=5):
    return {
        "x": rand(*lead, L, H, P),
        "dt": rand(*lead, L, H).exp(),
        "A": -rand(H).exp(),
        "B": rand(*lead, L, G, N),
        "C": rand(*lead, L, G, N),
        "D": rand(H),
        "initial": rand(*lead, H, P, N),
    }


def bank(lead=(2,), L=7, D=3, N=4, regular=False):
    return {
        "u": rand(*lead, L, D),
        "step": rand(D).exp().expand(1, D).clone() if regular else rand(*lead, L, D).exp(),
        "A": torch.complex(-rand(D, N).exp(), rand(D, N)),
        "B": rand(D, N, dtype=torch.complex128),
        "C": rand(D, N, dtype=torch.complex128),
        "initial": rand(*lead, D, N, dtype=torch.complex128),
    }


def pairs(lead=(2,), L=7, D=3):
    return {
        "matrix": 0.5 * rand(*lead, L, D, 2, 2),
        "drive": rand(*lead, L, D, 2),
        "initial": rand(*lead, D, 2),
    }


def scan(lead=(2,), L=7, D=3):
    return {"a": 0.6 * rand(*lead, L, D), "b": rand(*lead, L, D), "initial": rand(*lead, D)}


OPS = {
    "linear_scan": (linear_scan, linear_scan_reference, scan, {}),
    "linear_scan, reverse": (linear_scan, linear_scan_reference, scan, {"reverse": True}),
    "linear_scan, last": (linear_scan, linear_scan_reference, scan, {"last": True}),
    "scan2x2": (scan2x2, scan2x2_reference, pairs, {}),
    "selective_scan": (selective_scan, selective_scan_reference, selective, {"softplus": True}),
    "selective_scan, recomputed": (selective_scan, selective_scan_reference, selective, {"softplus": True}),
    "ssd": (ssd, ssd_reference, duality, {}),
    "diag_lti, recomputed": (diag_lti, diag_lti_reference, bank, {"method": "zoh"}),
    "diag_lti": (diag_lti, diag_lti_reference, bank, {"method": "zoh"}),
    "diag_lti, bilinear": (diag_lti, diag_lti_reference, bank, {"method": "bilinear"}),
}
SKIPPING = ("selective_scan", "selective_scan, recomputed", "ssd")


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def assert_same(found, wanted, tolerance=1e-11):
    for one, other in zip(as_tuple(found), as_tuple(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def gradients(outputs, inputs, seed=0):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    total = 0.0
    for out in as_tuple(outputs):
        weight = torch.randn(out.shape, dtype=torch.float64, generator=generator)
        total = total + (out * weight).real.sum()
    return torch.autograd.grad(total, list(inputs), materialize_grads=True)


def masks(name, lead, L):
    """Steps at which a sequence begins anew, and steps that count."""
    found = {"reset": torch.rand(*lead, L) < 0.3}
    if name in SKIPPING:
        found["mask"] = torch.rand(*lead, L) < 0.7
    return found


@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("name", OPS)
def test_values_and_gradients_equal_the_reference(name, L):
    fast, plain, make, options = OPS[name]
    for steps in ({}, masks(name, (2,), L)):
        args = {k: x.requires_grad_() for k, x in make(L=L).items()}
        found, wanted = fast(**args, **options, **steps), plain(**args, **options, **steps)
        assert_same(found, wanted)
        for one, other in zip(gradients(found, args.values()), gradients(wanted, args.values()), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPS)
def test_first_and_second_derivatives(name):
    fast, _, make, options = OPS[name]
    small = {"ssd": {"H": 2, "P": 1, "G": 1, "N": 2}, "linear_scan": {"D": 2}, "scan2x2": {"D": 2}}
    args = make(lead=(), L=3, **small.get(name.split(",")[0], {"D": 1, "N": 2}))
    names, values = list(args), [x.requires_grad_() for x in args.values()]

    def f(*inputs):
        return fast(**dict(zip(names, inputs, strict=True)), **options)

    assert gradcheck(f, values)
    assert gradgradcheck(f, values)


@pytest.mark.parametrize(
    "name", ["linear_scan", "scan2x2", "selective_scan, recomputed", "ssd", "diag_lti, recomputed"]
)
def test_second_derivatives_over_several_chunks(name, monkeypatch):
    for module, constant, value in (
        ("recompute", "_CHUNK_ELEMENTS", 1),
        ("recompute", "_SHORTEST_CHUNK", 2),
        ("selective_torch", "_CHUNK", {"cpu": 2}),
    ):
        monkeypatch.setattr(import_module(f"pyro_ssm.ops.{module}"), constant, value)
    fast, plain, make, options = OPS[name]
    args = {k: x.requires_grad_() for k, x in make(L=5).items()}
    found = []
    for f in (fast, plain):
        outputs = f(**args, **options)
        first = sum(out.abs().square().sum() for out in as_tuple(outputs))
        grads = torch.autograd.grad(first, list(args.values()), create_graph=True)
        found.append(torch.autograd.grad(sum(g.abs().square().sum() for g in grads), list(args.values())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-7)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at its first forward-mode call
@pytest.mark.parametrize("name", OPS)
def test_forward_mode_and_vmap(name):
    fast, plain, make, options = OPS[name]
    args = make(lead=(), L=5)
    names, values = list(args), tuple(args.values())
    tangents = tuple(torch.randn_like(x) for x in values)

    def of(f):
        return lambda *inputs: as_tuple(f(**dict(zip(names, inputs, strict=True)), **options))

    found, wanted = (torch.func.jvp(of(f), values, tangents) for f in (fast, plain))
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other)
    batch = tuple(torch.stack([x, 1.5 * x]) for x in values)
    each = [of(fast)(*(x[i] for x in batch)) for i in range(2)]
    assert_same(torch.func.vmap(of(fast))(*batch), tuple(torch.stack(parts) for parts in zip(*each, strict=True)))

    def loss(*inputs):
        return sum(out.abs().square().sum() for out in of(fast)(*inputs))

    grads = torch.func.vmap(torch.func.grad(loss, argnums=0))(*batch)
    alone = torch.stack([torch.func.grad(loss, argnums=0)(*(x[i] for x in batch)) for i in range(2)])
    assert_same(grads, alone, 1e-9)


@pytest.mark.parametrize("name", [n for n in OPS if n.split(",")[0] != "linear_scan" and n != "scan2x2"])
def test_chunked_calls_are_one_call(name):
    fast, _, make, options = OPS[name]
    args = make(L=11)
    whole = fast(**args, **options)
    timed = {"u", "dt", "B", "C", "z", "gap", "x", "step"} if "diag" not in name else {"u", "step"}
    pieces, state = [], args["initial"]
    for at in (slice(0, 1), slice(1, 8), slice(8, 11)):
        part = {k: (x[:, at] if k in timed else x) for k, x in args.items()} | {"initial": state}
        y, state = fast(**part, **options)
        pieces.append(y)
    assert_same((torch.cat(pieces, 1), state), whole)


@pytest.mark.parametrize("name", SKIPPING)
def test_skipped_steps_are_not_there(name):
    """Removing the skipped steps changes nothing, and what they hold (NaN) neither; nor their gradient."""
    fast, _, make, options = OPS[name]
    args = make(lead=(), L=9)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0], dtype=torch.bool)
    timed = [k for k in args if k in ("u", "dt", "B", "C", "z", "gap", "x")]
    dirty = {
        k: (x.masked_fill(~mask.reshape(-1, *[1] * (x.dim() - 1)), float("nan")) if k in timed else x).requires_grad_()
        for k, x in args.items()
    }
    removed = {k: (x[mask] if k in timed else x) for k, x in args.items()}
    y, final = fast(**dirty, **options, mask=mask)
    short, wanted = fast(**removed, **options)
    assert_same((y[mask], final), (short, wanted))
    assert (y[~mask] == 0).all()
    clean = {k: x.detach().requires_grad_() for k, x in args.items()}
    short, wanted = fast(**{k: (x[mask] if k in timed else x) for k, x in clean.items()}, **options)
    total, total_wanted = (out.square().sum() + last.square().sum() for out, last in ((y, final), (short, wanted)))
    found = torch.autograd.grad(total, dirty.values(), materialize_grads=True)
    assert_same(found, torch.autograd.grad(total_wanted, clean.values(), materialize_grads=True))


@pytest.mark.parametrize("name", OPS)
def test_a_reset_is_a_fresh_sequence(name):
    fast, _, make, options = OPS[name]
    args = make(L=8)
    reset = torch.zeros(8, dtype=torch.bool)
    reset[5] = True
    found = as_tuple(fast(**args, **options, reset=reset))
    timed = {"diag_lti": ("u", "step")}.get(
        name.split(",")[0], ("a", "b", "matrix", "drive", "u", "dt", "z", "gap", "x")
    )
    timed = (*timed, "B", "C") if "diag" not in name else timed
    at = slice(0, 5) if options.get("reverse") else slice(5, 8)
    if options.get("reverse"):
        reset[5], reset[4] = False, True
        found = as_tuple(fast(**args, **options, reset=reset))
    part = {k: (x[:, at] if k in timed else x) for k, x in args.items() if k != "initial"}
    alone = as_tuple(fast(**part, **options))
    first = found[0] if options.get("last") else found[0][:, at]
    torch.testing.assert_close(first, alone[0], rtol=1e-12, atol=1e-12)
    if len(found) > 1:
        torch.testing.assert_close(found[1], alone[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPS)
def test_an_empty_batch_and_no_steps(name):
    fast, _, make, options = OPS[name]
    for out in as_tuple(fast(**make(lead=(0,)), **options)):
        assert out.shape[0] == 0
    empty = as_tuple(fast(**make(L=0), **options))
    if len(empty) > 1:
        assert empty[0].shape[1] == 0 and empty[1].shape[0] == 2


def test_non_contiguous_and_broadcast_arguments():
    args = selective(lead=(2, 3), L=6)
    odd = {k: x.transpose(0, -1).contiguous().transpose(0, -1) for k, x in args.items()}
    odd["B"] = args["B"][:, :1]
    odd["gap"] = args["gap"][0, 0]
    full = odd | {"B": odd["B"].expand(args["B"].shape), "gap": odd["gap"].expand(2, 3, 6)}
    assert_same(selective_scan(**odd), selective_scan_reference(**full))


def test_parameters_with_leading_dims_broadcast_over_series():
    """Drawn values carry a time axis: (draws, 1, 1, D, N) against u (series, time, D)."""
    args = selective(lead=(2,), L=6, extras=False)
    A = -rand(5, 1, 1, 3, 4).exp()
    found = selective_scan(**args | {"A": A})
    for k in range(5):
        assert_same(tuple(x[k] for x in found), selective_scan(**args | {"A": A[k, 0, 0]}))


def test_duality_is_the_selective_scan_with_scalar_decay():
    args = duality(G=1, L=70)
    lead, L, H, P = (2,), 70, 4, 3
    y, final = ssd(**args)
    wanted, state = selective_scan(
        args["x"].flatten(-2),
        args["dt"].repeat_interleave(P, -1),
        args["A"].repeat_interleave(P).unsqueeze(-1).expand(H * P, 5),
        args["B"].squeeze(-2),
        args["C"].squeeze(-2),
        args["D"].repeat_interleave(P),
        initial=args["initial"].flatten(-3, -2),
    )
    assert y.shape == (*lead, L, H, P)
    assert_same((y.flatten(-2), final.flatten(-3, -2)), (wanted, state))


@pytest.mark.parametrize("L", [1, 2, 9, 64, 200])
@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_convolution_is_the_recurrence(L, method):
    args = {k: x.requires_grad_() for k, x in bank(L=L, regular=True).items()}
    found, wanted = (diag_lti(**args, method=method, mode=mode) for mode in ("convolution", "scan"))
    assert_same(found, wanted, 1e-10)
    for one, other in zip(gradients(found, args.values()), gradients(wanted, args.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_a_step_of_zero_leaves_the_state_exactly():
    for name, zero in (("selective_scan", "gap"), ("diag_lti", "step")):
        fast, _, make, options = OPS[name]
        args = make(L=4)
        args[zero] = torch.zeros_like(args[zero])
        assert torch.equal(fast(**args, **options)[1], args["initial"])


def test_memory_of_the_backward_pass_is_linear_in_the_boundary_states():
    """No tensor of L * D * N elements is kept."""
    L, D, N = 512, 32, 16
    args = {k: x.requires_grad_() for k, x in selective(lead=(1,), L=L, D=D, N=N).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        y, _ = selective_scan(**args, softplus=True)
    assert max(kept) <= L * D * N // 16
    y.sum().backward()


@pytest.mark.parametrize("L", [65536, 65537])
def test_float32_against_float64_over_long_series(L):
    single = {"L": L, "lead": (1,), "D": 2}
    cases = [
        (selective_scan, selective(**single, N=4), {"softplus": True}),
        (diag_lti, bank(**single, N=4), {}),
        (diag_lti, bank(**single, N=4, regular=True), {"mode": "convolution"}),
        (ssd, duality((1,), L, H=2, P=1, G=1, N=2), {}),
        (linear_scan, {"a": 1 - 1e-3 * torch.rand(L, 2).double(), "b": rand(L, 2)}, {}),
    ]
    for f, args, options in cases:
        exact = as_tuple(f(**args, **options))
        low = {k: x.to(torch.complex64 if x.is_complex() else torch.float32) for k, x in args.items()}
        for one, other in zip(as_tuple(f(**low, **options)), exact, strict=True):
            error = (one - other).abs().max() / other.abs().max()
            assert error < 1e-5, (f.__name__, float(error))


def test_half_precision_accumulates_in_float32():
    a, b = torch.full((1, 2), 0.999), rand(4000, 2).float()
    exact = linear_scan(a.double().to(torch.bfloat16).double(), b.to(torch.bfloat16).double())
    found = linear_scan(a.to(torch.bfloat16), b.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() < 2**-8 * exact.abs().max()


def test_what_does_not_fit_is_refused():
    args = selective(L=6)
    for change, error, match in (
        ({"dt": args["dt"][:, :5]}, ValueError, "`dt`"),
        ({"A": args["A"][:2]}, ValueError, "`A`"),
        ({"B": args["B"][..., :3]}, ValueError, "`B`"),
        ({"C": args["C"].float()}, TypeError, "`C` is torch.float32"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, "`mask` must be"),
        ({"reset": torch.ones(2, 6)}, TypeError, "`reset` must be boolean"),
    ):
        with pytest.raises(error, match=match):
            selective_scan(**args | change)
    with pytest.raises(ValueError, match="must divide the 4 heads"):
        ssd(**duality(G=3))
    with pytest.raises(ValueError, match="one step for all times"):
        diag_lti(**bank(), mode="convolution")
    with pytest.raises(ValueError, match="`reset` must be"):
        linear_scan(rand(5, 2), rand(5, 2), reset=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="channels, 2, 2"):
        scan2x2(rand(5, 2, 2), rand(5, 2, 2))
