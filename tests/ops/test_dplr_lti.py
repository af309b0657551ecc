"""Systems that are diagonal plus low rank, with one step for all times: compiled scan, convolution and loop agree."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import profile

from pyro_ssm.ops import NormalPlusLowRank, compiled, dplr_lti, dplr_scan_reference
from pyro_ssm.ops.dplr_step import both, dplr_matrices, dplr_step
from pyro_ssm.ops.low_rank_bank import low_rank_bank
from tests.ops.test_diag_bank import close, results

needs_library = pytest.mark.skipif(compiled.library().functions is None, reason="the compiled library is not in use")


def system(lead=(2,), L=70, D=5, N=3, r=1, dtype=torch.float64):
    z = dtype.to_complex()
    return {
        "u": torch.randn(*lead, L, D, dtype=dtype),
        "step": torch.rand(D, dtype=dtype) / 3 + 0.1,
        "eigenvalues": torch.complex(-torch.randn(D, N, dtype=dtype).exp(), 3 * torch.randn(D, N, dtype=dtype)),
        "P": torch.randn(D, N, r, dtype=z),
        "B": torch.randn(D, N, dtype=z),
        "C": torch.randn(D, N, dtype=z),
        "initial": torch.randn(*lead, D, N, dtype=z),
    }


def loop(u, step, *rest, reset=None, **named):
    return dplr_scan_reference(u, step.expand(u.shape[-2:]), *rest, **named, reset=reset)


def bank_loop(u, a, b, C, W, Q, initial, reset):
    """:func:`low_rank_bank` as its equation says."""
    h = torch.zeros((), dtype=a.dtype) if initial is None else initial
    outputs = []
    for t in range(u.shape[-2]):
        h = h if reset is None else h * ~reset[..., t, None, None]
        coupled = (Q * h.unsqueeze(-2)).sum(-1).real  # (..., D, r)
        h = a * h + b * u[..., t, :, None] - (W * coupled.unsqueeze(-1)).sum(-2)
        outputs.append((C * h).sum(-1).real)
    return torch.stack(torch.broadcast_tensors(*outputs), -2), h


def hippo_system(lead, L, D=3, size=64):
    form, single = NormalPlusLowRank.of("legs", size), torch.complex64
    parts = {"eigenvalues": form.eigenvalues, "P": form.P, "B": form.B}
    parts = {k: x.to(single).expand(D, *x.shape).clone() for k, x in parts.items()}
    step, C = torch.logspace(-3, -1, D), torch.randn(D, size // 2, dtype=single)
    return {"u": torch.randn(*lead, L, D), "step": step, **parts, "C": C}


def in_double(args):
    return {k: x.to(torch.complex128 if x.is_complex() else torch.float64) for k, x in args.items()}


@pytest.mark.parametrize("rank", [1, 2])
def test_the_step_is_the_dense_one(rank):
    args = system(r=rank)
    parts = {k: args[k].requires_grad_() for k in ("eigenvalues", "P", "B", "step")}
    wanted, driven = dplr_matrices(**parts)
    found = dplr_step(**parts)
    h = torch.randn(5, 3, dtype=torch.complex128)
    moved = found.a * h - (found.W * (found.Q @ h.unsqueeze(-1)).real).sum(-2)
    moved_by_dense = (wanted @ both(h).unsqueeze(-1)).squeeze(-1)[:, :3]
    close((moved, found.b), (moved_by_dense, driven[:, :3]), 1e-13)
    A, b = found.dense()
    real = torch.cat([h.real, h.imag], -1)
    close(((A @ real.unsqueeze(-1)).squeeze(-1), b), (torch.cat([x.real, x.imag], -1) for x in (moved, found.b)), 1e-13)


@pytest.mark.parametrize("D", [1, 5, 17])
@pytest.mark.parametrize("L", [1, 2, 9, 32, 33, 97])
@pytest.mark.parametrize("resets", [False, True])
def test_is_the_loop(engine, D, L, resets):
    for rank, lead, N in ((1, (3,), 3), (2, (), 2), (1, (2, 2), 1)):
        reset = torch.rand(*lead, L) < 0.1 if resets else None
        args = system(lead, L, D, N, rank)
        wanted = results(loop, args, reset=reset)
        close(results(dplr_lti, args, reset=reset), wanted, 1e-11)
        close(results(dplr_lti, args, reset=reset, mode="scan"), wanted, 1e-11)
        if not resets:
            close(results(dplr_lti, args, mode="convolution"), wanted, 1e-10)


@needs_library
def test_coefficients_that_each_series_has_of_its_own():
    """Leading dims of parameters, crossed; channels that are not contiguous; what is shared has one gradient."""
    z = torch.complex128
    a, b, C = 0.3 * torch.randn(3, 1, 5, 2, dtype=z), torch.randn(5, 2, dtype=z), torch.randn(4, 5, 2, dtype=z).conj()
    W, Q = 0.3 * torch.randn(5, 2, 2, dtype=z), torch.randn(3, 1, 5, 2, 2, dtype=z).mT
    u = torch.randn(5, 9, 4, dtype=torch.float64).permute(2, 1, 0)
    initial, reset = torch.randn(3, 1, 1, 2, dtype=z).expand(3, 1, 5, 2), torch.rand(3, 1, 9) < 0.2
    inputs = [x.detach().requires_grad_() for x in (u, a, b, C, W, Q, initial)]
    found, wanted = low_rank_bank(*inputs, reset), bank_loop(*inputs, reset)
    close(found, wanted, 1e-13)
    weights = [torch.randn_like(x) for x in wanted]
    close(*(torch.autograd.grad(x, inputs, weights) for x in (found, wanted)), 1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_derivatives(engine, rank):
    args = system((2,), 4, 2, 2, rank)
    names, values = list(args), [x.requires_grad_() for x in args.values()]
    reset = torch.tensor([False, False, True, False])

    def f(*x):
        return dplr_lti(**dict(zip(names, x, strict=True)), reset=reset)

    assert gradcheck(f, values) and gradgradcheck(f, values)


def test_transforms_and_graphs(engine):
    args = system((3,), 9)
    u, rest = args.pop("u"), {k: x for k, x in args.items() if k != "initial"}
    initial = torch.zeros(5, 3, dtype=torch.complex128)
    wanted = torch.func.grad(lambda u: loop(u, **rest, initial=initial)[0].sin().sum())(u)
    f = torch.func.grad(lambda u: dplr_lti(u, **rest)[0].sin().sum())
    torch.testing.assert_close(f(u), wanted)
    torch.testing.assert_close(torch.func.vmap(f)(u), wanted)
    graph = torch.compile(lambda u: dplr_lti(u, **rest)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(graph(u), dplr_lti(u, **rest)[0])


@needs_library  # the convolution of plain torch is off by up to three times as much
@pytest.mark.parametrize("L", [1001, 20000])
def test_single_precision_of_hippo(L):
    """64 states of HiPPO-LegS in float32: outputs, states and gradients to 1e-4 of the largest."""
    args = hippo_system((1,), L)
    close(
        (x.to(torch.complex128 if x.is_complex() else torch.float64) for x in results(dplr_lti, args)),
        results(dplr_lti, in_double(args)),
        1e-4,
    )


def test_pieces_are_the_whole(engine):
    args = system(L=100)
    whole = dplr_lti(**args)
    y1, state = dplr_lti(**args | {"u": args["u"][:, :37]})
    y2, state = dplr_lti(**args | {"u": args["u"][:, 37:], "initial": state})
    close((torch.cat([y1, y2], 1), state), whole, 1e-11)
    assert dplr_lti(**args | {"u": args["u"][:, :0]})[1].equal(args["initial"])
    assert dplr_lti(**args | {"u": args["u"][:0], "initial": None})[0].shape == (0, 100, 5)


@needs_library
def test_no_tensor_of_time_times_states():
    """Neither made, forward or backward, nor kept: the largest has as many elements as states before each 32 steps."""
    L, D, size = 1024, 32, 64
    args = {k: x.requires_grad_() for k, x in hippo_system((1,), L, D, size).items()}
    kept = []
    with (
        profile(profile_memory=True) as seen,
        torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x),
    ):
        y, final = dplr_lti(**args)
        (y.square().sum() + final.abs().square().sum()).backward()
    assert max(kept) == L * D * size // 32
    largest = max(event.self_cpu_memory_usage for event in seen.events())
    assert L * D * 4 <= largest <= max(L * D * size // 32, D * size**2) * 4


def test_a_way_that_is_not_there_is_refused(monkeypatch):
    args, reset = system(), torch.zeros(70, dtype=torch.bool)
    for options, error, match in (
        ({"mode": "fft"}, ValueError, "`mode` must be"),
        ({"mode": "convolution", "reset": reset}, ValueError, "no reset"),
        ({"reset": reset.float()}, TypeError, "`reset` must be boolean"),
        ({"reset": reset[:3]}, ValueError, "`reset` must be"),
    ):
        with pytest.raises(error, match=match):
            dplr_lti(**args, **options)
    monkeypatch.setattr(compiled, "_library", compiled.Library(None, "switched off by the test", "", 0))
    with pytest.raises(ValueError, match="needs the compiled library"):
        dplr_lti(**args, mode="bank")
