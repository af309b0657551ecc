"""Sums, means and growth over periods against dense Gaussians whose rows are explicit sums."""

import pytest
import torch
from torch.distributions import MultivariateNormal

import pyro_ssm as ssm
from pyro_ssm.dynamics import Matern, NormalInitial
from pyro_ssm.dynamics.structural import (
    AR,
    ARMA,
    Aggregate,
    Cycle,
    Irregular,
    Level,
    Regression,
    Seasonal,
    Trend,
    period_column,
)
from pyro_ssm.predict import decompose
from tests.infer.gaussian.linear import dense

D = torch.float64


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(D)
    yield
    torch.set_default_dtype(torch.float32)


def proper(part):
    return part.named(None, start=NormalInitial(part.state_dim, loc=0.3, scale=1.5))


def parts():
    return proper(Level(scale=0.6)) + proper(Seasonal(4, scale=0.2)) + AR(2, torch.tensor([0.5, 0.3]), scale=0.8)


def signal(made, times, inputs=None):
    """Mean and covariance of the signal at every step, from the model without aggregates."""
    model = ssm.models.structural(made, noise=1.0).requires_grad_(False)
    y = torch.zeros(len(times), 1)
    _, _, mean, covariance, _ = dense(model.bind(), ssm.TimeSeries(times, y, inputs=inputs))
    return mean, covariance - torch.eye(len(times))


def judge(W, mean, covariance, noise, data):
    """log N of what is seen, rows of W being explicit sums."""
    seen = data.mask.flatten()
    S = W @ covariance @ W.mT + noise**2 * torch.eye(len(W))
    return MultivariateNormal((W @ mean)[seen], S[seen][:, seen]).log_prob(data.values.flatten()[seen])


def sums(labels, kind):
    """Row k: what is dated at step k, the steps of its period up to now."""
    T = len(labels)
    W = torch.zeros(T, T)
    for k in range(T):
        same = [j for j in range(k + 1) if labels[j] == labels[k]]
        W[k, same] = 1.0 / labels.count(labels[k]) if kind == "mean" else 1.0
    return W


def ends(labels):
    return torch.tensor([k + 1 == len(labels) or labels[k + 1] != labels[k] for k in range(len(labels))])


