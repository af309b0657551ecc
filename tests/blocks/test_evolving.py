"""Blocks in continuous time: the protocol of structured blocks, and each block against its own mathematics."""

import copy

import pytest
import torch
from torch import nn

from pyro_ssm.binding import bind, parameter_names
from pyro_ssm.blocks import GRUD, GRUODE, ODERNN, Bidirectional, EvolvingMemory, GRUODEBayes, NeuralCDE, ResidualStack
from pyro_ssm.ops.runge_kutta import Tolerance
from pyro_ssm.testing import MemoryContract
from tests.blocks.test_structured import assert_same, leaves, rand, size

F = 4  # columns: one value, its mask, two others
BLOCKS = {
    "GRUD": lambda: GRUD(1, F, 2, mean=0.3),
    "ODERNN": lambda: ODERNN(F, F, num_steps=2),
    "ODERNN, masks": lambda: ODERNN(F, F, obs_dim=1, cell="rnn", method="midpoint"),
    "GRUODE": lambda: GRUODE(F, F),
    "GRUODE, masks": lambda: GRUODE(F, F, obs_dim=1, method="rk4"),
    "GRUODEBayes": lambda: GRUODEBayes(1, F, 2, prepared_dim=3),
    "GRUODEBayes, fed": lambda: GRUODEBayes(1, F, 2, prepared_dim=3, feed_prediction=True),
    "NeuralCDE": lambda: NeuralCDE(F, F, obs_dim=1, hidden=5),
    "NeuralCDE, cubic": lambda: NeuralCDE(F, F, interpolation="cubic", hidden=5),
    "NeuralCDE, rectilinear": lambda: NeuralCDE(F, F, obs_dim=1, interpolation="rectilinear", hidden=5),
}
SEES_MASKS = [name for name in BLOCKS if BLOCKS[name]().obs_dim]
all_blocks = pytest.mark.parametrize("name", BLOCKS)


def make(name, dtype=torch.float64):
    block = BLOCKS[name]().to(dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block


def solving(block):
    """Where a block keeps its solver."""
    return block.flow if isinstance(block, (GRUODE, GRUODEBayes)) else block


def columns(*shape, dtype=torch.float64):
    """u = [value, mask, two others]."""
    u = torch.randn(*shape, F, dtype=dtype)
    u[..., 1] = (torch.rand(shape) < 0.6).to(dtype)
    return u


# ----------------------------------------------------------------------------------------------- the protocol


@all_blocks
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_steps_and_pieces_are_the_sequence(name, dtype, tolerance):
    block, u, dt = make(name, dtype), columns(2, 3, 7, dtype=dtype), 0.2 + torch.rand(3, 7).double()
    for gaps in (None, dt):
        y, final = block(u, dt=gaps)
        state, outputs = block.start((2, 3)), []
        for t in range(7):
            y_t, state = block.step(u[..., t, :], state, dt=None if gaps is None else gaps[..., t])
            outputs.append(y_t)
        assert y.dtype == dtype and y.shape == (2, 3, 7, F)
        assert_same((torch.stack(outputs, -2), state), (y, final), tolerance)
        state, outputs = None, []
        for at in (slice(0, 4), slice(4, 5), slice(5, 7)):
            y_at, state = block(u[..., at, :], state, None if gaps is None else gaps[..., at])
            outputs.append(y_at)
        assert_same((torch.cat(outputs, -2), state), (y, final), tolerance)


@all_blocks
def test_the_two_halves_of_a_step_are_the_step(name):
    block, u, gap = make(name), columns(3, 1), 0.7 * torch.ones(3, 1, 1).double()
    state = block(columns(3, 4))[1]
    halves = block.see(block.evolve(state, gap), block.prepare(u))
    assert_same(halves, block(u, state, dt=gap.squeeze(-1))[1])


@all_blocks
def test_a_mask_removes_steps(name):
    """Padding, missing steps and the NaNs that stand there change nothing: outputs, states, gradients."""
    block, u, dt = make(name), columns(3, 6), 0.2 + torch.rand(3, 6).double()
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = False
    mask[2] = torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.bool)
    dirty = u.masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    for given in (None, dt.masked_fill(~mask, float("nan"))):
        for start in (None, block.start((3,))):
            y, final = block(dirty, start, given, mask)
            assert (y[~mask] == 0).all()
            clean, one_by_one = u.detach().requires_grad_(), 0.0
            for i in range(3):
                alone = block(clean[i][mask[i]], dt=None if given is None else dt[i][mask[i]])
                assert_same(y[i][mask[i]], alone[0])
                assert_same([leaf[i] for leaf in leaves(final)], leaves(alone[1]))
                one_by_one = one_by_one + size(*alone)
            learnt = list(block.parameters())
            found, wanted = (
                torch.autograd.grad(total, [inputs, *learnt], allow_unused=True, materialize_grads=True)
                for total, inputs in ((size(y, final), dirty), (one_by_one, clean))
            )
            assert (found[0][~mask] == 0).all()
            assert_same(found, wanted)


