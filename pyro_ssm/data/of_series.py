"""The methods of `TimeSeries` that pick series out of many; their workings are in `selection` and `loader`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Generator
from torch.utils.data import DataLoader

from pyro_ssm.data import selection
from pyro_ssm.data.along_time import AlongTime
from pyro_ssm.data.loader import make_loader

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False, repr=False)
class OfSeries(AlongTime):
    """A record whose series can be counted, picked and drawn in mini-batches."""

    def __len__(self) -> int:
        """Number of series: the size of the last batch dim."""
        if not self.batch_shape:
            raise TypeError("One series has no number of series; `num_times` is its number of times.")
        return self.batch_shape[-1]

    def __bool__(self) -> bool:
        return True  # not len(): one series without batch dims has none

    def minibatch(self, index: Any) -> Self:
        """Some of the series, with what is needed to scale their terms up to the full data.

        Args:
            index: positions `(b,)` along the last batch dim.

        Returns:
            A series whose `total` is the number of series of the full data and whose `index` are positions in it; a
            mini-batch of a mini-batch refers to the full data as well.

        Raises:
            TypeError: if there is no batch dim, or the index is not of integers.
            ValueError: if it is empty or out of range.

        Example:
            >>> import torch
            >>> from pyro_ssm.data import TimeSeries
            >>> batch = TimeSeries([0.0, 1.0], torch.ones(5, 2, 1)).minibatch([3, 1])
            >>> batch.total, batch.index.tolist(), batch.values.shape
            (5, [3, 1], torch.Size([2, 2, 1]))
        """
        return selection.minibatch(self, index, len(self))

    def loader(
        self,
        batch_size: int,
        shuffle: bool = True,
        generator: Generator | None = None,
        drop_last: bool = False,
        trim: bool = False,
    ) -> DataLoader:
        """A `torch.utils.data.DataLoader` over mini-batches of series.

        Args:
            batch_size: series in a mini-batch; the last one may be smaller.
            shuffle: whether to draw a new order in each epoch, without replacement.
            generator: of that order; default torch's global one.
            drop_last: whether to leave a smaller last one out.
            trim: whether to cut each mini-batch to its longest series (`trim`): cheaper, but shapes then change from
                one to the next.

        Returns:
            A loader that yields `TimeSeries` (by `minibatch`).

        Raises:
            TypeError: if there is no batch dim.
            ValueError: for a batch size below 1, or one that leaves no batch.

        Example:
            >>> import torch
            >>> from pyro_ssm.data import TimeSeries
            >>> data = TimeSeries([0.0, 1.0], torch.ones(5, 2, 1))
            >>> [batch.index.tolist() for batch in data.loader(2, shuffle=False)]
            [[0, 1], [2, 3], [4]]
        """
        return make_loader(self, batch_size, shuffle, generator, drop_last, trim)

    def series(self, i: Any) -> Self:
        """One series, without batch dims and padding.

        Args:
            i: its position, its name in `coords["series"]`, or a tuple of positions with several batch dims.

        Returns:
            A series of batch shape `()`; it is not a mini-batch.

        Raises:
            TypeError: if there is no batch dim.
            ValueError: if there is no such series.

        Example:
            >>> import torch
            >>> from pyro_ssm.data import TimeSeries
            >>> data = TimeSeries.from_sequences([torch.ones(2, 1), torch.ones(4, 1)], coords={"series": ["a", "b"]})
            >>> data.series("a").num_times, data.series(1).num_times
            (2, 4)
        """
        return selection.one_series(self, i, len(self))
