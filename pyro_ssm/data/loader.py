"""Mini-batches through `torch.utils.data`: the sampler picks positions, the data set cuts them out in one indexing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Generator
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

if TYPE_CHECKING:
    from typing_extensions import Self


@runtime_checkable
class Batchable(Protocol):
    """What a loader needs of its data."""

    def minibatch(self, index: list[int]) -> Self:
        """The series at these positions."""

    def trim(self) -> Self:
        """The same without steps that are padding everywhere."""

    def __len__(self) -> int: ...


class SeriesDataset(Dataset):
    """A data set whose item is a whole mini-batch: no series is copied twice and nothing is collated."""

    def __init__(self, data: Batchable, trim: bool) -> None:
        self.data = data
        self.trim = trim

    def __getitem__(self, index: list[int]) -> Batchable:
        batch = self.data.minibatch(index)
        return batch.trim() if self.trim else batch

    def __len__(self) -> int:
        return len(self.data)


def _as_is(batch: Any) -> Any:
    return batch


def make_loader(
    data: Batchable, batch_size: int, shuffle: bool, generator: Generator | None, drop_last: bool, trim: bool
) -> DataLoader:
    """See `TimeSeries.loader`."""
    dataset = SeriesDataset(data, trim)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size!r}, but an integer of at least 1 is wanted.")
    if drop_last and batch_size > len(dataset):
        raise ValueError(
            f"`batch_size` is {batch_size} with drop_last, but there are {len(dataset)} series: no batch would be left."
        )
    order: Sampler = RandomSampler(dataset, generator=generator) if shuffle else SequentialSampler(dataset)
    batches = BatchSampler(order, batch_size, drop_last)
    # batch_size=None: the sampler's list of positions goes to `__getitem__` as it is
    return DataLoader(dataset, batch_size=None, sampler=batches, collate_fn=_as_is, generator=generator)
