"""Class numbers in floating point, as states and the values of a time series hold them."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Categorical, Independent
from torch import Tensor

from pyro_ssm.ops.reading import may_read

__all__ = ["CategoricalCodes", "index_law"]


class CategoricalCodes(Categorical):
    """A categorical law whose draws have the dtype of its logits.

    >>> import torch
    >>> from pyro_ssm.distributions.codes import CategoricalCodes
    >>> CategoricalCodes(logits=torch.zeros(3)).sample().dtype
    torch.float32
    """

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # torch's own default
        if may_read():
            return super().sample(sample_shape).to(self.logits.dtype)
        # torch.multinomial checks its argument; a race of exponential clocks of these rates has the same winner's law
        shape = self._extended_shape(sample_shape)
        clocks = self.logits.new_empty(shape + self.logits.shape[-1:]).exponential_()
        return (self.logits - clocks.log()).argmax(-1).to(self.logits.dtype)


def index_law(log_weights: Tensor) -> Any:
    """The law of one index with one event dim: log-weights ``(..., K)`` to batch ``(...)``, event ``(1,)``.

    >>> import torch
    >>> from pyro_ssm.distributions.codes import index_law
    >>> law = index_law(torch.zeros(5, 3))
    >>> law.batch_shape, law.event_shape
    (torch.Size([5]), torch.Size([1]))
    """
    law = CategoricalCodes(logits=log_weights.unsqueeze(-2), validate_args=False)
    return Independent(law, 1, validate_args=False)
