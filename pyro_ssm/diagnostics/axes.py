"""Names and labels of the axes of results: series, time with real dates, state, obs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_ssm.data import TimeSeries

__all__ = ["Axes"]


class Axes:
    """How tensors about one :class:`~pyro_ssm.data.TimeSeries` become labelled arrays.

    The last batch dim is ``series`` (others ``batch_0``, ...; a single series has none). ``time`` is labelled with the
    dates of the data where it has them, else with its times; where each series has its own grid, with 0, 1, 2, ...
    Everything lives at observation times, also on a refined grid.

    Args:
        data: gives shapes and labels.
        num_chains: by which draws are grouped.
        coords: labels that replace or add to those of the data, by name of dim.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.diagnostics.axes import Axes
    >>> axes = Axes(ssm.TimeSeries([0.0, 0.5], torch.zeros(3, 2, 1)))
    >>> axes.draws(torch.zeros(10, 3, 2, 4), ("time", "state")).dims
    ('chain', 'draw', 'series', 'time', 'state')
    """

    def __init__(self, data: TimeSeries, num_chains: int = 1, coords: Mapping[str, Any] | None = None) -> None:
        self.data, self.num_chains = data, num_chains
        number = len(data.batch_shape)
        self.batch_dims = tuple(f"batch_{i}" for i in range(number - 1)) + (("series",) if number else ())
        self.time_labels = _at_observations(data, data.coords.get("time"))
        self.labels: dict[str, np.ndarray] = {
            name: plain(labels) for name, labels in data.coords.items() if name in ("series", "obs", "input")
        }
        if data.index is not None and "series" not in self.labels:
            self.labels["series"] = data.index.cpu().numpy()
        if not data.has_own_times:
            labels = self.time_labels
            self.labels["time"] = data.observed_times.cpu().numpy() if labels is None else labels
        self.given = {name: plain(np.asarray(labels)) for name, labels in (coords or {}).items()}
        self.used: set[str] = set()

    def array(self, values: Any, dims: tuple[str, ...], labels: Mapping[str, Any] | None = None) -> xr.DataArray:
        """A labelled array; ``labels`` replace those of the data."""
        values = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        coords: dict[str, Any] = {}
        for dim, size in zip(dims, values.shape, strict=True):
            found = self.given.get(dim, {**self.labels, **(labels or {})}.get(dim))
            if dim in self.given:
                self.used.add(dim)
                if dim == "time" and labels is not None and "time" in labels:
                    found = labels["time"]  # labels that were given are those of the data, not of the future
            coords[dim] = np.arange(size) if found is None else found
            if len(coords[dim]) != size:
                raise ValueError(f"`coords` has {len(coords[dim])} labels of `{dim}`, but there are {size}")
        return xr.DataArray(values, coords, dims)

    def batched(self, values: Any, dims: tuple[str, ...], labels: Mapping[str, Any] | None = None) -> xr.DataArray:
        """``(*batch, ...)``, labelled; what lacks the batch dims does without them."""
        batch = self.batch_dims if values.ndim > len(dims) else ()
        return self.array(values, batch + dims, labels)

    def draws(self, values: Tensor, dims: tuple[str, ...], labels: Mapping[str, Any] | None = None) -> xr.DataArray:
        """``(S, *batch, ...)`` as ``(chain, draw, *batch, ...)``."""
        return self.array(self.by_chain(values), ("chain", "draw") + self.batch_dims + dims, labels)

    def parameter(self, name: str, values: Tensor) -> xr.DataArray:
        """``(S, *aligned plates, *event)``: a plate of size 1 is no dim, event dims are called ``name_dim_0``, ..."""
        number = len(self.batch_dims)
        plates = values.shape[1 : 1 + number]
        kept = [i for i in range(number) if plates[i] != 1]
        event = values.shape[1 + number :]
        values = values.reshape(values.shape[:1] + tuple(plates[i] for i in kept) + event)
        dims = tuple(self.batch_dims[i] for i in kept) + tuple(f"{name}_dim_{i}" for i in range(len(event)))
        return self.array(self.by_chain(values), ("chain", "draw") + dims)

    def by_chain(self, values: Tensor) -> Tensor:
        """``(S, ...)`` as ``(chain, draw, ...)``; one chain where the draws are not as many as the chains'."""
        chains = self.num_chains if values.shape[0] % self.num_chains == 0 else 1
        return values.reshape((chains, values.shape[0] // chains) + values.shape[1:])

    def check_given(self) -> None:
        """Raise if labels were given for a dim that no array has."""
        if unknown := sorted(set(self.given) - self.used):
            raise ValueError(f"`coords` has labels of {unknown}, which is no dim of these results")

    def future_labels(self, times: Tensor) -> tuple[Any, np.ndarray | None]:
        """Labels of the time axis of a forecast, and its dates ``(*batch, time)`` where each series has its own."""
        data = self.data
        grid = TimeSeries(data.times, lengths=data.lengths, coords=_only_time(data))
        dates = grid.extend(times).coords.get("time")
        if dates is None:
            return (times.cpu().numpy(), None) if times.dim() == 1 else (np.arange(times.shape[-1]), None)
        if dates.ndim == 1:
            return dates[-times.shape[-1] :], None
        length = torch.full(data.batch_shape, data.num_times) if data.lengths is None else data.lengths.cpu()
        new = length.unsqueeze(-1) + torch.arange(times.shape[-1])
        return np.arange(times.shape[-1]), np.take_along_axis(dates, new.numpy(), -1)


def plain(labels: np.ndarray) -> np.ndarray:
    """Labels that can be saved: objects become strings."""
    return labels.astype(str) if labels.dtype.kind == "O" else labels


def _only_time(data: TimeSeries) -> dict[str, np.ndarray]:
    return {"time": data.coords["time"]} if "time" in data.coords else {}


def _at_observations(data: TimeSeries, labels: np.ndarray | None) -> np.ndarray | None:
    if labels is None:
        return None
    return plain(labels if data.observed_index is None else labels[..., data.observed_index.cpu().numpy()])