@pytest.mark.parametrize("kind", ["sum", "mean"])
@pytest.mark.parametrize("first", [0, 1])
def test_clock(kind, first):
    """Also a record that begins within a period, whose first value is masked."""
    T, noise = 13, 0.4
    times = torch.arange(T) + float(first)
    labels = [int((k + first) // 3) for k in range(T)]
    mask = ends(labels)
    mask[: 2 if first else 0] = False
    data = ssm.TimeSeries(times, torch.randn(T, 1), mask=mask.unsqueeze(-1))
    model = ssm.models.structural(parts(), noise, aggregate=Aggregate(kind)).requires_grad_(False)
    W = sums(labels, kind)
    if kind == "mean":
        W[:, :] = sums(labels, "sum") / 3
    wanted = judge(W, *signal(parts(), times), noise, data)
    torch.testing.assert_close(ssm.infer.kalman_filter(model, data).log_likelihood.sum(), wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_calendar_in_the_inputs_with_a_regression(kind):
    labels, noise = [0] * 4 + [1] * 5 + [2] + [3] * 4, 0.4
    T = len(labels)
    times = torch.arange(float(T))
    inputs = torch.cat([torch.randn(T, 1), period_column(labels, kind)], -1)

    def made():
        return proper(Level(scale=0.6)) + proper(Regression([0], scale=0.3))

    data = ssm.TimeSeries(times, torch.randn(T, 1), mask=ends(labels).unsqueeze(-1), inputs=inputs)
    model = ssm.models.structural(made(), noise, aggregate=Aggregate(kind, column=1)).requires_grad_(False)
    wanted = judge(sums(labels, kind), *signal(made(), times, inputs), noise, data)
    torch.testing.assert_close(ssm.infer.kalman_filter(model, data).log_likelihood.sum(), wanted, rtol=1e-9, atol=0)


def test_irregular_steps_and_parts_in_continuous_time():
    times, noise = torch.cumsum(torch.rand(14) + 0.1, 0), 0.3
    labels = [int(t // 2.5) for t in times]

    def made():
        return Matern(1.5, lengthscale=2.0) + Irregular(0.5)

    data = ssm.TimeSeries(times, torch.randn(14, 1), mask=ends(labels).unsqueeze(-1))
    model = ssm.models.structural(made(), noise, aggregate=Aggregate("sum", period=2.5)).requires_grad_(False)
    wanted = judge(sums(labels, "sum"), *signal(made(), times), noise, data)
    torch.testing.assert_close(ssm.infer.kalman_filter(model, data).log_likelihood.sum(), wanted, rtol=1e-9, atol=0)


def test_steps_and_sums_of_one_signal_beside_each_other():
    T, noise = 9, torch.tensor([0.2, 0.7])
    times, labels = torch.arange(float(T)), [k // 3 for k in range(T)]
    mask = torch.stack([torch.rand(T) < 0.6, ends(labels)], -1)
    data = ssm.TimeSeries(times, torch.randn(T, 2), mask=mask)
    both = [Aggregate("last"), Aggregate("sum")]
    model = ssm.models.structural(parts(), noise, aggregate=both).requires_grad_(False)
    mean, covariance = signal(parts(), times)
    W = torch.stack([torch.eye(T), sums(labels, "sum")], 1).flatten(0, 1)  # (time, column) rows
    S = W @ covariance @ W.mT + torch.diag(noise.repeat(T) ** 2)
    seen = mask.flatten()
    wanted = MultivariateNormal((W @ mean)[seen], S[seen][:, seen]).log_prob(data.values.flatten()[seen])
    torch.testing.assert_close(ssm.infer.kalman_filter(model, data).log_likelihood.sum(), wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("aggregate", "weights"),
    [
        (Aggregate("growth"), [1 / 3, 2 / 3, 1.0, 2 / 3, 1 / 3]),
        (Aggregate("growth", period=2.0), [0.5, 1.0, 0.5]),
        (Aggregate("weights", weights=(2.0, -1.0)), [2.0, -1.0]),
    ],
)
def test_lags_reach_behind_the_first_time(aggregate, weights):
    T, noise, before = 9, 0.4, len(weights) - 1

    def made():
        return (
            AR(2, torch.tensor([0.5, 0.3]), scale=0.8)
            + ARMA(1, 1, moving_average=0.4)
            + Cycle(9.0, 0.7, 0.5)
            + Irregular(0.3)
            + Matern(0.5, 3.0)
        )

    data = ssm.TimeSeries(torch.arange(float(T)), torch.randn(T, 1), mask=(torch.arange(T) % 3 == 1).unsqueeze(-1))
    model = ssm.models.structural(made(), noise, aggregate=aggregate).requires_grad_(False)
    mean, covariance = signal(made(), torch.arange(float(T + before)))
    W = torch.zeros(T, T + before)
    for k in range(T):
        for j, weight in enumerate(weights):
            W[k, k + before - j] = weight
    wanted = judge(W, mean, covariance, noise, data)
    torch.testing.assert_close(ssm.infer.kalman_filter(model, data).log_likelihood.sum(), wanted, rtol=1e-9, atol=0)


def test_diffuse_start_is_the_limit_of_a_wide_one():
    """A sum of a diffuse level: same differences of log-likelihoods, same smoothed steps."""
    T, times = 12, torch.arange(12.0)
    mask = (torch.arange(T) % 3 == 2).unsqueeze(-1)
    totals = {"wide": [], "diffuse": []}
    for y in (torch.randn(T, 1), torch.randn(T, 1)):
        data = ssm.TimeSeries(times, y, mask=mask)
        for name, part in (("wide", Level(0.5).named(None, NormalInitial(1, scale=1e6))), ("diffuse", Level(0.5))):
            model = ssm.models.structural(part, 0.3, aggregate=Aggregate("sum")).requires_grad_(False)
            totals[name].append(ssm.infer.kalman_filter(model, data).log_likelihood.sum())
            smoothed = decompose(model, data).total
            totals.setdefault("mean", []).append(smoothed.mean)
    torch.testing.assert_close(totals["wide"][0] - totals["wide"][1], totals["diffuse"][0] - totals["diffuse"][1])
    torch.testing.assert_close(totals["mean"][0], totals["mean"][1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(totals["mean"][2], totals["mean"][3], rtol=1e-5, atol=1e-5)


def test_smoothed_steps_add_up_to_exact_sums():
    """Disaggregation: without noise, the smoothed steps of a period sum to the value seen."""
    T = 12
    y = torch.randn(T, 1)
    data = ssm.TimeSeries(torch.arange(float(T)), y, mask=(torch.arange(T) % 3 == 2).unsqueeze(-1))
    model = ssm.models.structural(Trend(level_scale=None) + Irregular(0.2), None, aggregate=Aggregate("sum"))
    total = decompose(model.requires_grad_(False), data).total
    torch.testing.assert_close(total.mean.reshape(4, 3).sum(-1), y[2::3, 0], rtol=0, atol=1e-8)


def test_a_draw_adds_up():
    model = ssm.models.structural(parts(), None, aggregate=[Aggregate("last"), Aggregate("sum"), Aggregate("mean")])
    with torch.no_grad():
        _, y = model(ssm.TimeSeries(torch.arange(9.0).expand(4, 9)))
    assert y.shape == (4, 9, 3)
    steps = y[..., 0].reshape(4, 3, 3).sum(-1)
    torch.testing.assert_close(y[:, 2::3, 1], steps)
    torch.testing.assert_close(y[:, 2::3, 2], steps / 3)


def test_batch_is_a_loop_and_own_grids():
    times = torch.stack([torch.arange(9.0), torch.arange(9.0) + 1.0])
    y = torch.randn(2, 9, 1)
    mask = torch.rand(2, 9, 1) < 0.6
    mask[:, 2] = True
    model = ssm.models.structural(parts(), 0.4, aggregate=Aggregate("sum")).requires_grad_(False)
    together = ssm.infer.kalman_filter(model, ssm.TimeSeries(times, y, mask=mask)).log_likelihood
    for b in range(2):
        alone = ssm.infer.kalman_filter(model, ssm.TimeSeries(times[b], y[b], mask=mask[b])).log_likelihood
        torch.testing.assert_close(together[b], alone)


def test_errors():
    with pytest.raises(TypeError, match="'level' .* has no stationary law"):
        ssm.models.structural(Level(), aggregate=Aggregate("growth"))
    with pytest.raises(ValueError, match="`kind` must be one of"):
        Aggregate("total")
    with pytest.raises(ValueError, match="`weights` belong to"):
        Aggregate("sum", weights=(1.0,))
    model = ssm.models.structural(Level(), aggregate=Aggregate("sum", column=2)).requires_grad_(False)
    y = torch.zeros(4, 1)
    with pytest.raises(ValueError, match="the data has no `inputs`"):
        ssm.infer.kalman_filter(model, ssm.TimeSeries(torch.arange(4.0), y))
    with pytest.raises(ValueError, match="`inputs` has 1 of them"):
        ssm.infer.kalman_filter(model, ssm.TimeSeries(torch.arange(4.0), y, inputs=torch.zeros(4, 1)))