@pytest.mark.parametrize("name", SEES_MASKS)
def test_a_hidden_value_changes_nothing(name):
    block, u = make(name), columns(3, 6)
    hidden = u[..., 1:2] == 0
    outcomes = []
    for value in (0.0, 1e3, float("nan")):
        given = torch.cat([u[..., :1].masked_fill(hidden, value), u[..., 1:]], -1).requires_grad_()
        y, state = block(given)
        grads = torch.autograd.grad(y.square().sum(), [given, *block.parameters()])
        outcomes.append((y, *leaves(state), *grads))
    assert (outcomes[0][-len(list(block.parameters())) - 1][..., :1][hidden] == 0).all()
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


@all_blocks
def test_a_reset_is_a_fresh_sequence(name):
    block, u = make(name), columns(2, 6)
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[0, 3] = reset[1, 0] = True
    before = block(columns(2, 3))[1]
    y, final = block(u, before, reset=reset)
    assert_same(y[0, :3], block(u[:, :3], before)[0][0])
    fresh, last = block(u[:1, 3:])
    assert_same((y[0, 3:], [leaf[0] for leaf in leaves(final)]), (fresh[0], [leaf[0] for leaf in leaves(last)]))
    assert_same(y[1], block(u[1:])[0][0])


@all_blocks
def test_leading_dims_are_a_loop_and_series_may_be_permuted(name):
    block, u, dt = make(name), columns(2, 3, 5), 0.2 + torch.rand(3, 5).double()
    y, state = block(u, dt=dt)
    for s in range(2):
        for i in range(3):
            alone = block(u[s, i], dt=dt[i])
            assert_same((y[s, i], [leaf[s, i] for leaf in leaves(state)]), (alone[0], leaves(alone[1])))
    order = torch.tensor([2, 0, 1])
    assert_same(block(u[:, order], dt=dt[order])[0], y[:, order], 1e-13)
    empty, final = block(u[:0])
    assert empty.shape == (0, 3, 5, F) and all(leaf.shape[0] == 0 for leaf in leaves(final))
    none, kept = block(u[..., :0, :], state)
    assert none.shape == (2, 3, 0, F) and leaves(kept)[0] is leaves(state)[0]
    assert [leaf.shape for leaf in leaves(block.start((2, 3)))] == [leaf.shape for leaf in leaves(state)]


@all_blocks
def test_drawn_parameters_are_a_loop_over_draws(name):
    block, u = make(name), columns(2, 4)
    names = parameter_names(block)
    values = {n: block.get_parameter(n).detach() + 0.1 * rand(3, 1, *block.get_parameter(n).shape) for n in names}
    y, _ = bind(block, values)(u)
    assert y.shape == (3, 2, 4, F)
    for k in range(3):
        assert_same(y[k], bind(block, {n: v[k, 0] for n, v in values.items()})(u)[0])


@all_blocks
def test_gradients_reach_every_parameter_and_derivatives_are_right(name):
    block, u = make(name), columns(2, 3).requires_grad_()
    dt = torch.rand(2, 3).double() + 0.5
    y, _ = block(u, dt=dt)
    grads = torch.autograd.grad(y.square().sum(), list(block.parameters()))
    for n, grad in zip(parameter_names(block), grads, strict=True):
        assert grad.abs().sum() > 0, n
    values = u.detach()[..., :1].clone().requires_grad_()
    rest = u.detach()[..., 1:]
    assert torch.autograd.gradcheck(
        lambda x, t: block(torch.cat([x, rest], -1), dt=t)[0], (values, dt.requires_grad_())
    )


