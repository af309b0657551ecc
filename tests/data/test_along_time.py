"""split, extend, refine, thin and trim, on series that have everything: ragged, own grids, inputs, coords."""

import numpy as np
import pytest
import torch

from pyro_ssm.data import TimeSeries

NAN = float("nan")
FIELDS = ("times", "values", "mask", "inputs")


def plain(num_times=6, **changes):
    """One series on an irregular grid, with a missing entry, inputs and string labels of time."""
    values = torch.arange(2.0 * num_times).reshape(num_times, 2)
    values[1, 0] = NAN
    arguments = {
        "inputs": 10 * torch.arange(num_times)[:, None],
        "coords": {"obs": ["x", "y"], "input": ["u"], "time": [f"t{k}" for k in range(num_times)]},
        **changes,
    }
    return TimeSeries(torch.arange(num_times) ** 2, values, **arguments)


def panel(own=True, dates=False):
    """Series of 5, 3 and 4 steps; on own grids, times are 0, 2, 4 ... , 1, 3, ... and 2, 4, ..."""
    lengths = (5, 3, 4)
    times = [torch.arange(n) * 2.0 + (i if own else 0) for i, n in enumerate(lengths)]
    values = [100.0 * i + torch.arange(n)[:, None] for i, n in enumerate(lengths)]
    values[2][1] = NAN
    data = TimeSeries.from_sequences(
        values,
        times,
        [-v.nan_to_num() for v in values],
        coords={"series": ["a", "b", "c"], "obs": ["x"], "input": ["u"]},
    )
    if not dates:
        return data
    days = np.datetime64("2020-01-01", "ns") + data.times.numpy().astype("timedelta64[D]")
    return data.replace(coords={**data.coords, "time": days})


def same(left, right):
    """All that a series is."""
    for name in (*FIELDS, "lengths", "index", "observed_index"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None) == (b is None), name
        if name == "times":  # to rounding: refining twice, or continuing padding, adds up in another order
            torch.testing.assert_close(a, b, rtol=1e-14, atol=0.0)
        else:
            assert a is None or torch.equal(a, b), name
    assert set(left.coords) == set(right.coords)
    for key in left.coords:
        np.testing.assert_array_equal(left.coords[key], right.coords[key])
    assert (left.total, left.batch_shape) == (right.total, right.batch_shape)
    return True


def joined(before, after):
    return {
        name: torch.cat([getattr(before, name), getattr(after, name)], 0 if name == "times" else -2) for name in FIELDS
    }


# -- split ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, 2.5, 4.0, np.int64(2), torch.tensor(4.0)])
def test_split_parts_join_to_the_whole(at):
    data = plain()
    before, after = data.split(at)
    assert before.times.tolist() == [0, 1] and after.times.tolist() == [4, 9, 16, 25]
    for name, whole in joined(before, after).items():
        assert torch.equal(whole, getattr(data, name))
    assert [*before.coords["time"], *after.coords["time"]] == [*data.coords["time"]]
    assert after.coords["obs"].tolist() == ["x", "y"]


@pytest.mark.parametrize(("own", "at"), [(True, 2), (True, 3.5), (False, 2), (False, 4.0), (True, 4.0)])
def test_split_of_ragged_series_is_the_split_of_each(own, at):
    data = panel(own)
    before, after = data.split(at)
    for i in range(3):
        parts = data.series(i).split(at)
        assert same(before.series(i), parts[0]) and same(after.series(i), parts[1])
    assert before.coords["series"].tolist() == ["a", "b", "c"]
    assert (after.times.diff(dim=-1) > 0).all() and (before.times.diff(dim=-1) > 0).all()
    for part in (before, after):
        assert not part.mask[~part.step_mask].any()
        assert (part.inputs[~part.step_mask] == 0).all()


@pytest.mark.parametrize("own", [False, True])
def test_split_at_a_date(own):
    data = panel(own, dates=True)
    before, after = data.split("2020-01-05")
    expected = data.split(4.0)
    same(before, expected[0])
    same(after, expected[1])
    for i in range(3):
        real = after.series(i)
        assert (real.coords["time"] >= np.datetime64("2020-01-05")).all()


