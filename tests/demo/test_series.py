"""What the models of the demo are given."""

import numpy as np
import pytest
import torch

from pyro_ssm.demo import atmospheric_co2, returns, seasonal_inputs, sunspots


@pytest.fixture(params=[atmospheric_co2, sunspots, returns], ids=["co2", "sunspots", "returns"])
def make(request):
    return request.param


def test_transformation_is_undone_exactly(make):
    task = make()
    starts = list(task.origins())
    known = [start - task.window for start in starts]
    restored = task.original(task.futures().values, known, starts)
    index = torch.tensor(starts).unsqueeze(-1) + torch.arange(task.season)
    torch.testing.assert_close(restored, task.data.values[index], rtol=1e-5, atol=1e-3)


def test_nothing_held_out_enters_training(make):
    task = make()
    after = torch.arange(task.data.num_times) >= task.num_training
    changed = task._replace(data=task.data.replace(values=task.data.values + 1e3 * after[:, None], mask=task.data.mask))
    for one, other in (
        (task.windows(), changed.windows()),
        (task.histories().minibatch([0]), changed.histories().minibatch([0])),
    ):
        assert torch.equal(one.values, other.values)
    assert float(task.windows().times.max()) < float(task.futures().times.min())


def test_scale_and_trend_are_those_of_the_training_span(make, monkeypatch):
    from pyro_ssm.demo import series

    task, load = make(), series.load

    def spoiled(name):
        data = load(name)
        late = torch.from_numpy(data.coords["time"] >= task.data.coords["time"][task.num_training])
        return data.replace(values=data.values + 1e3 * late[:, None], mask=data.mask)

    monkeypatch.setattr(series, "load", spoiled)
    again = make()
    assert again.scale == task.scale
    assert torch.equal(again.trend, task.trend)


def test_forecasts_follow_their_histories(make):
    histories, futures = make().histories(), make().futures()
    assert torch.equal(histories.times[:, -1] + histories.times.diff(dim=-1)[:, -1], futures.times[:, 0])


def test_anchor_is_the_mean_of_the_first_season():
    task = atmospheric_co2()
    first = task.windows()
    seen = first.mask[:, : task.season]
    mean = torch.where(seen, first.values[:, : task.season], 0.0).sum((-2, -1)) / seen.sum((-2, -1))
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-5)


def test_there_are_missing_values_in_training_and_none_is_hidden_afterwards(make):
    task = make()
    assert not task.data.mask[: task.num_training].all()
    assert task.data.mask[task.num_training :].all()


def test_seasonal_inputs_have_the_period_of_a_year():
    days = np.array(["1999-04-11", "2001-04-11", "2001-10-10"], dtype="datetime64[s]")
    inputs = seasonal_inputs(days)
    torch.testing.assert_close(inputs[0], inputs[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(inputs.square().reshape(3, 2, 2).sum(1), torch.ones(3, 2))  # sine and cosine
