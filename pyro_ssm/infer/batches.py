"""Which series are seen at which step: a pure function of one seed and the step, so that a fit can resume mid-epoch."""

from __future__ import annotations

import math
from typing import Any

import torch

from pyro_ssm.data import TimeSeries

__all__ = ["Batches", "observation_count"]


def observation_count(data: Any) -> int:
    """The number of observed (unmasked) entries, 1 for what is no :class:`~pyro_ssm.data.TimeSeries`.

    >>> import torch
    >>> from pyro_ssm.infer.batches import observation_count
    >>> observation_count(torch.zeros(3))
    1
    """
    if not isinstance(data, TimeSeries) or data.mask is None:
        return 1
    return max(1, int(data.mask.sum()))


class Batches:
    """Mini-batches of series, in an order that depends only on ``seed``.

    Epoch ``e`` visits the series in ``torch.randperm(len(data))`` drawn from a generator with seed ``seed + e``; the
    last mini-batch of an epoch may be smaller. Without a batch size every step sees all data.

    Args:
        data: what model and guide take; with ``batch_size`` a ``TimeSeries`` with a batch dim.
        batch_size: series per step, None for all.
        seed: of the order.

    Raises:
        TypeError: ``batch_size`` is given and the data cannot be cut.
        ValueError: ``batch_size`` is less than 1.

    >>> from pyro_ssm.infer.batches import Batches
    >>> Batches([1, 2, 3], None, seed=0).at(5)
    [1, 2, 3]
    """

    def __init__(self, data: Any, batch_size: int | None, seed: int) -> None:
        self.data, self.seed = data, seed
        self.batch_size = batch_size
        self.per_epoch = 1
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)
        if batch_size is None:
            return
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}")
        if not isinstance(data, TimeSeries) or not data.batch_shape:
            raise TypeError(
                f"`batch_size` needs data that can be cut into mini-batches (a TimeSeries of several series), "
                f"got {data!r}; leave batch_size out to use all data at every step"
            )
        self.per_epoch = math.ceil(len(data) / batch_size)

    def reseed(self, seed: int) -> None:
        """Take another order, from its beginning."""
        self.seed, self._epoch = seed, -1

    def at(self, step: int) -> Any:
        """What the optimiser step ``step`` (from 0) sees."""
        if self.batch_size is None:
            return self.data
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.data), generator=generator)
        # steps that are padding in every series of the mini-batch cost time and add exactly 0
        return self.data.minibatch(self._order[place * self.batch_size : (place + 1) * self.batch_size]).trim()
