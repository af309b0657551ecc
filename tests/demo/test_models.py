"""The models of the demo."""

import pytest
import torch
from pyro.distributions import Normal

from pyro_ssm import infer
from pyro_ssm.demo import atmospheric_co2, linear, seasonal_naive, sunspots
from pyro_ssm.demo.models import _around, _rotations


def test_naive_forecast_is_last_season_moved_by_the_mean_change():
    task = sunspots()
    outcome = seasonal_naive(task, num_samples=4000)
    values, mask = task.data.values[: task.num_training], task.data.mask[: task.num_training]
    lag = task.season
    changes = (values[lag:] - values[:-lag])[mask[lag:] & mask[:-lag]] / task.scale
    histories = task.histories()
    full = histories.mask[:, -lag:].all(1).squeeze(-1)
    assert full.any() and not full.all()
    law = Normal(histories.values[:, -lag:] + changes.mean(), changes.std())
    torch.testing.assert_close(
        outcome.log_scores[full], law.log_prob(task.futures().values)[full], rtol=1e-4, atol=1e-4
    )
    error = ((outcome.draws.mean(0) - law.mean) / law.stddev)[full]
    assert error.abs().max() < 5 / 4000**0.5


def test_naive_takes_an_earlier_season_where_the_last_is_missing():
    task = sunspots()
    histories, outcome = task.histories(), seasonal_naive(task)
    lag = task.season
    gap = ~histories.mask[:, -lag:] & histories.mask[:, -2 * lag : -lag]
    values, mask = task.data.values[: task.num_training] / task.scale, task.data.mask[: task.num_training]
    changes = (values[2 * lag :] - values[: -2 * lag])[mask[2 * lag :] & mask[: -2 * lag]]
    law = Normal(histories.values[:, -2 * lag : -lag] + changes.mean(), changes.std())
    expected = law.log_prob(task.futures().values)
    assert gap.any()
    torch.testing.assert_close(outcome.log_scores[gap], expected[gap], rtol=1e-4, atol=1e-4)


def test_rotations_come_back_after_a_period():
    turned = torch.linalg.matrix_power(_rotations(11), 11)
    expected = torch.diag(torch.tensor([0.97, 0.97, 0.8, 0.8]) ** 11)
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [atmospheric_co2, sunspots])
def test_linear_bound_is_the_likelihood_of_windows_that_do_not_overlap(make):
    task = make()
    outcome = linear(task, num_steps=1, num_samples=2, progress=False)
    windows = task.windows(stride=task.window)
    assert (windows.times[1:, 0] > windows.times[:-1, -1]).all()
    with torch.no_grad():
        one_by_one = sum(
            infer.kalman_filter(outcome.model, windows.series(i)).log_likelihood.sum() for i in range(len(windows))
        )
    assert outcome.bound == pytest.approx(float(one_by_one / windows.mask.sum()), rel=1e-4)


def test_deep_model_starts_as_the_linear_one_with_its_exact_posterior():
    """Before training, the weight of every draw is the linear model's likelihood."""
    task = atmospheric_co2()
    fitted = linear(task, num_steps=5, num_samples=2, progress=False)
    model, guide = _around(fitted.model, task)
    windows = task.windows(stride=task.window)
    with torch.no_grad():
        exact = infer.kalman_filter(fitted.model, windows).log_likelihood.sum(-1)
    one_draw = infer.evidence_lower_bound(model, guide, windows, num_samples=1).series
    torch.testing.assert_close(one_draw, exact, rtol=1e-4, atol=1e-2)
