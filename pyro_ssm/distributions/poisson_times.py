"""The law of when something is observed: a Poisson process whose rate is known along a path."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["PoissonTimes"]


class PoissonTimes(TorchDistribution):
    """Poisson processes of observation times, one for each channel, on the span of a record,

    .. math:: \\log p = \\sum_i \\Big( \\sum_{k:\\, m_{ki} = 1} \\log \\lambda_i(t_k) - \\Lambda_i \\Big), \\qquad
        \\Lambda_i = \\int_{t_1}^{t_T} \\lambda_i(t)\\, dt,

    the density of the points with respect to unordered points in time (per unit of time, each). Its value is the mask
    of the record: channel i had an event at :math:`t_k` where it was observed. With one channel and a mask of several
    columns, an event is a time at which anything was observed. A channel that is never observed adds exactly its
    :math:`-\\Lambda_i`; an entry that is missing adds exactly 0 to the sum. The span is that of the record's times,
    whether or not anything was seen there: a first and a last time without values set it to the time of observation.

    Args:
        log_rate: :math:`\\log \\lambda` ``(*batch, time, channels)``, per unit of time.
        total: :math:`\\Lambda` ``(*batch, channels)``.

    Raises:
        NotImplementedError: a draw is asked for; the times of a record are given.

    Gradients: with respect to both arguments. Source: D. J. Daley, D. Vere-Jones (2003), An introduction to the theory
    of point processes, volume I, section 2.1; Rubanova, Chen and Duvenaud (2019), section 3.3.

    >>> import torch
    >>> from pyro_ssm.distributions import PoissonTimes
    >>> law = PoissonTimes(torch.full((4, 1), 2.0).log(), torch.tensor([6.0]))          # rate 2 on [0, 3]
    >>> law.log_prob(torch.tensor([[True], [True], [False], [True]])) - (3 * torch.tensor(2.0).log() - 6)
    tensor(0.)
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.boolean, 2)

    def __init__(self, log_rate: Tensor, total: Tensor) -> None:
        batch = torch.broadcast_shapes(log_rate.shape[:-2], total.shape[:-1])
        self.log_rate, self.total = log_rate, total
        super().__init__(batch, log_rate.shape[-2:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PoissonTimes:
        batch = torch.Size(batch_shape)
        return PoissonTimes(
            self.log_rate.expand(batch + self.log_rate.shape[-2:]), self.total.expand(batch + self.total.shape[-1:])
        )

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Raises: the times of a record are given."""
        raise NotImplementedError(
            "the times of a record are given, and this law says how probable they are: it draws no others. To simulate "
            "a record give TimeSeries(times) without values, for which the model has no site for its times"
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """``(*batch,)`` for masks ``(*batch, time, channels)``, or of several columns for one channel."""
        event = value.bool()
        if self.event_shape[-1] == 1:
            event = event.any(-1, keepdim=True)
        terms = torch.where(event, self.log_rate, torch.zeros((), dtype=self.log_rate.dtype, device=value.device))
        return terms.sum((-1, -2)) - self.total.sum(-1)
