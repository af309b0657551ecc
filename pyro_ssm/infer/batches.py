"""Which series are seen at which step: a pure function of one seed and the step, so that a fit can resume mid-epoch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

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

    With ``by_length`` the series of an epoch are sorted by length (in random order among equals), cut, and the
    mini-batches shuffled: less padding is computed. Each series is still seen once an epoch, and which mini-batch is
    the smaller one is drawn anew.

    Args:
        data: what model and guide take; with ``batch_size`` a ``TimeSeries`` with a batch dim.
        batch_size: series per step, None for all.
        seed: of the order.
        by_length: series of like length together.

    Raises:
        TypeError: ``batch_size`` is given and the data cannot be cut.
        ValueError: ``batch_size`` is less than 1.

    >>> from pyro_ssm.infer.batches import Batches
    >>> Batches([1, 2, 3], None, seed=0).at(5)
    [1, 2, 3]
    """

    def __init__(self, data: Any, batch_size: int | None, seed: int, by_length: bool = False) -> None:
        self.data, self.seed = data, seed
        self.batch_size, self.by_length = batch_size, by_length
        self.per_epoch = 1
        self._epoch = -1
        self._parts: tuple[Tensor, ...] = ()
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
            self._epoch, self._parts = epoch, self._cut(torch.Generator().manual_seed(self.seed + epoch))
        # steps that are padding in every series of the mini-batch cost time and add exactly 0
        return self.data.minibatch(self._parts[place]).trim()

    def _cut(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The positions of each mini-batch of one epoch."""
        size = self.batch_size or len(self.data)
        order = torch.randperm(len(self.data), generator=generator)
        if not self.by_length or self.data.lengths is None:
            return order.split(size)
        order = order[self.data.lengths.cpu()[order].argsort(stable=True)]
        full, rest = divmod(len(order), size)
        sizes = torch.tensor([size] * full + [rest] * (rest > 0))
        parts = order.split(sizes[torch.randperm(len(sizes), generator=generator)].tolist())
        return tuple(parts[i] for i in torch.randperm(len(parts), generator=generator).tolist())
