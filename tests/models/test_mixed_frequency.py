"""Mixed-frequency factor models against statsmodels and a dense Gaussian whose quarterly rows are explicit sums."""

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

import pyro_ssm as ssm
from pyro_ssm.dynamics.structural import Aggregate
from tests.slopes import assert_slope

D = torch.float64
T = 24


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(D)
    yield
    torch.set_default_dtype(torch.float32)


def record(low, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(T, 4, generator=generator)
    y[torch.rand(T, 4, generator=generator) < 0.1] = float("nan")
    y[-2:, :2] = float("nan")  # a ragged edge
    for column in low:
        y[torch.arange(T) % 3 != 2, column] = float("nan")
    return ssm.TimeSeries(torch.arange(float(T)), y)


VALUES = {
    "emission.loadings": torch.tensor([[0.9], [-0.4], [0.6], [0.3]], dtype=D),
    "transition.factor.partial": torch.tensor([0.5 / 0.7, 0.3], dtype=D),
    "transition.own.coefficient": torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=D),
    "transition.own.scale": torch.tensor([0.8, 1.1, 0.4, 0.7], dtype=D),
}


def monthly_covariance(before):
    """Of the four monthly series, ``before`` months before the first one included; (time, series) rows."""
    arma = pytest.importorskip("statsmodels.tsa.arima_process")
    n = T + before
    lag = np.abs(np.arange(n)[:, None] - np.arange(n))
    factor = torch.as_tensor(arma.arma_acovf([1, -0.5, -0.3], [1], n)[lag])
    loadings = VALUES["emission.loadings"][:, 0]
    S = torch.einsum("st,i,j->sitj", factor, loadings, loadings)
    for i in range(4):
        psi, s = float(VALUES["transition.own.coefficient"][i]), float(VALUES["transition.own.scale"][i])
        S[:, i, :, i] += s**2 / (1 - psi**2) * psi ** torch.as_tensor(lag)
    return S.reshape(4 * n, 4 * n)


def rows(kinds, before):
    """(time, series) rows of explicit sums over months."""
    W = torch.zeros(T, 4, T + before, 4)
    for i, kind in enumerate(kinds):
        for k in range(T):
            lags = {"last": [1.0], "growth": [1 / 3, 2 / 3, 1.0, 2 / 3, 1 / 3]}.get(kind)
            if lags is None:
                lags = [1.0 if kind == "sum" else 1 / 3] * (k % 3 + 1)
            for j, weight in enumerate(lags):
                W[k, i, k + before - j, i] = weight
    return W.reshape(4 * T, 4 * (T + before))


@pytest.mark.parametrize(
    "low", [{2: "growth", 3: "growth"}, {3: "sum"}, {2: "mean", 3: "growth"}, {1: "last", 2: "sum", 3: "mean"}, {}]
)
@pytest.mark.parametrize("noise", [None, 0.3])
def test_is_the_dense_gaussian_with_explicit_sums(low, noise):
    data = record(low)
    model = ssm.models.mixed_frequency_factor(4, low, factor_order=2, noise=noise, offset=0.2).requires_grad_(False)
    value = ssm.infer.kalman_filter(model.bind(VALUES), data).log_likelihood.sum()
    W = rows([low.get(i, "last") for i in range(4)], 4)
    S = W @ monthly_covariance(4) @ W.mT + (noise or 0.0) ** 2 * torch.eye(4 * T)
    seen = data.mask.flatten()
    law = MultivariateNormal(torch.full((int(seen.sum()),), 0.2), S[seen][:, seen])
    torch.testing.assert_close(value, law.log_prob(data.values.flatten()[seen]), rtol=1e-9, atol=0)


def test_is_statsmodels_dynamic_factor():
    pd, sm = pytest.importorskip("pandas"), pytest.importorskip("statsmodels.api")
    data = record({2: "growth", 3: "growth"})
    values = torch.where(data.mask, data.values, torch.tensor(float("nan"))).numpy()
    index = pd.period_range("2000-01", periods=T, freq="M")
    monthly = pd.DataFrame(values[:, :2], index=index, columns=["a", "b"])
    quarterly = pd.DataFrame(values[2::3, 2:], index=index[2::3].asfreq("Q"), columns=["c", "d"])
    theirs = sm.tsa.DynamicFactorMQ(
        monthly, endog_quarterly=quarterly, factors=1, factor_orders=2, idiosyncratic_ar1=True, standardize=False
    )
    unit = [1.0, 1.0, 3.0, 3.0]  # their quarterly weights are 1, 2, 3, 2, 1
    loadings = VALUES["emission.loadings"][:, 0]
    given = {f"loading.0->{n}": float(v) / u for n, v, u in zip("abcd", loadings, unit, strict=True)}
    given |= {"L1.0->0": 0.5, "L2.0->0": 0.3, "fb(0).cov.chol[1,1]": 1.0}
    own = zip("abcd", VALUES["transition.own.coefficient"], VALUES["transition.own.scale"], unit, strict=True)
    for n, psi, s, u in own:
        given |= {f"L1.eps_{'M' if n in 'ab' else 'Q'}.{n}": float(psi), f"sigma2.{n}": float(s / u) ** 2}
    wanted = theirs.loglike([given[name] for name in theirs.param_names])
    model = ssm.models.mixed_frequency_factor(4, {2: "growth", 3: "growth"}, factor_order=2, offset=None)
    value = ssm.infer.kalman_filter(model.requires_grad_(False).bind(VALUES), data).log_likelihood.sum()
    assert float(value) == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("kind", ["sum", "mean", "growth"])
