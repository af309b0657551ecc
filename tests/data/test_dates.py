import numpy as np
import pandas as pd
import pytest

from pyro_ssm.data.dates import UNITS, as_dates, dates_to_times, interpolate_labels, times_to_dates, unit_of

ORIGIN = np.datetime64("1999-11-30T06:00", "ns")


@pytest.mark.parametrize("unit", UNITS)
def test_dates_to_times_and_back(unit):
    dates = ORIGIN + np.array([0, 1, 36, 59, 10_000, -400], dtype="m8[h]").astype("m8[ns]")
    times = dates_to_times(dates, unit, ORIGIN)
    assert times.dtype == np.float64 and times[0] == 0
    error = np.abs((times_to_dates(times, unit, ORIGIN) - dates).astype(np.int64))
    # float64 carries fractions of a day, or of a month, to nanoseconds, or microseconds
    assert error.max() <= (5_000 if unit in "MQY" else 5)


@pytest.mark.parametrize(("unit", "freq"), [("M", "MS"), ("Q", "QS"), ("Y", "YS"), ("W", "W"), ("D", "D"), ("h", "h")])
def test_regular_dates_are_whole_numbers(unit, freq):
    dates = as_dates(pd.date_range("1890-01-01", periods=300, freq=freq))
    times = dates_to_times(dates, unit, dates[0])
    np.testing.assert_array_equal(times, np.arange(300))
    np.testing.assert_array_equal(times_to_dates(times, unit, dates[0]), dates)
    assert unit_of(dates, times) == unit
    assert unit_of(dates, times + 7.5) == unit


def test_no_unit():
    dates = as_dates(["2020-01-01", "2020-01-02", "2020-01-05"])
    assert unit_of(dates, np.array([0.0, 1.0, 2.0])) is None
    assert unit_of(dates[:1], np.array([0.0])) is None


def test_thirds_of_a_quarter_are_months():
    dates = times_to_dates(np.array([0, 1 / 3, 2 / 3, 1]), "Q", np.datetime64("2000-01-01"))
    assert (
        dates.astype("M8[M]").tolist()
        == as_dates(["2000-01", "2000-02", "2000-03", "2000-04"]).astype("M8[M]").tolist()
    )
    np.testing.assert_array_equal(dates, dates.astype("M8[M]").astype("M8[ns]"))


def test_as_dates_takes_all_kinds():
    expected = np.array(["2020-01-01", "2020-02-01"], dtype="M8[ns]")
    index = pd.DatetimeIndex(expected)
    for kind in (["2020-01-01", "2020-02-01"], index, index.as_unit("s"), index.to_period("M"), index.to_pydatetime()):
        result = as_dates(kind)
        assert result.dtype == expected.dtype
        np.testing.assert_array_equal(result, expected)
    zoned = pd.DatetimeIndex(["2020-01-01 02:00", "2020-02-01 02:00"], tz="Etc/GMT-2")
    np.testing.assert_array_equal(as_dates(zoned), expected)


def test_interpolated_labels():
    days = np.array(["2020-01-01", "2020-01-03", "NaT"], dtype="M8[ns]")
    fine = interpolate_labels(days, 2)
    np.testing.assert_array_equal(
        fine, np.array(["2020-01-01", "2020-01-02", "2020-01-03", "NaT", "NaT"], dtype="M8[ns]")
    )
    assert interpolate_labels(np.array([0, 3, 4]), 2).tolist() == [0, 1.5, 3, 3.5, 4]
    assert interpolate_labels(np.array(["a", "b"], dtype=object), 2) is None
