"""A structural model's parts, read off the smoothed states."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.dynamics import Part, Stacked
from pyro_ssm.infer import kalman_smoother
from pyro_ssm.ops import block_diagonal

__all__ = ["Contribution", "Decomposition", "decompose"]


class Contribution(NamedTuple):
    """The posterior of one part of the signal, each ``(*batch, time)``.

    >>> from pyro_ssm.predict import Contribution
    >>> Contribution._fields
    ('mean', 'sd')
    """

    mean: Tensor
    sd: Tensor


class Decomposition(NamedTuple):
    """What :func:`decompose` returns.

    >>> from pyro_ssm.predict import Decomposition
    >>> Decomposition._fields
    ('parts', 'total')
    """

    parts: dict[str, Contribution]  # by the parts' names
    total: Contribution  # their sum, the signal without observation noise


def decompose(model: Any, data: TimeSeries) -> Decomposition:
    """The contribution of every part of a structural model to the signal, given all data.

    .. math:: E[h_{i,k}^T z_{i,k} \\mid y], \\qquad \\text{sd}[h_{i,k}^T z_{i,k} \\mid y]

    At every time of the data, also where nothing is seen (the smoother fills the gap), and at every step where what is
    seen are sums or means over periods. The means of the parts add up to the mean of the total; standard deviations do
    not add, since the parts are correlated given the data.

    Args:
        model: from ``models.structural``, bound, or unbound and without random parameters. Parameters with sample dims
            give results with sample dims.
        data: with values.

    Returns:
        Differentiable with respect to parameters and values, as the smoother is.

    Raises:
        TypeError: the model's transition is not made of parts.

    Source: Durbin and Koopman (2012), "Time Series Analysis by State Space Methods", section 4.4.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.dynamics.structural import Level, Seasonal
    >>> from pyro_ssm.predict import decompose
    >>> model = ssm.models.structural(Level(scale=0.1) + Seasonal(2), noise=0.5)
    >>> data = ssm.TimeSeries(torch.arange(6.0), torch.tensor([1.0, 2, 1, 2, 1, 2]).unsqueeze(-1))
    >>> parts, total = decompose(model, data)
    >>> parts["seasonal"].mean.detach()
    tensor([-0.5000,  0.5000, -0.5000,  0.5000, -0.5000,  0.5000])
    """
    bound = model.bind()
    transition = bound.transition
    if not isinstance(transition, Stacked) or not all(isinstance(part, Part) for part in transition.parts.values()):
        raise TypeError(
            f"decompose needs a model whose transition is made of parts, got {type(model.transition).__name__}. "
            "Build it with models.structural(Level() + Seasonal(12) + ...)"
        )
    smoothed = kalman_smoother(bound, data)
    rows = {name: _row(part, data.inputs, smoothed.mean) for name, part in transition.parts.items()}
    width = smoothed.mean.shape[-1]
    reads = block_diagonal([row.unsqueeze(-2) for row in rows.values()])  # (..., time or 1, parts, state of the parts)
    reads = torch.nn.functional.pad(reads, (0, width - reads.shape[-1]))
    reads = torch.cat([reads, reads.sum(-2, keepdim=True)], -2)
    mean = (reads @ smoothed.mean.unsqueeze(-1)).squeeze(-1)
    sd = torch.linalg.vector_norm(reads @ smoothed.scale_tril, dim=-1)
    found = [Contribution(*pair) for pair in zip(mean.unbind(-1), sd.unbind(-1), strict=True)]
    return Decomposition(dict(zip(rows, found[:-1], strict=True)), found[-1])


def _row(part: Part, inputs: Tensor | None, like: Tensor) -> Tensor:
    """:math:`h_k` ``(..., time or 1, state of the part)``."""
    row = part.row().to(like).unsqueeze(0)
    for coordinate, column in part.input_columns().items():
        if inputs is None:
            raise ValueError("a regression of this model reads the inputs, but the data has no `inputs`")
        unit = torch.nn.functional.one_hot(torch.tensor(coordinate), part.state_dim).to(like)
        row = row + inputs[..., column, None].to(like) * unit
    return row
