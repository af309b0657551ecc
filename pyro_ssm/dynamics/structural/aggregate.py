"""Values of a period: sums, means, last values and growth rates of what moves by shorter steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_ssm.blocks._checks import check_choice, check_positive
from pyro_ssm.dynamics.structural.design import column_of

__all__ = ["Aggregate", "period_column"]

_KINDS = ("sum", "mean", "last", "growth", "weights")
_ROUNDING = 1e-9  # of a period: times such as 0.1 * 3 are not exactly where a period begins


@dataclass(frozen=True)
class Aggregate:
    """How a low-frequency value is made of a signal :math:`x` that moves by shorter steps (a quarter of months).

    .. list-table::
       :header-rows: 1

       * - ``kind``
         - a value is
         - for
       * - ``"sum"``
         - :math:`\\sum_{s \\in \\text{period}} x_s`
         - flows (GDP, sales)
       * - ``"mean"``
         - :math:`\\frac1m \\sum_{s \\in \\text{period}} x_s`
         - averages (an index, a rate)
       * - ``"last"``
         - :math:`x_k`
         - stocks at the period's end
       * - ``"growth"``
         - :math:`\\sum_j w_j x_{k-j}`, :math:`w = (1, \\dots, m, \\dots, 1) / m`
         - growth of a flow
       * - ``"weights"``
         - :math:`\\sum_j w_j x_{k-j}` with your ``weights``
         - anything else

    With m = 3 the growth weights are 1/3, 2/3, 1, 2/3, 1/3 for x the growth a step (Mariano and Murasawa 2003). A
    value is dated at the *last* step of its period, and is missing (masked) at the others. Sums and means carry one
    more coordinate, the running sum of the steps of this period *before* now (so it starts at 0, exactly, whatever the
    start of the rest),

    .. math:: c_{k+1} = \\delta_{k+1} (c_k + x_k), \\qquad y_k = w\\,(c_k + x_k) + \\text{noise},

    with :math:`\\delta = 0` at the first step of a period and 1 elsewhere; growth and weights carry lags of x.

    The calendar is either a clock or a mark in the inputs. The clock: a period is the times from
    :math:`\\text{origin} + j\\,\\text{period}` up to, but without, the next of these; steps may be irregular. The mark,
    for periods of unequal length (weeks in months): column ``column`` of the inputs is 0 inside a period, and at its
    last step the weight of the sum: 1 for a sum, 1 over the number of steps for a mean (:func:`period_column` makes
    it). A record that begins within a period has no first value: mask it.

    Args:
        kind: see the table.
        period: length of a period, in the units of ``times``; ignored with ``column``.
        origin: a time at which a period begins.
        steps: m, steps a period; None: ``period`` rounded. Only means and growth use it.
        column: of the inputs, if the calendar is there.
        weights: of ``kind="weights"``, the newest first.

    Raises:
        ValueError: of an unknown kind, a bad length, or weights where none belong.

    Sources: Harvey (1989), "Forecasting, Structural Time Series Models and the Kalman Filter", section 6.3; Mariano and
    Murasawa (2003), "A new coincident index of business cycles based on monthly and quarterly series".

    >>> from pyro_ssm.dynamics.structural import Aggregate
    >>> Aggregate("sum").num_states, Aggregate("growth").num_states, Aggregate("last").num_states
    (1, 4, 0)
    """

    kind: str = "sum"
    period: float = 3.0
    origin: float = 0.0
    steps: int | None = None
    column: int | None = None
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, _KINDS)
        check_positive("period", self.period)
        if (self.weights is not None) != (self.kind == "weights") or self.weights == ():
            raise ValueError(
                f"`weights` belong to kind='weights' (at least one), got kind={self.kind!r}, {self.weights}"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}")
        if self.column is not None and self.kind not in ("sum", "mean"):
            raise ValueError(f"`column` marks the periods of sums and means, got kind={self.kind!r}")

    @property
    def num_steps(self) -> int:
        """m."""
        return max(1, round(self.period)) if self.steps is None else self.steps

    @property
    def lag_weights(self) -> tuple[float, ...]:
        """The weights of x and its lags; none for sums and means, which run over a calendar."""
        if self.kind == "last":
            return (1.0,)
        if self.kind == "growth":
            m = self.num_steps
            return tuple((m - abs(j)) / m for j in range(1 - m, m))
        return tuple(self.weights or ())

    @property
    def is_running(self) -> bool:
        """Whether it is a running sum (else it is a sum over lags)."""
        return self.kind in ("sum", "mean")

    @property
    def num_states(self) -> int:
        """Coordinates that it adds to the state."""
        return 1 if self.is_running else len(self.lag_weights) - 1

    def keeps(self, time: Tensor, next_time: Tensor, inputs: Tensor | None) -> Tensor:
        """:math:`\\delta` of each step, bool ``(..., time)``: whether the next time is in the same period."""
        if self.column is not None:
            return column_of(inputs, [self.column], "an Aggregate")[..., 0] == 0
        return self._number(time) == self._number(next_time)

    def weight(self, inputs: Tensor | None) -> Tensor:
        """:math:`w` ``(..., time or 1)`` of a running sum."""
        if self.column is not None:
            return column_of(inputs, [self.column], "an Aggregate")[..., 0]
        return torch.tensor([1.0 / self.num_steps if self.kind == "mean" else 1.0])

    def _number(self, time: Tensor) -> Tensor:
        return torch.floor((time - self.origin) / self.period + _ROUNDING)


def period_column(periods: Sequence[object], kind: str = "sum") -> Tensor:
    """The input column that tells an :class:`Aggregate` which steps make a period.

    Args:
        periods: one label a step, equal within a period: month numbers of weeks, say.
        kind: ``"sum"`` or ``"mean"``.

    Returns:
        ``(time, 1)``: 0 inside a period; at its last step 1, or 1 over the number of its steps for a mean. The last
        period counts as ended.

    >>> from pyro_ssm.dynamics.structural import period_column
    >>> period_column(["jan", "jan", "feb", "feb", "feb", "feb"], kind="mean").squeeze(-1)
    tensor([0.0000, 0.5000, 0.0000, 0.0000, 0.0000, 0.2500])
    """
    check_choice("kind", kind, ("sum", "mean"))
    labels, column, run = list(periods), torch.zeros(len(periods), 1), 0
    for k, label in enumerate(labels):
        run += 1
        if k + 1 == len(labels) or labels[k + 1] != label:
            column[k] = 1.0 / run if kind == "mean" else 1.0
            run = 0
    return column
