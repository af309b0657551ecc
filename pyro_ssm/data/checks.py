"""What the `TimeSeries` constructor accepts, and what it says to the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_ssm.data.padding import continue_times, step_mask
from pyro_ssm.data.record import series_name

COORDS = ("series", "obs", "input", "time")


def shape_of(x: Tensor | np.ndarray) -> str:
    """The shape as errors write it."""
    return str(tuple(x.shape))


def as_tensor(name: str, x: Any, way_out: str = "Convert it to numbers first.") -> Tensor:
    """A tensor of any dtype from a tensor, an array or nested lists; masked arrays and odd dtypes are settled here."""
    if isinstance(x, Tensor):
        return x
    plain = isinstance(x, (list, tuple, int, float))
    if isinstance(x, np.ma.MaskedArray):  # np.asarray would silently uncover what was masked
        x = np.ma.filled(x.astype(np.promote_types(x.dtype, np.float32)), np.nan)
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise ValueError(
            f"`{name}` is not rectangular ({error}). For sequences of unequal length use `TimeSeries.from_sequences`."
        ) from None
    if array.dtype.kind not in "fiub":
        raise TypeError(f"`{name}` has dtype {array.dtype}, but real numbers are wanted. {way_out}")
    if array.dtype == np.longdouble and array.dtype != np.float64:
        array = array.astype(np.float64)
    tensor = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    return tensor.to(torch.get_default_dtype()) if plain and tensor.is_floating_point() else tensor


def as_floating(name: str, x: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A real floating tensor: integers and booleans take the default dtype, floats keep theirs unless one is given."""
    tensor = as_tensor(
        name,
        x,
        "Objects (None, strings, mixed columns) become numbers by e.g. `numpy.asarray(x, dtype=float)`; missing is "
        "NaN.",
    )
    if tensor.is_complex():
        raise TypeError(
            f"`{name}` has dtype {tensor.dtype}, but real numbers are wanted. Stack its real and imaginary parts."
        )
    if dtype is None:
        dtype = tensor.dtype if tensor.is_floating_point() else torch.get_default_dtype()
    return tensor.to(dtype)


def as_times(name: str, x: Any) -> Tensor:
    """Float64 times; dates are refused with the way out."""
    if not isinstance(x, Tensor):
        x = np.asarray(x)  # lists must not pass through the default float32
    tensor = as_tensor(
        name,
        x,
        "Times are numbers: for dates use `TimeSeries.from_pandas`, which turns them into float64 and keeps them in "
        "`coords`.",
    )
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"`{name}` has dtype {tensor.dtype}, but real numbers are wanted.")
    return tensor.to(torch.float64)


def as_index(name: str, x: Any) -> Tensor:
    """Int64 positions or lengths; nothing is rounded."""
    tensor = as_tensor(name, np.asarray(x) if not isinstance(x, Tensor) else x, "Give integers.")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"`{name}` has dtype {tensor.dtype}, but integers are wanted.")
    return tensor.to(torch.int64)


def as_bool(name: str, x: Any, meaning: str) -> Tensor:
    """Booleans; numbers are refused, because 0.3 is neither."""
    tensor = as_tensor(name, x, f"Give booleans, {meaning}.")
    if tensor.dtype != torch.bool:
        raise TypeError(
            f"`{name}` has dtype {tensor.dtype}, but booleans are wanted ({meaning}). Convert it with `!= 0`."
        )
    return tensor


def broadcast_batch(name: str, tensor: Tensor, batch: torch.Size, num_event_dims: int) -> Tensor:
    """Expands the batch dims of `tensor`, or says why they do not fit."""
    split = tensor.dim() - num_event_dims
    try:
        return tensor.expand(batch + tensor.shape[split:])
    except RuntimeError:
        raise ValueError(
            f"`{name}` has shape {shape_of(tensor)}, whose batch part {tuple(tensor.shape[:split])} does not fit the "
            "batch shape "
            f"{tuple(batch)} of the data. Leave its batch dims out (shared by all series) or make them equal."
        ) from None