def test_disaggregated_months_are_the_posterior_of_the_dense_gaussian(kind):
    low = {2: kind, 3: kind}
    data = record(low)
    model = ssm.models.mixed_frequency_factor(4, low, factor_order=2, noise=None, offset=0.2).requires_grad_(False)
    months = ssm.predict.disaggregate(model.bind(VALUES), data)
    W, P = rows(["last", "last", kind, kind], 4), monthly_covariance(4)
    seen = data.mask.flatten()
    cross, S = (W @ P)[seen], (W @ P @ W.mT)[seen][:, seen]
    gain = torch.linalg.solve(S, cross).mT
    mean = (gain @ (data.values.flatten()[seen] - 0.2)).reshape(T + 4, 4)[4:]
    sd = (P - gain @ cross).diagonal().clamp(min=0).sqrt().reshape(T + 4, 4)[4:]
    torch.testing.assert_close(months.mean, mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(months.sd, sd, rtol=1e-5, atol=1e-5)


def test_disaggregate_refuses_a_model_without_aggregates():
    model = ssm.models.structural(ssm.dynamics.structural.Level())
    with pytest.raises(TypeError, match="disaggregate needs a model whose values are aggregates"):
        ssm.predict.disaggregate(model, ssm.TimeSeries(torch.arange(3.0), torch.zeros(3, 1)))


def test_two_factors_are_a_sum_of_two_covariances():
    low = {3: "growth"}
    data = record(low)
    model = ssm.models.mixed_frequency_factor(4, low, factors=2, offset=None, noise=0.5).requires_grad_(False)
    loadings = torch.tensor([[0.9, 0.1], [-0.4, 0.5], [0.6, 0.0], [0.3, 0.7]])
    values = {
        "emission.loadings": loadings,
        "transition.factor.partial": torch.tensor([0.6]),
        "transition.factor_2.partial": torch.tensor([-0.3]),
    }
    lag = (torch.arange(T + 4)[:, None] - torch.arange(T + 4)).abs()
    S = torch.zeros(T + 4, 4, T + 4, 4)
    for f, phi in enumerate((0.6, -0.3)):
        S += torch.einsum("st,i,j->sitj", phi**lag / (1 - phi**2), loadings[:, f], loadings[:, f])
    for i in range(4):
        S[:, i, :, i] += 0.5**lag / 0.75
    W = rows(["last", "last", "last", "growth"], 4)
    S = W @ S.reshape(4 * T + 16, -1) @ W.mT + 0.25 * torch.eye(4 * T)
    seen = data.mask.flatten()
    wanted = MultivariateNormal(torch.zeros(int(seen.sum())), S[seen][:, seen]).log_prob(data.values.flatten()[seen])
    value = ssm.infer.kalman_filter(model.bind(values), data).log_likelihood.sum()
    torch.testing.assert_close(value, wanted, rtol=1e-7, atol=0)  # own.scale is 1 after a softplus


def test_factors_keep_their_scale():
    model = ssm.models.mixed_frequency_factor(3, {2: Aggregate("sum")}, factors=2)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == 2 and all("factor" in name and "scale" in name for name in frozen)
    torch.testing.assert_close(model.transition.factor_2.scale, torch.ones(1))


def test_gradients_reach_every_parameter():
    model = ssm.models.mixed_frequency_factor(4, {2: "growth", 3: "sum"}, factor_order=2).double()
    data = record([2, 3])
    data = data.replace(values=data.values.double(), mask=data.mask)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert_slope(lambda: ssm.infer.kalman_filter(model, data).log_likelihood.sum(), parameters, rel=1e-4, every=True)


def test_errors_name_the_column():
    with pytest.raises(ValueError, match="names column 4, but `obs_dim` is 4"):
        ssm.models.mixed_frequency_factor(4, {4: "sum"})
