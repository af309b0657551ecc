"""Discretised equations: their capabilities, and the exact likelihood as the judge."""

import pytest
import torch

from pyro_ssm import StateSpaceModel, TimeSeries, infer
from pyro_ssm.binding import bind
from pyro_ssm.components import AffineGaussian, Gaussian, SampleOnly
from pyro_ssm.dynamics import (
    ConstantDiffusion,
    HarmonicOscillator,
    LinearDrift,
    LinearSDE,
    MLPDrift,
    NeuralSDE,
    NormalInitial,
    OrnsteinUhlenbeck,
    discretize,
)
from pyro_ssm.emissions import LinearNormal
from pyro_ssm.testing import TransitionContract

D = torch.float64
F, G = torch.tensor([[-1.0, 0.5], [-0.4, -0.6]]), torch.tensor([[0.6, 0.0], [0.3, 0.5]])


def linear(noise="additive"):
    diffusion = ConstantDiffusion(G) if noise == "additive" else ConstantDiffusion(0.5, 2)
    return NeuralSDE(LinearDrift(F, 0.2), diffusion, noise=noise)


class TestAffineEuler(TransitionContract):
    def make_component(self):
        return discretize(linear(), "euler_maruyama")


class TestExact(TransitionContract):
    exact_in_gaps = True

    def make_component(self):
        return discretize(linear("diagonal"), "exact")


class TestLocalLinearisation(TransitionContract):
    def make_component(self):
        return discretize(NeuralSDE(MLPDrift(2, 4), ConstantDiffusion(0.5, 2)), "local_linearisation")


class TestEuler(TransitionContract):
    def make_component(self):
        return discretize(NeuralSDE(MLPDrift(2, 4), ConstantDiffusion(0.5, 2)), "euler_maruyama")


class TestODE(TransitionContract):
    def make_component(self):
        return discretize(MLPDrift(2, 4), "rk4", noise_floor=0.3, substeps=2)


def test_capabilities_are_true():
    nonlinear = NeuralSDE(MLPDrift(2, 4), ConstantDiffusion(0.5, 2))
    for equation, method, more, capability, lacking in [
        (linear(), "euler_maruyama", {}, AffineGaussian, SampleOnly),
        (linear(), "exact", {}, AffineGaussian, SampleOnly),
        (nonlinear, "euler_maruyama", {}, Gaussian, AffineGaussian),
        (nonlinear, "local_linearisation", {}, Gaussian, AffineGaussian),
        (nonlinear, "euler_maruyama", {"substeps": 2}, SampleOnly, Gaussian),
        (nonlinear, "milstein", {}, SampleOnly, Gaussian),
        (MLPDrift(2, 4), "rk4", {}, Gaussian, AffineGaussian),
        (OrnsteinUhlenbeck(2), "euler_maruyama", {}, AffineGaussian, SampleOnly),
        (OrnsteinUhlenbeck(2), "exact", {}, AffineGaussian, SampleOnly),
    ]:
        transition = discretize(equation, method, **more)
        assert isinstance(transition, capability) and not isinstance(transition, lacking), method


@pytest.mark.parametrize("method", ["exact", "local_linearisation"])
def test_linear_equations_have_the_law_of_linear_sde(method):
    torch.manual_seed(0)
    wanted = LinearSDE(F, G, offset=0.2).double()
    transition = discretize(linear().double(), method)
    z, times = torch.randn(3, 4, 2, dtype=D), torch.tensor([0.0, 0.1, 1.0, 1.5, 4.0], dtype=D)
    a, b = (t(z, times[:-1], times[1:], None) for t in (transition, wanted))
    torch.testing.assert_close(a.mean, b.mean)
    torch.testing.assert_close(a.covariance_matrix, b.covariance_matrix.expand(a.covariance_matrix.shape))


@pytest.mark.parametrize(
    "process", [OrnsteinUhlenbeck(2, rate=0.8, mean=0.5, diffusion=0.7), HarmonicOscillator(2.0, damping=0.5)],
    ids=["OrnsteinUhlenbeck", "HarmonicOscillator"],
)  # fmt: skip
def test_the_likelihood_of_a_discretised_process_converges_at_order_one(process):
    torch.manual_seed(0)
    process = process.double()
    start, emission = NormalInitial(2).double(), LinearNormal(2, 1, scale=0.5).double()
    data = TimeSeries(torch.tensor([0.0, 0.4, 1.0, 1.3, 2.5]), torch.randn(2, 5, 1, dtype=D))
    exact = infer.kalman_filter(StateSpaceModel(start, process, emission).bind(), data).log_likelihood.sum()
    errors = []
    for n in (32, 64, 128):
        model = StateSpaceModel(start, discretize(process, "euler_maruyama"), emission)
        found = infer.kalman_filter(model.bind(), data.refine(n)).log_likelihood.sum()
        errors.append(float((found - exact).abs().detach()))
    orders = torch.tensor(errors).log2().diff().neg()
    assert ((orders > 0.9) & (orders < 1.2)).all(), errors


def test_parameters_of_a_process_are_shared():
    process = OrnsteinUhlenbeck(1)
    transition = discretize(process, "euler_maruyama")
    assert set(map(id, transition.parameters())) == set(map(id, process.parameters()))


