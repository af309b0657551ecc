"""Draws of a model's parameters: their names, their event dims, and their alignment with a batch of series."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_ssm.binding import parameter_names, random_parameters
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import local_parameters
from pyro_ssm.models import StateSpaceModel, site_name
from pyro_ssm.models.sde_sites import DRIVING_SITES

__all__ = ["align", "by_dotted_name", "event_dims"]


def event_dims(model: StateSpaceModel) -> dict[str, int]:
    """How many rightmost dims of a draw belong to each parameter itself; the rest are plates and draws.

    A random parameter has the event dims of its prior, a learnable one all its dims.

    >>> import torch, pyro.distributions as dist, pyro_ssm as ssm
    >>> from pyro.nn import PyroSample
    >>> from pyro_ssm.predict.parameters import event_dims
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> model.transition.offset = PyroSample(dist.Normal(torch.zeros(2), 1.0).to_event(1))
    >>> event_dims(model)["transition.offset"], event_dims(model)["transition.matrix"]
    (1, 2)
    """
    with torch.no_grad(), local_parameters(), pyro.poutine.block(), pyro.poutine.trace() as traced:
        model.bind()
    sites = traced.trace.nodes
    dims = {}
    for name in parameter_names(model):
        site: Any = sites.get(site_name(model, name))
        path, _, attribute = name.rpartition(".")
        if site is None:
            dims[name] = getattr(model.get_submodule(path), attribute).dim()
        else:
            dims[name] = site["fn"].event_dim if site["type"] == "sample" else site["value"].dim()
    return dims


def by_dotted_name(model: StateSpaceModel, draws: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split draws into those of the model's parameters, by dotted name, and the others.

    Keys may be dotted names or the names of Pyro sites (``child.transition.rate`` inside a user's PyroModule); the path
    is among the others, as ``"z"``, and so are the sites that may drive it.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.predict.parameters import by_dotted_name
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> parameters, others = by_dotted_name(model, {"transition.offset": torch.zeros(5, 2), "z": torch.zeros(5, 4, 2)})
    >>> list(parameters), list(others)
    (['transition.offset'], ['z'])
    """
    names = {site_name(model, name): name for name in parameter_names(model)}
    names |= {name: name for name in names.values()}
    names_of_path = {key: name for name in ("z", *DRIVING_SITES) for key in (site_name(model, name), name)}
    tensors = {key: torch.as_tensor(value) for key, value in draws.items()}
    parameters = {names[key]: value for key, value in tensors.items() if key in names}
    others = {names_of_path.get(key, key): value for key, value in tensors.items() if key not in names}
    return parameters, others


def align(name: str, value: Tensor, event_dim: int, data: TimeSeries) -> Tensor:
    """Draws with batch dims of 1 where there is no plate: ``(S, 1.., *event)``, or ``(S, *batch, *event)``.

    Against states ``(S, *batch, time, state)`` the draws then line up; :func:`~pyro_ssm.binding.bind` adds the time
    axis.

    Raises:
        ValueError: the dims between draws and event do not broadcast with the batch of ``data``.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.predict.parameters import align
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> align("rate", torch.ones(100), 0, data).shape, align("rate", torch.ones(100, 3), 0, data).shape
    (torch.Size([100, 1]), torch.Size([100, 3]))
    """
    batch = data.batch_shape
    if not fits(value, event_dim, data, lead=1):
        raise ValueError(
            f"draws of `{name}` have shape {tuple(value.shape)}, but (draws, *plates, *event) is wanted, with "
            f"{event_dim} event dim(s) and plates that broadcast with the batch {tuple(batch)} of the data. Draws "
            "grouped by chain have two leading dims, the same for all parameters: flatten them with value.flatten(0, 1)"
        )
    split = value.dim() - event_dim
    plates = value.shape[1:split]
    return value.reshape(value.shape[:1] + (1,) * (len(batch) - len(plates)) + plates + value.shape[split:])


def fits(value: Tensor, event_dim: int, data: TimeSeries, lead: int) -> bool:
    """Whether the dims between ``lead`` leading ones and the event broadcast with the batch, without enlarging it."""
    if value.dim() < lead + event_dim:
        return False
    plates, batch = value.shape[lead : value.dim() - event_dim], data.batch_shape
    if len(plates) > len(batch):
        return False
    return all(size in (1, wanted) for size, wanted in zip(reversed(plates), reversed(batch), strict=False))


def missing_parameters(model: StateSpaceModel, draws: Mapping[str, Any]) -> list[str]:
    """The random parameters of which there are no draws."""
    return [name for name in random_parameters(model) if name not in draws]