@all_blocks
def test_both_directions_of_a_ragged_batch_are_a_loop(name):
    encoder = Bidirectional(make(name), make(name))
    x, lengths, dt = columns(3, 6), torch.tensor([6, 4, 1]), 0.2 + torch.rand(3, 6).double()
    dirty = x.masked_fill((torch.arange(6) >= lengths[:, None]).unsqueeze(-1), float("nan"))
    past, future = encoder(dirty, lengths, dt=dt)
    for i, n in enumerate(lengths.tolist()):
        assert_same((past[i, :n], future[i, :n]), encoder(x[i, :n], dt=dt[i, :n]))
        after = torch.cat([dt[i, 1:n], torch.ones(1).double()]).flip(0)
        assert_same(future[i, :n], encoder.future(x[i, :n].flip(0), dt=after)[0].flip(0))
        assert (past[i, n:] == 0).all() and (future[i, n:] == 0).all()


@all_blocks
def test_copies_and_stacks(name):
    block, u = make(name), columns(2, 3)
    assert_same(copy.deepcopy(block)(u), block(u))
    assert ResidualStack([BLOCKS[name]()], 3).double()(rand(2, 5, 3))[0].shape == (2, 5, F)
    with pytest.raises(ValueError, match=f"in_features={F}, got `u`"):
        block(rand(2, 5, F + 1))


@all_blocks
def test_gaps_of_one_are_no_gaps_and_strides_do_not_matter(name):
    block, u = make(name), columns(2, 4)
    assert_same(block(u, dt=torch.ones(2, 4)), block(u))
    assert_same(block(u.mT.contiguous().mT), block(u), 1e-13)


def test_a_field_that_blows_up_is_an_error_with_the_time():
    block = ODERNN(F, F, lambda h: 10 + h**2, method="dopri5").double()
    with torch.no_grad(), pytest.raises(FloatingPointError, match=r"at time 0\.4.* of series 1"):
        block(columns(2, 1), dt=torch.tensor([[0.01], [3.0]]))


# ------------------------------------------------------------------------------------------ their mathematics


def torch_gru(cell, hidden):
    made = nn.GRUCell(cell.from_input.in_features, hidden).double()
    made.weight_ih, made.bias_ih = cell.from_input.weight, cell.from_input.bias
    made.weight_hh, made.bias_hh = cell.from_state.weight, cell.from_state.bias
    return made


def run_cell(cell, u, h):
    outputs = []
    for step in u.unbind(-2):
        h = cell(step, h)
        outputs.append(h)
    return torch.stack(outputs, -2)


def test_gru_d_without_gaps_and_missing_values_is_a_gru():
    block, u = make("GRUD"), columns(3, 5)
    u[..., 1] = 1.0
    with torch.no_grad():
        block.state_decay.bias.zero_()
    h = block.first.expand(3, F)
    assert_same(block(u, dt=torch.zeros(3, 5))[0], run_cell(torch_gru(block.cell, F), u, h))


def test_gru_d_is_its_equations():
    block = GRUD(3, F, mean=torch.tensor([0.1, -0.2, 0.3])).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x, m, dt = rand(6, 3), (torch.rand(6, 3) < 0.5).double(), 0.3 + torch.rand(6).double()
    cell, h, last, outputs = torch_gru(block.cell, F), block.first, block.mean.clone(), []
    since = torch.zeros(3).double()
    for k in range(6):
        since = dt[k] + (since if k == 0 else torch.where(m[k - 1].bool(), torch.zeros_like(since), since))
        gamma_x = torch.exp(-torch.clamp(block.decay_rate * since + block.decay_start, min=0))
        gamma_h = torch.exp(-torch.clamp(block.state_decay.weight @ since + block.state_decay.bias, min=0))
        imputed = m[k] * x[k] + (1 - m[k]) * (gamma_x * last + (1 - gamma_x) * block.mean)
        h = cell(torch.cat([imputed, m[k]]).unsqueeze(0), (gamma_h * h).unsqueeze(0))[0]
        last = m[k] * x[k] + (1 - m[k]) * last
        outputs.append(h)
    assert_same(block(torch.cat([x, m], -1), dt=dt)[0], torch.stack(outputs))


@pytest.mark.parametrize("cell", ["gru", "rnn"])
@pytest.mark.parametrize("method", ["euler", "heun", "rk4", "dopri5"])
def test_ode_rnn_with_zero_field_is_the_rnn(cell, method):
    block, u = ODERNN(F, F, torch.zeros_like, cell=cell, method=method).double(), columns(3, 5)
    if cell == "gru":
        made = torch_gru(block.cell, F)
    else:
        made = nn.RNNCell(F, F).double()
        made.weight_ih, made.bias_ih = block.cell.from_input.weight, block.cell.from_input.bias
        made.weight_hh, made.bias_hh = block.cell.from_state.weight, block.cell.from_state.bias
    dt = torch.rand(3, 5).double()
    assert_same(block(u, dt=dt)[0], run_cell(made, u, block.first.expand(3, F)))


