"""Drawing a model's random parameters from their priors."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

from pyro_ssm.binding import bind, is_bound, random_parameters
from pyro_ssm.infer.local_parameters import local_parameters

__all__ = ["sample_prior"]


@torch.no_grad()
def sample_prior(model: PyroModule, num_samples: int | None = None) -> dict[str, Tensor]:
    """Draw every random parameter (``PyroSample``) once, as ``model.bind(values)`` takes them.

    .. math:: \\theta \\sim p(\\theta)

    All parameters of one draw are read in one trace, so that a prior which depends on another parameter sees the value
    that is returned for it.

    Args:
        model: an unbound model or component.
        num_samples: number of draws; they become the leftmost dimension of every value. None for a single draw.

    Returns:
        Dotted name to value, ``(*event,)`` or ``(num_samples, *event)``, without gradient. Beside data with a batch
        dim, bind draws with a dim for it: ``value.unsqueeze(1)``.

    Raises:
        TypeError: ``model`` is bound already: its parameters are numbers.
        ValueError: ``num_samples`` is less than 1.

    Randomness: torch's global generator.

    >>> import torch, pyro.distributions as dist
    >>> from pyro.nn import PyroSample
    >>> from pyro_ssm.components import Component
    >>> from pyro_ssm.infer import sample_prior
    >>> component = Component()
    >>> component.rate = PyroSample(dist.LogNormal(0.0, 1.0))
    >>> component.twice = PyroSample(lambda self: dist.Delta(2 * self.rate))
    >>> drawn = sample_prior(component)
    >>> bool(drawn["twice"] == 2 * drawn["rate"])
    True
    >>> sample_prior(component, num_samples=5)["rate"].shape
    torch.Size([5])
    """
    if not isinstance(model, PyroModule) or is_bound(model):
        raise TypeError(
            f"`model` must be an unbound PyroModule (a StateSpaceModel or a component), got {type(model).__name__}"
        )
    if num_samples is None:
        return _draw(model)
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}")
    draws = [_draw(model) for _ in range(num_samples)]
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


def _draw(model: PyroModule) -> dict[str, Tensor]:
    with poutine.block(), poutine.trace() as traced, local_parameters(), model._pyro_context:
        bind(model)
        names = {name: model._pyro_get_fullname(name) for name in random_parameters(model)}
    nodes: dict[str, Any] = traced.trace.nodes
    return {name: nodes[site]["value"] for name, site in names.items()}