def test_split_keeps_a_minibatch_and_may_be_unobserved():
    data = panel().hide(panel().times[..., None] > 3).minibatch([2, 0])
    before, after = data.split(4.0)
    assert not after.mask.any()
    assert (after.total, after.index.tolist()) == (3, [2, 0])
    assert before.coords["series"].tolist() == ["c", "a"]


def test_split_of_a_refined_series():
    data = plain().refine(2)
    before, after = data.split(5)
    assert (before.num_times, after.num_times) == (5, 6)
    assert before.observed_index.tolist() == [0, 2, 4] and after.observed_index.tolist() == [1, 3, 5]
    assert torch.equal(torch.cat([before.values, after.values]), data.values)
    assert torch.equal(torch.cat([before.observed_times, after.observed_times]), data.observed_times)
    with pytest.raises(ValueError, match="hold no time that carries values. Split first"):
        plain(2).refine(3).split(1)[1].split(1)
    with pytest.raises(ValueError, match="different steps of a refined series"):
        panel().refine(2).split(3.5)


@pytest.mark.parametrize(
    ("error", "message", "at"),
    [
        (ValueError, "`at` = step 0 leaves series 0 .'a'., which has 5 steps, with nothing before", 0),
        (ValueError, "`at` = step 3 leaves series 1 .'b'., which has 3 steps, with nothing after", 3),
        (ValueError, "`at` = time 1 leaves series 1 .'b'., which has 3 steps, with nothing before", 1.0),
        (ValueError, "`at` = time 5.5 leaves series 1", 5.5),
        (TypeError, "`at` is a bool", True),
        (TypeError, "`at` is 'no date'", "no date"),
        (ValueError, "`at` is the date '2020-01-01', but the series has no dates", "2020-01-01"),
    ],
)
def test_split_refuses(error, message, at):
    with pytest.raises(error, match=message):
        panel().split(at)


# -- extend ---------------------------------------------------------------------------------------------------------


def test_extend_appends_unobserved_steps():
    data = plain(coords={"obs": ["x", "y"]})
    longer = data.extend([30, 31.5], inputs=[[7.0], [8.0]])
    assert longer.times.tolist() == [0, 1, 4, 9, 16, 25, 30, 31.5]
    assert longer.lengths is None and not longer.has_own_times
    assert longer.inputs[-2:, 0].tolist() == [7, 8]
    before, after = longer.split(6)
    assert same(before, data)
    assert not after.mask.any() and (after.values == 0).all()


@pytest.mark.parametrize("own", [False, True])
def test_extend_of_ragged_series_is_the_extension_of_each(own):
    data = panel(own)
    times = data.times.expand(3, 5).gather(1, data.lengths[:, None] - 1) + torch.tensor([1.0, 1.5])
    inputs = torch.arange(6.0).reshape(3, 2, 1)
    longer = data.extend(times, inputs)
    assert longer.lengths.tolist() == [7, 5, 6]
    assert (longer.times.diff(dim=-1) > 0).all()
    for i in range(3):
        assert same(longer.series(i), data.series(i).extend(times[i], inputs[i]))
    assert (longer.inputs[~longer.step_mask] == 0).all() and not longer.mask[~longer.step_mask].any()


def test_extend_of_ragged_series_by_shared_times():
    longer = panel(own=False).extend([20.0, 30.0], [[1.0], [2.0]])
    assert longer.times.tolist() == [
        [0, 2, 4, 6, 8, 20, 30],
        [0, 2, 4, 20, 30, 40, 50],
        [0, 2, 4, 6, 20, 30, 40],
    ]
    assert longer.inputs[1, :, 0].tolist() == [0 - 100, -101, -102, 1, 2, 0, 0]


def test_extend_of_equal_lengths_with_own_new_times():
    data = TimeSeries([0.0, 1.0], torch.ones(2, 2, 1), lengths=[2, 2])
    longer = data.extend([[2.0], [3.0]])
    assert longer.times.tolist() == [[0, 1, 2], [0, 1, 3]]
    assert longer.lengths.tolist() == [3, 3]


