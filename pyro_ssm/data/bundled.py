"""Small series that come with the package (sources: `bundled/README.md`)."""

from __future__ import annotations

from importlib.resources import files

import torch

from pyro_ssm.data.time_series import TimeSeries

__all__ = ["available", "load"]

UNITS = {"co2": "W", "elnino": "M", "lynx_hare": "Y", "macrodata": "Q", "nile": "Y", "sunspots": "Y"}


def available() -> list[str]:
    """Names of the bundled series, for `load`.

    Returns:
        The sorted names.

    Example:
        >>> from pyro_ssm.data import available
        >>> available()
        ['co2', 'elnino', 'lynx_hare', 'macrodata', 'nile', 'sunspots']
    """
    return sorted(UNITS)


def load(name: str, dtype: torch.dtype | None = None) -> TimeSeries:
    """Reads a bundled series.

    One step lasts one unit of time: a week (co2), a month (elnino), a quarter (macrodata) or a year (lynx_hare, nile,
    sunspots), so that times are 0, 1, 2, ... The dates are in `coords["time"]`, the names of the variables in
    `coords["obs"]`.

    Args:
        name: one of `available()`.
        dtype: of the values; default torch's.

    Returns:
        A series of shape `(time, obs)`; co2 has missing weeks.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> from pyro_ssm.data import load
        >>> load("co2")
        TimeSeries(times=2284, obs=1, observed=97.4%)
        >>> print(load("nile").coords["time"][0].astype("datetime64[Y]"))
        1871
        >>> load("lynx_hare").coords["obs"].tolist()
        ['hare', 'lynx']
    """
    import pandas as pd

    if name not in UNITS:
        raise ValueError(f"`name` is {name!r}, but the bundled series are {', '.join(available())}.")
    with (files("pyro_ssm.data") / "bundled" / f"{name}.csv").open(encoding="utf-8") as file:
        frame = pd.read_csv(file, index_col="date", parse_dates=["date"])
    return TimeSeries.from_pandas(frame, unit=UNITS[name], dtype=dtype)
