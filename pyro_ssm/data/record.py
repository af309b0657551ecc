"""The fields of a time series and what can be read off them; no checks and no verbs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_ssm.data.padding import step_mask

if TYPE_CHECKING:
    from typing_extensions import Self


def series_name(position: tuple[int, ...], coords: Mapping[str, np.ndarray]) -> str:
    """How an error names one series of the batch."""
    if not position:
        return "the series"
    names = coords.get("series")
    where = str(position[0]) if len(position) == 1 else str(position)
    return f"series {where}" if names is None else f"series {where} ({names[position[-1]]!r})"


@dataclass(frozen=True, eq=False, repr=False)
class Record:
    """Immutable fields of `TimeSeries`, already consistent."""

    times: Tensor  # (time,) or (*batch, time), float64
    values: Tensor | None  # (*batch, observed time, obs)
    mask: Tensor | None  # like values, bool
    inputs: Tensor | None  # (*batch, time, input)
    lengths: Tensor | None  # (*batch,), int64
    coords: Mapping[str, np.ndarray]
    total: int | None
    index: Tensor | None  # (b,), int64
    observed_index: Tensor | None  # (observed time,), int64
    batch_shape: torch.Size

    def _derive(self, **changes: Any) -> Self:
        """A copy with some fields exchanged and *nothing checked*: for derivations that are right by construction."""
        new = object.__new__(type(self))
        for field in fields(Record):
            value = changes[field.name] if field.name in changes else getattr(self, field.name)
            object.__setattr__(new, field.name, value)
        return new

    @property
    def num_times(self) -> int:
        """Size of the latent time axis, padding included."""
        return self.times.shape[-1]

    @property
    def num_observed_times(self) -> int:
        """Size of the time axis of `values`: `num_times`, unless the grid was refined."""
        return self.num_times if self.observed_index is None else len(self.observed_index)

    @property
    def obs_dim(self) -> int:
        """Number of observed coordinates; 0 without values."""
        return 0 if self.values is None else self.values.shape[-1]

    @property
    def input_dim(self) -> int:
        """Number of input (control) coordinates; 0 without inputs."""
        return 0 if self.inputs is None else self.inputs.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of values and inputs (times are always float64); torch's default where there is neither."""
        for tensor in (self.values, self.inputs):
            if tensor is not None:
                return tensor.dtype
        return torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """Where all tensors live."""
        return self.times.device

    @property
    def observed(self) -> Tensor | None:
        """The mask: True where an entry was observed (False at padding); None without values."""
        return self.mask

    @property
    def step_mask(self) -> Tensor:
        """True at real latent steps, False at padding, `(*batch, time)`."""
        if self.lengths is None:
            return torch.ones(self.batch_shape + (self.num_times,), dtype=torch.bool, device=self.device)
        return step_mask(self.lengths, self.num_times)

    @property
    def observed_times(self) -> Tensor:
        """The times at which `values` live, `(observed time,)` or `(*batch, observed time)`."""
        return self.times if self.observed_index is None else self.times[..., self.observed_index]

    @property
    def observed_step_mask(self) -> Tensor:
        """`step_mask` at the times of `values`, `(*batch, observed time)`."""
        return self.step_mask if self.observed_index is None else self.step_mask[..., self.observed_index]

    @property
    def is_ragged(self) -> bool:
        """Whether any series is shorter than the time axis."""
        return self.lengths is not None and bool((self.lengths < self.num_times).any())

    @property
    def has_own_times(self) -> bool:
        """Whether each series has its own time grid, `times` of shape `(*batch, time)`."""
        return self.times.dim() > 1

    def _series_name(self, position: tuple[int, ...]) -> str:
        return series_name(position, self.coords)
