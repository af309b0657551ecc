"""`TimeSeries`: what was seen, when, and what was done to the system meanwhile."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.data.checks import as_bool, checked_fields, shape_of
from pyro_ssm.data.of_series import OfSeries
from pyro_ssm.data.tables import frame_fields, sequence_fields, xarray_fields

__all__ = ["TimeSeries"]

GIVEN = ("times", "values", "mask", "inputs", "lengths", "coords", "total", "index", "observed_index")


@dataclass(frozen=True, eq=False, repr=False, init=False)
class TimeSeries(OfSeries):
    """One or many time series with missing entries, unequal lengths, own time grids and inputs; immutable.

    An entry is *missing* when its state exists but it was not seen (NaN, or False in `mask`); a step is *padding* when
    the series has ended (beyond `lengths`). NaN becomes a mask here, once: in `values` hidden entries are 0.

    Args:
        times: `(time,)`, shared by all series, or `(*batch, time)`; strictly increasing over real steps; kept in
            float64. Padded times are overwritten and go on increasing by each series' last gap (1 if it has but one
            time).
        values: `(*batch, time, obs)`, NaN = missing; floats keep their dtype, integers take torch's default. None:
            nothing was seen, as for simulation from the prior.
        mask: True = observed, the shape of `values`; combined with "is not NaN".
        inputs: controls `(*batch, time, input)` or `(time, input)`; inputs[k] holds on [times[k], times[k + 1]).
        lengths: number of real steps per series, `(*batch,)`; None = all.
        coords: labels of axes: "series" and "obs" and "input" (names), "time" (dates or other labels, `(time,)`; with
            own time grids also `(*batch, time)`).
        total: number of series of the full data, if this is a mini-batch (set by `minibatch`).
        index: positions `(b,)` of this mini-batch in the full data, along the last batch dim.
        observed_index: positions `(observed time,)` in `times` at which `values` live (set by `refine`); None = at all.

    Raises:
        TypeError: for dtypes that are not real numbers (objects, dates, complex), and masks that are not boolean.
        ValueError: for wrong shapes, times that do not increase, infinite values, missing inputs, lengths out of range,
            and a series with no observed entry at all.

    Example:
        >>> import torch
        >>> from pyro_ssm.data import TimeSeries
        >>> data = TimeSeries([0.0, 1.0, 3.0], torch.tensor([[1.0], [float("nan")], [2.0]]))
        >>> data
        TimeSeries(times=3, obs=1, observed=66.7%)
        >>> data.values[:, 0], data.mask[:, 0]
        (tensor([1., 0., 2.]), tensor([ True, False,  True]))
    """

    def __init__(
        self,
        times: Any,
        values: Any = None,
        mask: Any = None,
        inputs: Any = None,
        lengths: Any = None,
        *,
        coords: Mapping[str, Any] | None = None,
        total: int | None = None,
        index: Any = None,
        observed_index: Any = None,
    ) -> None:
        fields = checked_fields(times, values, mask, inputs, lengths, coords, total, index, observed_index)
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    # -- from other forms -------------------------------------------------------------------------------------------

    @classmethod
    def from_sequences(
        cls,
        values: Sequence[Any],
        times: Sequence[Any] | None = None,
        inputs: Sequence[Any] | None = None,
        coords: Mapping[str, Any] | None = None,
    ) -> TimeSeries:
        """Pads sequences of unequal length.

        Args:
            values: list of `(time_i, obs)`.
            times: list of `(time_i,)`; default 0, 1, 2, ... Where all grids are beginnings of the longest, it is
                shared.
            inputs: list of `(time_i, input)`.
            coords: as in the constructor.

        Returns:
            A series of batch shape `(len(values),)`.

        Raises:
            ValueError: if lists or shapes do not fit each other.

        Example:
            >>> import torch
            >>> from pyro_ssm.data import TimeSeries
            >>> data = TimeSeries.from_sequences([torch.ones(2, 1), torch.ones(4, 1)])
            >>> data.batch_shape, data.lengths
            (torch.Size([2]), tensor([2, 4]))
        """
        return cls(**sequence_fields(values, times, inputs), coords=coords)

    @classmethod
    def from_pandas(
        cls,
        frame: Any,
        values: Any = None,
        inputs: Any = None,
        time: Hashable | None = None,
        series: Hashable | None = None,
        unit: str = "D",
        origin: Any = None,
        dtype: torch.dtype | None = None,
    ) -> TimeSeries:
        """Reads a frame: wide (one index), or long (with a column that names the series; grids may differ).

        Dates become float64 times in `unit` since `origin`, and stay in `coords["time"]`; zones are turned to UTC.

        Args:
            frame: a DataFrame or Series, rows in order of time (within each series).
            values: columns to observe; default all that are not otherwise used.
            inputs: columns that are inputs.
            time: the column that holds times; default the index.
            series: the column that names the series (long form); default one series.
            unit: of times made from dates: W, D, h, min, s, ms, us, ns, or a calendar unit M, Q, Y (months of any
                length are one month).
            origin: the date of time 0; default the first.
            dtype: of values and inputs; default torch's (pandas knows little else than float64).

        Returns:
            Shapes `(time, obs)`, or `(series, time, obs)` in long form.

        Raises:
            TypeError: for columns that are not numbers, and a time index that is neither dates nor numbers.
            ValueError: for unknown columns or units.

        Example:
            >>> import pandas as pd
            >>> from pyro_ssm.data import TimeSeries
            >>> frame = pd.DataFrame({"who": ["a", "a", "b"], "t": [0, 2, 1], "x": [1.0, 2.0, 3.0]})
            >>> data = TimeSeries.from_pandas(frame, time="t", series="who")
            >>> data.coords["series"].tolist(), data.lengths.tolist(), data.times.tolist()
            (['a', 'b'], [2, 1], [[0.0, 2.0], [1.0, 2.0]])
        """
        return cls(**frame_fields(frame, values, inputs, time, series, unit, origin, dtype))

    @classmethod
    def from_xarray(
        cls,
        data: Any,
        time: str = "time",
        series: str | None = None,
        obs: str | None = None,
        inputs: Any = None,
        unit: str = "D",
        origin: Any = None,
        dtype: torch.dtype | None = None,
    ) -> TimeSeries:
        """Reads an xarray DataArray, or a Dataset whose variables are the observed coordinates.

        Args:
            data: the array or data set.
            time: the dim of time; its coordinate holds dates or numbers (default 0, 1, 2, ...).
            series: the dim that runs over series, if any.
            obs: the dim that runs over observed coordinates of a DataArray; default: one coordinate.
            inputs: variables of a Dataset that are inputs.
            unit: as in `from_pandas`.
            origin: as in `from_pandas`.
            dtype: as in `from_pandas`.

        Returns:
            Shapes `(time, obs)`, or `(series, time, obs)`.

        Raises:
            TypeError: if `data` is neither.
            ValueError: if a dim is not named.

        Example:
            >>> import numpy as np, xarray as xr
            >>> from pyro_ssm.data import TimeSeries
            >>> array = xr.DataArray(np.ones((2, 3)), dims=("site", "time"), coords={"site": ["a", "b"]}, name="level")
            >>> data = TimeSeries.from_xarray(array, series="site")
            >>> data.batch_shape, data.coords["obs"].tolist()
            (torch.Size([2]), ['level'])
        """
        return cls(**xarray_fields(data, time, series, obs, inputs, unit, origin, dtype))

    # -- of entries -------------------------------------------------------------------------------------------------

    def hide(self, where: Any) -> TimeSeries:
        """Hides further entries, as for held-out scores.

        Args:
            where: booleans that broadcast to the shape of `values`, True = hide.

        Returns:
            The series with those entries missing.

        Raises:
            TypeError: if `where` is not boolean.
            ValueError: if there are no values, or the shape does not fit.

        Example:
            >>> import torch
            >>> from pyro_ssm.data import TimeSeries
            >>> data = TimeSeries([0.0, 1.0], [[1.0], [2.0]]).hide(torch.tensor([[False], [True]]))
            >>> data.values[:, 0].tolist(), data.mask[:, 0].tolist()
            ([1.0, 0.0], [True, False])
        """
        if self.values is None or self.mask is None:
            raise ValueError("`hide` needs a series with values, and this one has none.")
        where = as_bool("where", where, "True = hide").to(self.device)
        try:
            where = where.expand(self.values.shape)
        except RuntimeError:
            raise ValueError(
                f"`where` has shape {shape_of(where)}, but that of `values`, {shape_of(self.values)}, is wanted."
            ) from None
        mask = self.mask & ~where
        return self._derive(values=torch.where(mask, self.values, torch.zeros_like(self.values)), mask=mask)

    def without_values(self) -> TimeSeries:
        """The same times and inputs with nothing seen, for simulation from the prior.

        Returns:
            A series of the same batch shape, values and mask None.

        Example:
            >>> from pyro_ssm.data import TimeSeries
            >>> TimeSeries([0.0, 1.0], [[1.0], [2.0]]).without_values()
            TimeSeries(times=2, no values)
        """
        return self._derive(values=None, mask=None)

    def replace(self, **changes: Any) -> TimeSeries:
        """A copy with other fields, checked together (but a series may be without observed entries).

        New values bring their own mask; without one, all that is not NaN is observed.

        Args:
            **changes: arguments of the constructor.

        Returns:
            The changed series.

        Raises:
            TypeError: for an unknown field.
            ValueError: as the constructor.

        Example:
            >>> from pyro_ssm.data import TimeSeries
            >>> TimeSeries([0.0, 1.0], [[1.0], [2.0]]).replace(times=[0.0, 0.5]).times.tolist()
            [0.0, 0.5]
        """
        unknown = sorted(set(changes) - set(GIVEN))
        if unknown:
            raise TypeError(f"`replace` got {unknown}, but the fields are {list(GIVEN)}.")
        fields = {name: changes[name] if name in changes else getattr(self, name) for name in GIVEN}
        if "values" in changes and "mask" not in changes:
            fields["mask"] = None
        return self._derive(**checked_fields(**fields, batch_shape=self.batch_shape, require_observed=False))

    # -- where it lives ---------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TimeSeries:
        """Moves all tensors to a device, and values and inputs to a dtype; times stay float64.

        Args:
            device: default: stay.
            dtype: a floating dtype; default: keep.

        Returns:
            The moved series.

        Raises:
            TypeError: if `dtype` is not floating.

        Example:
            >>> import torch
            >>> from pyro_ssm.data import TimeSeries
            >>> data = TimeSeries([0.0, 1.0], [[1.0], [2.0]]).to(dtype=torch.float64)
            >>> data.values.dtype, data.times.dtype
            (torch.float64, torch.float64)
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"`dtype` is {dtype}, but a floating one is wanted: missing entries and networks need it.")
        moved: dict[str, Tensor | None] = {}
        for name in ("times", "mask", "lengths", "index", "observed_index"):
            x = getattr(self, name)
            moved[name] = None if x is None else x.to(device=device)
        for name in ("values", "inputs"):
            x = getattr(self, name)
            moved[name] = None if x is None else x.to(device=device, dtype=dtype)
        return self._derive(**moved)

    def pin_memory(self) -> TimeSeries:
        """Page-locked copies of all tensors, for fast transfer to a GPU (called by `DataLoader(pin_memory=True)`).

        Returns:
            The pinned series.

        Example:
            >>> import torch
            >>> from pyro_ssm.data import TimeSeries
            >>> data = TimeSeries([0.0, 1.0], [[1.0], [2.0]])
            >>> pinned = data.pin_memory() if torch.cuda.is_available() else data
            >>> pinned.num_times
            2
        """
        names = ("times", "values", "mask", "inputs", "lengths", "index", "observed_index")
        tensors = {name: getattr(self, name) for name in names}
        return self._derive(**{name: None if x is None else x.pin_memory() for name, x in tensors.items()})

    def __repr__(self) -> str:
        parts = [f"batch={tuple(self.batch_shape)}"] if self.batch_shape else []
        parts.append(f"times={self.num_times}")
        if self.values is None or self.mask is None:
            parts.append("no values")
        else:
            real = int(self.observed_step_mask.sum()) * self.obs_dim
            parts += [f"obs={self.obs_dim}", f"observed={100 * int(self.mask.sum()) / max(real, 1):.1f}%"]
        if self.input_dim:
            parts.append(f"inputs={self.input_dim}")
        if self.lengths is not None and self.is_ragged:
            parts.append(f"lengths={int(self.lengths.min())}..{int(self.lengths.max())}")
        if self.has_own_times:
            parts.append("own grids")
        if self.observed_index is not None:
            parts.append(f"observed times={self.num_observed_times}")
        if self.total is not None:
            parts.append(f"of {self.total}")
        return f"TimeSeries({', '.join(parts)})"