def first_true(where: Tensor) -> tuple[int, ...]:
    """Position of the first True."""
    return tuple(where.nonzero()[0].tolist())


def check_times(times: Tensor, lengths: Tensor | None, name_of: Any) -> Tensor:
    """Finite and strictly increasing at real steps; padded times go on increasing."""
    num_times = times.shape[-1]
    if lengths is None:
        real = torch.ones_like(times, dtype=torch.bool)
    else:
        real = step_mask(lengths if times.dim() > 1 else lengths.max(), num_times).expand(times.shape)
    broken = real & ~times.isfinite()
    if broken.any():
        where = first_true(broken)
        raise ValueError(
            f"`times` must be finite, but {name_of(where[:-1])} has {times[where].item()} at step {where[-1]}. "
            "Drop the step, or shorten `lengths` if it is padding."
        )
    broken = real[..., 1:] & (times.diff(dim=-1) <= 0)
    if broken.any():
        where = first_true(broken)
        k = where[-1]
        here, following = times[where[:-1]][k].item(), times[where[:-1]][k + 1].item()
        raise ValueError(
            f"`times` must be strictly increasing, but {name_of(where[:-1])} has times[{k}] = {here:g} and "
            f"times[{k + 1}] = {following:g}. Sort by time, and merge or drop repeated times."
        )
    return times if lengths is None else continue_times(times, lengths)


def check_coords(coords: Any, sizes: Mapping[str, int | None], times_shape: torch.Size) -> dict[str, np.ndarray]:
    """Known names of the right length. A size of None is not checked (the axis is not there yet)."""
    if coords is None:
        return {}
    if not isinstance(coords, Mapping):
        raise TypeError(f"`coords` is a {type(coords).__name__}, but a dict is wanted, with keys among {COORDS}.")
    checked = {}
    for key, labels in coords.items():
        if key not in COORDS:
            raise ValueError(f"`coords` has the unknown entry {key!r}; the entries are {COORDS}.")
        array = np.asarray(labels)
        if array.dtype.kind == "U":
            array = array.astype(object)  # fixed-width strings would cut longer names when arrays are joined
        wanted = [tuple(times_shape), (times_shape[-1],)] if key == "time" else [(sizes[key],)]
        if (key != "time" and sizes[key] is None and array.ndim == 1) or array.shape in wanted:
            checked[key] = array
            continue
        if key == "series" and sizes[key] == 0:
            raise ValueError(
                "`coords['series']` names series, but the data has no batch dim: there is one series without a name."
            )
        raise ValueError(
            f"`coords[{key!r}]` has shape {array.shape}, but {' or '.join(dict.fromkeys(map(str, wanted)))} is "
            "wanted: one label per entry of that axis."
        )
    return checked


