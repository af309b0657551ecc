"""The equation as a component: fields and their weights, inputs, jumps, regularisation, laws and errors."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from scipy.integrate import solve_ivp
from torch import nn

from pyro_ssm import StateSpaceModel, TimeSeries, infer
from pyro_ssm.binding import bind, random_parameters
from pyro_ssm.blocks import with_normal_priors
from pyro_ssm.components import Gaussian
from pyro_ssm.dynamics import (
    ConstantDiffusion,
    FieldPenalty,
    GreyBox,
    InputPath,
    LinearDrift,
    MLPDrift,
    NeuralODE,
    NeuralSDE,
    NormalInitial,
    SecondOrder,
    discretize,
    interpolate_inputs,
)
from pyro_ssm.emissions import LinearNormal
from pyro_ssm.models.laws import solve_from
from pyro_ssm.testing import TransitionContract

D = torch.float64
A = torch.tensor([[-0.3, 1.0], [-1.0, -0.3]])
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


class TestContract(TransitionContract):
    def make_component(self):
        return discretize(NeuralODE(MLPDrift(2, 8, activation="tanh")), "flow", noise_floor=0.3)


class TestInputsContract(TransitionContract):
    input_dim = 2

    def make_component(self):
        ode = NeuralODE(MLPDrift(2, 8, input_dim=2, activation="tanh"), method="rk4")
        return discretize(ode, "flow", noise_floor=0.3)


def grids(batch=3, num=6):
    torch.manual_seed(0)
    return torch.rand(batch, num, dtype=D).cumsum(-1) + torch.arange(batch, dtype=D).unsqueeze(-1)


def by_gaps(ode, start, times, inputs=None):
    """A path by single steps of the transition."""
    path = [start]
    for k in range(times.shape[-1] - 1):
        held = None if inputs is None else inputs[..., k : k + 1, :]
        law = ode(path[-1], times[..., k : k + 1], times[..., k + 1 : k + 2], held)
        path.append(law.sample())
        assert (law.stddev == 0).all()
    return torch.cat(path, -2)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8", "rk4", "implicit_adams"])
def test_steps_and_paths_agree_and_are_the_matrix_exponential(method):
    more = TIGHT if method in ("dopri5", "bosh3", "dopri8") else {**TIGHT, "step_size": 0.01}
    ode, times = NeuralODE(LinearDrift(A), method=method, **more).double(), grids()
    start = torch.randn(3, 1, 2, dtype=D)
    path = ode.solve(start, times)
    for b in range(3):
        wanted = torch.linalg.matrix_exp(A.double() * (times[b] - times[b, 0])[:, None, None]) @ start[b, 0]
        torch.testing.assert_close(path[b].detach(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_gaps(ode, start, times), path.detach(), rtol=1e-5, atol=1e-6)
    together = ode(path[:, :-1], times[:, :-1], times[:, 1:], None)
    torch.testing.assert_close(together.mean, path[:, 1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_drawn_weights_are_read_once_and_have_their_gradients(adjoint, own):
    """Each draw has its own path; the adjoint's gradient of drawn weights is that of finite differences."""
    torch.manual_seed(0)
    field = with_normal_priors(MLPDrift(2, 4, activation="tanh").double())
    ode = NeuralODE(field, adjoint=adjoint, **TIGHT)
    times = grids(3, 4) if own else grids(3, 4)[0]
    names = random_parameters(ode)
    shapes = [(4, 2), (4,), (2, 4), (2,)]
    draws = [torch.randn(2, 1, *shape, dtype=D, requires_grad=True) for shape in shapes]
    start = torch.randn(2, 3, 1, 2, dtype=D)

    def loss(*values):
        return bind(ode, dict(zip(names, values, strict=True))).solve(start, times).square().sum()

    path = bind(ode, dict(zip(names, draws, strict=True))).solve(start, times)
    for i in range(2):
        alone = bind(ode, {name: value[i, 0] for name, value in zip(names, draws, strict=True)}).solve(start[i], times)
        torch.testing.assert_close(path[i], alone, rtol=1e-6, atol=1e-7)
    grads = torch.autograd.grad(loss(*draws), draws)
    for value, grad in zip(draws, grads, strict=True):
        step = 1e-5 * torch.randn_like(value)
        with torch.no_grad():
            up = loss(*[v + step if v is value else v for v in draws])
            down = loss(*[v - step if v is value else v for v in draws])
        torch.testing.assert_close((up - down) / 2, (grad * step).sum(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", [None, "held", "linear", "cubic", "rectilinear"])
@pytest.mark.parametrize("backend", ["dense", "torchdiffeq"])
def test_inputs_move_as_they_are_interpolated(kind, backend):
    """Against scipy with the input as a function of time; own grids; a refined grid and single steps agree."""
    times = grids()
    data = TimeSeries(times, torch.zeros(3, 6, 1, dtype=D), inputs=torch.randn(3, 6, 1, dtype=D))
    moving = data if kind is None else interpolate_inputs(data, kind)
    ode = NeuralODE(
        lambda t, z, u: -z + u + torch.sin(t), state_dim=1, interpolation=kind, backend=backend, rtol=1e-8, atol=1e-9
    )
    start = torch.randn(3, 1, 1, dtype=D)
    path = ode.solve(start, times, moving.inputs)
    for b in range(3):
        z = start[b, 0].numpy()
        for k in range(5):

            def rhs(t, z, b=b, k=k):
                row = moving.inputs[b, k : k + 1]
                u = row if kind is None else InputPath(kind).at(row, torch.tensor([t], dtype=D))
                return -z + u.numpy()[0] + torch.tensor(t).sin().numpy()

            z = solve_ivp(rhs, times[b, k : k + 2].tolist(), z, rtol=1e-10, atol=1e-11).y[:, -1]
            torch.testing.assert_close(path[b, k + 1], torch.from_numpy(z), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(by_gaps(ode, start, times, moving.inputs), path, rtol=1e-6, atol=1e-6)
    fine = moving.refine(3)
    torch.testing.assert_close(ode.solve(start, fine.times, fine.inputs)[:, ::3], path, rtol=1e-6, atol=1e-6)


def test_inputs_that_the_field_ignores_make_no_gaps():
    calls = []

    class Counted(nn.Module):
        state_dim, input_dim = 1, 0

        def forward(self, t, z, u):
            assert u is None
            calls.append(1)
            return -z

    times = torch.linspace(0, 1, 201, dtype=D)
    NeuralODE(Counted()).solve(torch.ones(1, 1), times, torch.zeros(201, 3))
    assert len(calls) < 60


def dose(t, z, u):
    return z + u


def test_jumps_are_doses():
    """A compartment with given doses, against the sum of exponentials; refined, own times, single steps."""
    times = grids()
    doses = torch.zeros(3, 6, 1, dtype=D)
    doses[0, 1], doses[0, 3], doses[2, 0] = 2.0, 1.0, 0.5
    data = interpolate_inputs(TimeSeries(times, torch.zeros(3, 6, 1, dtype=D), inputs=doses), "held")
    ode = NeuralODE(lambda t, z, u: -0.8 * z, state_dim=1, jump=dose, interpolation="held", **TIGHT)
    start = torch.ones(3, 1, 1, dtype=D)

    def amount(b, t):
        before = (times[b] < t).to(D)
        return torch.exp(-0.8 * (t - times[b, 0])) + (before * doses[b, :, 0] * torch.exp(-0.8 * (t - times[b]))).sum()

    model = StateSpaceModel(NormalInitial(1), ode, LinearNormal(1, 1)).double().bind()
    for grid in (data, data.refine(4)):
        path = solve_from(model, grid, start)
        for b in range(3):
            wanted = torch.stack([amount(b, t) for t in grid.times[b]])
            torch.testing.assert_close(path[b, :, 0], wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(by_gaps(ode, start, times, data.inputs), ode.solve(start, times, data.inputs))
    raw = TimeSeries(times, torch.zeros(3, 6, 1, dtype=D), inputs=doses)
    plain = NeuralODE(lambda t, z, u: -0.8 * z, state_dim=1, jump=dose, **TIGHT)
    torch.testing.assert_close(plain.solve(start, times, raw.inputs), ode.solve(start, times, data.inputs))
    with pytest.raises(ValueError, match="a jump would be made at every refined time"):
        solve_from(StateSpaceModel(NormalInitial(1), plain, LinearNormal(1, 1)).double().bind(), raw.refine(2), start)


def test_penalties_are_integrals_along_the_path():
    field = LinearDrift(A).double()
    ode = NeuralODE(field, **TIGHT).double()
    times = torch.linspace(0, 2, 401, dtype=D)
    path = ode.solve(torch.randn(2, 1, 2, dtype=D), times)
    speed = lambda z: field(None, z, None)  # noqa: E731
    # |A z|^2 = 1.09 |z|^2 and |z|^2 = |z_1|^2 exp(-0.6 t)
    wanted = 1.09 * path[:, 0].square().sum(-1) * (1 - torch.tensor(-1.2, dtype=D).exp()) / 0.6
    torch.testing.assert_close(FieldPenalty(kinetic=3.0)(speed, path, times), 3 * wanted, rtol=1e-4, atol=0)
    draws = torch.stack([FieldPenalty(jacobian=0.5)(speed, path, times) for _ in range(100)])
    wanted = 0.5 * 2 * A.square().sum().double()
    # for signs e of two coordinates |e^T A|^2 = |A|_F^2 + 2 e_1 e_2 (A A^T)_12, and A A^T is diagonal
    torch.testing.assert_close(draws, wanted.expand(100, 2), rtol=1e-6, atol=0)
    for _ in range(50):  # the gradient of |A|_F^2 in expectation
        FieldPenalty(jacobian=0.5)(speed, path.detach(), times).sum().backward()
    torch.testing.assert_close(field.matrix.grad / 50, 2 * 2 * A.double(), rtol=0, atol=0.15)
    stopped = times.clamp(max=1.0)
    held = torch.where((times <= 1.0).unsqueeze(-1), path, path[:, 200:201])
    for penalty in (FieldPenalty(kinetic=1.0), FieldPenalty(jacobian=1.0)):
        torch.manual_seed(0)
        a = penalty(speed, held, stopped)
        torch.testing.assert_close(a, penalty(speed, path[:, :201], times[:201]), rtol=1e-6, atol=0)
    with torch.no_grad():
        assert not FieldPenalty(jacobian=0.5)(speed, path, times).requires_grad


def test_second_order_equations():
    pendulum = NeuralODE(SecondOrder(1, lambda t, z, u: -torch.sin(z[..., :1])), **TIGHT)
    path = pendulum.solve(torch.tensor([[2.0, 0.3]], dtype=D), torch.linspace(0, 20, 101, dtype=D))
    energy = 0.5 * path[:, 1] ** 2 - torch.cos(path[:, 0])
    torch.testing.assert_close(energy, energy[:1].expand(101), rtol=0, atol=1e-6)
    torch.manual_seed(0)
    field = SecondOrder(2, hidden=8, input_dim=1, uses_time=True)
    z, t, u = torch.randn(3, 5, 4), torch.rand(5, 1), torch.randn(3, 5, 1)
    value = field(t, z, u)
    torch.testing.assert_close(value[..., :2], z[..., 2:])
    whole = torch.cat([z, u, t.expand(3, 5, 1)], -1)
    torch.testing.assert_close(value[..., 2:], field.network(whole))
    bayesian = NeuralODE(with_normal_priors(SecondOrder(2, hidden=8)))
    assert random_parameters(bayesian)[0] == "field.network.layers.0.weight"
    noise = ConstantDiffusion(torch.tensor([[0.0], [0.5]]))
    assert NeuralSDE(SecondOrder(1, hidden=4), noise, noise="additive", method="heun").state_dim == 2


class Decay(PyroModule):
    def __init__(self):
        super().__init__()
        self.rate = PyroSample(dist.LogNormal(0.0, 0.5))

    def forward(self, t, z, u):
        return -self.rate * z


def test_grey_boxes_have_priors_and_corrections():
    torch.manual_seed(0)
    ode = NeuralODE(GreyBox(Decay(), MLPDrift(1, 4, scale=0.0)), **TIGHT).double()
    assert random_parameters(ode) == ["field.mechanism.rate"] and ode.state_dim == 1
    rates = torch.tensor([0.5, 2.0], dtype=D)
    times = torch.linspace(0, 1, 3, dtype=D)
    path = bind(ode, {"field.mechanism.rate": rates}).solve(torch.ones(1, 1, dtype=D), times)
    torch.testing.assert_close(path.squeeze(-1), torch.exp(-rates[:, None] * times).detach(), rtol=1e-6, atol=1e-7)
    (grad,) = torch.autograd.grad(path.sum(), ode.field.correction.network.layers[-1].bias)
    assert grad.abs() > 0.1


def test_it_is_a_gaussian_law_without_variance_for_kalman_filters():
    """The extended filter of a linear field is exact: the density of the record as one Gaussian vector."""
    times = grids(2, 4)
    torch.manual_seed(1)
    model = StateSpaceModel(
        NormalInitial(2), NeuralODE(LinearDrift(A), **TIGHT), LinearNormal(2, 1, scale=0.4)
    ).double()
    assert isinstance(model.transition, Gaussian)
    data = TimeSeries(times, torch.randn(2, 4, 1, dtype=D))
    found = infer.extended_kalman_filter(model.bind(), data).log_likelihood.sum(-1)
    H = model.emission.matrix.detach()
    for b in range(2):
        E = H @ torch.linalg.matrix_exp(A.double() * (times[b] - times[b, 0])[:, None, None])
        rows = E.squeeze(-2)
        law = torch.distributions.MultivariateNormal(
            torch.zeros(4, dtype=D), rows @ rows.mT + 0.16 * torch.eye(4, dtype=D)
        )
        torch.testing.assert_close(found[b].detach(), law.log_prob(data.values[b, :, 0]), rtol=1e-5, atol=1e-5)
    unscented = infer.unscented_kalman_filter(model.bind(), data).log_likelihood.sum(-1)
    torch.testing.assert_close(unscented, found, rtol=1e-5, atol=1e-5)


def test_copies_and_pickles():
    ode, times = NeuralODE(SecondOrder(1, hidden=4), penalty=FieldPenalty(0.1)), torch.linspace(0, 1, 4, dtype=D)
    start = torch.ones(1, 2)
    for again in (copy.deepcopy(ode), pickle.loads(pickle.dumps(ode))):
        torch.testing.assert_close(again.solve(start, times), ode.solve(start, times), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "rk45"}, "`method` must be one of 'dopri5'"),
        ({"backend": "jax"}, "`backend` must be one of"),
        ({"backend": "dense", "method": "dopri8"}, "backend='dense' has the methods"),
        ({"backend": "dense", "adjoint": True}, "backend='dense' has the methods"),
        ({"step_size": 0.1}, "`step_size` is of fixed-step methods"),
        ({"method": "rk4", "step_size": -0.1}, "`step_size` must be positive"),
        ({"rtol": 0.0}, "`rtol` must be positive"),
        ({"interpolation": "spline"}, "`kind` must be one of"),
        ({"state_dim": 3}, "`state_dim` is 3, but `field` has 2"),
    ],
)
def test_wrong_options_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        NeuralODE(MLPDrift(2, 4), **arguments)


def test_what_does_not_fit_is_refused():
    times, start = torch.tensor([[0.0, 1.0], [0.5, 0.25]], dtype=D), torch.zeros(2, 1, 2)
    with pytest.raises(ValueError, match="`times` go back from 0.5 to 0.25 in series 1"):
        NeuralODE(MLPDrift(2, 4)).solve(start, times)
    with pytest.raises(ValueError, match=r"`field` must return \(..., time, 2\), got"):
        NeuralODE(lambda t, z, u: z[..., :1], state_dim=2).solve(start, times[0])
    with pytest.raises(ValueError, match=r"`jump` must return \(..., time, 2\), got"):
        NeuralODE(MLPDrift(2, 4), jump=lambda t, z, u: z[..., :1]).solve(start, times[0])
    with pytest.raises(ValueError, match="`state_dim` is needed"):
        NeuralODE(lambda t, z, u: z)
    with pytest.raises(ValueError, match="Prepare the data: dynamics.interpolate_inputs"):
        NeuralODE(lambda t, z, u: z, state_dim=2, interpolation="linear").solve(start, times[0], torch.zeros(2, 1))
    with pytest.raises(TypeError, match="`adjoint` needs a field that is a module"):
        NeuralODE(lambda t, z, u: z, state_dim=2, adjoint=True)
    for call in (
        lambda: NeuralODE(3),
        lambda: NeuralODE(MLPDrift(2), jump=3),
        lambda: NeuralODE(MLPDrift(2), penalty=1),
    ):
        with pytest.raises(TypeError, match="must be"):
            call()
    with pytest.raises(ValueError, match="both 0"):
        FieldPenalty()
    with pytest.raises(ValueError, match="`jacobian` must be a finite number"):
        FieldPenalty(1.0, -1.0)
    ode = NeuralODE(MLPDrift(2, 4))
    for call in (lambda: discretize(ode), lambda: discretize(ode, "rk4"), lambda: discretize(ode, "flow", substeps=2)):
        with pytest.raises(ValueError, match="a NeuralODE brings its solver"):
            call()
    with pytest.raises(FloatingPointError, match=r"a step of 'euler' is not finite at step 0 \(time 0\) of series 1"):
        NeuralODE(lambda t, z, u: z**5, method="euler", state_dim=1)(
            torch.tensor([1.0, 1e30]).reshape(2, 1, 1), times[0, :1], times[0, 1:], None
        )
    with pytest.raises(FloatingPointError, match="the path of 'rk4' is not finite at step 1"):
        NeuralODE(lambda t, z, u: z / 0, method="rk4", state_dim=1).solve(torch.ones(1, 1), times[0])
    with pytest.raises(ValueError, match=r"`start` must have shape \(\*lead, 1, 2\).*start.unsqueeze"):
        NeuralODE(MLPDrift(2, 4)).solve(start.squeeze(-2), times[0])


def test_a_grey_box_may_be_an_acceleration():
    spring = GreyBox(lambda t, z, u: -4 * z[..., :1], lambda t, z, u: torch.zeros_like(z[..., :1]))
    ode = NeuralODE(SecondOrder(1, acceleration=spring), **TIGHT)
    times = torch.linspace(0, 2, 9, dtype=torch.float64)
    path = ode.solve(torch.tensor([[1.0, 0.0]], dtype=torch.float64), times)
    torch.testing.assert_close(path[:, 0], (2 * times).cos(), rtol=1e-6, atol=1e-6)


def test_parts_of_a_grey_box_have_one_size():
    with pytest.raises(ValueError, match=r"`mechanism` differ: \[None, 3, 2\]"):
        GreyBox(MLPDrift(2), MLPDrift(3))
    field = GreyBox(lambda t, z, u: z[..., :1], MLPDrift(2))
    with pytest.raises(ValueError, match=r"as many columns as each other, got \(1, 1\) and \(1, 2\)"):
        field(torch.zeros(1, 1), torch.zeros(1, 2), None)  # would be added to both coordinates