def test_extend_of_an_over_long_time_axis():
    data = TimeSeries([0.0, 1, 2, 3], torch.ones(2, 4, 1), lengths=[2, 1])
    longer = data.extend([9.0])
    assert longer.times.tolist() == [[0, 1, 9], [0, 9, 18]] and longer.lengths.tolist() == [3, 2]


def test_extend_without_values():
    assert panel().without_values().extend([50.0], [[0.0]]).values is None


@pytest.mark.parametrize("given", ["times", "dates"])
def test_extend_continues_dates(given):
    days = np.array(["2020-01-01", "2020-01-02", "2020-01-05"], dtype="M8[D]")
    data = TimeSeries([0, 1, 4], torch.ones(3, 1), coords={"time": days})
    new = np.array(["2020-01-06T12", "2020-03-01"], dtype="M8[h]")
    longer = data.extend(new if given == "dates" else [5.5, 60])
    assert longer.times.tolist() == [0, 1, 4, 5.5, 60]
    np.testing.assert_array_equal(longer.coords["time"], np.concatenate([days, new]))


def test_extend_continues_dates_of_ragged_series():
    longer = panel(dates=True).extend([20.0], [[0.0]])
    assert longer.coords["time"].shape == (3, 6)
    assert longer.series("b").coords["time"][-1] == np.datetime64("2020-01-21")
    assert np.isnat(longer.coords["time"]).sum() == 3
    shared = panel(own=False, dates=True).extend([20.0], [[0.0]])
    assert shared.series("b").coords["time"].tolist() == longer.series("a").coords["time"][[0, 1, 2, 5]].tolist()


def test_extend_drops_labels_that_do_not_go_on():
    assert "time" not in plain().extend([30.0], [[0.0]]).coords
    odd = np.array(["2020-01-01", "2020-01-02", "2020-01-05"], dtype="M8[D]")
    data = TimeSeries([0, 1, 2], torch.ones(3, 1), coords={"time": odd})
    assert "time" not in data.extend([3]).coords
    with pytest.raises(ValueError, match="`times` holds dates, but the times of the series do not count dates"):
        data.extend(["2020-01-06"])


def test_extend_of_a_refined_series_observes_at_the_new_times():
    data = plain(3, coords=None).refine(2).extend([5.0], [[1.0]])
    assert data.times.tolist() == [0, 0.5, 1, 2.5, 4, 5]
    assert data.observed_index.tolist() == [0, 2, 4, 5]
    assert data.mask.any(-1).tolist() == [True, True, True, False]
    with pytest.raises(ValueError, match="Extend first, refine afterwards"):
        panel().refine(2).extend([50.0], [[0.0]])


@pytest.mark.parametrize(
    ("message", "times", "inputs"),
    [
        ("`inputs` are wanted for the 1 new times", [50.0], None),
        (r"`inputs` has shape \(2, 1\), but \(\*batch, 1, 1\)", [50.0], [[1.0], [2.0]]),
        (r"`inputs` has shape \(2, 1, 1\), whose batch part \(2,\)", [50.0], [[[1.0]], [[2.0]]]),
        ("`inputs` must be finite", [50.0], [[NAN]]),
        ("series 0 .'a'. ends at 8 and the first new time is 8", [8.0], [[0.0]]),
        ("series 2 .'c'. ends at 8 and the first new time is 7", [[9.0], [6.0], [7.0]], [[0.0]]),
        ("`times` must be strictly increasing. Sort", [50.0, 50.0], [[0.0], [0.0]]),
        ("`times` must be finite", [NAN], [[0.0]]),
        (r"`times` has shape \(0,\)", [], None),
        (r"`times` has shape \(2, 1\), whose batch part", [[50.0], [50.0]], [[0.0]]),
        ("`times` holds dates, but", ["2030-01-01"], [[0.0]]),
    ],
)
def test_extend_refuses(message, times, inputs):
    with pytest.raises(ValueError, match=message):
        panel().extend(times, inputs)


def test_extend_refuses_inputs_where_there_are_none():
    with pytest.raises(ValueError, match="`inputs` were given for the new times, but the series has none"):
        TimeSeries([0.0], [[1.0]]).extend([1.0], [[1.0]])


