"""The pictures of the demo: forecasts of the held-out span, and what the deep model makes of a window with gaps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_ssm import predict
from pyro_ssm.demo.models import Outcome
from pyro_ssm.demo.series import Task

__all__ = ["draw_forecasts", "draw_latent"]

SEEN, DEEP, LINEAR, HELD_OUT = "0.2", "tab:blue", "tab:orange", "tab:red"


def draw_forecasts(path: Path, results: Sequence[tuple[Task, Sequence[Outcome]]]) -> None:
    """Draw the forecasts that follow each other without overlap, one panel a series.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from pyro_ssm.demo import deep, draw_forecasts, linear, sunspots
    >>> task, tiny = sunspots(), {"num_steps": 1, "num_samples": 20, "progress": False}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     draw_forecasts(Path(folder) / "forecast.png", [(task, [deep(task, **tiny), linear(task, **tiny)])])
    ...     (Path(folder) / "forecast.png").stat().st_size > 10_000
    True
    """
    figure, panels = _figure(len(results), height=4.0)
    for ax, (task, outcomes) in zip(panels, results, strict=True):
        origins, dates = list(task.origins()), task.data.coords["time"]
        chosen = list(range(0, len(origins), task.season))
        starts = [origins[i] for i in chosen]
        known = [start - task.window for start in starts]
        shown = slice(max(task.num_training - task.window, 0), starts[-1] + task.season)
        for outcome, colour in zip(outcomes, (DEEP, LINEAR)):
            draws = task.original(outcome.draws[:, chosen], known, starts)
            for i, start in enumerate(starts):
                time = dates[start : start + task.season]
                label = f"{outcome.name}: " if i == 0 else None
                if colour == DEEP:
                    _band(ax, time, draws[:, i, :, 0], colour, label)
                else:
                    low, high = predict.interval(draws[:, i, :, 0], 0.9)
                    for edge, name in ((low, label and f"{label}90 % band"), (high, None)):
                        ax.plot(time, edge, "--", color=colour, lw=1, label=name)
                ax.axvline(time[0], color="0.85", lw=0.8, zorder=0)
        values = torch.where(task.data.mask, task.data.values, torch.nan)[..., 0]
        before, after = slice(shown.start, task.num_training), slice(task.num_training, shown.stop)
        ax.plot(dates[before], values[before], ".-", color=SEEN, ms=3, lw=0.5, label="training")
        ax.plot(dates[after], values[after], "o", color=HELD_OUT, mfc="none", ms=3.5, mew=0.8, label="held out")
        _mark_missing(ax, task, shown)
        times = "new forecast at each grey line"
        ax.set_title(f"{task.name}: forecasts of the next {task.season} steps ({times})", fontsize=10)
        _finish(ax, task)
    _save(figure, path)


def draw_latent(path: Path, results: Sequence[tuple[Task, Outcome]], num_samples: int = 200) -> None:
    """Draw, for each series, the training window with most gaps: the values and the latent states, with their bands.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from pyro_ssm.demo import deep, draw_latent, sunspots
    >>> task = sunspots()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     outcome = deep(task, num_steps=1, num_samples=2, progress=False)
    ...     draw_latent(Path(folder) / "latent.png", [(task, outcome)], 10)
    ...     (Path(folder) / "latent.png").stat().st_size > 10_000
    True
    """
    figure, panels = _figure(2 * len(results), height=2.6)
    for (top, bottom), (task, outcome) in zip(zip(panels[::2], panels[1::2]), results, strict=True):
        starts, windows = list(task.window_starts()), task.windows()
        worst = int(windows.mask.sum((-2, -1)).argmin())
        window = windows.minibatch([worst])
        shown = slice(starts[worst], starts[worst] + task.window)
        dates = task.data.coords["time"][shown]
        draws = predict.posterior_draws(outcome.model, outcome.guide, window, num_samples)
        filled = predict.impute(outcome.model, draws, window, num_samples)
        filled = task.original(filled, [shown.start], [shown.start])[:, 0, :, 0]
        seen = task.data.mask[shown, 0]
        values = task.data.values[shown, 0]
        top.plot(dates, torch.where(seen, values, torch.nan), ".-", color=SEEN, ms=4, lw=0.5, label="observed")
        low, high = predict.interval(filled, 0.9)
        middle, gap = filled.mean(0), (~seen).numpy()
        error = torch.stack([middle - low, high - middle])[:, gap]
        top.errorbar(dates[gap], middle[gap], error, fmt="s", color=DEEP, ms=3.5, lw=1, label="imputed, 90 %")
        _mark_missing(top, task, shown)
        top.set_title(
            f"{task.name}: the training window with most gaps, and the states that the guide infers", fontsize=10
        )
        for k in range(draws.states.shape[-1]):
            state = draws.states[:, 0, :, k]
            low, high = predict.interval(state, 0.9)
            bottom.plot(dates, state.mean(0), color=f"C{k}", lw=1.2, label=f"$z_{k + 1}$")
            bottom.fill_between(dates, low, high, color=f"C{k}", alpha=0.2, lw=0)
        _mark_missing(bottom, task, shown)
        _finish(top, task)
        _finish(bottom, task)
        bottom.set_ylabel("state (no unit): mean, 90 %")
    _save(figure, path)


def _figure(rows: int, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, 1, squeeze=False)[:, 0]


def _band(ax: Any, time: np.ndarray, draws: Tensor, colour: str, label: str | None) -> None:
    for level, alpha in ((0.9, 0.2), (0.5, 0.35)):
        low, high = predict.interval(draws, level)
        name = label and f"{label}{100 * level:.0f} % band"
        ax.fill_between(time, low, high, color=colour, alpha=alpha, lw=0, label=name)
    ax.plot(time, draws.mean(0), color=colour, lw=1.2, label=label and f"{label}mean")


def _mark_missing(ax: Any, task: Task, shown: slice) -> None:
    gaps = (~task.data.mask[shown, 0]).numpy()
    for i, date in enumerate(task.data.coords["time"][shown][gaps]):
        ax.axvline(date, ymax=0.04, color="tab:purple", lw=2, label="missing" if i == 0 else None)


def _finish(ax: Any, task: Task) -> None:
    ax.set_ylabel(task.label)
    ax.set_xlabel("date")
    ax.margins(x=0.01)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, ncols=4, loc="upper left", frameon=False)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.22 * (high - low))  # room for the legend


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
