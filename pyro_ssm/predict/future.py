"""The times to come, as a model in step form needs them: where each series ends, and what drives each step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import gap
from pyro_ssm.data import TimeSeries

__all__ = ["Future", "future_of"]


class Future(NamedTuple):
    """Times after the end of each series, checked and aligned.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.predict.future import future_of
    >>> future = future_of(ssm.TimeSeries(torch.arange(4.0), torch.zeros(4, 1)), [3.5, 6.0], None)
    >>> [[time.item(), next_time.item()] for h in range(2) for time, next_time in future.legs(h)]
    [[3.0, 3.5], [3.5, 6.0]]
    """

    times: Tensor  # (H,) or (*batch, H), float64
    inputs: Tensor | None  # (*batch, H, input), holding from each of these times on
    last_index: Tensor  # (*batch,) the position of each series' last latent time
    last_time: Tensor  # (1,) or (*batch, 1)
    last_input: Tensor | None  # (*batch, 1, input), holding up to the first new time
    last_observed_time: Tensor  # (1,) or (*batch, 1): the time since which memory stands still
    parts: int  # steps in which a gap is crossed

    @property
    def num_times(self) -> int:
        """H."""
        return self.times.shape[-1]

    def last(self, states: Tensor) -> Tensor:
        """The last state of each series, ``(S, *batch, 1, state)``, of paths ``(S, *batch, time, state)``."""
        index = self.last_index[..., None, None].expand(states.shape[:-2] + (1, states.shape[-1]))
        return states.gather(-2, index)

    def legs(self, h: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The latent steps that lead to the new time ``h``."""
        start, stop = self._before(h, self.last_time), self.times[..., h : h + 1]
        marks = [start + (stop - start) * part / self.parts for part in range(self.parts)] + [stop]
        yield from zip(marks[:-1], marks[1:], strict=True)

    def input_before(self, h: int) -> Tensor | None:
        """What holds on the gap before the new time ``h``."""
        if self.inputs is None:
            return None
        return self.last_input if h == 0 else self.inputs[..., h - 1 : h, :]

    def inputs_at(self, steps: slice) -> Tensor | None:
        """What holds at the new times ``steps``."""
        return None if self.inputs is None else self.inputs[..., steps, :]

    def memory_gap(self, h: int, like: Tensor) -> Tensor:
        """The gap ``(..., 1, 1)`` since memory last saw something."""
        return gap(self._before(h, self.last_observed_time), self.times[..., h : h + 1], like)

    def _before(self, h: int, last: Tensor) -> Tensor:
        return last if h == 0 else self.times[..., h - 1 : h]


def future_of(data: TimeSeries, times: Any, inputs: Any) -> Future:
    """Check new times and inputs against ``data`` (as ``TimeSeries.extend``), and find where each series ends."""
    latent = data if data.observed_index is None else data.without_values().replace(observed_index=None)
    extended = latent.extend(times, inputs)
    batch, length = data.batch_shape, data.lengths
    if length is None:
        length = torch.full(batch, data.num_times, device=data.device)
    num_new = extended.num_times - int(length.max())
    new = length.unsqueeze(-1) + torch.arange(num_new, device=data.device)
    last = length - 1
    if extended.has_own_times:
        grid = data.times.expand(batch + (data.num_times,))
        new_times, last_time = extended.times.gather(-1, new), grid.gather(-1, last.unsqueeze(-1))
    else:
        new_times, last_time = extended.times[-num_new:], data.times[-1:]
    new_inputs = last_input = None
    if data.inputs is not None and extended.inputs is not None:
        width = (data.input_dim,)
        new_inputs = extended.inputs.gather(-2, new.unsqueeze(-1).expand(new.shape + width))
        last_input = data.inputs.gather(-2, last[..., None, None].expand(batch + (1,) + width))
    return Future(
        new_times, new_inputs, last, last_time, last_input, _last_observed_time(data, last, last_time), _parts(data)
    )


def _last_observed_time(data: TimeSeries, last: Tensor, last_time: Tensor) -> Tensor:
    if data.observed_index is None:
        return last_time
    seen = (data.observed_index <= last.unsqueeze(-1)).sum(-1, keepdim=True) - 1
    grid = data.observed_times.expand(data.batch_shape + (data.num_observed_times,))
    found = grid.gather(-1, seen)
    return found if last_time.dim() > 1 else found.reshape(-1, 1)[0]


def _parts(data: TimeSeries) -> int:
    """The factor of the refinement."""
    if data.observed_index is None or data.num_observed_times < 2:
        return 1
    return int(data.observed_index.diff().min())
