"""Pictures of forecasts and latent paths; matplotlib is imported only here, and only when asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.diagnostics.axes import Axes
from pyro_ssm.predict import Forecast, PosteriorDraws, quantile
from pyro_ssm.predict.record import record_of

__all__ = ["plot_forecast", "plot_states"]

LEVELS = (0.9, 0.5)  # widest first, so that the narrow band lies on top
SEEN, DRAWN, FUTURE, HELD_OUT = "0.25", "tab:blue", "tab:orange", "tab:red"


def plot_forecast(
    data: TimeSeries,
    forecast: Forecast,
    series: int | str = 0,
    obs: int = 0,
    *,
    ax: Any = None,
    held_out: TimeSeries | None = None,
    last: int | None = None,
) -> Any:
    """What was observed, and the forecast of it: mean, 50 % and 90 % bands of the draws, held-out values.

    Args:
        data: what the forecast went on from.
        forecast: what :func:`~pyro_ssm.predict.forecast` returned.
        series: position or name of the series; without a batch there is but one.
        obs: position of the observed coordinate.
        ax: matplotlib axes to draw on; default: new ones.
        held_out: what was observed later, at any times.
        last: how many of the last times of ``data`` to show; default: all.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no such series; or several batch dims (take one series of each argument first).

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.diagnostics import plot_forecast
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> later = ssm.predict.Forecast(torch.randn(50, 3, 2, 1), torch.randn(50, 3, 2, 2), torch.tensor([4.0, 5.0]))
    >>> plot_forecast(data, later, series=2).get_ylabel()
    'y'
    """
    ax = _axes(1)[0] if ax is None else ax
    at = _position(data, series)
    name = data.coords["obs"][obs] if "obs" in data.coords else "y" if data.obs_dim == 1 else f"y[{obs}]"
    past = _one(data, at)
    shown = slice(None if last is None else max(past.num_observed_times - last, 0), None)
    ax.plot(
        _labels(past)[shown],
        _seen(past, obs)[shown],
        ".-",
        color=SEEN,
        markersize=4,
        lw=0.4,
        label="observed",
        zorder=3,
    )
    time = _future_labels(data, forecast, at)
    _bands(ax, time, _of(forecast.values, at)[..., obs], "forecast")
    if held_out is not None:
        later = _one(held_out, at)
        ax.plot(
            _labels(later), _seen(later, obs), "o", color=HELD_OUT, mfc="none", markersize=5, label="held out", zorder=4
        )
    ax.set_ylabel(str(name))
    _finish(ax, data, series)
    return ax


def plot_states(
    data: TimeSeries,
    draws: PosteriorDraws | Tensor,
    series: int | str = 0,
    states: list[int] | None = None,
    *,
    axes: Any = None,
    forecast: Forecast | None = None,
) -> list[Any]:
    """The latent path of one series: mean, 50 % and 90 % bands of the draws, one panel for each coordinate.

    Args:
        data: what the posterior was given.
        draws: what :func:`~pyro_ssm.predict.posterior_draws` returned, or paths ``(S, *batch, time, state)``.
        series: position or name of the series.
        states: positions of the coordinates; default: the first six.
        axes: as many matplotlib axes; default: new ones, one below the other.
        forecast: to go on into the future.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no such series; as many axes as coordinates are not given.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.diagnostics import plot_states
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> [ax.get_ylabel() for ax in plot_states(data, torch.randn(50, 3, 4, 2), series=1)]
    ['z[0]', 'z[1]']
    """
    paths = draws.states if isinstance(draws, PosteriorDraws) else draws
    chosen = list(range(min(paths.shape[-1], 6))) if states is None else list(states)
    axes = _axes(len(chosen)) if axes is None else list(np.atleast_1d(axes))
    if len(axes) != len(chosen):
        raise ValueError(f"`axes` has {len(axes)} matplotlib axes, but one for each of the states {chosen} is wanted")
    at = _position(data, series)
    time = _labels(_one(data.without_values().replace(observed_index=None), at))
    for ax, k in zip(axes, chosen, strict=True):
        _bands(ax, time, _of(paths, at)[:, : len(time), k], "posterior")
        if forecast is not None:
            later = _of(forecast.states, at)[..., k]
            _bands(ax, _future_labels(data, forecast, at), later, "forecast", FUTURE)
        ax.set_ylabel(f"z[{k}]")
        ax.spines[["top", "right"]].set_visible(False)
    _finish(axes[0], data, series)
    return axes


def _axes(number: int) -> list[Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'pyro-ssm[plots]'") from error
    figure = Figure(figsize=(9, 3.4 if number == 1 else 1.0 + 1.6 * number), layout="constrained")
    return list(np.atleast_1d(figure.subplots(number, 1, sharex=True)))


def _bands(ax: Any, time: np.ndarray, draws: Tensor, label: str, color: str = DRAWN) -> None:
    for level, alpha in zip(LEVELS, (0.18, 0.35), strict=True):
        lower, upper = (quantile(draws, q).cpu().numpy() for q in (0.5 - level / 2, 0.5 + level / 2))
        if len(time) > 1:
            ax.fill_between(time, lower, upper, color=color, alpha=alpha, lw=0)
        else:
            ax.vlines(time, lower, upper, color=color, alpha=alpha, lw=8)
    levels = " and ".join(f"{level:.0%}" for level in sorted(LEVELS))
    marker = "o" if len(time) == 1 else None
    ax.plot(
        time, draws.mean(0).cpu().numpy(), color=color, lw=1.5, marker=marker, label=f"{label}: mean, {levels} bands"
    )


def _finish(ax: Any, data: TimeSeries, series: int | str) -> None:
    handles = len(ax.get_legend_handles_labels()[0])
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=handles, frameon=False, fontsize="small")
    if data.batch_shape:
        names = data.coords.get("series")
        name = series if names is None or isinstance(series, str) else names[series]
        ax.set_title(str(name), loc="left", fontsize="medium")
    ax.spines[["top", "right"]].set_visible(False)


def _position(data: TimeSeries, series: int | str) -> tuple[int, ...]:
    """The index of the series along the batch dims."""
    if len(data.batch_shape) > 1:
        raise ValueError(f"pictures are of data with one batch dim or none, and this has {tuple(data.batch_shape)}")
    if not data.batch_shape:
        return ()
    if isinstance(series, str):
        names = data.coords.get("series")
        found = [] if names is None else np.flatnonzero(names == series).tolist()
        if len(found) != 1:
            raise ValueError(f"`series` is {series!r}, which names {len(found)} series; give a position")
        return (found[0],)
    if not 0 <= series < data.batch_shape[0]:
        raise ValueError(f"`series` is {series}, but 0 to {data.batch_shape[0] - 1} is wanted")
    return (series,)


def _of(draws: Tensor, at: tuple[int, ...]) -> Tensor:
    """The draws of one series."""
    return draws[:, at[0]] if at else draws


def _one(data: TimeSeries, at: tuple[int, ...]) -> TimeSeries:
    return data.series(at) if at else data


def _labels(data: TimeSeries) -> np.ndarray:
    """Dates or times of the observation times of one series."""
    labels = Axes(data).time_labels
    return labels if labels is not None and labels.dtype.kind == "M" else data.observed_times.cpu().numpy()


def _future_labels(data: TimeSeries, forecast: Forecast, at: tuple[int, ...]) -> np.ndarray:
    times = forecast.times[at] if forecast.times.dim() > 1 else forecast.times
    return Axes(_one(data, at)).future_labels(times)[0]


def _seen(data: TimeSeries, obs: int) -> np.ndarray:
    """Observed values, NaN where missing."""
    values, mask = record_of(data)
    return torch.where(mask, values, torch.full_like(values, float("nan")))[..., obs].cpu().numpy()
