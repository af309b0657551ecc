"""pandas frames and xarray data sets as constructor arguments of a `TimeSeries`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_ssm.data.checks import as_floating, as_times
from pyro_ssm.data.dates import as_date, as_dates, check_unit, dates_to_times, is_dates
from pyro_ssm.data.padding import pad_sequences


def per_series(name: str, what: Any, number: int) -> list[Any]:
    """One entry per series, or a clear error."""
    if not isinstance(what, (list, tuple)) or len(what) != number:
        got = f"{len(what)} entries" if isinstance(what, (list, tuple)) else f"a {type(what).__name__}"
        raise ValueError(f"`{name}` has {got}, but a list with one entry for each of the {number} sequences is wanted.")
    return list(what)


def shared_times(times: Sequence[Tensor]) -> Tensor | None:
    """The longest grid, if all others are beginnings of it."""
    longest = max(times, key=len)
    return longest if all(torch.equal(grid, longest[: len(grid)]) for grid in times) else None


def sequence_fields(values: Any, times: Any, inputs: Any) -> dict[str, Any]:
    """Padded constructor arguments from lists of sequences."""
    if not isinstance(values, (list, tuple)) or len(values) == 0:
        raise ValueError("`values` must be a list of at least one sequence of shape (time_i, obs).")
    sequences = [as_floating(f"values[{i}]", x) for i, x in enumerate(values)]
    for i, x in enumerate(sequences):
        if x.dim() != 2 or 0 in x.shape:
            raise ValueError(
                f"`values[{i}]` has shape {tuple(x.shape)}, but (time_i, obs) with at least one step is wanted. For "
                "one coordinate give `x[:, None]`."
            )
    dtype = sequences[0].dtype
    for x in sequences[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    padded, lengths = pad_sequences([x.to(dtype) for x in sequences], fill=float("nan"))
    number = len(sequences)
    if times is None:
        grid = torch.arange(int(lengths.max()), dtype=torch.float64)
    else:
        grids = [as_times(f"times[{i}]", t) for i, t in enumerate(per_series("times", times, number))]
        for i, (t, x) in enumerate(zip(grids, sequences, strict=True)):
            if t.shape != x.shape[:1]:
                raise ValueError(
                    f"`times[{i}]` has shape {tuple(t.shape)}, but ({len(x)},) is wanted: one time per step of "
                    f"values[{i}]."
                )
        shared = shared_times(grids)
        grid = pad_sequences(grids)[0] if shared is None else shared
    if inputs is not None:
        inputs = [as_floating(f"inputs[{i}]", u, dtype) for i, u in enumerate(per_series("inputs", inputs, number))]
        for i, (u, x) in enumerate(zip(inputs, sequences, strict=True)):
            if u.dim() != 2 or len(u) != len(x):
                raise ValueError(
                    f"`inputs[{i}]` has shape {tuple(u.shape)}, but ({len(x)}, input) is wanted: one row per step of "
                    f"values[{i}]."
                )
        inputs = pad_sequences(inputs)[0]
    ragged = bool((lengths < lengths.max()).any())
    return {"times": grid, "values": padded, "inputs": inputs, "lengths": lengths if ragged else None}


def column_list(name: str, columns: Any, available: Sequence[Any]) -> list[Any]:
    """One column or several as a list, all of them known."""
    if isinstance(columns, Hashable) and not isinstance(columns, tuple):
        columns = [columns]
    missing = [c for c in columns if c not in available]
    if missing:
        raise ValueError(f"`{name}` names {missing}, but the frame has the columns {list(available)}.")
    return list(columns)


def numbers(name: str, frame: Any, columns: Sequence[Hashable]) -> np.ndarray:
    """Columns as float64 (nullable pandas types included), or an error that names the column."""
    import pandas as pd

    for column in columns:
        if not pd.api.types.is_numeric_dtype(frame[column].dtype):
            raise TypeError(
                f"`{name}` includes the column {column!r} of dtype {frame[column].dtype}, but numbers are wanted. "
                "Choose the columns, "
                "or convert it (`pandas.to_numeric`, `pandas.get_dummies`)."
            )
    return frame[columns].to_numpy(dtype=np.float64, na_value=np.nan)


def times_of_index(index: Any, unit: str, origin: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Float64 times, and the dates they count if there are any."""
    import pandas as pd

    check_unit(unit)
    if isinstance(index, (pd.DatetimeIndex, pd.PeriodIndex)):
        dates = as_dates(index)
        if np.isnat(dates).any():
            raise ValueError("The time index holds missing dates (NaT). Drop those rows.")
        return dates_to_times(dates, unit, dates.min() if origin is None else as_date(origin)), dates
    if isinstance(index, pd.MultiIndex) or not pd.api.types.is_numeric_dtype(index.dtype):
        raise TypeError(
            f"The time index has dtype {index.dtype}, but dates or numbers are wanted. Convert it with "
            "`pandas.to_datetime`, "
            "or name the column that holds the times: `time='column'`."
        )
    if origin is not None:
        raise ValueError(f"`origin` is {origin!r}, but the time index holds numbers, not dates. Leave it out.")
    return index.to_numpy(dtype=np.float64), None


