"""The record of a data set, which every posterior was given."""

from __future__ import annotations

from torch import Tensor

from pyro_ssm.data import TimeSeries

__all__ = ["record_of"]


def record_of(data: TimeSeries, name: str = "data") -> tuple[Tensor, Tensor]:
    """Values and mask, both there.

    Raises:
        TypeError: ``data`` is no TimeSeries.
        ValueError: it has no values.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.predict.record import record_of
    >>> values, mask = record_of(ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> values.shape, mask.all()
    (torch.Size([3, 4, 1]), tensor(True))
    """
    if not isinstance(data, TimeSeries):
        raise TypeError(f"`{name}` must be a TimeSeries, got {type(data).__name__}. Wrap it: TimeSeries(times, values)")
    if data.values is None or data.mask is None:
        raise ValueError(
            f"observations are needed, and `{name}.values` is None. To simulate the prior call the model itself"
        )
    return data.values, data.mask
