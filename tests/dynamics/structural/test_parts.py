"""The structural parts one by one: contracts, moments, limits."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.nn import PyroSample

import pyro_ssm as ssm
from pyro_ssm.binding import bind
from pyro_ssm.dynamics.structural import (
    AR,
    ARMA,
    Cycle,
    Irregular,
    Level,
    ParallelAR,
    Regression,
    Seasonal,
    Trend,
    from_partial,
    to_partial,
)
from pyro_ssm.predict import decompose
from tests.blocks.component_checks import TIMES, check_component

D = torch.float64


@pytest.mark.parametrize(
    "make",
    [
        lambda: Trend(0.7, 0.3, damping=0.8),
        lambda: Seasonal(3.5, harmonics=1),
        lambda: Cycle(7.0, 0.8, 0.6),
        lambda: ParallelAR(2, 0.4, 0.6),
        lambda: Regression(2, scale=0.5),
        lambda: AR(2).stationary(),
        lambda: ARMA(1, 1, moving_average=0.3).stationary(),
        lambda: ParallelAR(2).stationary(),
    ],
)
def test_contract(make):
    check_component(make)


@pytest.mark.parametrize(
    "part", [Level(0.5), Trend(), Seasonal(4), Seasonal(4, 2), Cycle(), AR(3), ARMA(2, 2), Irregular(), Regression(2)]
)
def test_draws_of_parameters_are_a_loop(part):
    values = {}
    for name in part._pyro_params:
        value = getattr(part, name).detach()
        values[name] = value * torch.rand(3, 2, *value.shape).add(0.5).clamp(max=1.0 if name == "partial" else 1.5)
        if name in ("damping",):
            values[name] = values[name].clamp(max=0.99)
    z = torch.randn(2, 5, part.state_dim)
    law = bind(part, values)(z, TIMES[:-1], TIMES[1:], None)
    for s in range(3):
        for b in range(2):
            alone = bind(part, {n: v[s, b] for n, v in values.items()})(z[b], TIMES[:-1], TIMES[1:], None)
            torch.testing.assert_close(law.mean.expand(3, 2, 5, part.state_dim)[s, b], alone.mean)
            wide = law.covariance_matrix.expand(3, 2, 5, part.state_dim, part.state_dim)
            torch.testing.assert_close(wide[s, b], alone.covariance_matrix)


def step(part):
    A, _, L = part.affine(TIMES[:1], TIMES[1:2], None)
    return A[0].detach(), L[0].detach()


@pytest.mark.parametrize("part", [Seasonal(5), Seasonal(5, 2), Seasonal(4, 2), Seasonal(4)])
def test_a_fixed_pattern_comes_back_and_sums_to_zero(part):
    A, _ = step(part)
    z, row, seen = torch.randn(part.state_dim, dtype=D), part.row().double(), []
    for _ in range(2 * int(part.period)):
        seen.append(float(row @ z))
        z = A.double() @ z
    m = int(part.period)
    assert seen[:m] == pytest.approx(seen[m:], abs=1e-5)
    assert sum(seen[:m]) == pytest.approx(0.0, abs=1e-5)


def test_partial_autocorrelations_and_back():
    partial = 1.9 * torch.rand(20, 4, dtype=D) - 0.95
    coefficients = from_partial(partial)
    for row, phi in zip(partial, coefficients, strict=True):
        torch.testing.assert_close(to_partial(phi), row, rtol=1e-8, atol=1e-8)
        companion = torch.cat([phi[None], torch.eye(4, dtype=D)[:3]])
        assert float(torch.linalg.eigvals(companion).abs().max()) < 1
    with pytest.raises(ValueError, match="must be those of a stationary autoregression"):
        to_partial(torch.tensor([0.9, 0.3]))


@pytest.mark.parametrize(
    "part", [AR(2), ARMA(2, 1, moving_average=0.4), ARMA(0, 2, moving_average=0.4), Cycle(), Irregular()]
)
def test_stationary_law_does_not_move(part):
    P = part.stationary()(TIMES[:1], None)
    P = (P.covariance_matrix if hasattr(P, "covariance_matrix") else torch.diag_embed(P.variance))[0].detach()
    A, L = step(part)
    torch.testing.assert_close(A @ P @ A.mT + L @ L.mT, P, rtol=1e-5, atol=1e-6)


def test_arma_without_moving_average_is_ar():
    y = ssm.TimeSeries(torch.arange(20.0), torch.randn(20, 1))
    phi = torch.tensor([0.5, 0.3])
    a = ssm.models.structural(AR(2, phi, scale=0.7), 0.5).requires_grad_(False)
    b = ssm.models.structural(ARMA(2, 0, phi, scale=0.7), 0.5).requires_grad_(False)
    torch.testing.assert_close(*(ssm.infer.kalman_filter(m, y).log_likelihood for m in (a, b)), rtol=1e-4, atol=1e-4)


def test_decomposition_adds_up_and_knows_its_uncertainty():
    """The parts' means sum to the total; a regression with inputs, missing values and a batch go through."""
    T = 24
    k = torch.arange(T, dtype=D)
    u = torch.randn(T, 1, dtype=D)
    pattern = torch.tensor([1.0, -2.0, 0.5, 0.5], dtype=D).repeat(T // 4)
    y = torch.stack([0.1 * k + pattern + 2.0 * u[:, 0], pattern - u[:, 0]]).unsqueeze(-1)
    seen = torch.rand(2, T, 1) < 0.9
    data = ssm.TimeSeries(k, y + 0.01 * torch.randn(2, T, 1, dtype=D), mask=seen, inputs=u)
    model = ssm.models.structural(Trend(0.01, 0.001) + Seasonal(4, scale=None) + Regression(1), noise=0.01)
    parts, total = decompose(model.double().requires_grad_(False), data)
    torch.testing.assert_close(sum(part.mean for part in parts.values()), total.mean)
    torch.testing.assert_close(parts["regression"].mean, torch.stack([2.0 * u[:, 0], -u[:, 0]]), rtol=0, atol=0.05)
    torch.testing.assert_close(parts["seasonal"].mean[0], pattern, rtol=0, atol=0.05)
    assert (parts["seasonal"].sd < 0.05).all() and (parts["seasonal"].sd > 1e-3).all()


def test_decompose_refuses_a_model_without_parts():
    model = ssm.StateSpaceModel(
        ssm.dynamics.NormalInitial(1), ssm.dynamics.LinearNormal(1), ssm.emissions.LinearNormal(1, 1)
    )
    with pytest.raises(TypeError, match="decompose needs a model whose transition is made of parts, got LinearNormal"):
        decompose(model, ssm.TimeSeries(torch.arange(3.0), torch.zeros(3, 1)))


def test_maximum_likelihood_finds_the_nile_variances():
    """Durbin and Koopman (2012), table 2.1: 15099 and 1469.1."""
    data = ssm.data.load("nile", dtype=D)
    model = ssm.models.structural(Level(scale=30.0), noise=100.0).double()
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = -ssm.infer.kalman_filter(model, data).log_likelihood.sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert float(model.emission.scale.detach() ** 2) == pytest.approx(15099, rel=2e-3)
    assert float(model.transition.level.scale.detach() ** 2) == pytest.approx(1469, rel=5e-3)


def test_nuts_over_a_scale():
    model = ssm.models.structural(Level(), noise=0.5).requires_grad_(False)
    model.transition.level.scale = PyroSample(dist.HalfNormal(1.0))
    data = ssm.TimeSeries(torch.arange(15.0), torch.randn(15, 1).cumsum(0))
    mcmc = MCMC(
        NUTS(ssm.infer.Marginal(model), max_tree_depth=3), num_samples=15, warmup_steps=15, disable_progbar=True
    )
    mcmc.run(data)
    draws = mcmc.get_samples()["transition.level.scale"]
    assert (draws > 0).all() and len(draws.unique()) > 5
    draws = ssm.predict.forecast(model, mcmc, data, torch.arange(15.0, 18.0), num_samples=10)
    assert draws.values.shape == (10, 3, 1) and (draws.values - data.values[-1]).abs().max() < 20


def test_cycle_forgets_at_its_damping():
    A, _ = step(Cycle(period=8.0, damping=0.5, scale=1.0))
    turned = torch.linalg.matrix_power(A, 8)
    torch.testing.assert_close(turned, 0.5**8 * torch.eye(2), rtol=1e-4, atol=1e-6)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="`period` must be a whole number"):
        Seasonal(52.18)
    with pytest.raises(ValueError, match="`harmonics` must be at most half the period"):
        Seasonal(12, harmonics=7)
    with pytest.raises(ValueError, match="`damping` must lie between 0 and 1"):
        Trend(damping=1.0)
    with pytest.raises(ValueError, match="`period` must lie above its floor 2"):
        Cycle(period=2.0)
    with pytest.raises(ValueError, match="both 0: use structural.Irregular"):
        ARMA(0, 0)
    with pytest.raises(ValueError, match="`columns` must name at least one column"):
        Regression([1, 1])
    with pytest.raises(ValueError, match="without damping or noise has no stationary law"):
        Cycle(damping=None).stationary()(TIMES[:1], None)
    assert math.isclose(float(Cycle(period=10.0).period.detach()), 10.0, rel_tol=1e-5)