def test_ode_rnn_with_linear_field_is_the_matrix_exponential_between_cells():
    """dopri5 over each series' own gaps."""
    A = 0.5 * rand(F, F)
    block = ODERNN(F, F, lambda h: h @ A.T, method="dopri5", rtol=1e-9, atol=1e-10).double()
    u, dt = columns(3, 4), 0.2 + torch.rand(3, 4).double()
    cell, h, outputs = torch_gru(block.cell, F), block.first.expand(3, F), []
    for k in range(4):
        h = torch.stack([torch.matrix_exp(A * dt[i, k]) @ h[i] for i in range(3)])
        h = cell(u[:, k], h)
        outputs.append(h)
    assert_same(block(u, dt=dt)[0], torch.stack(outputs, -2), 1e-7)


@pytest.mark.parametrize(
    "name", ["ODERNN, masks", "GRUODE, masks", "GRUODEBayes", "GRUODEBayes, fed", "NeuralCDE, rectilinear"]
)
def test_a_time_without_observation_is_only_time(name):
    """It splits a gap in two, which an exact solver does not see."""
    block = make(name)
    solving(block).solver = solving(block).solver._replace(num_steps=60, method="rk4")
    u = columns(2, 3)
    u[:, 0, 1], u[:, 1, 1] = 1.0, 0.0
    if name.startswith("NeuralCDE"):  # a path of other columns moves
        u[:, 1, 2:] = u[:, 0, 2:]
    dt = torch.tensor([1.0, 0.4, 0.8]).double().expand(2, 3)
    without = block(u[:, [0, 2]], dt=torch.tensor([1.0, 1.2]).double().expand(2, 2))
    assert_same(block(u, dt=dt)[0][:, -1], without[0][:, -1], 1e-6)


@pytest.mark.parametrize("name", ["GRUODE", "GRUODEBayes"])
def test_gru_flow_stays_inside_and_rests_where_the_gru_does(name):
    block = make(name)
    with torch.no_grad():  # strong weights, so that gates saturate
        block.flow.recur.weight.mul_(4)
    h = torch.rand(50, 1, F).double() * 1.998 - 0.999
    for gap in (0.1, 1.0, 30.0, 1e4):
        assert block.evolve(h, torch.full((1, 1), gap).double()).abs().max() < 1
    cell = nn.GRUCell(1, F).double()
    cell.weight_ih, cell.bias_ih = nn.Parameter(torch.zeros(3 * F, 1).double()), block.flow.drive
    cell.weight_hh, cell.bias_hh = block.flow.recur.weight, block.flow.recur.bias
    # the speed of the flow is the step of the GRU, and one Euler step of length 1 is the GRU
    step = cell(torch.zeros(50, 1).double(), h.squeeze(1)).unsqueeze(1)
    assert_same(block.flow.velocity(h), step - h)
    solving(block).solver = solving(block).solver._replace(method="euler", num_steps=1)
    assert_same(block.evolve(h, torch.ones(1, 1).double()), step)


def test_a_prediction_that_drives_the_flow_keeps_it_inside():
    block = make("GRUODEBayes, fed")
    h = torch.rand(20, 1, F).double() * 1.998 - 0.999
    alone = block.flow(h, torch.ones(1, 1).double())
    assert (block.evolve(h, torch.ones(1, 1).double()) - alone).abs().max() > 1e-3
    assert block.evolve(h, torch.full((1, 1), 1e4).double()).abs().max() < 1


def test_gru_flow_leaves_fixed_points_alone():
    block = make("GRUODE")
    with torch.no_grad():
        block.flow.recur.weight.mul_(0.3)
        h = torch.zeros(1, 1, F).double()
        for _ in range(400):  # the GRU by itself
            h = h + block.flow.velocity(h)
        for method in ("exponential", "rk4"):
            solving(block).solver = solving(block).solver._replace(method=method)
            assert_same(block.evolve(h, torch.full((1, 1), 5.0).double()), h, 1e-12)


@pytest.mark.parametrize("method, order", [("euler", 1), ("exponential", 2), ("midpoint", 2), ("rk4", 4)])
def test_solvers_converge_with_their_order(method, order):
    block = make("GRUODE")
    state, gap = 0.5 * rand(5, 1, F), torch.full((1, 1), 2.0).double()
    solving(block).solver = solving(block).solver._replace(method="dopri5", tolerance=Tolerance(1e-11, 1e-12))
    exact = block.evolve(state, gap)
    errors = []
    for n in (8, 16, 32):
        solving(block).solver = solving(block).solver._replace(method=method, num_steps=n)
        errors.append((block.evolve(state, gap) - exact).abs().max().log2().item())
    slopes = [a - b for a, b in zip(errors, errors[1:], strict=False)]
    assert min(slopes) > order - 0.15 and max(slopes) < order + 0.7


