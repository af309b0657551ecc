"""The log-likelihoods of a filter, by the cheapest way that it offers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac

__all__ = ["Filter", "log_likelihood_terms"]

#: ``(bound model, data) -> result`` with ``log_likelihood`` increments ``(*batch, time)``; it may have an attribute
#: ``log_likelihood``: a function of the same arguments that returns these alone
Filter = Callable[[Any, TimeSeries], Any]


def log_likelihood_terms(filter: Filter, model: Any, data: TimeSeries) -> Tensor:
    """:math:`\\log p(y_k \\mid y_{<k})` by a filter, ``(*batch, time)``.

    A filter that can compute them without its other results says so by an attribute ``log_likelihood``: a function of
    the same arguments, also of the same options under ``functools.partial``, that returns what the filter's result has
    under that name. ``infer.kalman_filter`` has one. Any other filter runs as it is.

    Args:
        filter: such a function.
        model: bound.
        data: with values.

    Raises:
        TypeError: the filter is a builder of particle filters.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.filter_terms import log_likelihood_terms
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.LinearNormal(1), ssm.emissions.LinearNormal(1, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> log_likelihood_terms(ssm.infer.kalman_filter, model.bind(), data).shape
    torch.Size([3, 4])
    """
    options: dict[str, Any] = {}
    within: Any = filter
    if isinstance(filter, functools.partial) and not filter.args:
        within, options = filter.func, filter.keywords
    alone = getattr(within, "log_likelihood", None)
    if alone is None:
        found = filter(model, data)
        if isinstance(found, FeynmanKac):
            raise TypeError(
                "`filter` builds a particle filter and does not run it. Give ParticleMarginal(num_particles, "
                "build=...), which does; for particle MCMC see pmmh and particle_gibbs"
            )
        return found.log_likelihood
    return alone(model, data, **options)
