"""Every structured block: pieces are the whole, steps the sequence, skipped steps nowhere, gaps exact."""

import copy

import pytest
import torch

from pyro_ssm.binding import bind, parameter_names
from pyro_ssm.blocks import (
    DSS,
    H3,
    LRU,
    LSSL,
    S4,
    S4D,
    S5,
    Bidirectional,
    LinOSS,
    LiquidS4,
    Mamba,
    Mamba2,
    Norm,
    RecurrentEncoder,
    ResidualStack,
)
from pyro_ssm.ops.dplr_step import dplr_matrices

F = 4  # features
STEPS = {"step_range": (0.05, 0.5)}
BLOCKS = {
    "LSSL": lambda: LSSL(F, 4, **STEPS),
    "S4": lambda: S4(F, 6, **STEPS),
    "S4, legt": lambda: S4(F, 6, "legt", **STEPS),
    "S4D": lambda: S4D(F, 6, **STEPS),
    "S4D, inv, bilinear": lambda: S4D(F, 6, "inv", "bilinear", **STEPS),
    "S4D, legs": lambda: S4D(F, 6, "legs", **STEPS),
    "DSS": lambda: DSS(F, 6, horizon=32, **STEPS),
    "DSS, exp": lambda: DSS(F, 6, "exp", **STEPS),
    "S5": lambda: S5(F, 8, num_blocks=2, **STEPS),
    "S5, bilinear": lambda: S5(F, 8, method="bilinear", **STEPS),
    "LRU": lambda: LRU(F, 6),
    "LinOSS, im": lambda: LinOSS(F, 6),
    "LinOSS, imex": lambda: LinOSS(F, 6, "imex"),
    "H3": lambda: H3(F, 6, head_size=2, **STEPS),
    "LiquidS4": lambda: LiquidS4(F, 6, **STEPS),
    "Mamba": lambda: Mamba(F, 3, **STEPS),
    "Mamba2": lambda: Mamba2(F, 3, head_size=4, groups=2, **STEPS),
    "stack of banks": lambda: ResidualStack([S4D(3, 4), LSSL(3, 4)], F, F),
    "stack of selections": lambda: ResidualStack([Mamba(F, 2), Mamba2(F, 2)], norm="rms", dropout=0.3),
}
TIME_INVARIANT = [n for n in BLOCKS if n.split(",")[0] in ("LSSL", "S4", "S4D", "DSS", "S5", "LRU", "LinOSS")]
all_blocks = pytest.mark.parametrize("name", BLOCKS)


