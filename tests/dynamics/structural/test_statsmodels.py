"""Log-likelihoods at fixed parameters against statsmodels, with exact diffuse starts."""

import numpy as np
import pytest
import torch

import pyro_ssm as ssm
from pyro_ssm.dynamics.structural import AR, ARMA, Cycle, Level, Regression, Seasonal, Trend, to_partial
from pyro_ssm.predict import decompose

D = torch.float64


@pytest.fixture(scope="module")
def sm():
    return pytest.importorskip("statsmodels.api")


def record(num_times=60, missing=True, seed=0):
    generator = np.random.default_rng(seed)
    k = np.arange(num_times)
    y = 0.05 * k + np.sin(2 * np.pi * k / 4) + generator.normal(size=num_times).cumsum() * 0.3
    if missing:
        y[[7, 8, 20]] = np.nan
    return y


def ours(parts, values, data_values, noise, inputs=None):
    model = ssm.models.structural(parts, noise=1.0 if noise is None else noise).double()
    values = {name: torch.as_tensor(value, dtype=D) for name, value in values.items()}
    values["emission.scale"] = torch.tensor([0.0 if noise is None else noise], dtype=D)
    data = ssm.TimeSeries(torch.arange(len(data_values), dtype=D), torch.as_tensor(data_values)[:, None], inputs=inputs)
    bound = model.bind(values)
    return bound, data, float(ssm.infer.kalman_filter(bound, data).log_likelihood.sum().detach())


def agrees(value, wanted):
    assert value == pytest.approx(wanted, rel=1e-8)


def test_local_level_on_the_nile(sm):
    y = sm.datasets.nile.load_pandas().data["volume"].to_numpy().copy()
    _, _, value = ours(Level(), {"transition.level.scale": 1469.2**0.5}, y, 15098.5**0.5)
    agrees(value, -633.464564)
    wanted = sm.tsa.UnobservedComponents(y, "llevel", use_exact_diffuse=True).loglike([15098.5, 1469.2])
    agrees(value, wanted)


def test_local_linear_trend_with_missing_values(sm):
    y = record()
    bound, data, value = ours(
        Trend(), {"transition.trend.level_scale": 0.4, "transition.trend.slope_scale": 0.05}, y, 0.7
    )
    theirs = sm.tsa.UnobservedComponents(y, "lltrend", use_exact_diffuse=True)
    wanted = theirs.smooth([0.49, 0.16, 0.0025])
    agrees(value, wanted.llf)
    parts, _ = decompose(bound, data)
    np.testing.assert_allclose(parts["trend"].mean.detach(), wanted.level.smoothed, rtol=1e-7)
    np.testing.assert_allclose(parts["trend"].sd.detach() ** 2, wanted.level.smoothed_cov, rtol=1e-6)


def test_smooth_trend_and_dummy_seasonal(sm):
    y = record()
    parts = Trend(level_scale=None) + Seasonal(4)
    values = {"transition.trend.slope_scale": 0.1, "transition.seasonal.scale": 0.3}
    bound, data, value = ours(parts, values, y, 0.5)
    theirs = sm.tsa.UnobservedComponents(y, "strend", seasonal=4, use_exact_diffuse=True).smooth([0.25, 0.01, 0.09])
    agrees(value, theirs.llf)
    found = decompose(bound, data).parts["seasonal"]
    np.testing.assert_allclose(found.mean.detach(), theirs.seasonal.smoothed, atol=1e-8)
    np.testing.assert_allclose(found.sd.detach() ** 2, theirs.seasonal.smoothed_cov, rtol=1e-6)


@pytest.mark.parametrize(("period", "harmonics"), [(12, 3), (6.5, 2)])
def test_level_and_trigonometric_seasonal(sm, period, harmonics):
    y = record()
    values = {"transition.level.scale": 0.4, "transition.seasonal.scale": 0.2}
    _, _, value = ours(Level() + Seasonal(period, harmonics=harmonics), values, y, 0.6)
    theirs = sm.tsa.UnobservedComponents(
        y, "llevel", freq_seasonal=[{"period": period, "harmonics": harmonics}], use_exact_diffuse=True
    )
    agrees(value, theirs.loglike([0.36, 0.16, 0.04]))


def test_all_harmonics_of_an_even_period_are_the_dummies_when_the_pattern_is_fixed():
    """The same space of patterns; the diffuse measures differ by a constant that the data does not see."""
    y, other = record(seed=1), record(seed=2)
    gaps = []
    for series in (y, other):
        _, _, dummies = ours(Level() + Seasonal(4, scale=None), {"transition.level.scale": 0.4}, series, 0.6)
        _, _, waves = ours(Level() + Seasonal(4, 2, scale=None), {"transition.level.scale": 0.4}, series, 0.6)
        gaps.append(dummies - waves)
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-9)


