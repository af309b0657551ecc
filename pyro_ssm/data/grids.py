"""Derivations along time: split, extend, refine, thin. Functions of a record; nothing here checks values again."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyro_ssm.data.checks import as_floating, as_times, broadcast_batch, first_true, shape_of
from pyro_ssm.data.dates import as_date, as_dates, dates_to_times, interpolate_labels, is_dates, times_to_dates, unit_of
from pyro_ssm.data.padding import continue_times, step_mask
from pyro_ssm.data.record import Record

R = TypeVar("R", bound=Record)


def full_lengths(data: Record) -> Tensor:
    """Lengths `(*batch,)`, also where the record has none."""
    if data.lengths is not None:
        return data.lengths
    return torch.full(data.batch_shape, data.num_times, device=data.device)


def with_time_labels(data: Record, labels: np.ndarray | None) -> dict[str, np.ndarray]:
    """The coords with other labels of time, or without any."""
    coords = {key: value for key, value in data.coords.items() if key != "time"}
    return coords if labels is None else {**coords, "time": labels}


def take_steps(x: Tensor, steps: Tensor, num_event_dims: int) -> Tensor:
    """x `(*batch, time, *event)` at `steps` `(*batch, n)`."""
    index = steps.reshape(steps.shape + (1,) * num_event_dims).expand(steps.shape + x.shape[x.dim() - num_event_dims :])
    return x.gather(steps.dim() - 1, index)


def repadded(data: R, lengths: Tensor) -> R:
    """The record with (shorter) lengths, its padding cleaned; observed at every time."""
    steps = step_mask(lengths, data.num_times)
    clean = {
        name: None if x is None else torch.where(steps.unsqueeze(-1), x, torch.zeros_like(x))
        for name, x in (("values", data.values), ("mask", data.mask), ("inputs", data.inputs))
    }
    labels = data.coords.get("time")
    if labels is not None and labels.ndim > 1 and is_dates(labels):
        labels = np.where(steps.cpu().numpy(), labels, np.datetime64("NaT"))
    return data._derive(
        times=continue_times(data.times, lengths), lengths=lengths, coords=with_time_labels(data, labels), **clean
    )


def window(data: R, start: int, stop: int) -> R:
    """Steps start to stop, the same for all series; every length reaches beyond `start`."""
    positions, observed = slice(start, stop), slice(start, stop)
    observed_index = data.observed_index
    if observed_index is not None:
        first, last = torch.searchsorted(observed_index, torch.tensor([start, stop], device=data.device)).tolist()
        if first == last:
            raise ValueError(
                f"Steps {start} to {stop} of the refined series hold no time that carries values. "
                "Split first, refine the parts afterwards."
            )
        observed = slice(first, last)
        observed_index = observed_index[observed] - start
    lengths = None if data.lengths is None else (data.lengths - start).clamp(max=stop - start)
    labels = data.coords.get("time")
    return data._derive(
        times=data.times[..., positions],
        values=None if data.values is None else data.values[..., observed, :],
        mask=None if data.mask is None else data.mask[..., observed, :],
        inputs=None if data.inputs is None else data.inputs[..., positions, :],
        lengths=lengths,
        observed_index=observed_index,
        coords=with_time_labels(data, None if labels is None else labels[..., positions]),
    )


def trim(data: R) -> R:
    """See `TimeSeries.trim`."""
    longest = data.num_times if data.lengths is None else int(data.lengths.max())
    return data if longest == data.num_times else window(data, 0, longest)


def steps_before(data: Record, at: Any) -> tuple[Tensor, str]:
    """Number of real steps before `at`, `(*batch,)`, and how to name `at` in an error."""
    if isinstance(at, Tensor) and at.dim() == 0:
        at = at.item()
    if isinstance(at, bool):
        raise TypeError("`at` is a bool, but a step (int), a time (float) or a date is wanted.")
    if isinstance(at, Integral):
        return torch.full(data.batch_shape, int(at), device=data.device), f"step {int(at)}"
    if isinstance(at, Real):
        before = (data.times < float(at)) & data.step_mask
        return before.sum(-1), f"time {float(at):g}"
    try:
        date = as_date(at)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`at` is {at!r}, but a step (int), a time (float) or a date is wanted ({error}).") from None
    labels = data.coords.get("time")
    if labels is None or not is_dates(labels):
        raise ValueError(
            f"`at` is the date {at!r}, but the series has no dates. Give a step (int) or a time (float), or build the "
            "series with "
            "`TimeSeries.from_pandas`, or with `coords={'time': dates}`."
        )
    before = torch.from_numpy(labels < date).to(data.device) & data.step_mask
    return before.sum(-1), f"date {date.astype('datetime64[s]')}"


def split(data: R, at: Any) -> tuple[R, R]:
    """See `TimeSeries.split`."""
    counts, name = steps_before(data, at)
    lengths = full_lengths(data)
    bad = (counts < 1) | (counts >= lengths)
    if bad.any():
        where = first_true(bad) if bad.dim() else ()
        raise ValueError(
            f"`at` = {name} leaves {data._series_name(where)}, which has {lengths[where].item()} steps, with nothing "
            f"{'before' if counts[where] < 1 else 'after'}. Choose another place, or keep only the series that have "
            "both."
        )
    if bool((counts == counts.flatten()[0]).all()):
        at = int(counts.flatten()[0])
        before, after = window(data, 0, at), window(data, at, int(lengths.max()))
        return before._derive(lengths=None), after
    if data.observed_index is not None:
        raise ValueError(
            f"`at` = {name} falls on different steps of a refined series with own time grids. Split first, refine the "
            "parts afterwards."
        )
    before = repadded(window(data, 0, int(counts.max())), counts)
    remaining = lengths - counts
    steps = counts.unsqueeze(-1) + torch.arange(int(remaining.max()), device=data.device)
    steps = steps.clamp(max=data.num_times - 1)
    labels = data.coords.get("time")
    labels = np.take_along_axis(labels, steps.cpu().numpy(), -1) if labels is not None and labels.ndim > 1 else None
    after = data._derive(
        times=take_steps(data.times, steps, 0),
        values=None if data.values is None else take_steps(data.values, steps, 1),
        mask=None if data.mask is None else take_steps(data.mask, steps, 1),
        inputs=None if data.inputs is None else take_steps(data.inputs, steps, 1),
        coords=with_time_labels(data, labels),
    )
    return before, repadded(after, remaining)


def clock(data: Record) -> tuple[str, np.datetime64, float] | None:
    """Unit, a date and its time, if `times` count the dates in `coords`."""
    labels = data.coords.get("time")
    if labels is None or not is_dates(labels) or labels.shape != tuple(data.times.shape):
        return None
    real = ~np.isnat(labels)
    if data.lengths is not None:
        steps = step_mask(data.lengths if labels.ndim > 1 else data.lengths.max(), data.num_times)
        real &= steps.expand(data.times.shape).cpu().numpy()
    dates, times = labels[real], data.times.cpu().numpy()[real]
    unit = unit_of(dates, times)
    return None if unit is None else (unit, dates[0], float(times[0]))


def new_times(data: Record, times: Any) -> Tensor:
    """The times to append as float64, `(n,)` or `(*batch, n)`, from numbers or dates."""
    dates = not isinstance(times, Tensor) and np.asarray(times).dtype.kind in "MOU"
    if dates:
        counted = clock(data)
        if counted is None:
            raise ValueError(
                "`times` holds dates, but the times of the series do not count dates in one unit. Give float times, "
                "or build the series with `TimeSeries.from_pandas`."
            )
        unit, date, time = counted
        times = time + dates_to_times(as_dates(times), unit, date)
    times = as_times("times", times).to(data.device)
    if times.dim() == 0 or times.shape[-1] == 0:
        raise ValueError(
            f"`times` has shape {shape_of(times)}, but (n,) or (*batch, n) with at least one new time is wanted."
        )
    if times.dim() > 1:
        times = broadcast_batch("times", times, data.batch_shape, 1)
    last = data.times.expand(data.batch_shape + (data.num_times,)).gather(-1, (full_lengths(data) - 1).unsqueeze(-1))
    if not bool(times.isfinite().all()):
        raise ValueError("`times` must be finite; drop what is NaN or infinite.")
    if bool((times.diff(dim=-1) <= 0).any()):
        raise ValueError("`times` must be strictly increasing. Sort the new times, and drop repeated ones.")
    late = (times[..., 0] > last[..., 0]).expand(data.batch_shape)
    if not bool(late.all()):
        where = first_true(~late) if late.dim() else ()
        first = times[..., 0].expand(data.batch_shape)[where].item()
        raise ValueError(
            f"`times` must be later than the last time of each series, but {data._series_name(where)} ends at "
            f"{last[..., 0][where].item():g} "
            f"and the first new time is {first:g}. Give later times; to look between observed times use `refine`."
        )
    return times


def new_inputs(data: Record, inputs: Any, n: int) -> Tensor | None:
    """Inputs of the appended times, `(*batch, n, input)`."""
    if data.inputs is None:
        if inputs is not None:
            raise ValueError(
                "`inputs` were given for the new times, but the series has none. Leave them out, or give inputs to "
                "both."
            )
        return None
    if inputs is None:
        raise ValueError(
            f"`inputs` are wanted for the {n} new times, because the series has inputs: shape ({n}, "
            f"{data.input_dim}), or one per series."
        )
    inputs = as_floating("inputs", inputs, data.dtype).to(data.device)
    if inputs.dim() < 2 or inputs.shape[-2:] != (n, data.input_dim):
        raise ValueError(
            f"`inputs` has shape {shape_of(inputs)}, but (*batch, {n}, {data.input_dim}) is wanted: the {n} new "
            "times, the inputs of the series."
        )
    if not bool(inputs.isfinite().all()):
        raise ValueError("`inputs` must be finite; fill what is missing.")
    return broadcast_batch("inputs", inputs, data.batch_shape, 2)


def extend(data: R, times: Any, inputs: Any) -> R:
    """See `TimeSeries.extend`."""
    times = new_times(data, times)
    n = times.shape[-1]
    inputs = new_inputs(data, inputs, n)
    lengths = full_lengths(data)
    own = data.has_own_times or times.dim() > 1 or data.is_ragged
    if data.is_ragged and data.observed_index is not None:
        raise ValueError("`extend` cannot append to a refined ragged series. Extend first, refine afterwards.")
    data = trim(data)
    longest = data.num_times

    def appended(old: Tensor, new: Tensor, num_event_dims: int) -> Tensor:
        # (*batch, longest, *event) and (*batch, n, *event): the new steps go right after each series' own end
        event = old.shape[old.dim() - num_event_dims :]
        room = torch.cat([old, old.new_zeros(new.shape)], dim=old.dim() - num_event_dims - 1)
        steps = lengths.unsqueeze(-1) + torch.arange(n, device=data.device)
        steps = steps.reshape(steps.shape + (1,) * num_event_dims).expand(steps.shape + event)
        return room.scatter(steps.dim() - num_event_dims - 1, steps, new)

    if own:
        old = data.times.expand(data.batch_shape + (longest,))
        all_times = continue_times(appended(old, times.expand(data.batch_shape + (n,)), 0), lengths + n)
    else:
        all_times = torch.cat([data.times, times])
    observed_index = data.observed_index
    if observed_index is not None:
        observed_index = torch.cat([observed_index, torch.arange(longest, longest + n, device=data.device)])
    values, mask = data.values, data.mask
    if values is not None and mask is not None:
        filler = values.new_zeros(data.batch_shape + (n, data.obs_dim))
        values, mask = torch.cat([values, filler], -2), torch.cat([mask, filler.bool()], -2)
    all_lengths = None if data.lengths is None else data.lengths + n
    return data._derive(
        times=all_times,
        values=values,
        mask=mask,
        inputs=None if data.inputs is None or inputs is None else appended(data.inputs, inputs, 1),
        lengths=all_lengths,
        observed_index=observed_index,
        coords=with_time_labels(data, extended_labels(data, all_times, all_lengths)),
    )


def extended_labels(data: Record, times: Tensor, lengths: Tensor | None) -> np.ndarray | None:
    """Dates of all times after an extension, where times count dates; else None."""
    counted = clock(data)
    if counted is None:
        return None
    unit, date, time = counted
    labels = times_to_dates(times.cpu().numpy() - time, unit, date)
    if lengths is None or labels.ndim == 1:
        return labels
    return np.where(step_mask(lengths, labels.shape[-1]).cpu().numpy(), labels, np.datetime64("NaT"))


def check_factor(n: Any) -> int:
    """A whole number of at least 1."""
    if isinstance(n, bool) or not isinstance(n, Integral) or n < 1:
        raise ValueError(f"`n` is {n!r}, but an integer of at least 1 is wanted.")
    return int(n)


def refine(data: R, n: int) -> R:
    """See `TimeSeries.refine`."""
    n = check_factor(n)
    if n == 1:
        return data
    left, right = data.times[..., :-1, None], data.times[..., 1:, None]
    part = torch.arange(n, device=data.device) / torch.tensor(n, dtype=torch.float64, device=data.device)
    times = torch.cat([(left + (right - left) * part).flatten(-2), data.times[..., -1:]], dim=-1)
    num_times = times.shape[-1]
    lengths = None if data.lengths is None else (data.lengths - 1) * n + 1
    inputs = data.inputs
    if inputs is not None:
        inputs = inputs.repeat_interleave(n, dim=-2)[..., :num_times, :]
        if lengths is not None:
            inputs = torch.where(step_mask(lengths, num_times).unsqueeze(-1), inputs, torch.zeros_like(inputs))
    coarse = (
        data.observed_index if data.observed_index is not None else torch.arange(data.num_times, device=data.device)
    )
    labels = data.coords.get("time")
    return data._derive(
        times=times,
        inputs=inputs,
        lengths=lengths,
        observed_index=coarse * n,
        coords=with_time_labels(data, None if labels is None else interpolate_labels(labels, n)),
    )


def thin(data: R, n: int) -> R:
    """See `TimeSeries.thin`."""
    n = check_factor(n)
    if n == 1:
        return data
    times = data.times[..., ::n]
    num_times = times.shape[-1]
    observed: slice | Tensor = slice(None, None, n)
    observed_index = None
    if data.observed_index is not None:
        observed = (data.observed_index % n == 0).nonzero()[:, 0]
        if len(observed) == 0:
            raise ValueError(
                f"`thin({n})` keeps none of the times that carry values. Choose another n, or thin before refining."
            )
        observed_index = data.observed_index[observed] // n
        if len(observed_index) == num_times:
            observed_index = None
    lengths = None if data.lengths is None else (data.lengths - 1) // n + 1
    labels = data.coords.get("time")
    return data._derive(
        times=times,
        values=None if data.values is None else data.values[..., observed, :],
        mask=None if data.mask is None else data.mask[..., observed, :],
        inputs=None if data.inputs is None else data.inputs[..., ::n, :],
        lengths=lengths,
        observed_index=observed_index,
        coords=with_time_labels(data, None if labels is None else labels[..., ::n]),
    )