def make(name, dtype=torch.float64):
    block = BLOCKS[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in block.parameters():  # away from first values that are alike
            parameter.add_(0.05 * torch.randn_like(parameter))
    return block


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def leaves(state):
    return [state] if isinstance(state, torch.Tensor) else [leaf for part in state for leaf in leaves(part)]


def assert_same(one, other, tolerance=1e-10):
    for a, b in zip(leaves(one), leaves(other), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@all_blocks
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("gaps", [False, True])
def test_steps_are_the_sequence(name, dtype, tolerance, gaps):
    block = make(name, dtype)
    u, dt = rand(2, 3, 17, F).to(dtype), (0.2 + torch.rand(2, 3, 17)).to(dtype) if gaps else None
    y, final = block(u, dt=dt)
    state, outputs = block.start((2, 3)), []
    for t in range(17):
        y_t, state = block.step(u[..., t, :], state, dt=None if dt is None else dt[..., t])
        outputs.append(y_t)
    assert y.dtype == dtype
    assert_same((torch.stack(outputs, -2), state), (y, final), tolerance)


@all_blocks
def test_pieces_are_the_whole(name):
    block = make(name)
    for dt in (None, 0.2 + torch.rand(2, 31).double()):
        u = rand(2, 31, F)
        whole = block(u, dt=dt)
        state, outputs = None, []
        for at in (slice(0, 12), slice(12, 13), slice(13, 31)):
            y, state = block(u[:, at], state, None if dt is None else dt[:, at])
            outputs.append(y)
        assert_same((torch.cat(outputs, 1), state), whole)


@all_blocks
@pytest.mark.parametrize("L", [1, 2, 9])
def test_the_start_is_the_state_before_the_first_step(name, L):
    block, u = make(name), rand(2, L, F)
    assert_same(block(u, block.start((2,))), block(u))


def size(y, state):
    return y.square().sum() + sum(leaf.abs().square().sum() for leaf in leaves(state))


@all_blocks
def test_a_mask_removes_steps(name):
    """Padding, missing steps and the NaNs that stand there change nothing: outputs, states, gradients."""
    block, u, dt = make(name), rand(3, 12, F), 0.2 + torch.rand(3, 12).double()
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 7:] = False
    mask[2] = torch.tensor([0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0, 0], dtype=torch.bool)
    dirty = u.masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    for given in (None, dt.masked_fill(~mask, float("nan"))):
        for start in (None, block.start((3,))):
            y, final = block(dirty, start, given, mask)
            assert (y[~mask] == 0).all()
            clean, one_by_one = u.detach().requires_grad_(), 0.0
            for i in range(3):
                gaps = None if given is None else dt[i][mask[i]]
                alone = block(clean[i][mask[i]], dt=gaps)
                assert_same(y[i][mask[i]], alone[0])
                assert_same([leaf[i] for leaf in leaves(final)], leaves(alone[1]))
                one_by_one = one_by_one + size(*alone)
            learnt = list(block.parameters())
            grads = torch.autograd.grad(size(y, final), [dirty, *learnt])
            assert (grads[0][~mask] == 0).all()
            assert_same(list(grads), list(torch.autograd.grad(one_by_one, [clean, *learnt])))


@all_blocks
def test_a_reset_is_a_fresh_sequence(name):
    block, u = make(name), rand(2, 12, F)
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[0, 5] = reset[1, 0] = reset[1, 9] = True
    y, final = block(u, tuple_state(block, u), reset=reset)
    first = block(u, tuple_state(block, u))[0]
    second, last = block(u[:1, 5:])
    assert_same(y[0, :5], first[0, :5])
    assert_same(y[0, 5:], second[0])
    assert_same([leaf[0] for leaf in leaves(final)], [leaf[0] for leaf in leaves(last)])
    assert_same(y[1, :9], block(u[1:, :9])[0][0])
    assert_same(y[1, 9:], block(u[1:, 9:])[0][0])


def tuple_state(block, u):
    """A state that a sequence left."""
    return block(u.flip(1))[1]


@all_blocks
def test_leading_dims_are_a_loop(name):
    block, u, dt = make(name), rand(2, 3, 10, F), 0.2 + torch.rand(3, 10).double()
    y, state = block(u, dt=dt)
    for s in range(2):
        for i in range(3):
            alone = block(u[s, i], dt=dt[i])
            assert_same((y[s, i], [leaf[s, i] for leaf in leaves(state)]), (alone[0], leaves(alone[1])))
    empty, final = block(u[:0])
    assert empty.shape == (0, 3, 10, F) and all(leaf.shape[0] == 0 for leaf in leaves(final))
    assert [leaf.shape for leaf in leaves(block.start((2, 3)))] == [leaf.shape for leaf in leaves(state)]


@all_blocks
@pytest.mark.parametrize("L", [3, 20])
def test_drawn_parameters_are_a_loop_over_draws(name, L):
    """Values (draws, 1, *event) of every parameter broadcast as leftmost sample dims."""
    block, u = make(name), rand(2, L, F)
    names = parameter_names(block)
    values = {n: block.get_parameter(n).detach() + 0.05 * rand(3, 1, *block.get_parameter(n).shape) for n in names}
    y, _ = bind(block, values)(u)
    assert y.shape == (3, 2, L, F)
    for k in range(3):
        assert_same(y[k], bind(block, {n: v[k, 0] for n, v in values.items()})(u)[0])


@all_blocks
def test_gradients_reach_every_parameter_and_derivatives_are_right(name):
    block, u = make(name), rand(1, 3, F).requires_grad_()
    y, state = block(u.expand(2, 3, F), dt=torch.rand(2, 3).double() + 0.5)
    total = y.square().sum() + sum(leaf.abs().square().sum() for leaf in leaves(state))
    for n, grad in zip(parameter_names(block), torch.autograd.grad(total, list(block.parameters())), strict=True):
        assert grad.abs().sum() > 0, n
    assert torch.autograd.gradcheck(lambda x: block(x)[0], u)


@pytest.mark.parametrize("name", TIME_INVARIANT)
def test_gaps_of_one_are_no_gaps(name):
    block, u = make(name), rand(2, 20, F)
    assert_same(block(u, dt=torch.ones(2, 20)), block(u))


@pytest.mark.parametrize("name", ["S4D", "S4D, legs", "DSS", "DSS, exp", "S5"])
def test_a_held_input_over_a_long_gap_is_two_short_gaps(name):
    """Zero-order hold is exact: a gap of 3 with one input is a gap of 1 and a gap of 2 with the same input."""
    block, u = make(name), rand(2, 1, F)
    state = block(rand(2, 4, F))[1]
    whole = block(u, state, dt=torch.full((2, 1), 3.0))
    parts = block(u.expand(2, 2, F), state, dt=torch.tensor([[1.0, 2.0]]).expand(2, 2))
    assert_same((whole[0][:, -1], whole[1]), (parts[0][:, -1], parts[1]))


@all_blocks
def test_copies_and_what_is_refused(name):
    block, u = make(name), rand(2, 5, F)
    assert_same(copy.deepcopy(block)(u), block(u))
    with pytest.raises(ValueError, match=f"in_features={F}, got `u`"):
        block(rand(2, 5, F + 1))
    with pytest.raises(ValueError, match="`mask` must be"):
        block(u, mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="`reset` must be boolean"):
        block(u, reset=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="`dt` must be"):
        block(u, dt=torch.ones(2, 6))


@pytest.mark.parametrize("name", [n for n in BLOCKS if not n.startswith(("LSSL", "Liquid", "stack"))])
def test_states_stay_bounded(name):
    """What promises stability keeps bounded states over 5000 steps of noise, whatever its parameters."""
    block = BLOCKS[name]()
    with torch.no_grad():
        for parameter_name, parameter in block.named_parameters():
            if parameter_name.split(".")[-1] in block.slow_parameters and "imex" not in name:
                parameter.add_(torch.randn_like(parameter).abs())
        u = torch.randn(1, 5000, F)
        y, _ = block(u)
    late, early = y[:, -500:].abs().max(), y[:, :2000].abs().max()
    assert late < 4 * early


# -------------------------------------------------------------------- each block against its own equations


def test_s4_is_the_dense_discretisation_of_its_matrix():
    block, u = make("S4"), rand(1, 24, F)
    with torch.no_grad():
        parts = [
            torch.complex(-block.log_decay.exp(), block.frequency),
            torch.complex(block.P_real, block.P_imag),
            torch.complex(block.B_real, block.B_imag),
        ]
        A, B = dplr_matrices(*parts, block.log_step.exp())
        C = torch.complex(block.C_real, block.C_imag)
        h, outputs = torch.zeros_like(B), []
        for t in range(24):
            h = (A @ h.unsqueeze(-1)).squeeze(-1) + B * u[0, t].unsqueeze(-1)
            outputs.append(2 * (C * h[..., :3]).sum(-1).real + block.direct * u[0, t])
    assert_same(block(u)[0][0], torch.stack(outputs))


def test_s4_and_lssl_begin_as_one_system():
    """S4 and LSSL of one measure, steps and read-out are one map in two bases."""
    from pyro_ssm.ops import NormalPlusLowRank

    form = NormalPlusLowRank.of("legs", 6)
    with torch.no_grad():
        torch.set_default_dtype(torch.float64)
        try:
            s4, lssl = S4(F, 6, **STEPS), LSSL(F, 6, **STEPS)
        finally:
            torch.set_default_dtype(torch.float32)
        lssl.log_step.copy_(s4.log_step)
        lssl.direct.copy_(s4.direct)
        C = lssl.C.to(form.V.dtype) @ form.V
        s4.C_real.copy_(C.real)
        s4.C_imag.copy_(C.imag)
    u = rand(2, 30, F)
    assert_same(s4(u)[0], lssl(u)[0], 1e-8)


def test_dss_kernel_is_the_published_one():
    block = make("DSS")
    L = block.horizon
    impulse = torch.zeros(1, L, F, dtype=torch.float64)
    impulse[:, 0] = 1
    with torch.no_grad():
        found = block(impulse)[0][0]
        found[0] -= block.direct
        eigenvalues = torch.complex(-block.log_decay.exp(), block.frequency)
        rows = torch.exp((eigenvalues * block.log_step.exp().unsqueeze(-1)).unsqueeze(-1) * torch.arange(L))
        weights = torch.complex(block.C_real, block.C_imag) / eigenvalues
        wanted = 2 * (weights.unsqueeze(-1) * rows / rows.sum(-1, keepdim=True)).sum(-2).real
    assert_same(found, wanted.mT)


@pytest.mark.parametrize("method", ["im", "imex"])
def test_linoss_is_its_equations(method):
    block = make(f"LinOSS, {method}")
    u, dt = rand(1, 9, F), 0.5 + torch.rand(1, 9).double()
    with torch.no_grad():
        A = block.stiffness.relu()
        v, x, outputs = torch.zeros(6).double(), torch.zeros(6).double(), []
        for t in range(9):
            step, force = block.raw_step.sigmoid() * dt[0, t], block.B @ u[0, t]
            if method == "imex":
                v = v + step * (-A * x + force)
            else:  # both equations at once
                v = (v + step * (force - A * x)) / (1 + step**2 * A)
            x = x + step * v
            outputs.append(block.C @ x + block.direct * u[0, t])
    y, state = block(u, dt=dt)
    assert_same((y[0], state[0]), (torch.stack(outputs), torch.stack([v, x], -1)))


def test_lru_keeps_white_input_at_unit_variance():
    block = LRU(1, 3, radius=(0.5, 0.9)).double()
    for gap in (0.3, 1.0, 4.0):
        a, w = block._factors(torch.tensor([gap], dtype=torch.float64))
        torch.testing.assert_close(a.abs().square() + w.square(), torch.ones_like(w))


def test_liquid_s4_is_s4d_with_a_state_matrix_that_the_input_moves():
    block, u = make("LiquidS4"), 0.3 * rand(1, 6, F)
    from pyro_ssm.ops import discretise

    with torch.no_grad():
        A, step = torch.complex(-block.log_decay.exp(), block.frequency), block.log_step.exp().unsqueeze(-1)
        a, b = discretise(A * step, step, "bilinear")
        h, outputs = torch.zeros_like(A), []
        for t in range(6):
            drive = b * u[0, t].unsqueeze(-1)
            h = (a + drive) * h + drive
            outputs.append(2 * (torch.complex(block.C_real, block.C_imag) * h).sum(-1).real + block.direct * u[0, t])
    assert_same(block(u)[0][0], torch.stack(outputs))


def test_mamba_multiplies_its_step_by_the_gap():
    """A gap of 0 at the last step leaves the state of the scan, and moves the window of the convolution."""
    block, u = make("Mamba"), rand(1, 5, F)
    _, (_, before) = block(u[:, :4])
    dt = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])
    _, (inputs, after) = block(u, dt=dt)
    assert_same(after, before)
    assert_same(inputs[:, -1], block.enter(u[:, -1]).chunk(2, -1)[0])