class LinearField(nn.Module):
    def __init__(self, matrices):
        super().__init__()
        self.matrices = matrices

    def forward(self, z):  # sum_c A_c z dX_c
        return torch.einsum("cij,...j->...ic", self.matrices, z)


@pytest.mark.parametrize("interpolation", ["linear", "rectilinear"])
def test_cde_with_linear_field_is_a_product_of_matrix_exponentials(interpolation):
    A = 0.4 * rand(3, F, F)  # time and two columns
    block = NeuralCDE(2, F, LinearField(A), interpolation=interpolation, num_steps=60).double()
    u, dt = rand(3, 5, 2), 0.2 + torch.rand(3, 5).double()
    with torch.no_grad():
        wanted = []
        for i in range(3):
            z = block.enter(u[i, 0]) + block.first
            rows = [z]
            for k in range(1, 5):
                clock, jump = A[0] * dt[i, k], torch.einsum("cij,c->ij", A[1:], u[i, k] - u[i, k - 1])
                moves = (clock + jump,) if interpolation == "linear" else (clock, jump)
                for move in moves:
                    z = torch.matrix_exp(move) @ z
                rows.append(z)
            wanted.append(torch.stack(rows))
        assert_same(block(u, dt=dt)[0], torch.stack(wanted), 1e-7)


@pytest.mark.parametrize("interpolation", ["linear", "cubic", "rectilinear"])
def test_cde_does_not_see_the_speed_of_its_path(interpolation):
    """Without the clock, stretching time changes nothing; with it, stretching is a faster clock and nothing else."""
    block = NeuralCDE(2, F, clock=False, interpolation=interpolation, hidden=5).double()
    u, dt = rand(3, 5, 2), 0.2 + torch.rand(3, 5).double()
    y = block(u, dt=dt)[0]
    assert_same(block(u, dt=7.0 * dt)[0], y)
    if interpolation != "cubic":  # whose slopes are differences in time
        assert_same(block(u, dt=torch.rand(3, 5).double() + 0.1)[0], y)


@pytest.mark.parametrize("interpolation", ["linear", "rectilinear"])
def test_cde_does_not_see_knots_on_its_path(interpolation):
    """A further step where the path passes anyway changes nothing but the solver's steps: reparametrisation."""
    block = NeuralCDE(2, F, interpolation=interpolation, hidden=5, num_steps=40).double()
    u = rand(1, 3, 2)
    between = 0.3 * u[:, 2] + 0.7 * u[:, 1] if interpolation == "linear" else u[:, 1]
    more = torch.cat([u[:, :2], between.unsqueeze(1), u[:, 2:]], 1)
    dt = torch.tensor([[1.0, 0.5, 2.0]]).double()
    finer = torch.tensor([[1.0, 0.5, 0.6, 1.4]]).double()
    assert_same(block(more, dt=finer)[0][:, -1], block(u, dt=dt)[0][:, -1], 1e-7)


def test_cde_over_a_cubic_path_is_that_of_the_whole_interpolation():
    """The steps' own polynomials are those of ops.interpolation_coefficients; a scalar linear field sums the path."""
    from pyro_ssm.ops import interpolation_coefficients, interpolation_slope

    times, u = torch.tensor([0.0, 0.7, 1.0, 2.5, 3.0]).double(), rand(5, 2)
    weights = rand(1, 1, 3)
    # dz = sin(t) dX, with t kept as a second state: the integral depends on the shape of the path within each gap

    def field(z):
        clock = torch.zeros(z.shape[:-2] + (1, 2, 3)).double()
        clock[..., 1, 0] = 1.0
        clock[..., 0, :] = torch.sin(z[..., 1:]) * weights.squeeze(0)
        return clock

    block = NeuralCDE(2, 2, field, interpolation="cubic", num_steps=200).double()
    with torch.no_grad():
        block.enter.weight.zero_()
        block.enter.bias.zero_()
        y = block(u, dt=torch.cat([torch.ones(1).double(), times.diff()]))[0]
        rows, total, wanted = interpolation_coefficients(times, u, "cubic"), torch.zeros(()).double(), [0.0]
        for k in range(4):
            gap = times[k + 1] - times[k]
            tau = (torch.arange(20000).double() + 0.5) / 20000 * gap
            slope = interpolation_slope(rows[k], tau.unsqueeze(-1), 2)
            moves = torch.cat([torch.ones(20000, 1).double(), slope], -1)
            total = total + (torch.sin(times[k] + tau) * (moves * weights.reshape(3)).sum(-1)).mean() * gap
            wanted.append(float(total))
    torch.testing.assert_close(y[:, 0], torch.tensor(wanted).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in BLOCKS if n.startswith("NeuralCDE")])
