import math

import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample
from torch.distributions import MultivariateNormal

import pyro_ssm as ssm
from pyro_ssm.binding import bind
from pyro_ssm.dynamics import HarmonicOscillator, IntegratedWiener, LinearSDE, Matern, OrnsteinUhlenbeck
from pyro_ssm.testing.affine import compose
from tests.blocks.component_checks import TIMES, check_component, jitter, varied

D = torch.float64
F = torch.tensor([[-0.6, 1.0], [-0.8, -0.4]])
L = torch.tensor([[0.5, 0.0], [0.2, 0.9]])

MAKERS = {
    "LinearSDE": lambda: LinearSDE(F, L),
    "LinearSDE, inputs": lambda: jitter(LinearSDE(F, L, input_dim=3, offset=torch.tensor([0.3, -0.2]))),
    "Matern 3/2": lambda: Matern(1.5, lengthscale=1.7, variance=0.8),
    "IntegratedWiener": lambda: IntegratedWiener(1, diffusion=0.7),
    "HarmonicOscillator": lambda: HarmonicOscillator(1.5, 0.4, 0.8),
    "StationaryInitial of LinearSDE": lambda: jitter(LinearSDE(F - 3 * torch.eye(2), L)).stationary(),
    "StationaryInitial of Matern": lambda: Matern(1.5).stationary(),
}
TRANSITIONS = {name: make for name, make in MAKERS.items() if not name.startswith("Stationary")}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_contract(make):
    check_component(make)


@pytest.mark.parametrize("make", [*TRANSITIONS.values(), lambda: Matern(2.5), lambda: IntegratedWiener(3)])
def test_two_gaps_are_one_long_gap(make):
    component = make().double()
    inputs = torch.randn(1, 3, dtype=D)
    times = torch.tensor([0.0, 0.3, 2.0], dtype=D)
    first, second, both = (
        component.affine(times[a : a + 1], times[b : b + 1], inputs) for a, b in ((0, 1), (1, 2), (0, 2))
    )
    matrix, offset, covariance = compose(first, second)
    torch.testing.assert_close(matrix, both.matrix)
    torch.testing.assert_close(offset, both.offset.expand(offset.shape))
    torch.testing.assert_close(covariance, both.scale_tril @ both.scale_tril.mT)


def test_diagonal_drift_is_ornstein_uhlenbeck():
    rate, mean, q = torch.tensor([0.7, 2.0]), torch.tensor([1.0, -3.0]), torch.tensor([0.5, 1.5])
    sde = bind(LinearSDE(-torch.diag(rate), torch.diag(q), offset=rate * mean))
    process = bind(OrnsteinUhlenbeck(2, rate=rate, mean=mean, diffusion=q))
    z = torch.randn(4, 5, 2)
    a, b = sde(z, TIMES[:-1], TIMES[1:], None), process(z, TIMES[:-1], TIMES[1:], None)
    torch.testing.assert_close((a.mean, a.variance), (b.mean, b.variance))
    a, b = sde.stationary()(TIMES[:1], None), process.stationary()(TIMES[:1], None)
    torch.testing.assert_close((a.mean, a.variance), (b.mean, b.variance))


def test_held_inputs_move_the_mean_as_an_offset_does():
    drive = torch.randn(2, 3, dtype=D)
    driven = bind(LinearSDE(F, L, input_dim=3).double(), {"input_matrix": drive})
    z, u = torch.randn(5, 2, dtype=D), torch.randn(5, 3, dtype=D)
    law = driven(z, TIMES[:-1], TIMES[1:], u)
    for k in range(5):
        alone = LinearSDE(F, L, offset=torch.zeros(2)).double()
        alone = bind(alone, {"offset": drive @ u[k]})(z[k : k + 1], TIMES[k : k + 1], TIMES[k + 1 : k + 2], None)
        torch.testing.assert_close(law.mean[k], alone.mean[0])


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5])
@pytest.mark.parametrize("own", [False, True])
def test_matern_is_the_gaussian_process(nu, own):
    times = torch.cumsum(0.01 + torch.rand(*((2,) if own else ()), 40, dtype=D), -1)
    y = torch.randn(2, 40, 1, dtype=D)
    mask = torch.rand(2, 40, 1) < 0.8
    mask[:, 0] = True
    transition = Matern(nu)
    emission = ssm.emissions.LinearNormal(transition.state_dim, 1, matrix=transition.row().unsqueeze(0))
    model = ssm.StateSpaceModel(transition.stationary(), transition, emission).double().requires_grad_(False)
    values = {"transition.lengthscale": 0.8, "transition.variance": 1.7, "emission.scale": torch.tensor([0.3])}
    values = {name: torch.as_tensor(value, dtype=D) for name, value in values.items()}
    total = ssm.infer.kalman_filter(model.bind(values), ssm.TimeSeries(times, y, mask=mask)).log_likelihood.sum(-1)
    for b in range(2):
        t, seen = (times[b] if own else times), mask[b, :, 0]
        x = (t[:, None] - t).abs() * math.sqrt(2 * nu) / values["transition.lengthscale"]
        kernel = 1.7 * torch.exp(-x) * {0.5: 1.0, 1.5: 1 + x, 2.5: 1 + x + x * x / 3}[nu]
        S = kernel + values["emission.scale"] ** 2 * torch.eye(40, dtype=D)
        wanted = MultivariateNormal(torch.zeros(int(seen.sum()), dtype=D), S[seen][:, seen]).log_prob(y[b, seen, 0])
        torch.testing.assert_close(total[b], wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Matern(0.5),
        lambda: Matern(1.5),
        lambda: Matern(2.5, 0.3, 2.0),
        lambda: HarmonicOscillator(1.5, 0.4, 0.8),
    ],
)
def test_closed_form_stationary_covariance(make):
    component = make().double().requires_grad_(False)
    (A, B), root = component.system(), component.stationary_covariance_root()
    P = root @ root.mT
    torch.testing.assert_close(A @ P + P @ A.mT, -B @ B.mT, rtol=1e-9, atol=1e-9 * float(B.square().max()))
    general = super(type(component), component).stationary_covariance_root()
    torch.testing.assert_close(general @ general.mT, P, rtol=1e-6, atol=1e-9)