# ------------------------------------------------------------------------------- norm, both directions


def test_norms():
    x = rand(3, 5)
    torch.testing.assert_close(Norm(5).double()(x), torch.nn.functional.layer_norm(x, (5,)))
    torch.testing.assert_close(Norm(5, "rms").double()(x), torch.nn.functional.rms_norm(x, (5,), eps=1e-5))


@pytest.mark.parametrize("block", [lambda n: S4D(n, 4), lambda n: Mamba(n, 2), lambda n: S5(n, 4)])
def test_both_directions_of_a_ragged_batch_are_a_loop(block):
    encoder = Bidirectional.of(block, 3, F, num_layers=2).double()
    x, lengths, dt = rand(3, 12, 3), torch.tensor([12, 9, 1]), 0.2 + torch.rand(3, 12).double()
    dirty = x.clone()
    for i, n in enumerate(lengths):
        dirty[i, n:] = float("nan")
    for gaps in (None, dt):
        past, future = encoder(dirty, lengths, dt=gaps)
        for i, n in enumerate(lengths.tolist()):
            own = None if gaps is None else gaps[i, :n]
            alone = encoder(x[i, :n], dt=own)
            assert_same((past[i, :n], future[i, :n]), alone)
            assert (past[i, n:] == 0).all() and (future[i, n:] == 0).all()
            after = None if own is None else torch.cat([own[1:], torch.ones(1).double()]).flip(0)
            assert_same(future[i, :n], encoder.future(x[i, :n].flip(0), dt=after)[0].flip(0))