def everything():
    return Trend(0.3, 0.05) + Seasonal(4, scale=0.1) + Cycle(9.0, 0.8, 0.4) + AR(2, scale=0.5) + Regression(1)


def test_gradients_reach_every_parameter():
    model = ssm.models.structural(everything(), noise=0.3)
    data = ssm.TimeSeries(torch.arange(30.0), torch.randn(2, 30, 1), inputs=torch.randn(30, 1))
    ssm.infer.kalman_filter(model, data).log_likelihood.sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad != 0).all(), name


def test_ragged_batches_missing_values_and_float32():
    model = ssm.models.structural(everything(), noise=0.3).requires_grad_(False)
    u = torch.randn(2, 30, 1)
    y, lengths = torch.randn(2, 30, 1), torch.tensor([30, 21])
    y[0, 5:9] = float("nan")
    data = ssm.TimeSeries(torch.arange(30.0), y, inputs=u, lengths=lengths)
    single = ssm.infer.kalman_filter(model, data).log_likelihood
    assert single.dtype == torch.float32 and (single[1, 21:] == 0).all()
    model, data = model.double(), data.to(dtype=D)
    both = ssm.infer.kalman_filter(model, data).log_likelihood
    torch.testing.assert_close(single.double().sum(-1), both.sum(-1), rtol=1e-4, atol=1e-3)
    for b, n in enumerate(lengths):
        alone = ssm.TimeSeries(torch.arange(float(n)), y[b, :n].double(), inputs=u[b, :n].double())
        wanted = ssm.infer.kalman_filter(model, alone).log_likelihood
        torch.testing.assert_close(both[b, :n], wanted, rtol=1e-8, atol=1e-8)
