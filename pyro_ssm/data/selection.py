"""Some series out of many: mini-batches, and one series alone."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyro_ssm.data.checks import as_index, shape_of
from pyro_ssm.data.record import Record

R = TypeVar("R", bound=Record)


def minibatch(data: R, index: Any, number: int) -> R:
    """See `TimeSeries.minibatch`."""
    index = as_index("index", index)
    if index.dim() != 1 or len(index) == 0:
        raise ValueError(f"`index` has shape {shape_of(index)}, but (b,) with at least one position is wanted.")
    if not 0 <= int(index.min()) <= int(index.max()) < number:
        raise ValueError(
            f"`index` runs from {int(index.min())} to {int(index.max())}, but must lie in 0 to {number - 1}."
        )
    positions = index.to(data.device)

    def pick(x: Tensor | None, num_event_dims: int) -> Tensor | None:
        return None if x is None else x.index_select(x.dim() - num_event_dims - 1, positions)

    coords = dict(data.coords)
    kept = positions.cpu().numpy()
    if "series" in coords:
        coords["series"] = coords["series"][kept]
    if "time" in coords and coords["time"].ndim > 1:
        coords["time"] = coords["time"][..., kept, :]
    total, inside = (number, positions) if data.index is None else (data.total, data.index[positions])
    return data._derive(
        times=pick(data.times, 1) if data.has_own_times else data.times,
        values=pick(data.values, 2),
        mask=pick(data.mask, 2),
        inputs=pick(data.inputs, 2),
        lengths=pick(data.lengths, 0),
        coords=coords,
        total=total,
        index=inside,
        batch_shape=data.batch_shape[:-1] + (len(positions),),
    )


def one_series(data: R, i: Any, number: int) -> R:
    """See `TimeSeries.series`."""
    position = position_of(data, i, number)
    length = data.num_times if data.lengths is None else int(data.lengths[position])
    coords = {key: labels for key, labels in data.coords.items() if key != "series"}
    if "time" in coords:
        labels = coords["time"][position] if coords["time"].ndim > 1 else coords["time"]
        coords["time"] = labels[:length]
    observed_index = data.observed_index
    if observed_index is not None:
        observed_index = observed_index[observed_index < length]
    observed = length if observed_index is None else len(observed_index)

    def pick(x: Tensor | None, size: int) -> Tensor | None:
        return None if x is None else x[position][:size]

    return data._derive(
        times=(data.times[position] if data.has_own_times else data.times)[:length],
        values=pick(data.values, observed),
        mask=pick(data.mask, observed),
        inputs=pick(data.inputs, length),
        lengths=None,
        coords=coords,
        total=None,
        index=None,
        observed_index=observed_index,
        batch_shape=torch.Size(),
    )


def position_of(data: Record, i: Any, number: int) -> tuple[int, ...]:
    """Position in the batch of a series that is given by position or by name."""
    if isinstance(i, tuple):
        position = i
    elif isinstance(i, (int, np.integer)):
        position = (int(i),)
    else:
        names = data.coords.get("series")
        found = [] if names is None else np.flatnonzero(names == i).tolist()
        if len(found) != 1:
            raise ValueError(
                f"`i` is {i!r}, which names {len(found)} of the {number} series. Give a position, or a name in "
                "`coords['series']`."
            )
        position = (found[0],)
    batch = data.batch_shape
    if len(position) != len(batch) or any(not 0 <= p < n for p, n in zip(position, batch, strict=True)):
        raise ValueError(f"`i` is {i!r}, but a position in the batch shape {tuple(batch)} is wanted.")
    return position
