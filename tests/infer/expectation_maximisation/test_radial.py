"""Nonlinear EM: radial basis functions with an extended Kalman smoother."""

import pytest
import torch

from pyro_ssm import StateSpaceModel, TimeSeries
from pyro_ssm.dynamics import LinearNormal, NormalInitial, RBFTransition
from pyro_ssm.emissions import LinearNormal as LinearEmission
from pyro_ssm.emissions import RBFNormal
from pyro_ssm.infer import em, kalman_smoother
from pyro_ssm.infer.expectation_maximisation.statistics import features
from pyro_ssm.infer.gaussian import extended_kalman_smoother

D = torch.float64
CENTERS = torch.linspace(-2, 2, 7, dtype=D).unsqueeze(-1)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(D)
    yield
    torch.set_default_dtype(torch.float32)


def known_emission(scale=0.3):
    return LinearEmission(1, 1, matrix=torch.ones(1, 1), scale=scale).requires_grad_(False)


def mean_of(transition, z):
    with torch.no_grad():
        return transition(z, torch.zeros(len(z)), torch.ones(len(z)), None).mean


def sigmoid(z):
    return 1.5 * torch.tanh(3 * z)


def draw(map, batch, times, noise, observation):
    z = 1.5 * torch.randn(batch, times, 1)
    for k in range(times - 1):
        z[:, k + 1] = map(z[:, k]) + noise * torch.randn(batch, 1)
    values = z + observation * torch.randn(z.shape)
    return TimeSeries(torch.arange(float(times)), values)


def tent(z):
    return 1.2 - 1.6 * z.abs()


@pytest.mark.parametrize("map", [sigmoid, tent])
def test_a_nonlinear_map_is_recovered_better_than_by_a_linear_one(map):
    torch.manual_seed(0)
    data = draw(map, 30, 12, noise=0.2, observation=0.15)
    linear = StateSpaceModel(NormalInitial(1), LinearNormal(1), known_emission(0.15))
    radial = StateSpaceModel(NormalInitial(1), RBFTransition(1, CENTERS, width=0.6), known_emission(0.15))
    straight = em(linear, data, num_iterations=8, progress=False)
    bent = em(radial, data, num_iterations=8, smoother=extended_kalman_smoother, progress=False)
    grid = torch.linspace(-1.4, 1.4, 41).unsqueeze(-1)
    error = (mean_of(radial.transition, grid) - map(grid)).square().mean().sqrt()
    linear_error = (mean_of(linear.transition, grid) - map(grid)).square().mean().sqrt()
    assert error < 0.15 and error < linear_error / 3
    assert radial.transition.scale.item() == pytest.approx(0.2, abs=0.06)
    assert bent.log_likelihood[-1] > straight.log_likelihood[-1] + 50
    assert bent.log_likelihood.shape == (bent.num_iterations + 1,)
    assert torch.equal(radial.transition.centers, CENTERS)  # the M-step leaves them


def test_without_bumps_it_is_linear_em():
    torch.manual_seed(1)
    data = draw(sigmoid, 5, 8, 0.3, 0.3)
    linear = StateSpaceModel(NormalInitial(1), LinearNormal(1), LinearEmission(1, 1, matrix=torch.ones(1, 1)))
    emission = RBFNormal(1, 1, CENTERS, matrix=torch.ones(1, 1))
    radial = StateSpaceModel(NormalInitial(1), RBFTransition(1, CENTERS), emission)
    fixed = ["transition.weights", "emission.weights"]
    one = em(linear, data, num_iterations=3, progress=False)
    two = em(radial, data, num_iterations=3, fixed=fixed, smoother=extended_kalman_smoother, progress=False)
    torch.testing.assert_close(one.log_likelihood, two.log_likelihood, rtol=1e-9, atol=0)
    for part in ("transition", "emission"):
        for name in ("matrix", "offset", "scale"):
            ours, theirs = (getattr(getattr(model, part), name) for model in (radial, linear))
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_known_states_give_least_squares():
    """Next to no observation noise: the M-step is the regression on the features of what was seen."""
    torch.manual_seed(2)
    data = draw(sigmoid, 6, 12, 0.4, 1e-5)
    transition = RBFTransition(1, CENTERS, width=0.6)
    model = StateSpaceModel(NormalInitial(1), transition, known_emission(2e-4))
    em(model, data, num_iterations=1, smoother=extended_kalman_smoother, progress=False)
    x, z = data.values[:, :-1].reshape(-1, 1), data.values[:, 1:].reshape(-1, 1)
    bumps = (-0.5 * ((x - CENTERS.mT) / 0.6).square()).exp()
    phi = torch.cat([x, bumps, torch.ones_like(x)], -1)
    fit = phi @ torch.linalg.lstsq(phi, z).solution
    torch.testing.assert_close(mean_of(transition, x), fit, rtol=0, atol=1e-3)
    assert transition.scale.item() == pytest.approx((z - fit).square().mean().sqrt().item(), rel=1e-3)


def test_moments_of_features_are_those_of_draws():
    torch.manual_seed(3)
    component = RBFTransition(2, torch.randn(4, 2), input_dim=1)
    root = torch.tensor([[0.5, 0.0], [0.3, 0.4]])
    mean, u = torch.tensor([0.3, -0.2]), torch.tensor([1.7])
    found = features(component, mean, root @ root.mT, u)
    z = mean + torch.randn(200_000, 2) @ root.mT
    bumps = (-0.5 * ((z.unsqueeze(-2) - component.centers) / component.width).square().sum(-1)).exp()
    phi = torch.cat([z, bumps, u.expand(len(z), 1), torch.ones(len(z), 1)], -1).detach()
    torch.testing.assert_close(found.mean, phi.mean(0), rtol=0, atol=5e-3)
    torch.testing.assert_close(found.covariance, phi.T.cov(), rtol=0, atol=5e-3)
    across = (phi - phi.mean(0)).T @ (z - mean) / len(z)
    torch.testing.assert_close(found.slope @ root @ root.mT, across, rtol=0, atol=5e-3)


def test_an_exact_smoother_is_asked_for_where_it_is_needed():
    data = draw(sigmoid, 3, 5, 0.3, 0.3)
    model = StateSpaceModel(NormalInitial(1), RBFTransition(1, CENTERS), known_emission())
    with pytest.raises(TypeError, match="AffineGaussian, got RBFTransition"):
        em(model, data, progress=False, smoother=kalman_smoother)
    with pytest.raises(ValueError, match="`accelerate` compares log-likelihoods"):
        em(model, data, progress=False, smoother=extended_kalman_smoother, accelerate=True)