def test_cde_sees_the_past_only(name):
    block, u = make(name), columns(5)
    jacobian = torch.autograd.functional.jacobian(lambda u: block(u)[0], u).abs().sum((1, 3))
    assert (jacobian.triu(1) == 0).all() and (jacobian[:, 0] > 0).all()


# ------------------------------------------------------------------------------------------------ their memory


class OfBlock(MemoryContract):
    obs_dim, input_dim, state_dim, num_times = 2, 1, 0, 4
    block = staticmethod(lambda: None)

    def make_component(self):
        return EvolvingMemory(self.block(), input_dim=1)


class TestMemoryOfGRUD(OfBlock):
    block = staticmethod(lambda: GRUD(2, 3, 1))


class TestMemoryOfODERNN(OfBlock):
    block = staticmethod(lambda: ODERNN(5, 3, obs_dim=2))


class TestMemoryOfGRUODE(OfBlock):
    block = staticmethod(lambda: GRUODE(5, 3, obs_dim=2))


class TestMemoryOfGRUODEBayes(OfBlock):
    block = staticmethod(lambda: GRUODEBayes(2, 3, 1, prepared_dim=3))


class TestMemoryOfNeuralCDE(OfBlock):
    block = staticmethod(lambda: NeuralCDE(5, 3, obs_dim=2, interpolation="rectilinear", hidden=4))


del OfBlock


def test_memories_refuse_what_does_not_fit():
    with pytest.raises(TypeError, match="predicts nothing.*rectilinear"):
        EvolvingMemory(NeuralCDE(4, 3, obs_dim=2))
    with pytest.raises(ValueError, match="wanted obs_dim > 0"):
        EvolvingMemory(ODERNN(4, 3))
    with pytest.raises(ValueError, match="in_features = 2"):
        EvolvingMemory(ODERNN(4, 3, obs_dim=2), input_dim=1)
    with pytest.raises(TypeError, match="must be an evolving block"):
        EvolvingMemory(nn.Linear(2, 2))
    memory = EvolvingMemory(GRUD(2, 3, 1), input_dim=1)
    with pytest.raises(ValueError, match="input_dim=1, got `inputs` None"):
        memory.see_state(memory.start((3,))[0], torch.zeros(3, 1, 0), torch.ones(1, 1), None)


def test_constructors_refuse_what_cannot_be():
    for wrong, match in (
        (lambda: ODERNN(3, 4, obs_dim=2), "at least 4"),
        (lambda: ODERNN(3, 4, method="exponential"), "`method`"),
        (lambda: ODERNN(3, 4, cell="lstm"), "`cell`"),
        (lambda: GRUODE(3, 4, num_steps=0), "`num_steps`"),
        (lambda: GRUD(3, 4, mean=torch.zeros(2)), "`mean`"),
        (lambda: GRUODEBayes(3, 4, floor=0.0), "`floor`"),
        (lambda: NeuralCDE(3, 4, interpolation="spline"), "`interpolation`"),
        (lambda: NeuralCDE(3, 4, obs_dim=2), "at least 4"),
        (lambda: ODERNN(3, 4, lambda h: h[..., :1])(torch.zeros(2, 5, 3)), r"`field` must return \(..., 1, 4\)"),
        (lambda: NeuralCDE(3, 4, lambda z: z)(torch.zeros(2, 5, 3)), r"`field` must return \(..., 1, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()


@all_blocks
def test_nothing_waits_for_the_device(name):
    """On the meta device a tensor of another device, or a value that is asked for, is an error."""
    block = BLOCKS[name]().to("meta")
    u, dt, mask = (torch.zeros(shape, device="meta") for shape in ((2, 4, F), (2, 4), (2, 4)))
    y, state = block(u, dt=dt, mask=mask.bool(), reset=mask.bool())
    assert y.shape == (2, 4, F) and all(leaf.device.type == "meta" for leaf in [y, *leaves(state)])
