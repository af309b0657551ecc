"""Dates and times: how labels become float64 times and back."""

from __future__ import annotations

from typing import Any

import numpy as np

NANOSECONDS = {
    "W": 7 * 86_400_000_000_000,
    "D": 86_400_000_000_000,
    "h": 3_600_000_000_000,
    "min": 60_000_000_000,
    "s": 1_000_000_000,
    "ms": 1_000_000,
    "us": 1_000,
    "ns": 1,
}
MONTHS = {"M": 1, "Q": 3, "Y": 12}  # calendar units: a month is a month, however many days it has
UNITS = (*MONTHS, *NANOSECONDS)


def is_dates(labels: Any) -> bool:
    """Whether labels are dates (datetime64)."""
    return isinstance(labels, np.ndarray) and labels.dtype.kind == "M"


def as_dates(x: Any) -> np.ndarray:
    """Dates of any kind as datetime64[ns]; time zones are turned to UTC, periods to their start."""
    import pandas as pd

    if isinstance(x, pd.PeriodIndex):
        x = x.to_timestamp()
    index = pd.DatetimeIndex(pd.to_datetime(x))
    if index.tz is not None:
        index = index.tz_convert("UTC").tz_localize(None)
    return index.as_unit("ns").to_numpy()


def as_date(x: Any) -> np.datetime64:
    """One date of any kind as datetime64[ns]."""
    import pandas as pd

    return as_dates([pd.Timestamp(x)])[0]


def check_unit(unit: str) -> None:
    """Refuses what is not a unit of time."""
    if unit not in UNITS:
        raise ValueError(f"`unit` is {unit!r}, but one of {', '.join(UNITS)} is wanted.")


def months_of(dates: np.ndarray) -> np.ndarray:
    """Calendar months since 1970-01, with the part of the month that has passed."""
    month = dates.astype("datetime64[M]")
    start = month.astype("datetime64[ns]")
    length = (month + 1).astype("datetime64[ns]") - start
    return np.asarray(month.astype(np.int64) + (dates - start) / length)


def dates_to_times(dates: np.ndarray, unit: str, origin: np.datetime64) -> np.ndarray:
    """Float64 times in `unit` since `origin`; exact for whole units."""
    dates = dates.astype("datetime64[ns]")
    start = np.asarray(origin, dtype="datetime64[ns]")
    if unit in MONTHS:
        return (months_of(dates) - months_of(start)) / MONTHS[unit]
    whole, rest = np.divmod((dates - start).astype(np.int64), NANOSECONDS[unit])
    return whole + rest / NANOSECONDS[unit]


def times_to_dates(times: np.ndarray, unit: str, origin: np.datetime64) -> np.ndarray:
    """Undoes `dates_to_times`: exactly for whole numbers of units, else to the rounding of float64."""
    start = np.asarray(origin, dtype="datetime64[ns]")
    if unit in MONTHS:
        months = months_of(start) + times * MONTHS[unit]
        whole = np.floor(months + 1e-9)  # 1 / 3 of a quarter must be one month, not a month less a rounding error
        month = whole.astype(np.int64).astype("datetime64[M]")
        first = month.astype("datetime64[ns]")
        length = ((month + 1).astype("datetime64[ns]") - first).astype(np.int64)
        return first + (np.maximum(months - whole, 0.0) * length).round().astype("timedelta64[ns]")
    whole = np.floor(times)
    rest = ((times - whole) * NANOSECONDS[unit]).round()
    return start + (whole.astype(np.int64) * NANOSECONDS[unit] + rest.astype(np.int64)).astype("timedelta64[ns]")


def unit_of(dates: np.ndarray, times: np.ndarray) -> str | None:
    """The unit in which `times` count `dates`, or None if no unit does (or there is but one date)."""
    if len(dates) < 2:
        return None
    for unit in UNITS:
        expected = times[0] + dates_to_times(dates, unit, dates[0])
        if np.allclose(expected, times, rtol=0.0, atol=1e-6 * abs(times[1] - times[0])):
            return unit
    return None


def interpolate_labels(labels: np.ndarray, n: int) -> np.ndarray | None:
    """Labels of a grid refined n times (last axis), or None where labels have no in-between (strings)."""
    if labels.dtype.kind not in "Mfiu":
        return None
    left, right = labels[..., :-1, None], labels[..., 1:, None]
    if is_dates(labels):
        steps = (
            ((right - left).astype(np.int64) * (np.arange(n) / n)).round().astype(np.int64).astype((right - left).dtype)
        )
        fine = left + np.where(np.isnat(right), np.timedelta64("NaT"), steps)
        fine[..., 0] = left[..., 0]
    else:
        fine = left + (right - left) * (np.arange(n) / n)
    fine = fine.reshape(labels.shape[:-1] + (-1,))
    return np.concatenate([fine, labels[..., -1:].astype(fine.dtype)], axis=-1)
