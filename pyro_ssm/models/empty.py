"""The path of a model without a state."""

from __future__ import annotations

from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.models.laws import BoundModel, batch_shape, tensor_like

__all__ = ["empty_path"]


def empty_path(model: BoundModel, data: TimeSeries) -> Tensor:
    """The path ``(*batch, time, 0)`` of a model whose state has no dimensions.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.models import empty_path
    >>> empty_path(ssm.models.ode_rnn(1).bind(), ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))).shape
    torch.Size([3, 4, 0])
    """
    return tensor_like(model, data).new_empty(batch_shape(model, data) + (data.num_times, 0))