def frame_fields(
    frame: Any, values: Any, inputs: Any, time: Hashable | None, series: Hashable | None, unit: str, origin: Any,
    dtype: torch.dtype | None,
) -> dict[str, Any]:  # fmt: skip
    """Constructor arguments from a wide frame, or from a long one with a series column."""
    import pandas as pd

    if isinstance(frame, pd.Series):
        frame = frame.to_frame(name="value" if frame.name is None else frame.name)
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(f"`frame` is a {type(frame).__name__}, but a pandas DataFrame or Series is wanted.")
    if len(frame) == 0:
        raise ValueError("`frame` has no rows.")
    if not frame.columns.is_unique:
        raise ValueError(
            f"`frame` has repeated column names: {list(frame.columns[frame.columns.duplicated()])}. Rename them."
        )
    for name, column in (("time", time), ("series", series)):
        if column is not None and column not in frame.columns:
            raise ValueError(f"`{name}` is {column!r}, but the frame has the columns {list(frame.columns)}.")
    input_columns: list[Any] = [] if inputs is None else column_list("inputs", inputs, list(frame.columns))
    if values is None:
        value_columns = [c for c in frame.columns if c not in (time, series, *input_columns)]
    else:
        value_columns = column_list("values", values, list(frame.columns))
    if not value_columns:
        raise ValueError("`values` names no column of the frame; at least one is wanted.")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    grid, dates = times_of_index(frame.index if time is None else pd.Index(frame[time]), unit, origin)
    y = torch.from_numpy(numbers("values", frame, value_columns).copy()).to(dtype)
    u = torch.from_numpy(numbers("inputs", frame, input_columns).copy()).to(dtype) if input_columns else None
    coords: dict[str, Any] = {"obs": np.array(value_columns, dtype=object)}
    if input_columns:
        coords["input"] = np.array(input_columns, dtype=object)
    if series is None:
        if dates is not None:
            coords["time"] = dates
        return {"times": grid, "values": y, "inputs": u, "coords": coords}

    rows = frame.groupby(frame[series].to_numpy(), sort=False).indices
    names = list(pd.unique(frame[series]))
    if len(rows) != len(names):
        raise ValueError(f"`series` column {series!r} holds missing names. Drop those rows, or name the series.")
    groups = [np.asarray(rows[name]) for name in names]
    fields = sequence_fields(
        [y[torch.from_numpy(group)] for group in groups],
        [torch.from_numpy(grid[group]) for group in groups],
        None if u is None else [u[torch.from_numpy(group)] for group in groups],
    )
    coords["series"] = np.array(names, dtype=object)
    if dates is not None:
        longest = max(groups, key=len)
        if fields["times"].dim() == 1:
            coords["time"] = dates[longest]
        else:
            coords["time"] = np.full((len(groups), len(longest)), np.datetime64("NaT"), dtype=dates.dtype)
            for row, group in zip(coords["time"], groups, strict=True):
                row[: len(group)] = dates[group]
    return {**fields, "coords": coords}


def xarray_fields(
    data: Any,
    time: str,
    series: str | None,
    obs: str | None,
    inputs: Any,
    unit: str,
    origin: Any,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Constructor arguments from an xarray DataArray, or from a Dataset whose variables are the coordinates."""
    import pandas as pd
    import xarray as xr

    input_names: list[Any] = []
    value_names: list[Any]
    if isinstance(data, xr.Dataset):
        if obs is not None:
            raise ValueError(
                f"`obs` is {obs!r}, but in a Dataset each variable is one coordinate. Leave `obs` out, or give a "
                "DataArray."
            )
        input_names = [] if inputs is None else column_list("inputs", inputs, list(data.data_vars))
        value_names = [name for name in data.data_vars if name not in input_names]
        if not value_names:
            raise ValueError("The data set has no variable to observe.")
        array, obs = data[value_names].to_dataarray(dim="__obs__"), "__obs__"
    elif isinstance(data, xr.DataArray):
        if inputs is not None:
            raise ValueError(
                "`inputs` names variables of a Dataset, but a DataArray was given. Put both in one Dataset."
            )
        array = data
        value_names = [data.name if data.name is not None else "value"]
    else:
        raise TypeError(f"`data` is a {type(data).__name__}, but an xarray Dataset or DataArray is wanted.")

    def dims_of(obs: str | None) -> list[str]:
        return [dim for dim in (series, time, obs) if dim is not None]

    if set(array.dims) != set(dims_of(obs)):
        raise ValueError(
            f"The array has dims {tuple(d for d in array.dims if d != '__obs__')}, but time = {time!r}, series = "
            f"{series!r}"
            f"{'' if obs == '__obs__' else f', obs = {obs!r}'} were named. Name each dim, or select one entry of the "
            "others with `.isel`."
        )
    dtype = torch.get_default_dtype() if dtype is None else dtype
    y = array.transpose(*dims_of(obs)).to_numpy()
    y = y if obs is not None else y[..., None]
    coords: dict[str, Any] = {}
    if obs == "__obs__" or obs is None:
        coords["obs"] = np.array(value_names, dtype=object)
    elif obs in array.coords:
        coords["obs"] = array[obs].to_numpy()
    if series is not None and series in array.coords:
        coords["series"] = array[series].to_numpy()
    u = None
    if input_names:
        u = data[input_names].to_dataarray(dim="__obs__").transpose(..., time, "__obs__").to_numpy()
        u = as_floating("inputs", u).to(dtype)
        coords["input"] = np.array(input_names, dtype=object)
    if time in array.coords:
        grid, dates = times_of_index(pd.Index(array[time].to_numpy()), unit, origin)
        if dates is not None and is_dates(dates):
            coords["time"] = dates
    else:
        grid = np.arange(array.sizes[time], dtype=np.float64)
    return {"times": grid, "values": as_floating("values", y).to(dtype), "inputs": u, "coords": coords}
