"""Names of sites, and the plate over series, opened where the caller's plates do not already cover the batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pyro
from pyro.nn import PyroModule
from pyro.poutine.runtime import get_plates

from pyro_ssm.data import TimeSeries

__all__ = ["series_plate", "site_name", "uncovered_dims"]


def site_name(model: PyroModule, name: str) -> str:
    """The full name of a model's site: ``z`` when the model is the root, ``child.z`` inside a user's PyroModule.

    Asking fixes the name: Pyro refuses to adopt the model afterwards.

    >>> from pyro_ssm.components import Component
    >>> from pyro_ssm.models import site_name
    >>> site_name(Component(), "z")
    'z'
    """
    with model._pyro_context:
        return model._pyro_get_fullname(name)


def series_plate(model: PyroModule, data: TimeSeries) -> AbstractContextManager:
    """``plate("series", total, subsample=index, dim=-1)``, or nothing where the caller's plates cover the batch.

    The model and the guide open the same plate, and it is the only place where a mini-batch is scaled.

    Args:
        model: gives the plate its name (``series``, or ``child.series`` inside a user's PyroModule).
        data: gives the batch shape, and ``total`` and ``index`` of a mini-batch.

    Raises:
        ValueError: a batch dim other than the last is covered by no plate.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.models.plates import series_plate
    >>> one = ssm.TimeSeries(torch.arange(3.0), torch.zeros(3, 1))
    >>> type(series_plate(None, one)).__name__  # a single series needs no plate
    'nullcontext'
    """
    bare = _bare_dims(data)
    if deeper := uncovered_dims(data):
        raise ValueError(
            f"data has batch shape {tuple(data.batch_shape)}, and no plate covers dim(s) {deeper}. "
            "Call the model inside `with pyro.plate(name, size, dim=...)` for them; the last dim gets its own plate"
        )
    if -1 not in bare:
        return nullcontext()
    name = site_name(model, "series")
    if data.index is None:
        return pyro.plate(name, data.batch_shape[-1], dim=-1)
    return pyro.plate(name, data.total, subsample=data.index, dim=-1)


def uncovered_dims(data: TimeSeries) -> list[int]:
    """The batch dims of a record, other than the last, for which no plate is open and a model opens none.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.models.plates import uncovered_dims
    >>> uncovered_dims(ssm.TimeSeries(torch.arange(3.0), torch.zeros(2, 5, 3, 1)))
    [-2]
    """
    return [dim for dim in _bare_dims(data) if dim < -1 and data.batch_shape[dim] != 1]


def _bare_dims(data: TimeSeries) -> list[int]:
    covered = {frame.dim for frame in get_plates()}
    return [dim for dim in range(-len(data.batch_shape), 0) if dim not in covered]
