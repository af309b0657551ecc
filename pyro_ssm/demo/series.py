"""What is modelled: two bundled series, in the form in which all models get them, and where they are cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries, load, stochastic_volatility

__all__ = ["Task", "atmospheric_co2", "returns", "seasonal_inputs", "sunspots"]


class Task(NamedTuple):
    """A series, its season, and the end of the training span; models learn from windows and forecast from them.

    The forecast of one season is made anew at each step of the held-out span, from the ``window`` steps before it.
    What is modelled is ``(value - base) / scale``: scale and trend are those of the training span, and an ``anchored``
    series, whose level wanders, is seen relative to the mean of the window's first season. All models get the same.

    >>> from pyro_ssm.demo.series import atmospheric_co2
    >>> task = atmospheric_co2()
    >>> task.windows(), task.histories().batch_shape, task.futures().batch_shape
    (TimeSeries(batch=(156,), times=52, obs=1, observed=97.3%, inputs=4, own grids), torch.Size([40]), torch.Size([40]))
    """

    name: str
    label: str  # of the axis, with the unit
    step: str  # what one time step is called
    data: TimeSeries  # (time, 1), original units, with inputs or without
    season: int  # steps in a season
    num_training: int  # steps before the held-out span
    window: int  # steps
    stride: int  # steps from one training window to the next
    anchored: bool
    trend: Tensor  # (time, 1), original units
    scale: float  # original units

    def origins(self) -> range:
        """The first step of each forecast."""
        return range(self.num_training, self.data.num_times - self.season + 1)

    def windows(self, stride: int | None = None) -> TimeSeries:
        """Windows of the training span as a batch of series; the last one ends where the span ends."""
        return self.modelled(self.window_starts(stride), self.window)

    def window_starts(self, stride: int | None = None) -> range:
        """The first step of each window."""
        step = self.stride if stride is None else stride
        return range((self.num_training - self.window) % step, self.num_training - self.window + 1, step)

    def histories(self) -> TimeSeries:
        """What is known at each forecast: the window before it."""
        return self.modelled([origin - self.window for origin in self.origins()], self.window)

    def futures(self) -> TimeSeries:
        """What each forecast is scored against: the season after its history, relative to the same base."""
        return self.modelled(self.origins(), self.season, [origin - self.window for origin in self.origins()])

    def modelled(self, starts: Sequence[int], length: int, known: Sequence[int] | None = None) -> TimeSeries:
        """Stretches of the series as a batch, in the units of the models; the windows ``known`` anchor them."""
        index = _positions(starts, length)
        base = self.base(starts if known is None else known, starts, length)
        values = (self.data.values[index] - base) / self.scale
        inputs = None if self.data.inputs is None else self.data.inputs[index]
        dates = {"time": self.data.coords["time"][index.numpy()], "obs": self.data.coords["obs"]}
        return TimeSeries(self.data.times[index], values, self.data.mask[index], inputs, coords=dates)

    def base(self, known: Sequence[int], starts: Sequence[int], length: int) -> Tensor:
        """Trend and level ``(series, length, 1)`` of stretches, given the windows that are known."""
        trend = self.trend[_positions(starts, length)]
        if not self.anchored:
            return trend
        index = _positions(known, self.season)
        seen = self.data.mask[index]
        excess = torch.where(seen, self.data.values[index] - self.trend[index], 0.0)
        return trend + excess.sum(-2, keepdim=True) / seen.sum(-2, keepdim=True)

    def original(self, modelled: Tensor, known: Sequence[int], starts: Sequence[int]) -> Tensor:
        """Undoes the transformation of values ``(..., series, time, 1)``."""
        return modelled * self.scale + self.base(known, starts, modelled.shape[-2])


def _positions(starts: Sequence[int], length: int) -> Tensor:
    return torch.tensor(list(starts)).unsqueeze(-1) + torch.arange(length)


def seasonal_inputs(dates: np.ndarray, harmonics: int = 2) -> Tensor:
    """Sines and cosines of the time of year, ``(time, 2 * harmonics)``.

    >>> import numpy as np
    >>> from pyro_ssm.demo.series import seasonal_inputs
    >>> seasonal_inputs(np.array(["2001-01-01", "2001-07-02T12"], dtype="datetime64[s]"), harmonics=1).round()
    tensor([[ 0.,  1.],
            [-0., -1.]])
    """
    year = dates.astype("datetime64[Y]")
    start, end = (y.astype("datetime64[s]").astype(np.float64) for y in (year, year + 1))
    phase = torch.from_numpy((dates.astype("datetime64[s]").astype(np.float64) - start) / (end - start)).float()
    angle = 2 * math.pi * phase.unsqueeze(-1) * torch.arange(1, harmonics + 1)
    return torch.cat([angle.sin(), angle.cos()], -1)


def _task(data: TimeSeries, split: str, degree: int, **fields: Any) -> Task:
    """Trend and scale by least squares over the observed entries before ``split``; the season is fitted beside them."""
    dates = data.coords["time"]
    num_training = int((dates < np.datetime64(split)).sum())
    columns = np.polynomial.chebyshev.chebvander(np.linspace(-1.0, 1.0, data.num_times), degree)
    seasonal = np.zeros((data.num_times, 0)) if data.inputs is None else data.inputs.double().numpy()
    seen = data.mask[:num_training, 0].numpy()
    values = data.values[:num_training, 0].double().numpy()
    design = np.concatenate([columns, seasonal], -1)[:num_training][seen]
    coefficients = np.linalg.lstsq(design, values[seen], rcond=None)[0]
    trend = columns @ coefficients[: degree + 1]
    return Task(
        data=data,
        num_training=num_training,
        trend=torch.from_numpy(trend).to(data.values.dtype).unsqueeze(-1),
        scale=float((values - trend[:num_training])[seen].std()),
        **fields,
    )


def atmospheric_co2(split: str = "1998-01-01") -> Task:
    """Carbon dioxide at Mauna Loa every four weeks, with its gaps; the last four years are held out.

    A straight line is removed and the season enters by harmonics of the year. The level wanders, so the series is
    anchored, and how much faster it rises than the line is for the models to find out. (A curve fitted to the training
    span would teach them that the level returns to it, which it does only there.)

    >>> from pyro_ssm.demo.series import atmospheric_co2
    >>> atmospheric_co2().data
    TimeSeries(times=571, obs=1, observed=97.2%, inputs=4)
    """
    data = load("co2").thin(4)
    data = data.replace(inputs=seasonal_inputs(data.coords["time"]))
    return _task(
        data, split, degree=1, name="Carbon dioxide at Mauna Loa", label="CO$_2$ (ppm)", step="four weeks", season=13,
        window=52, stride=3, anchored=True,
    )  # fmt: skip


def sunspots(split: str = "1949-01-01", hidden: float = 0.1) -> Task:
    """The yearly number of sunspots; the last sixty years are held out.

    Chosen as the second series because its law is known not to be linear: the number is never negative, a cycle rises
    faster than it falls, and strong cycles are more irregular than weak ones. The season is the cycle of about eleven
    years; as it keeps no calendar, no model gets seasonal inputs. The record is complete; a share of the entries before
    ``split`` is hidden at random.

    >>> from pyro_ssm.demo.series import sunspots
    >>> sunspots().data
    TimeSeries(times=309, obs=1, observed=91.3%)
    """
    data = load("sunspots")
    past = torch.from_numpy(data.coords["time"] < np.datetime64(split)).unsqueeze(-1)
    where = (torch.rand(data.values.shape, generator=torch.Generator().manual_seed(0)) < hidden) & past
    return _task(
        data.hide(where), split, degree=0, name="Sunspots", label="sunspot number", step="year", season=11, window=44,
        stride=1, anchored=False,
    )  # fmt: skip


def returns(split: str = "2004-05-19", hidden: float = 0.1) -> Task:
    """Returns whose volatility wanders (a simulation), one each day for 2000 days; the last 400 are held out.

    .. math:: h_{k+1} = -1 + 0.95 (h_k + 1) + 0.4\\, \\epsilon_k, \\qquad y_k \\sim N(0, e^{h_k})

    The mean is known to be 0 and only the spread can be forecast, which no linear-Gaussian model can do: nonlinearity
    pays here by construction. There is no season; a forecast covers five days. A share of the entries before ``split``
    is hidden at random.

    >>> from pyro_ssm.demo.series import returns
    >>> returns().num_training
    1600
    """
    simulated = stochastic_volatility(1, 2000, volatility=0.4, generator=0)[0].series(0)
    dates = np.datetime64("2000-01-01") + np.arange(2000)
    data = simulated.replace(coords={"time": dates, "obs": ["return"]})
    past = torch.from_numpy(dates < np.datetime64(split)).unsqueeze(-1)
    where = (torch.rand(data.values.shape, generator=torch.Generator().manual_seed(0)) < hidden) & past
    return _task(
        data.hide(where), split, degree=0, name="Returns with a wandering volatility (simulated)", label="return",
        step="day", season=5, window=60, stride=5, anchored=False,
    )  # fmt: skip
