"""What moves by short steps behind values of longer periods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_ssm.data import TimeSeries
from pyro_ssm.dynamics.structural import Aggregation
from pyro_ssm.infer import kalman_smoother
from pyro_ssm.predict.decompose import Contribution

__all__ = ["disaggregate"]


def disaggregate(model: Any, data: TimeSeries) -> Contribution:
    """The signals at every step, given all data: the months behind quarterly values, nowcasts included.

    .. math:: E[x_{i,k} \\mid y], \\qquad \\text{sd}[x_{i,k} \\mid y]

    Here x is what is aggregated: without the emission's offset (which belongs to the value seen) and without its noise.

    Args:
        model: from ``models.structural(..., aggregate=...)`` or ``models.mixed_frequency_factor``, bound, or unbound
            and without random parameters. Parameters with sample dims give results with sample dims.
        data: with values. For a nowcast, leave out (mask) what was not published at the time.

    Returns:
        ``mean`` and ``sd`` ``(*batch, time, obs)``; differentiable as the smoother is.

    Raises:
        TypeError: the model aggregates nothing.

    Source: Chow and Lin (1971), "Best linear unbiased interpolation, distribution, and extrapolation of time series by
    related series"; Harvey (1989), section 6.3.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.dynamics.structural import Aggregate, Level
    >>> from pyro_ssm.predict import disaggregate
    >>> model = ssm.models.structural(Level(), noise=None, aggregate=Aggregate("sum"))
    >>> quarters = torch.tensor([float("nan"), float("nan"), 6.0, float("nan"), float("nan"), 15.0]).unsqueeze(-1)
    >>> months = disaggregate(model, ssm.TimeSeries(torch.arange(6.0), quarters)).mean.detach()
    >>> months.reshape(2, 3).sum(-1).round(decimals=3)
    tensor([ 6., 15.])
    """
    bound = model.bind()
    aggregation = getattr(bound.emission, "design", None)
    if not isinstance(aggregation, Aggregation):
        raise TypeError(
            "disaggregate needs a model whose values are aggregates, from models.structural(..., aggregate=...) or "
            f"models.mixed_frequency_factor, got a {type(model.emission).__name__.removeprefix('Bound')} emission"
        )
    smoothed = kalman_smoother(bound, data)
    signals: Tensor = pad(aggregation.design(data.times, data.inputs), (0, aggregation.num_states))
    reads = bound.emission.read(signals).to(smoothed.mean)
    mean = (reads @ smoothed.mean.unsqueeze(-1)).squeeze(-1)
    return Contribution(mean, torch.linalg.vector_norm(reads @ smoothed.scale_tril, dim=-1))
