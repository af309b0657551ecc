"""Banks of diagonal systems with one step for all times: the compiled scan, the convolution and the loop agree."""

from importlib import import_module

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.ops import compiled, diag_lti, diag_lti_reference
from pyro_ssm.ops.diag_bank import DIAG_LTI, bank_is_compiled, diag_bank

needs_library = pytest.mark.skipif(compiled.library().functions is None, reason="the compiled library is not in use")


def bank(lead=(2,), L=70, D=5, N=3, dtype=torch.float64):
    z = dtype.to_complex()
    return {
        "u": torch.randn(*lead, L, D, dtype=dtype),
        "step": torch.rand(1, D, dtype=dtype) / 3,
        "A": torch.complex(-torch.randn(D, N, dtype=dtype).exp(), torch.randn(D, N, dtype=dtype)),
        "B": torch.randn(D, N, dtype=z),
        "C": torch.randn(D, N, dtype=z),
        "initial": torch.randn(*lead, D, N, dtype=z),
    }


def results(f, args, **options):
    inputs = [x.detach().requires_grad_() for x in args.values()]
    y, final = f(**dict(zip(args, inputs, strict=True)), **options)
    torch.manual_seed(3)
    doubles = [torch.complex128 if x.is_complex() else torch.float64 for x in (y, final)]  # one draw for all dtypes
    weights = [torch.randn(x.shape, dtype=double).to(x.dtype) for x, double in zip((y, final), doubles, strict=True)]
    found = torch.autograd.grad((y, final), inputs, weights, allow_unused=True, materialize_grads=True)
    return [y, final, *found]


def close(found, wanted, relative):
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        if other.numel():
            assert (one - other).abs().max() <= relative * other.abs().max()


def loop(u, a, b, C, initial, reset):
    """The bank as its equation says."""
    h = torch.zeros((), dtype=a.dtype) if initial is None else initial
    outputs = []
    for t in range(u.shape[-2]):
        h = h if reset is None else h * ~reset[..., t, None, None]
        h = a * h + b * u[..., t, :, None]
        outputs.append((C * h).sum(-1).real)
    return torch.stack(torch.broadcast_tensors(*outputs), -2), h


@pytest.mark.parametrize("D", [1, 5, 16, 21])
@pytest.mark.parametrize("L", [1, 2, 64, 65, 131])
@pytest.mark.parametrize("resets", [False, True])
def test_is_the_loop(engine, D, L, resets):
    for method, lead, N in (("zoh", (3,), 3), ("bilinear", (), 2), ("zoh", (2, 2), 1)):
        reset = torch.rand(*lead, L) < 0.1 if resets else None
        args = bank(lead, L, D, N)
        wanted = results(diag_lti_reference, args, reset=reset, method=method)
        close(results(diag_lti, args, reset=reset, method=method), wanted, 1e-11)


@needs_library
def test_coefficients_that_each_series_has_of_its_own():
    """Leading dims of parameters, crossed; channels that are not contiguous; what is shared has one gradient."""
    torch.manual_seed(0)
    a = 0.5 * torch.randn(3, 1, 5, 2, dtype=torch.complex128)
    b, C = torch.randn(5, 2, dtype=torch.complex128), torch.randn(4, 5, 2, dtype=torch.complex128).conj()
    u = torch.randn(5, 9, 4, dtype=torch.float64).permute(2, 1, 0)
    initial, reset = torch.randn(3, 1, 1, 2, dtype=torch.complex128).expand(3, 1, 5, 2), torch.rand(3, 1, 9) < 0.2
    inputs = [x.detach().requires_grad_() for x in (u, a, b, C, initial)]
    found, wanted = diag_bank(*inputs, reset), loop(*inputs, reset)
    close(found, wanted, 1e-13)
    weights = [torch.randn_like(x) for x in wanted]
    close(*(torch.autograd.grad(x, inputs, weights) for x in (found, wanted)), 1e-12)
    many = [x.expand(2, 1, 2, 1, 2, 1, 2, *x.shape) for x in (u[0, :3], b)]
    crossed = a.reshape(1, 3, 1, 1, 1, 1, 1, 5, 2)
    few = (many[0], crossed, many[1], b, None, None)
    close(diag_bank(*few), loop(*few), 1e-13)


def test_derivatives(engine):
    args = bank((2,), 4, 2, 2)
    names, values = list(args), [x.requires_grad_() for x in args.values()]
    reset = torch.tensor([False, False, True, False])

    def f(*x):
        return diag_lti(**dict(zip(names, x, strict=True)), reset=reset)

    assert gradcheck(f, values) and gradgradcheck(f, values)


