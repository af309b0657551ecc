"""What is modelled: a bundled series in the form that all models of the demo get, and where it is cut."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries, load

__all__ = ["Task", "atmospheric_co2", "el_nino", "seasonal_inputs"]


class Task(NamedTuple):
    """A series without trend in units of its standard deviation, its season, and the end of the training span.

    The trend (a polynomial in time), the mean and the standard deviation are those of the training span alone; all models
    see the same transformed series and are scored in the units of the original.

    >>> from pyro_ssm.demo.series import atmospheric_co2
    >>> task = atmospheric_co2()
    >>> task.data, task.num_training
    (TimeSeries(times=2284, obs=1, observed=97.4%, inputs=4), 2076)
    """

    name: str
    label: str  # of the axis, with the unit
    step: str  # what one time step is called
    data: TimeSeries  # (time, 1), transformed; inputs are the seasonal ones
    season: int  # steps in a season
    num_training: int  # steps before the held-out span
    window: int  # steps of a training window, and of the history that a forecast is given
    stride: int  # steps from one window to the next, and from one forecast to the next
    trend: Tensor  # (time, 1), original units
    scale: float  # original units per transformed unit

    @property
    def training(self) -> TimeSeries:
        """The training span, one series."""
        return self.data.split(self.num_training)[0]

    def windows(self, stride: int | None = None) -> TimeSeries:
        """Windows of the training span as a batch of series; the last one ends where the span ends."""
        first = (self.num_training - self.window) % (stride or self.stride)
        return cut(self.data, range(first, self.num_training - self.window + 1, stride or self.stride), self.window)

    def histories(self) -> TimeSeries:
        """What is known at each forecast: the window before it. The first forecast starts with the held-out span."""
        return cut(self.data, [origin - self.window for origin in self._origins()], self.window)

    def futures(self) -> TimeSeries:
        """What each forecast is scored against: the season after it."""
        return cut(self.data, self._origins(), self.season)

    def _origins(self) -> range:
        return range(self.num_training, self.data.num_times - self.season + 1, self.stride)

    def original(self, values: Tensor, first: int) -> Tensor:
        """Transformed values ``(..., time, 1)`` from step ``first`` on in the units of the original."""
        return values * self.scale + self.trend[first : first + values.shape[-2]]


def cut(data: TimeSeries, starts: range | list[int], length: int) -> TimeSeries:
    """Stretches of one series as a batch of series, each with its own times."""
    index = torch.tensor(list(starts)).unsqueeze(-1) + torch.arange(length)
    return TimeSeries(data.times[index], data.values[index], data.mask[index], data.inputs[index])


def seasonal_inputs(dates: np.ndarray, harmonics: int = 2) -> Tensor:
    """Sines and cosines of the time of year, ``(time, 2 * harmonics)``.

    >>> import numpy as np
    >>> from pyro_ssm.demo.series import seasonal_inputs
    >>> seasonal_inputs(np.array(["2001-01-01", "2001-07-02T12"], dtype="datetime64[s]"), harmonics=1)
    tensor([[ 0.0000e+00,  1.0000e+00],
            [-8.7423e-08, -1.0000e+00]])
    """
    year = dates.astype("datetime64[Y]")
    start, end = (y.astype("datetime64[s]").astype(np.float64) for y in (year, year + 1))
    phase = torch.from_numpy((dates.astype("datetime64[s]").astype(np.float64) - start) / (end - start)).float()
    angle = 2 * math.pi * phase.unsqueeze(-1) * torch.arange(1, harmonics + 1)
    return torch.cat([angle.sin(), angle.cos()], -1)


def _task(data: TimeSeries, split: str, degree: int, **fields: object) -> Task:
    dates = data.coords["time"]
    num_training = int((dates < np.datetime64(split)).sum())
    time = np.linspace(-1.0, 1.0, data.num_times)
    seen = data.mask[:num_training, 0].numpy()
    seasonal = seasonal_inputs(dates).numpy().astype(np.float64)
    columns = np.concatenate([np.polynomial.chebyshev.chebvander(time, degree), seasonal], -1)
    coefficients = np.linalg.lstsq(columns[:num_training][seen], data.values[:num_training, 0].double().numpy()[seen], rcond=None)[0]
    trend = torch.from_numpy(columns[:, : degree + 1] @ coefficients[: degree + 1]).float().unsqueeze(-1)
    deviation = (data.values - trend)[:num_training][data.mask[:num_training]]
    scale = deviation.std().item()
    return Task(
        data=data.replace(values=(data.values - trend) / scale, mask=data.mask, inputs=seasonal_inputs(dates)),
        num_training=num_training,
        trend=trend,
        scale=scale,
        **fields,
    )


def atmospheric_co2(split: str = "1998-01-01") -> Task:
    """Weekly carbon dioxide at Mauna Loa with its 59 missing weeks; the last four years are held out.

    A quadratic trend is removed, as is usual for this record (Thoning, Tans, Komhyr 1989, J. Geophys. Res. 94(D6)).

    >>> from pyro_ssm.demo.series import atmospheric_co2
    >>> atmospheric_co2().futures().batch_shape
    torch.Size([13])
    """
    return _task(
        load("co2"), split, degree=2, name="Carbon dioxide at Mauna Loa", label="CO2 (ppm)", step="week",
        season=52, window=156, stride=13,
    )  # fmt: skip


def el_nino(split: str = "1996-01-01", hidden: float = 0.1) -> Task:
    """Monthly sea surface temperature in the Nino 1+2 region; the last fifteen years are held out.

    Chosen because its law is not linear: warm events are stronger than cold ones, and how far the temperature strays
    depends on the month. Its entries are all there; a share of those before ``split`` is hidden at random.

    >>> from pyro_ssm.demo.series import el_nino
    >>> el_nino().data
    TimeSeries(times=732, obs=1, observed=92.6%, inputs=4)
    """
    data = load("elnino")
    past = torch.from_numpy(data.coords["time"] < np.datetime64(split)).unsqueeze(-1)
    where = (torch.rand(data.values.shape, generator=torch.Generator().manual_seed(0)) < hidden) & past
    return _task(
        data.hide(where), split, degree=0, name="Sea surface temperature, Nino 1+2", label="temperature (deg C)",
        step="month", season=12, window=72, stride=3,
    )  # fmt: skip
