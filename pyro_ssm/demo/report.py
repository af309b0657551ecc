"""What the demo says: a table, a verdict in words, and the results for ArviZ."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyro_ssm import predict
from pyro_ssm.demo.models import Outcome
from pyro_ssm.demo.series import Task
from pyro_ssm.diagnostics import to_inference_data

__all__ = ["COVERAGE", "Row", "inference_data", "rows", "table", "verdict", "write_summary"]

COVERAGE = (0.80, 0.97)  # what the share of held-out values in a 90 % band may be


class Row(NamedTuple):
    """One line of the table; log score and CRPS in the units of the series.

    >>> from pyro_ssm.demo import Row
    >>> Row._fields
    ('series', 'model', 'bound', 'log_score', 'crps', 'coverage', 'seconds')
    """

    series: str
    model: str
    bound: float  # nats per observation of the training span; of the scaled series
    log_score: float  # nats per held-out value; higher is better
    crps: float  # lower is better
    coverage: float  # share of held-out values in the 90 % band
    seconds: float


def rows(task: Task, outcomes: Sequence[Outcome]) -> list[Row]:
    """The scores of all models on the held-out span.

    >>> from pyro_ssm.demo import rows, seasonal_naive, sunspots
    >>> task = sunspots()
    >>> rows(task, [seasonal_naive(task)])[0].model
    'seasonal naive'
    """
    held_out = task.futures()
    found = []
    for outcome in outcomes:
        scores = predict.crps(outcome.draws, held_out.values, held_out.mask)
        found.append(
            Row(
                task.name,
                outcome.name,
                outcome.bound,
                predict.average(outcome.log_scores, held_out.mask).item() - math.log(task.scale),
                predict.average(scores, held_out.mask).item() * task.scale,
                predict.coverage(outcome.draws, held_out.values, held_out.mask, level=0.9).item(),
                outcome.seconds,
            )
        )
    return found


def table(found: Sequence[Row]) -> str:
    """The rows as text.

    >>> from pyro_ssm.demo import Row, table
    >>> print(table([Row("Nile", "naive", float("nan"), -6.5, 90.0, 0.9, 1.0)]))
    model               bound  log score    CRPS  90 % band covers   wall time
    naive                   -      -6.50  90.000              90 %         1 s
    """
    lines = ["model               bound  log score    CRPS  90 % band covers   wall time"]
    for row in found:
        bound = "-" if math.isnan(row.bound) else f"{row.bound:.2f}"
        lines.append(
            f"{row.model:<18}{bound:>7}{row.log_score:>11.2f}{row.crps:>8.3f}{100 * row.coverage:>16.0f} %"
            f"{row.seconds:>10.0f} s"
        )
    return "\n".join(lines)


def verdict(found: Sequence[Row]) -> str:
    """Who wins, and whether the deep model's band holds what it says, in words.

    >>> from pyro_ssm.demo import Row, verdict
    >>> deep = Row("Nile", "deep Markov", 0.0, 0.0, 2.0, 0.7, 0.0)
    >>> print(verdict([deep, Row("Nile", "naive", 0.0, 0.0, 1.0, 0.9, 0.0)]))
    Lowest CRPS: naive. The deep Markov model LOSES here, by 100 % in CRPS.
    Its 90 % band covers 70 % of the held-out values: OUTSIDE 80 to 97 %.
    """
    deep, best = found[0], min(found, key=lambda row: row.crps)
    if best is deep:
        second = min(found[1:], key=lambda row: row.crps)
        who = f"Lowest CRPS: {deep.model}, {100 * (1 - deep.crps / second.crps):.0f} % below that of {second.model}."
    else:
        excess = 100 * (deep.crps / best.crps - 1)
        who = f"Lowest CRPS: {best.model}. The {deep.model} model LOSES here, by {excess:.0f} % in CRPS."
    low, high = COVERAGE
    where = "within" if low <= deep.coverage <= high else "OUTSIDE"
    band = f"Its 90 % band covers {100 * deep.coverage:.0f} % of the held-out values: {where} 80 to 97 %."
    return f"{who}\n{band}"


def write_summary(path: Path, found: Sequence[Row]) -> None:
    """Write the rows as a CSV file.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from pyro_ssm.demo import Row, write_summary
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_summary(Path(folder) / "summary.csv", [Row("Nile", "naive", 0.0, -6.5, 90.0, 0.9, 1.0)])
    ...     print((Path(folder) / "summary.csv").read_text().splitlines()[1])
    Nile,naive,0.0,-6.5,90.0,0.9,1.0
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(found)


def inference_data(task: Task, outcome: Outcome, num_samples: int = 200) -> Any:
    """The deep model's posterior over the training span, cut into windows, and a forecast after each, for ArviZ.

    Values are in the units of the models. Of the forecasts, that after the last window is of held-out values.

    >>> from pyro_ssm.demo import deep, inference_data, sunspots
    >>> task = sunspots()
    >>> idata = inference_data(task, deep(task, num_steps=1, num_samples=2, progress=False), num_samples=5)
    >>> dict(idata["posterior"]["z"].sizes)
    {'chain': 1, 'draw': 5, 'series': 5, 'time': 44, 'state': 4}
    """
    data = task.windows(stride=task.window)
    starts = [start + task.window for start in task.window_starts(stride=task.window)]
    after = task.modelled(starts, task.season, list(task.window_starts(stride=task.window)))
    forecast = predict.forecast(outcome.model, outcome.guide, data, after.times, num_samples, inputs=after.inputs)
    imputed = predict.impute(outcome.model, outcome.guide, data, num_samples)
    return to_inference_data(
        outcome.guide,
        model=outcome.model,
        data=data,
        forecast=forecast,
        imputed=imputed,
        num_samples=num_samples,
    )
