"""Simulated moments against those of the law, within four standard errors."""

import math

import pytest
import torch

from pyro_ssm.data import (
    krishnan_linear,
    krishnan_nonlinear,
    linear_gaussian,
    lorenz,
    lotka_volterra,
    stochastic_volatility,
)

GENERATORS = [linear_gaussian, krishnan_linear, krishnan_nonlinear, stochastic_volatility, lorenz, lotka_volterra]


def check_normal(residual, variance):
    """All entries are independent draws of N(0, variance)."""
    number = residual.numel()
    assert abs(float(residual.double().mean())) < 4 * math.sqrt(variance / number)
    assert abs(float(residual.double().square().mean()) / variance - 1) < 4 * math.sqrt(2 / number)


@pytest.mark.parametrize("simulate", GENERATORS)
def test_seeds_repeat_and_nothing_else_is_touched(simulate):
    state = torch.get_rng_state()
    data, states = simulate(3, 4, generator=5)
    assert torch.equal(torch.get_rng_state(), state)
    again, _ = simulate(3, 4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(data.values, again.values)
    other, _ = simulate(3, 4, generator=6)
    assert not torch.equal(data.values, other.values)
    assert data.batch_shape == (3,) and data.num_times == 4 and states.shape[:2] == (3, 4)
    assert data.mask.all() and data.dtype == states.dtype == torch.float32
    assert simulate(2, 1, generator=0)[0].num_times == 1
    with pytest.raises(ValueError, match="`num_times` is 0"):
        simulate(2, 0)


def test_krishnan_linear():
    data, z = krishnan_linear(generator=0)
    assert data.values.shape == (5000, 25, 1)
    check_normal(z[:, 0], 1.0)
    check_normal(z[:, 1:] - z[:, :-1] - 0.05, 10.0)
    check_normal(data.values - 0.5 * z, 20.0)


def test_krishnan_nonlinear():
    data, z = krishnan_nonlinear(generator=0)
    u, v = z[:, :-1].unbind(-1)
    check_normal(z[:, 0], 0.01)
    check_normal(z[:, 1:, 0] - 0.2 * u - torch.tanh(0.5 * v), 1.0)
    check_normal(z[:, 1:, 1] - 0.2 * v - torch.sin(-0.1 * u), 1.0)
    check_normal(data.values - 0.5 * z, 0.1)


def test_linear_gaussian_by_its_letters():
    A, b = torch.tensor([[0.5, 0.3], [0.0, 0.8]]), torch.tensor([1.0, -1.0])
    H, d = torch.tensor([[1.0, 2.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([0.0, 5.0, 1.0])
    L_Q, L_R = torch.tensor([[1.0, 0.0], [0.5, 2.0]]), 0.1 * torch.eye(3)
    data, z = linear_gaussian(
        500, 30, matrix=A, offset=b, scale_tril=L_Q, emission_matrix=H, emission_offset=d, emission_scale_tril=L_R,
        initial_loc=[3.0, 4.0], missing=0.25, generator=1,
    )  # fmt: skip
    noise = torch.linalg.solve_triangular(L_Q, (z[:, 1:] - z[:, :-1] @ A.mT - b).reshape(-1, 2).mT, upper=False)
    check_normal(noise, 1.0)
    check_normal(z[:, 0] - torch.tensor([3.0, 4.0]), 1.0)
    check_normal((data.values - z @ H.mT - d)[data.mask], 0.01)
    hidden = 1 - float(data.mask.float().mean())
    assert abs(hidden - 0.25) < 4 * math.sqrt(0.25 * 0.75 / data.mask.numel())
    with pytest.raises(ValueError, match="`missing` is 1.0"):
        linear_gaussian(missing=1.0)


def test_stochastic_volatility_is_stationary():
    data, h = stochastic_volatility(2000, 20, level=-1.0, persistence=0.9, volatility=0.3, generator=0)
    for k in (0, 19):
        check_normal(h[:, k] + 1.0, 0.09 / (1 - 0.81))
    check_normal(h[:, 1:] + 1.0 - 0.9 * (h[:, :-1] + 1.0), 0.09)
    check_normal(data.values * (-0.5 * h).exp(), 1.0)
    with pytest.raises(ValueError, match="`persistence` is 1.0"):
        stochastic_volatility(persistence=1.0)


def test_lorenz_without_noise_solves_its_equation():
    # one observed gap in many steps against many gaps of one step: the same Euler scheme
    data, x = lorenz(2, 3, gap=0.01, noise=0.0, obs_noise=0.0, substeps=4, generator=0)
    _, fine = lorenz(2, 9, gap=0.0025, noise=0.0, obs_noise=0.0, substeps=1, generator=0)
    torch.testing.assert_close(x, fine[:, ::4])
    torch.testing.assert_close(data.values, x)
    u, v, w = fine[:, 0].unbind(-1)
    drift = torch.stack([10 * (v - u), u * (28 - w) - v, u * v - 8 / 3 * w], -1)
    torch.testing.assert_close(fine[:, 1], fine[:, 0] + 0.0025 * drift)
    with pytest.raises(ValueError, match="`substeps` is 0"):
        lorenz(1, 2, substeps=0)


def test_noise_of_lorenz_and_lotka_volterra():
    for simulate, noise, obs_noise in ((lorenz, 0.15, 0.01), (lotka_volterra, 1e-3, 1e-2)):
        data, x = simulate(3000, 2, gap=1e-4, substeps=1, noise=noise * 100, obs_noise=obs_noise, generator=0)
        _, still = simulate(3000, 2, gap=1e-4, substeps=1, noise=0.0, generator=0)
        check_normal((x[:, 1] - still[:, 1])[:, :2], (noise * 100) ** 2 * 1e-4)
        check_normal(data.values - x, obs_noise**2)


def test_lotka_volterra_keeps_its_invariant_without_noise():
    data, x = lotka_volterra(num_times=101, noise=0.0, obs_noise=0.0, substeps=200)
    assert data.times[-1] == pytest.approx(10.0)
    prey, predator = x[0].double().unbind(-1)
    invariant = prey - prey.log() + 4 / 3 * predator - 2 / 3 * predator.log()
    assert float(invariant.max() - invariant.min()) < 1e-2
    assert float(prey.max() - prey.min()) > 0.5
