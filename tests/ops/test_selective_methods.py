"""The selective scan by each of its methods: equal to the loop, and to the equation that a method stands for."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.ops import compiled, selective_scan, selective_scan_reference
from pyro_ssm.ops.selective_kernel import SELECTIVE_SCAN
from tests.ops.test_structured_scans import assert_same, gradients, selective

METHODS = ["zoh", "bilinear"]
needs_library = pytest.mark.skipif(
    compiled.library().functions is None, reason=f"no compiled library: {compiled.library().reason}"
)


@pytest.mark.parametrize(
    ("engine", "L"),
    [("compiled", L) for L in (1, 2, 3, 4, 17, 35)] + [("torch", 1), ("torch", 17), ("emulated CUDA", 5), ("CUDA", 35)],
    indirect=["engine"],
)
@pytest.mark.parametrize("size", [{"D": 1, "N": 1}, {"D": 5, "N": 3}, {"D": 16, "N": 16}, {"D": 70, "N": 9}])
@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients_equal_the_loop(method, size, L, engine):
    lead = (2,) if L % 2 else (9,)
    steps = {"reset": torch.rand(*lead, L) < 0.3, "mask": torch.rand(*lead, L) < 0.7}
    for given in ({}, steps):
        args = {k: x.requires_grad_() for k, x in selective(lead=lead, L=L, **size).items()}
        found, wanted = (
            f(**args, softplus=True, method=method, **given) for f in (selective_scan, selective_scan_reference)
        )
        assert_same(found, wanted)
        for one, other in zip(gradients(found, args.values()), gradients(wanted, args.values()), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            for _ in range(2):
                assert_same(selective_scan(**args, softplus=True, method=method, **given), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_first_and_second_derivatives_with_masks(method):
    args = selective(lead=(1,), L=3, D=2, N=2)
    args["dt"] = args["dt"] * torch.tensor([1e-7, 1.0, 1.0], dtype=torch.float64)[:, None]  # near 0 too
    steps = {"mask": torch.tensor([True, False, True]), "reset": torch.tensor([False, False, True])}
    names, values = list(args), [x.requires_grad_() for x in args.values()]

    def f(*inputs):
        return selective_scan(**dict(zip(names, inputs, strict=True)), method=method, **steps)

    assert gradcheck(f, values, check_batched_grad=True)
    assert gradgradcheck(f, values)


@pytest.mark.parametrize("engine", ["compiled", "torch"], indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_steps_are_the_sequence_and_a_step_of_zero_is_none(method, engine):
    args = selective(L=20, D=5)
    args["gap"][:, 7] = 0
    whole = selective_scan(**args, method=method, softplus=True)
    state, outputs = args["initial"], []
    for t in range(20):
        part = {k: x[:, t : t + 1] if k in ("u", "dt", "B", "C", "z", "gap") else x for k, x in args.items()}
        y, after = selective_scan(**part | {"initial": state}, method=method, softplus=True)
        assert t != 7 or torch.equal(after, state)
        state = after
        outputs.append(y)
    assert_same((torch.cat(outputs, 1), state), whole)


@pytest.mark.parametrize("engine", ["compiled", "torch"], indirect=True)
def test_zero_order_hold_is_exact_for_an_input_that_holds(engine):
    """Cutting each step into five of the same input changes nothing, however large the steps."""
    args = selective(L=6, D=3, extras=False)
    args["dt"] = args["dt"].exp()
    _, wanted = selective_scan(**args, method="zoh")
    fine = {k: x if k == "A" else x.repeat_interleave(5, 1) for k, x in args.items()}
    fine["dt"] = fine["dt"] / 5
    assert_same(selective_scan(**fine, method="zoh")[1], wanted, 1e-11)
    coarse = selective_scan(**args)[1]
    assert (coarse - wanted).abs().max() > 1e-2  # Mamba's own method is not exact


@pytest.mark.parametrize("engine", ["compiled", "torch"], indirect=True)
def test_bilinear_is_the_trapezoidal_rule(engine):
    """h' - h = step (A (h + h') / 2 + B u), for one step."""
    args = selective(L=1, D=3)
    h = args["initial"]
    plain = {k: args[k] for k in ("u", "dt", "A", "B", "C", "initial")}
    _, after = selective_scan(**plain, method="bilinear")
    step = args["dt"][:, 0, :, None]
    slope = args["A"] * (h + after) / 2 + args["B"][:, 0, None, :] * args["u"][:, 0, :, None]
    assert_same(after - h, step * slope)


@pytest.mark.parametrize("engine", ["compiled", "torch"], indirect=True)
@pytest.mark.parametrize("method", ["euler", *METHODS])
def test_float32_is_as_good_near_zero_as_elsewhere(method, engine):
    """Steps times rates from 1e-9 to 30: values and gradients within 1e-5 of float64, relative to the largest."""
    args = selective(L=24, D=16)
    args["dt"] = 10 ** torch.linspace(-9, 1.5, 24, dtype=torch.float64)[:, None].expand(2, 24, 16)
    args["A"] = -torch.rand(16, 4, dtype=torch.float64) - 0.1
    for k in ("gap", "dt_bias"):
        del args[k]
    for t in range(24):  # each step by itself: large ones would hide the others
        exact = {k: x[:, t : t + 1] if k in ("u", "dt", "B", "C", "z") else x for k, x in args.items()}
        low = {k: x.float().requires_grad_() for k, x in exact.items()}
        exact = {k: x.detach().double().requires_grad_() for k, x in low.items()}
        out, wanted = (selective_scan(**given, method=method) for given in (low, exact))
        # in float32 torch knows (e^x - 1) / x to rounding, its slope (e^x - w) / x only to 1e-5 near its series' end
        grads = zip(
            gradients(tuple(x.double() for x in out), low.values()), gradients(wanted, exact.values()), strict=True
        )
        limit = 1e-5 if engine == "torch" else 2e-6
        for one, other in [*zip(out, wanted, strict=True), *grads]:
            error = float(((one.double() - other).abs().max() / other.abs().max()).detach())
            assert error < limit, (t, error)


@needs_library
@pytest.mark.parametrize("method", METHODS)
def test_no_tensor_of_all_states_and_graphs(method):
    args = {k: x.requires_grad_() for k, x in selective(lead=(1,), L=64, D=32, N=16).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        selective_scan(**args, method=method)
    assert max(kept) <= 64 * 32 * 16 // 16
    flat, _ = SELECTIVE_SCAN._flat(
        [args[k] for k in ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "gap")]
        + [None, None, args["initial"], True, 1, 1 + METHODS.index(method)]
    )
    flat = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in flat]
    torch.library.opcheck(torch.ops.pyro_ssm.selective_scan, (*flat, True))

    graph = torch.compile(
        lambda **a: selective_scan(**a, softplus=True, method=method), fullgraph=True, backend="aot_eager"
    )
    found, wanted = graph(**args), selective_scan(**args, softplus=True, method=method)
    assert_same(found, wanted)
    for one, other in zip(gradients(found, args.values()), gradients(wanted, args.values()), strict=True):
        torch.testing.assert_close(one, other)
    torch._dynamo.reset()


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"`method` must be 'euler', 'zoh' or 'bilinear', got 'tustin'"):
        selective_scan(**selective(), method="tustin")
