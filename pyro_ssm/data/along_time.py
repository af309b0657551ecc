"""The methods of `TimeSeries` that change its time axis; their workings are in `grids`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyro_ssm.data import grids
from pyro_ssm.data.record import Record

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False, repr=False)
class AlongTime(Record):
    """A record that can be cut, continued, refined and thinned in time."""

    def split(self, at: Any) -> tuple[Self, Self]:
        """Cuts in two: what lies before `at`, and `at` with what follows.

        Args:
            at: a step (int), a time (float) or a date (needs dates in `coords["time"]`). With own time grids a time
                falls on another step in each series.

        Returns:
            Before and after; `after` keeps its own times. Either may have no observed entry.

        Raises:
            TypeError: if `at` is none of these.
            ValueError: if a series would have nothing on one side.

        Example:
            >>> from pyro_ssm.data import TimeSeries
            >>> data = TimeSeries([0.0, 1.0, 5.0], [[1.0], [2.0], [3.0]])
            >>> before, after = data.split(1.0)
            >>> before.times.tolist(), after.times.tolist()
            ([0.0], [1.0, 5.0])
        """
        return grids.split(self, at)

    def extend(self, times: Any, inputs: Any = None) -> Self:
        """Appends unobserved times, after each series' own end.

        Args:
            times: `(n,)` or `(*batch, n)`, later than the last time of each series; also dates, where times count
                dates.
            inputs: `(n, input)` or `(*batch, n, input)`; wanted exactly if the series has inputs.

        Returns:
            A series with n more steps, at which nothing is observed. Dates go on where times count dates; other labels
            of time are dropped.

        Raises:
            ValueError: for times that are not later, and for inputs that are missing or too many.

        Example:
            >>> from pyro_ssm.data import TimeSeries
            >>> data = TimeSeries([0.0, 1.0], [[1.0], [2.0]]).extend([2.0, 4.0])
            >>> data.times.tolist(), data.mask[:, 0].tolist()
            ([0.0, 1.0, 2.0, 4.0], [True, True, False, False])
        """
        return grids.extend(self, times, inputs)

    def refine(self, n: int) -> Self:
        """Inserts n - 1 equally spaced latent times into each gap.

        `times`, `inputs` (piecewise constant) and `lengths` move to the fine grid; `values` and `mask` stay as they
        are, at the times `observed_index`. `refine(a).refine(b)` is `refine(a * b)`.

        Args:
            n: parts per gap, at least 1.

        Returns:
            A series with (time - 1) n + 1 latent times.

        Raises:
            ValueError: if n is not a positive integer.

        Example:
            >>> from pyro_ssm.data import TimeSeries
            >>> data = TimeSeries([0.0, 1.0, 3.0], [[1.0], [2.0], [3.0]]).refine(2)
            >>> data.times.tolist(), data.observed_index.tolist(), data.values.shape
            ([0.0, 0.5, 1.0, 2.0, 3.0], [0, 2, 4], torch.Size([3, 1]))
        """
        return grids.refine(self, n)

    def thin(self, n: int) -> Self:
        """Keeps every n-th time, from the first; undoes `refine(n)`.

        Values and inputs at the other times are lost: what inputs did between the kept times is no longer known.

        Args:
            n: at least 1.

        Returns:
            A series with (time - 1) // n + 1 times.

        Raises:
            ValueError: if n is not a positive integer, or no time that carries values is kept.

        Example:
            >>> from pyro_ssm.data import TimeSeries
            >>> TimeSeries([0.0, 1.0, 3.0], [[1.0], [2.0], [3.0]]).thin(2).times.tolist()
            [0.0, 3.0]
        """
        return grids.thin(self, n)

    def trim(self) -> Self:
        """Drops the steps that are padding in every series.

        Bounds and gradients stay the same; the cost falls, most of all for mini-batches of very unequal lengths.

        Returns:
            A series with as many times as the longest one has.

        Example:
            >>> import torch
            >>> from pyro_ssm.data import TimeSeries
            >>> data = TimeSeries.from_sequences([torch.ones(2, 1), torch.ones(4, 1), torch.ones(3, 1)])
            >>> data.minibatch([0, 2]).trim()
            TimeSeries(batch=(2,), times=3, obs=1, observed=100.0%, lengths=2..3, of 3)
        """
        return grids.trim(self)
