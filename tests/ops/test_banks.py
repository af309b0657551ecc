"""The banks as operators: low rank, and steps that differ. Engines, derivatives, transforms and graphs are the loop."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.ops import compiled, diag_lti, diag_lti_reference, dplr_lti, dplr_scan_reference
from pyro_ssm.ops.diag_bank import pairs
from pyro_ssm.ops.gap_bank import METHODS, gap_bank
from pyro_ssm.ops.low_rank_bank import low_rank_bank
from tests.ops.test_diag_bank import close, uneven
from tests.ops.test_dplr_lti import bank_loop, system

needs_library = pytest.mark.skipif(compiled.library().functions is None, reason="the compiled library is not in use")
z = torch.complex128


def coefficients(D, N):
    """a, b and C."""
    a = torch.complex(-torch.rand(D, N).double(), 2 * torch.randn(D, N).double())
    return a, torch.randn(D, N, dtype=z), torch.randn(D, N, dtype=z)


def low_rank(lead, L, D, N):
    a, b, C = coefficients(D, N)
    W, Q = 0.2 * torch.randn(D, 2, N, dtype=z), torch.randn(D, 2, N, dtype=z)
    return torch.randn(*lead, L, D).double(), 0.4 * a, b, C, W, Q, torch.randn(*lead, D, N, dtype=z)


def gaps(lead, L, D, N):
    u, step = torch.randn(*lead, L, D).double(), torch.rand(*lead, L, D).double()
    return u, step, *coefficients(D, N), torch.randn(*lead, D, N, dtype=z)


def gap_loop(u, step, a, b, C, initial, reset, method):
    """:func:`gap_bank` as its equation says."""
    h, outputs = initial, []
    for t in range(u.shape[-2]):
        h = h * ~reset[..., t, None, None]
        x = step[..., t, :, None] * a
        e = x.exp() - 1 if method == "zoh" else x / (1 - x / 2)
        h = h + e * (h + b * u[..., t, :, None])
        outputs.append((C * h).sum(-1).real)
    return torch.stack(outputs, -2), h


BANKS = {
    "low rank": (low_rank_bank, bank_loop, low_rank, ()),
    "gaps, zoh": (gap_bank, gap_loop, gaps, ("zoh",)),
    "gaps, bilinear": (gap_bank, gap_loop, gaps, ("bilinear",)),
}


def both(name, lead, L, D, N):
    """The bank and its loop, of tensors alone, and the tensors."""
    fast, plain, make, options = BANKS[name]
    reset = torch.rand(*lead, L) < 0.2

    def of(f):
        return lambda *args: f(*args, reset, *options)

    return of(fast), of(plain), make(lead, L, D, N)


@pytest.mark.parametrize("name", BANKS)
@pytest.mark.parametrize("L", [1, 33, 130])
def test_is_the_loop(engine, name, L):
    for lead, D, N in (((), 1, 1), ((2, 2), 9, 3)):
        fast, plain, args = both(name, lead, L, D, N)
        inputs = [x.requires_grad_() for x in args]
        found, wanted = fast(*inputs), plain(*inputs)
        close(found, wanted, 1e-11)
        weights = [torch.randn_like(x) for x in wanted]
        close(*(torch.autograd.grad(x, inputs, weights) for x in (found, wanted)), 1e-10)


@pytest.mark.parametrize("name", BANKS)
def test_derivatives(engine, name):
    fast, _, args = both(name, (2,), 3, 2, 2)
    values = [x.requires_grad_() for x in args]
    assert gradcheck(fast, values) and gradgradcheck(fast, values)


@pytest.mark.parametrize("name", BANKS)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at its first forward-mode call
def test_transforms(engine, name):
    fast, plain, args = both(name, (), 9, 3, 2)
    tangents = tuple(torch.randn_like(x) for x in args)
    for one, other in zip(*(torch.func.jvp(f, args, tangents) for f in (fast, plain)), strict=True):
        close(one, other, 1e-11)
    inputs, rest = torch.randn(4, *args[0].shape, dtype=torch.float64), args[1:]
    hessians = [torch.func.hessian(lambda u, f=f: f(u, *rest)[0].square().sum()) for f in (fast, plain)]
    close(*([torch.func.vmap(f)(inputs)] for f in hessians), 1e-11)


@needs_library
@pytest.mark.parametrize("name", BANKS)
def test_registered_operator(name):
    """Schema, shapes without data, gradients, graphs of any size: torch's own checks."""
    _, _, make, options = BANKS[name]
    reals, lead = 2 - (make is low_rank), (2,)
    *args, initial = make(lead, 70, 5, 3)
    of_states = [torch.view_as_real(x)[None].detach() for x in args[reals:]]
    given = [x.requires_grad_() for x in (*args[:reals], *of_states, torch.view_as_real(initial))]
    numbers = [METHODS.index(x) for x in options]
    operator = torch.ops.pyro_ssm.low_rank_bank if make is low_rank else torch.ops.pyro_ssm.gap_bank
    torch.library.opcheck(operator, (*given, torch.rand(2, 70) < 0.1, *numbers, True))
    single = [x.detach().float() for x in given[:-1]]
    torch.library.opcheck(operator, (*single, None, None, *numbers, False))