def checked_fields(
    times: Any,
    values: Any,
    mask: Any,
    inputs: Any,
    lengths: Any,
    coords: Any,
    total: Any,
    index: Any,
    observed_index: Any,
    *,
    batch_shape: tuple[int, ...] = (),
    require_observed: bool = True,
) -> dict[str, Any]:
    """All fields of a `Record`, consistent, from what a user gave.

    `batch_shape` is a lower bound, used where no values tell it. `require_observed` refuses series with no observed
    entry.
    """
    times = as_times("times", times)
    if times.dim() == 0 or times.shape[-1] == 0:
        raise ValueError(
            f"`times` has shape {shape_of(times)}, but (time,) or (*batch, time) with at least one time is wanted."
        )
    num_times = times.shape[-1]

    if observed_index is not None:
        observed_index = check_observed_index(as_index("observed_index", observed_index), num_times)
    num_observed = num_times if observed_index is None else len(observed_index)

    values = None if values is None else check_values_shape(as_floating("values", values), num_observed)
    inputs = None if inputs is None else check_inputs_shape(inputs, values, num_times)
    lengths = None if lengths is None else check_lengths_range(as_index("lengths", lengths), num_times)

    # One batch shape and one device for all.
    if values is not None:
        batch, device = values.shape[:-2], values.device
    else:
        device = times.device
        parts = [batch_shape, times.shape[:-1]]
        parts += [] if inputs is None else [inputs.shape[:-2]]
        parts += [] if lengths is None else [lengths.shape]
        try:
            batch = torch.broadcast_shapes(*parts)
        except RuntimeError:
            raise ValueError(
                f"The batch shapes of `times`, `inputs` and `lengths` do not agree: {list(map(tuple, parts[1:]))}."
            ) from None
    if 0 in batch:
        raise ValueError(f"The data has batch shape {tuple(batch)}: there is no series in it. Give at least one.")
    times = times.to(device).clone()  # the series is immutable: it shares no memory with what was given
    times = broadcast_batch("times", times, batch, 1) if times.dim() > 1 else times
    observed_index = None if observed_index is None else observed_index.to(device)
    lengths = None if lengths is None else broadcast_batch("lengths", lengths.to(device).clone(), batch, 0)
    inputs = None if inputs is None else broadcast_batch("inputs", inputs.to(device).clone(), batch, 2)

    sizes = {
        "series": batch[-1] if batch else 0,
        "obs": None if values is None else values.shape[-1],
        "input": 0 if inputs is None else inputs.shape[-1],
    }
    coords = check_coords(coords, sizes, times.shape)

    def name_of(position: tuple[int, ...]) -> str:
        return series_name(position, coords)

    times = check_times(times, lengths, name_of)
    steps = None if lengths is None else step_mask(lengths, num_times)
    if inputs is not None:
        inputs = check_inputs(inputs, steps, name_of)
    if values is None:
        if mask is not None:
            raise ValueError(
                "`mask` was given without `values`; a mask says which values were observed. Give both, or neither."
            )
    else:
        observed_steps = steps if steps is None or observed_index is None else steps[..., observed_index]
        values, mask = hide_missing(values, mask, observed_steps, name_of, require_observed)
    total, index = check_subsample(total, index, batch, device)
    return {
        "times": times, "values": values, "mask": mask, "inputs": inputs, "lengths": lengths, "coords": coords,
        "total": total, "index": index, "observed_index": observed_index, "batch_shape": torch.Size(batch),
    }  # fmt: skip


def check_observed_index(index: Tensor, num_times: int) -> Tensor:
    """Increasing positions in the time axis."""
    good = index.dim() == 1 and len(index) > 0 and bool((index.diff() > 0).all())
    if not good or not 0 <= int(index[0]) <= int(index[-1]) < num_times:
        raise ValueError(
            f"`observed_index` is {index.tolist()}, but increasing positions in `times` (0 to {num_times - 1}) are "
            "wanted, at least one."
        )
    return index


def check_values_shape(values: Tensor, num_observed: int) -> Tensor:
    """`(*batch, observed time, obs)`."""
    if values.dim() == 1:
        raise ValueError(
            f"`values` has shape {shape_of(values)}, but (*batch, time, obs) is wanted. For one coordinate give "
            "`values[:, None]`."
        )
    if values.dim() == 0 or values.shape[-1] == 0:
        raise ValueError(
            f"`values` has shape {shape_of(values)}, but (*batch, time, obs) with at least one coordinate is wanted."
        )
    if values.shape[-2] != num_observed:
        raise ValueError(
            f"`values` has shape {shape_of(values)}, so {values.shape[-2]} steps (dimension -2), but there are "
            f"{num_observed} observed times. "
            "The shape is (*batch, time, obs)."
        )
    return values


def check_inputs_shape(inputs: Any, values: Tensor | None, num_times: int) -> Tensor:
    """`(*batch, time, input)`, in the dtype of the values."""
    inputs = as_floating("inputs", inputs, None if values is None else values.dtype)
    if inputs.dim() == 1:
        raise ValueError(
            f"`inputs` has shape {shape_of(inputs)}, but (*batch, time, input) is wanted. For one input give "
            "`inputs[:, None]`."
        )
    if inputs.dim() == 0 or inputs.shape[-1] == 0 or inputs.shape[-2] != num_times:
        raise ValueError(
            f"`inputs` has shape {shape_of(inputs)}, but (*batch, time, input) or (time, input) with {num_times} "
            "times is wanted: "
            "inputs[k] holds on [times[k], times[k + 1])."
        )
    return inputs