# -- refine and thin ------------------------------------------------------------------------------------------------


def test_refine_of_an_irregular_grid():
    data = plain(3, coords={"time": [0.0, 10.0, 40.0]}).refine(2)
    assert data.times.tolist() == [0, 0.5, 1, 2.5, 4]
    assert data.inputs[:, 0].tolist() == [0, 0, 10, 10, 20]
    assert data.observed_index.tolist() == [0, 2, 4]
    assert data.observed_times.tolist() == [0, 1, 4]
    assert data.coords["time"].tolist() == [0, 5, 10, 25, 40]
    assert (data.num_times, data.num_observed_times) == (5, 3)
    assert torch.equal(data.mask, plain(3).mask)
    assert repr(data) == "TimeSeries(times=5, obs=2, observed=83.3%, inputs=1, observed times=3)"


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dates", [False, True])
def test_refine_of_ragged_series_is_the_refinement_of_each(own, dates):
    data = panel(own, dates)
    fine = data.refine(4)
    assert fine.lengths.tolist() == [17, 9, 13]
    assert fine.times.shape == ((3, 17) if own else (17,))
    for i in range(3):
        assert same(fine.series(i), data.series(i).refine(4))
    assert (fine.inputs[~fine.step_mask] == 0).all()
    assert torch.equal(fine.observed_step_mask, data.step_mask)
    assert torch.equal(fine.observed_times, data.times)


@pytest.mark.parametrize("make", [plain, panel, lambda: panel(False, True), lambda: panel(True, True)])
def test_thin_undoes_refine_and_refinements_compose(make):
    data = make()
    data = data.replace(coords={k: v for k, v in data.coords.items() if k != "time" or v.dtype.kind == "M"})
    for n in (1, 2, 3):
        assert same(data.refine(n).thin(n), data)
    twice, once = data.refine(2).refine(3), data.refine(6)
    assert same(twice, once)
    assert same(data.thin(2).thin(2), data.thin(4))
    assert same(data.refine(6).thin(2), data.refine(3))


@pytest.mark.parametrize("own", [False, True])
def test_thin_of_ragged_series_is_the_thinning_of_each(own):
    data = panel(own, dates=True)
    thinned = data.thin(2)
    assert thinned.lengths.tolist() == [3, 2, 2]
    for i in range(3):
        assert same(thinned.series(i), data.series(i).thin(2))


def test_refine_without_values_tells_where_they_will_be():
    assert TimeSeries([0.0, 1.0]).refine(3).observed_index.tolist() == [0, 3]


def test_refine_drops_labels_without_in_between():
    assert "time" not in plain().refine(2).coords
    assert "time" in plain().thin(2).coords


def test_a_refined_series_is_rebuilt_by_the_constructor():
    data = panel().refine(3)
    names = ("times", "values", "mask", "inputs", "lengths", "coords", "total", "index", "observed_index")
    assert same(TimeSeries(**{name: getattr(data, name) for name in names}), data)
    assert same(data.minibatch([0, 2]).refine(2), data.refine(2).minibatch([0, 2]))


def test_thin_refuses_to_keep_no_values():
    after = plain(3).refine(3).split(1)[1]
    assert after.observed_index.tolist() == [2, 5]
    with pytest.raises(ValueError, match=r"`thin\(6\)` keeps none of the times that carry values"):
        after.thin(6)
    assert after.thin(2).observed_index.tolist() == [1]


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2"])
@pytest.mark.parametrize("verb", ["refine", "thin"])
def test_wrong_factors(verb, n):
    with pytest.raises(ValueError, match="`n` is .*, but an integer of at least 1"):
        getattr(plain(), verb)(n)


def test_trim_drops_only_padding():
    data = panel(dates=True).minibatch([1, 2])
    trimmed = data.trim()
    assert trimmed.num_times == 4 and trimmed.lengths.tolist() == [3, 4]
    for i in range(2):
        assert same(trimmed.series(i), data.series(i))
    fine = data.refine(3).trim()
    assert fine.num_times == 10 and fine.observed_index.tolist() == [0, 3, 6, 9]
    assert same(fine, trimmed.refine(3))
    assert plain().trim().num_times == 6