def test_both_directions_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="blocks of the same sizes"):
        Bidirectional(S4D(2), S4D(3))
    with pytest.raises(ValueError, match="same one twice"):
        block = S4D(2)
        Bidirectional(block, block)
    with pytest.raises(ValueError, match="in_features=2"):
        Bidirectional(S4D(2), None)(rand(4, 3))
    assert RecurrentEncoder(3, 4)(torch.zeros(2, 3))[0].shape == Bidirectional.of(S4D, 3, 4)(torch.zeros(2, 3))[0].shape


def test_constructors_refuse_what_cannot_be():
    for wrong, match in (
        (lambda: S4D(2, 5), "even"),
        (lambda: S4D(2, 4, "leg"), "`init`"),
        (lambda: S4D(2, 4, method="euler"), "`method`"),
        (lambda: S4D(2, 4, step_range=(0.1, 0.01)), "`step_range`"),
        (lambda: S5(2, 6, num_blocks=2), "multiple of"),
        (lambda: LRU(2, 4, radius=(0.5, 1.0)), "stable"),
        (lambda: Mamba2(4, head_size=3), "`head_size`"),
        (lambda: H3(4, head_size=3), "`head_size`"),
        (lambda: ResidualStack([S4D(2), S4D(3)]), "one number of features"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()


@pytest.mark.parametrize("name", ["S4", "S4D", "LSSL", "LiquidS4", "Mamba"])
def test_states_that_are_computed_again_change_nothing(name, monkeypatch):
    from importlib import import_module

    block, u, dt = make(name), rand(2, 21, F), 0.2 + torch.rand(2, 21).double()
    found = []
    for kept, chunk in ((2**20, 2**20), (0, 1)):
        monkeypatch.setattr(import_module("pyro_ssm.ops.recompute"), "_KEPT_ELEMENTS", kept)
        monkeypatch.setattr(import_module("pyro_ssm.ops.recompute"), "_CHUNK_ELEMENTS", chunk)
        y, state = block(u, dt=dt)
        total = y.square().sum() + sum(leaf.abs().square().sum() for leaf in leaves(state))
        found.append([y, *leaves(state), *torch.autograd.grad(total, list(block.parameters()))])
    assert_same(*found, 1e-9)