def check_lengths_range(lengths: Tensor, num_times: int) -> Tensor:
    """Each length in 1 to the number of times."""
    if lengths.numel() and not 1 <= int(lengths.min()) <= int(lengths.max()) <= num_times:
        raise ValueError(
            f"`lengths` runs from {int(lengths.min())} to {int(lengths.max())}, but must lie in 1 to {num_times} (the "
            "number of times). "
            "Drop empty series."
        )
    return lengths


def check_inputs(inputs: Tensor, steps: Tensor | None, name_of: Any) -> Tensor:
    """Finite at real steps, 0 at padding."""
    broken = ~inputs.isfinite()
    if steps is not None:
        broken = broken & steps.unsqueeze(-1)
    if broken.any():
        where = first_true(broken)
        raise ValueError(
            f"`inputs` must be finite, but {name_of(where[:-2])} has {inputs[where].item()} at step {where[-2]}, "
            f"input {where[-1]}. "
            "Inputs cannot be missing: fill them (forward fill, mean) and, if it matters, add an indicator as one "
            "more input."
        )
    return inputs if steps is None else torch.where(steps.unsqueeze(-1), inputs, torch.zeros_like(inputs))


def hide_missing(
    values: Tensor, mask: Any, steps: Tensor | None, name_of: Any, require_observed: bool
) -> tuple[Tensor, Tensor]:
    """The one place where NaN becomes a mask."""
    observed = ~values.isnan()
    if mask is not None:
        mask = as_bool("mask", mask, "True = observed").to(values.device)
        if mask.shape != values.shape:
            raise ValueError(
                f"`mask` has shape {shape_of(mask)}, but that of `values`, {shape_of(values)}, is wanted: one entry "
                "each. "
                "A mask of whole steps is given as `mask[..., None].expand(values.shape)`."
            )
        observed = observed & mask
    if steps is not None:
        observed = observed & steps.unsqueeze(-1)
    broken = observed & values.isinf()
    if broken.any():
        where = first_true(broken)
        raise ValueError(
            f"`values` must be finite or NaN (missing), but {name_of(where[:-2])} has {values[where].item()} at step "
            f"{where[-2]}, "
            f"coordinate {where[-1]}. If it means missing, make it NaN."
        )
    if require_observed:
        empty = ~observed.flatten(-2).any(-1)
        if empty.any():
            where = first_true(empty) if empty.dim() else ()
            raise ValueError(
                f"`values` has no observed entry in {name_of(where)} ({int(empty.sum())} such series in all): every "
                "entry is NaN or masked. "
                "Drop the series; for simulation from the prior give no values at all."
            )
    return torch.where(observed, values, torch.zeros_like(values)), observed


def check_subsample(
    total: Any, index: Any, batch: torch.Size, device: torch.device
) -> tuple[int | None, Tensor | None]:
    """Total and index of a mini-batch, both or neither."""
    if total is None and index is None:
        return None, None
    if total is None or index is None:
        raise ValueError(
            "`total` and `index` describe a mini-batch together; give both or neither (`TimeSeries.minibatch` does)."
        )
    if not batch:
        raise ValueError("`total` and `index` describe a mini-batch of series, but the data has no batch dim.")
    index = as_index("index", index).to(device).clone()
    if index.shape != batch[-1:]:
        raise ValueError(f"`index` has shape {shape_of(index)}, but ({batch[-1]},) is wanted: one position per series.")
    if isinstance(total, bool) or not isinstance(total, int) or not 0 <= int(index.min()) <= int(index.max()) < total:
        raise ValueError(
            f"`index` runs from {int(index.min())} to {int(index.max())}, which does not lie in 0 to `total` - 1 with "
            f"total = {total!r}."
        )
    return total, index