def test_undamped_and_damped_cycle(sm):
    y = record()
    for damping in (None, 0.8):
        parts = Level() + Cycle(damping=damping).named(None, start=ssm.dynamics.DiffuseInitial(2))
        values = {"transition.level.scale": 0.4, "transition.cycle.period": 9.0, "transition.cycle.scale": 0.5}
        if damping is not None:
            values["transition.cycle.damping"] = damping
        _, _, value = ours(parts, values, y, 0.6)
        theirs = sm.tsa.UnobservedComponents(
            y, "llevel", cycle=True, stochastic_cycle=True, damped_cycle=damping is not None, use_exact_diffuse=True
        )
        wanted = [0.36, 0.16, 0.25, 2 * np.pi / 9] + ([] if damping is None else [damping])
        agrees(value, theirs.loglike(wanted))  # statsmodels starts every cycle diffuse


def test_level_autoregression_and_regression(sm):
    y, exog = record(), np.random.default_rng(3).normal(size=(60, 2))
    values = {"transition.level.scale": 0.4, "transition.ar.scale": 0.3, "transition.ar.partial": [0.5 / 0.7, 0.3]}
    _, _, value = ours(Level() + AR(2) + Regression(2), values, y, 0.6, torch.as_tensor(exog))
    theirs = sm.tsa.UnobservedComponents(
        y, "llevel", autoregressive=2, exog=exog, mle_regression=False, use_exact_diffuse=True
    )
    agrees(value, theirs.loglike([0.36, 0.16, 0.09, 0.5, 0.3]))


def test_autoregression_with_regression(sm):
    y, exog = record(), np.random.default_rng(3).normal(size=(60, 1))
    values = {"transition.ar.scale": 0.3, "transition.ar.partial": [0.5 / 0.7, 0.3]}
    _, _, value = ours(AR(2) + Regression(1), values, y, None, torch.as_tensor(exog))
    theirs = sm.tsa.SARIMAX(y, exog, order=(2, 0, 0), mle_regression=False, use_exact_diffuse=True)
    agrees(value, theirs.loglike([0.5, 0.3, 0.09]))


def test_random_walk_coefficients(sm):
    y, exog = record(), np.random.default_rng(3).normal(size=(60, 1))
    values = {"transition.regression.scale": [0.2], "transition.ar.scale": 0.3, "transition.ar.partial": [0.5]}
    _, _, value = ours(AR(1) + Regression(1, scale=0.1), values, y, 0.6, torch.as_tensor(exog))
    theirs = sm.tsa.SARIMAX(
        y,
        exog,
        order=(1, 0, 0),
        mle_regression=False,
        time_varying_regression=True,
        measurement_error=True,
        use_exact_diffuse=True,
    )
    agrees(value, theirs.loglike([0.5, 0.04, 0.36, 0.09]))


@pytest.mark.parametrize(("p", "q"), [(2, 1), (1, 3), (0, 2)])
def test_arma(sm, p, q):
    y = record()
    phi, theta = [0.5, 0.3][:p], [0.4, -0.3, 0.2][:q]
    values = {"transition.arma.scale": 0.7, "transition.arma.moving_average": theta}
    if p:
        values["transition.arma.partial"] = to_partial(torch.tensor(phi, dtype=D))
    _, _, value = ours(ARMA(p, q), values, y, None)
    agrees(value, sm.tsa.SARIMAX(y, order=(p, 0, q)).loglike([*phi, *theta, 0.49]))


def maximum(parts, y, start, noise):
    """The largest log-likelihood that a quasi-Newton method finds over the logarithms of all scales."""
    model = ssm.models.structural(parts, noise=1.0).double()
    data = ssm.TimeSeries(torch.arange(len(y), dtype=D), torch.as_tensor(y)[:, None])
    names = [*start, "emission.scale"]
    logs = torch.tensor([*start.values(), noise], dtype=D).log().requires_grad_()
    optimiser = torch.optim.LBFGS([logs], max_iter=200, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def value():
        values = {name: x.exp() for name, x in zip(names, logs)}
        values["emission.scale"] = values["emission.scale"].reshape(1)
        return ssm.infer.kalman_log_likelihood(model.bind(values), data).sum()

    def closure():
        optimiser.zero_grad()
        loss = -value()
        loss.backward()
        return loss

    optimiser.step(closure)
    return float(value().detach())


def test_maximum_of_the_likelihood_is_not_below_theirs(sm):
    nile = sm.datasets.nile.load_pandas().data["volume"].to_numpy().copy()
    found = maximum(Level(), nile, {"transition.level.scale": 30.0}, 100.0)
    theirs = sm.tsa.UnobservedComponents(nile, "llevel", use_exact_diffuse=True).fit(disp=False)
    assert found >= theirs.llf - 1e-6
    nile[[20, 21, 22, 60, 75]] = np.nan
    start = {"transition.trend.level_scale": 30.0, "transition.trend.slope_scale": 1.0}
    found = maximum(Trend(), nile, start, 100.0)
    theirs = sm.tsa.UnobservedComponents(nile, "lltrend", use_exact_diffuse=True).fit(disp=False)
    assert found >= theirs.llf - 1e-6