def test_undamped_oscillator_turns():
    swing = HarmonicOscillator(2.0, None, 0.5).double()
    times = torch.tensor([0.0, 0.7], dtype=D)
    w, t = 2.0, 0.7
    wanted = torch.tensor([[math.cos(w * t), math.sin(w * t) / w], [-w * math.sin(w * t), math.cos(w * t)]], dtype=D)
    torch.testing.assert_close(swing.affine(times[:1], times[1:], None).matrix[0], wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="without damping has no stationary law"):
        swing.stationary()(times[:1], None)


def test_equal_gaps_are_one_step():
    sde, even = LinearSDE(F, L), torch.arange(1000.0).double()
    assert sde.affine(even[:-1], even[1:], None).matrix.shape == (1, 2, 2)
    odd = even.clone()
    odd[500:] += 0.5
    parts = sde.affine(odd[:-1], odd[1:], None)
    alone = sde.affine(odd[499:500], odd[500:501], None)
    assert parts.matrix.shape == (999, 2, 2)
    torch.testing.assert_close((parts.matrix[499], parts.scale_tril[499]), (alone.matrix[0], alone.scale_tril[0]))


def test_own_grids_and_own_parameters_are_a_loop():
    sde = LinearSDE(F, L)
    values = varied(sde, 3, 2)
    times = torch.cumsum(torch.rand(2, 6, dtype=D) + 0.1, -1)
    parts = bind(sde, values).affine(times[:, :-1], times[:, 1:], None)
    for s in range(3):
        for b in range(2):
            alone = bind(sde, {n: v[s, b] for n, v in values.items()}).affine(times[b, :-1], times[b, 1:], None)
            torch.testing.assert_close(parts.matrix[s, b], alone.matrix)
            torch.testing.assert_close(parts.scale_tril[s, b], alone.scale_tril, rtol=1e-4, atol=1e-5)


def test_a_prior_on_the_lengthscale():
    transition = Matern(1.5)
    model = ssm.StateSpaceModel(transition.stationary(), transition, ssm.emissions.LinearNormal(2, 1))
    model.transition.lengthscale = PyroSample(dist.LogNormal(0.0, 0.5))
    data = ssm.TimeSeries(torch.arange(5.0), torch.randn(2, 5, 1))
    values = torch.tensor([0.5, 2.0])
    both = ssm.infer.kalman_filter(model.bind({"transition.lengthscale": values.unsqueeze(-1)}), data).log_likelihood
    assert both.shape == (2, 2, 5)
    for s in range(2):
        one = ssm.infer.kalman_filter(model.bind({"transition.lengthscale": values[s]}), data).log_likelihood
        torch.testing.assert_close(both[s], one)


def test_a_path_without_density_says_so():
    sde = LinearSDE(torch.diag(torch.tensor([-1.0, -2.0])), torch.tensor([[1.0], [0.0]]))
    path = ssm.distributions.MarkovPath(ssm.dynamics.NormalInitial(2), sde, torch.arange(4.0).double())
    z = path.rsample((3,))
    assert z.shape == (3, 4, 2)
    torch.testing.assert_close(z[:, 1:, 1], z[:, :-1, 1] * math.exp(-2.0))
    with pytest.raises(NotImplementedError, match="has no density"):
        path.log_prob(z)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="`matrix` must be square"):
        LinearSDE(torch.ones(2, 3), L)
    with pytest.raises(ValueError, match=r"`diffusion` must have shape \(2, noise\)"):
        LinearSDE(F, torch.ones(3, 1))
    with pytest.raises(ValueError, match="`nu` must be one of"):
        Matern(2.0)
    with pytest.raises(ValueError, match="no stationary law: an eigenvalue of F"):
        LinearSDE(torch.eye(2), L).stationary()(TIMES[:1], None)