@pytest.mark.parametrize("method", ["euler_maruyama", "local_linearisation", "milstein"])
def test_particle_filters_agree_with_the_exact_likelihood(method):
    """Ornstein-Uhlenbeck with linear emission: within its own error, up to the bias of the step."""
    torch.manual_seed(0)
    sde = NeuralSDE(LinearDrift(torch.tensor([[-0.8]])), ConstantDiffusion(0.7, 1)).double()
    start, emission = NormalInitial(1).double(), LinearNormal(1, 1, scale=0.5).double()
    data = TimeSeries(torch.linspace(0, 2, 5), torch.randn(5, 1, dtype=D)).refine(10)
    exact = infer.kalman_filter(StateSpaceModel(start, discretize(sde, "exact"), emission).bind(), data)
    model = StateSpaceModel(start, discretize(sde, method), emission).bind()
    with torch.no_grad():
        runs = [
            infer.particle_filter(infer.bootstrap(model, data), num_particles=2000).log_likelihood.sum()
            for _ in range(6)
        ]
    runs = torch.stack(runs)
    bias = 0.0
    if method != "local_linearisation":  # one Euler step a gap (Milstein's is the same for additive noise)
        chain = StateSpaceModel(start, discretize(sde, "euler_maruyama"), emission).bind()
        bias = (infer.kalman_filter(chain, data).log_likelihood.sum() - exact.log_likelihood.sum()).detach()
        assert 0 < abs(float(bias)) < 0.1
    wanted = exact.log_likelihood.sum().detach() + bias
    assert (runs.mean() - wanted).abs() < 4.5 * runs.std() / 6**0.5 + 0.01


def test_local_linearisation_of_second_order_dynamics_has_a_density():
    """Noise on the velocity reaches the position within a step; an Euler step has no density."""
    torch.manual_seed(0)

    def drift(t, z, u):
        x, v = z.unbind(-1)
        return torch.stack([v, -x.sin() - 0.3 * v], -1)

    pendulum = NeuralSDE(drift, ConstantDiffusion(torch.tensor([[0.0], [0.4]])), noise="scalar", state_dim=2)
    euler = discretize(pendulum, "euler_maruyama")
    z, times = torch.randn(3, 4, 2), torch.linspace(0, 1, 5, dtype=D)
    law = discretize(pendulum, "local_linearisation")(z, times[:-1], times[1:], None)
    draws = law.sample((20000,))
    wanted = law.covariance_matrix
    centred = draws - law.mean
    found = (centred.unsqueeze(-1) * centred.unsqueeze(-2)).mean(0)
    torch.testing.assert_close(found, wanted, rtol=0.06, atol=2e-5)
    assert law.log_prob(draws[0]).shape == (3, 4)
    with pytest.raises(NotImplementedError, match="no density"):
        euler(z, times[:-1], times[1:], None).log_prob(z)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4)])
def test_ode_steps_have_their_order(method, order):
    errors = []
    for n in (32, 64, 128):
        step = discretize(lambda t, z, u: torch.cos(t) * z, method, state_dim=1, substeps=n)
        mean = step(torch.ones(1, 1, dtype=D), torch.zeros(1, dtype=D), torch.full((1,), 2.0, dtype=D), None).mean
        errors.append((mean - torch.tensor(2.0, dtype=D).sin().exp()).abs().item())
    orders = torch.tensor(errors, dtype=D).log2().diff().neg()
    assert (orders > order - 0.1).all() and (orders < order + 0.6).all(), orders


def test_drawn_parameters_and_jacobians():
    """Each draw of the drift's matrix has its own Jacobian."""
    sde = linear().double()
    matrices = torch.stack([F, 2 * F]).double()
    z, times = torch.randn(3, 4, 2, dtype=D), torch.linspace(0, 1, 5, dtype=D)
    both = bind(discretize(sde, "local_linearisation"), {"sde.drift.matrix": matrices.unsqueeze(1)})
    law = both(z, times[:-1], times[1:], None)
    for i in range(2):
        one = bind(discretize(sde, "local_linearisation"), {"sde.drift.matrix": matrices[i]})
        torch.testing.assert_close(law.mean[i], one(z, times[:-1], times[1:], None).mean)


def test_what_does_not_go_together_is_refused():
    nonlinear = NeuralSDE(MLPDrift(2, 4), ConstantDiffusion(0.5, 2))
    strat = NeuralSDE(MLPDrift(1, 4), lambda t, z, u: z, interpretation="stratonovich", method="heun")
    for words, call in [
        ("exact law over a gap is known for", lambda: discretize(nonlinear, "exact")),
        ("scheme for Itô's integral", lambda: discretize(strat, "euler_maruyama")),
        ("does not converge", lambda: discretize(nonlinear, "heun")),
        ("one step a gap", lambda: discretize(nonlinear, "local_linearisation", substeps=2)),
        ("belong to ODE fields", lambda: discretize(nonlinear, noise_floor=0.1)),
        ("`state_dim` is needed", lambda: discretize(lambda t, z, u: z, "rk4")),
        ("must not be negative", lambda: discretize(MLPDrift(1), "rk4", noise_floor=-1.0)),
        ("`method` must be one of", lambda: discretize(nonlinear, "rk4")),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="`equation` must be"):
        discretize(discretize(nonlinear))
    sde = linear()
    sde(torch.zeros(1, 2), torch.zeros(1), torch.ones(1), None)
    with pytest.raises(RuntimeError, match="discretise first"):
        discretize(sde, "exact")