@pytest.mark.parametrize("name", BANKS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_of_a_graph(engine, name, dynamic):
    # a graph of a loop is long
    fast, _, args = both(name, (2,), 40 if engine == "compiled" else 4, 3, 2)
    inputs = [x.requires_grad_() for x in args]
    graph = torch.compile(fast, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    found, wanted = graph(*inputs), fast(*inputs)
    close(found, wanted, 1e-11)
    weights = [torch.randn_like(x) for x in wanted]
    close(*(torch.autograd.grad(x, inputs, weights) for x in (found, wanted)), 1e-11)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", BANKS)
def test_no_steps_and_no_series(engine, name):
    for lead, L in (((2,), 0), ((0,), 5)):
        fast, _, args = both(name, lead, L, 3, 2)
        inputs = [x.requires_grad_() for x in args]
        y, final = fast(*inputs)
        assert y.shape == (*lead, L, 3) and final.equal(inputs[-1])
        grads = torch.autograd.grad(final, inputs, torch.ones_like(final), allow_unused=True, materialize_grads=True)
        assert all(g.eq(0).all() for g in grads[:-1]) and (L or grads[-1].eq(1).all())


@needs_library
def test_precisions_may_differ():
    """All in double where one is: nothing is read in another precision than it was written in."""
    varying, constant = uneven(), system()
    for of_real, of_complex in ((torch.float32, z), (torch.float64, torch.complex64)):
        for f, loop, args in ((diag_lti, diag_lti_reference, varying), (dplr_lti, dplr_scan_reference, constant)):
            given = {k: x.to(of_complex if x.is_complex() else of_real) for k, x in args.items()}
            wide = {k: x.to(z) if x.is_complex() else x.double() for k, x in given.items()}
            if loop is dplr_scan_reference:
                wide["step"] = wide["step"].expand(wide["u"].shape[-2:])
            for one, other in zip(f(**given), loop(**wide), strict=True):
                assert (one - other).abs().max() < 1e-5 * other.abs().max()


def test_what_no_bank_can_do_is_refused():
    u, a, b, C, *_, h = low_rank((), 4, 3, 2)
    for rank in (0, 3):
        W = torch.zeros(3, rank, 2, dtype=z)
        with pytest.raises(ValueError, match=f"got r = {rank}"):
            low_rank_bank(u, a, b, C, W, W, h, None)
    with pytest.raises(ValueError, match="`method` must be"):
        gap_bank(u, u, a, b, C, h, None, "euler")


def test_a_pair_has_the_precision_and_the_shape_that_are_asked_for():
    x = torch.randn(2, 1, 3, dtype=torch.complex64).conj()
    found = pairs(x, (4, 3), torch.float64)
    assert found.dtype == torch.float64 and found.shape == (2, 4, 3, 2) and pairs(None, (4, 3), torch.float64) is None
    assert torch.view_as_complex(found)[:, 2].equal(x[:, 0].to(z))