def test_transforms_and_graphs(engine):
    args = bank((3,), 9)
    u, rest = args.pop("u"), {k: x for k, x in args.items() if k != "initial"}
    wanted = torch.func.grad(lambda u: diag_lti_reference(u, **rest)[0].sin().sum())(u)
    f = torch.func.grad(lambda u: diag_lti(u, **rest)[0].sin().sum())
    torch.testing.assert_close(f(u), wanted)
    torch.testing.assert_close(torch.func.vmap(f)(u), wanted)
    graph = torch.compile(lambda u: diag_lti(u, **rest)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(graph(u), diag_lti(u, **rest)[0])


@needs_library
@pytest.mark.parametrize("reset", [None, torch.rand(2, 70) < 0.1])
def test_registered_operator(reset):
    """Schema, shapes without data, gradients, graphs of any size: torch's own checks."""
    args = bank()
    given = [args["u"], *(torch.view_as_real(0.2 * args[k])[None] for k in "ABC"), torch.view_as_real(args["initial"])]
    given = [*(x.detach().requires_grad_() for x in given), reset]
    torch.library.opcheck(torch.ops.pyro_ssm.diag_lti, (*given, True))
    single = [x.detach().float() for x in given[:4]]
    torch.library.opcheck(torch.ops.pyro_ssm.diag_lti, (*single, None, reset, False))


@needs_library
@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_of_a_graph(dynamic):
    args = {k: x.requires_grad_() for k, x in bank().items()}
    reset = torch.rand(2, 70) < 0.1

    def f(**given):
        y, final = diag_lti(**given, reset=reset)
        return y * 2, final

    graph = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    close(results(graph, args), results(f, args), 1e-12)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at its first forward-mode call
def test_forward_mode_and_nested_transforms(engine):
    args = bank((), 9, 2, 2)
    tangents = {k: torch.randn_like(x) for k, x in args.items()}

    def of(f):
        return lambda given: f(**given)

    found, wanted = (torch.func.jvp(of(f), (args,), (tangents,)) for f in (diag_lti, diag_lti_reference))
    for one, other in zip(found, wanted, strict=True):
        close(one, other, 1e-12)
    u = torch.randn(3, *args["u"].shape, dtype=torch.float64)
    rest = {k: x for k, x in args.items() if k != "u"}
    hessians = [
        torch.func.vmap(torch.func.hessian(lambda u, f=f: f(u, **rest)[0].square().sum()))(u)
        for f in (diag_lti, diag_lti_reference)
    ]
    close(hessians[:1], hessians[1:], 1e-12)


@pytest.mark.parametrize("mode", [None, "convolution"])
def test_halves_are_computed_in_float32(engine, mode):
    exact = bank()
    low = {k: x.to(torch.complex64) if x.is_complex() else x.to(torch.bfloat16) for k, x in exact.items()}
    wide = {k: x.to(torch.complex128) if x.is_complex() else x.double() for k, x in low.items()}
    inputs = {k: x.detach().requires_grad_() for k, x in low.items()}
    y, final = diag_lti(**inputs, mode=mode)
    wanted = diag_lti(**wide)
    assert y.dtype == torch.bfloat16 and final.dtype == torch.complex64
    assert (final - wanted[1]).abs().max() < 1e-5 * wanted[1].abs().max()
    assert (y.double() - wanted[0]).abs().max() < 2**-8 * wanted[0].abs().max()
    for x, grad in zip(inputs.values(), torch.autograd.grad(y.float().square().sum(), inputs.values()), strict=True):
        assert grad.dtype == x.dtype
    with torch.autocast(y.device.type, dtype=torch.bfloat16):  # nothing is narrowed
        again = diag_lti(**{k: x if x.is_complex() else x.float() for k, x in low.items()}, mode=mode)
    assert again[0].dtype == torch.float32
    assert (again[0].double() - wanted[0]).abs().max() < 1e-5 * wanted[0].abs().max()


def test_precisions_may_differ(engine):
    args = bank()
    for of_u, of_A in ((torch.float32, torch.complex128), (torch.float64, torch.complex64)):
        given = {k: x.to(of_A if x.is_complex() else of_u) for k, x in args.items()}
        wide = {k: x.to(torch.complex128) if x.is_complex() else x.double() for k, x in given.items()}
        for one, other in zip(diag_lti(**given), diag_lti_reference(**wide), strict=True):
            assert (one - other).abs().max() < 1e-5 * other.abs().max()


@pytest.mark.parametrize("L", [65536, 65537])
def test_single_precision_of_a_long_series(engine, L):
    """Outputs to 1e-4 of the largest: slow modes lose what their coefficients were rounded by."""
    args = bank((), L, 2, 2)
    args["A"] = torch.complex(torch.full((2, 2), -0.01), torch.randn(2, 2)).to(torch.complex128)
    args = {k: x.to(torch.float32 if not x.is_complex() else torch.complex64) for k, x in args.items()}
    double = {k: x.to(torch.float64 if not x.is_complex() else torch.complex128) for k, x in args.items()}
    for single, exact in zip(diag_lti(**args), diag_lti(**double), strict=True):
        assert (single - exact).abs().max() < 1e-4 * exact.abs().max()


def test_pieces_are_the_whole(engine):
    args = bank(L=100)
    whole = diag_lti(**args)
    y1, state = diag_lti(**args | {"u": args["u"][:, :37]})
    y2, state = diag_lti(**args | {"u": args["u"][:, 37:], "initial": state})
    close((torch.cat([y1, y2], 1), state), whole, 1e-12)
    assert diag_lti(**args | {"u": args["u"][:, :0]})[1].equal(args["initial"])
    assert diag_lti(**args | {"u": args["u"][:0], "initial": None})[0].shape == (0, 100, 5)


@needs_library
def test_the_way_is_the_one_expected(monkeypatch):
    def refuse(*args):
        raise AssertionError("the torch path was taken")

    module = import_module("pyro_ssm.ops.diag_lti")
    monkeypatch.setattr(module, "diagonal_scan", refuse)
    monkeypatch.setattr(module, "_convolution", refuse)
    args = bank()
    assert bank_is_compiled(DIAG_LTI, args["u"])
    diag_lti(**args, reset=torch.rand(70) < 0.1)
    with pytest.raises(AssertionError):
        diag_lti(**args, mode="convolution")


# ------------------------------------------------------------------------------------------ steps that differ


def uneven(lead=(2,), L=70, D=5, N=3, dtype=torch.float64):
    """Steps of many sizes, some of them 0, and fast phases."""
    args = bank(lead, L, D, N, dtype)
    args["A"] = torch.complex(args["A"].real, 20 * args["A"].imag)
    step = 3 * torch.rand(*lead, L, D, dtype=dtype) ** 4
    return {**args, "step": step * (torch.rand(*lead, L, D) < 0.8)}


@pytest.mark.parametrize("D", [1, 5, 16, 21])
@pytest.mark.parametrize("L", [1, 2, 64, 65, 131])
@pytest.mark.parametrize("resets", [False, True])
def test_steps_that_differ_are_the_loop(engine, D, L, resets):
    for method, lead, N in (("zoh", (3,), 3), ("bilinear", (), 2), ("zoh", (2, 2), 1)):
        reset = torch.rand(*lead, L) < 0.1 if resets else None
        args = uneven(lead, L, D, N)
        wanted = results(diag_lti_reference, args, reset=reset, method=method)
        close(results(diag_lti, args, reset=reset, method=method), wanted, 1e-10)
        close(results(diag_lti, args, reset=reset, method=method, mode="scan"), wanted, 1e-10)


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_derivatives_where_steps_differ(engine, method):
    args = bank((2,), 4, 2, 2)
    args["step"] = torch.rand(2, 4, 2, dtype=torch.float64)
    names, values = list(args), [x.requires_grad_() for x in args.values()]
    reset = torch.tensor([False, False, True, False])

    def f(*x):
        return diag_lti(**dict(zip(names, x, strict=True)), reset=reset, method=method)

    assert gradcheck(f, values) and gradgradcheck(f, values)


@needs_library
def test_coefficients_of_its_own_where_steps_differ():
    a, z = uneven((4,), 9, 5, 2), torch.complex128
    a["A"], a["C"] = a["A"] * torch.rand(3, 1, 1, 1, 1).double().add(0.5), torch.randn(4, 1, 5, 2, dtype=z)
    a["u"], a["initial"] = a["u"].mT.contiguous().mT, torch.randn(3, 4, 5, 2, dtype=z)
    found, wanted = (results(diag_lti, a, mode=mode) for mode in (None, "scan"))
    close(found, wanted, 1e-11)


def test_a_step_of_nothing_leaves_a_state_and_an_eigenvalue_of_0_is_an_integral(engine):
    args = uneven(L=9)
    still = dict(args, step=torch.zeros_like(args["step"]))
    assert diag_lti(**still)[1].equal(args["initial"])
    args["A"][:, 0] = 0
    close(results(diag_lti, args), results(diag_lti_reference, args), 1e-11)


@needs_library
@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_single_precision_of_short_and_of_long_steps(method):
    """From 1e-6 of the time of a state to a hundred turns a step."""
    for scale in (1e-6, 1e-3, 1.0, 10.0):
        args = uneven((), 3000, 3, 2)
        args["step"] = scale * args["step"]
        single = {k: x.to(torch.complex64 if x.is_complex() else torch.float32) for k, x in args.items()}
        double = {k: x.to(torch.complex128 if x.is_complex() else torch.float64) for k, x in single.items()}
        for one, other in zip(
            diag_lti(**single, method=method), diag_lti_reference(**double, method=method), strict=True
        ):
            assert (one - other).abs().max() < 1e-5 * max(scale, 1) * other.abs().max()


@needs_library
def test_no_tensor_of_time_times_states_where_steps_differ():
    L, D, N = 1024, 32, 32
    args = {k: x.requires_grad_() for k, x in uneven((1,), L, D, N, torch.float32).items()}
    kept = []
    with (
        torch.profiler.profile(profile_memory=True) as seen,
        torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x),
    ):
        diag_lti(**args)[0].square().sum().backward()
    assert max(kept) == L * D * N * 2 // 64
    assert max(event.self_cpu_memory_usage for event in seen.events()) <= 4 * max(kept)
