"""The demo from end to end."""

import csv
import math

import numpy as np
import pytest
import torch

from pyro_ssm import demo
from pyro_ssm.demo import COVERAGE, Outcome, Row, atmospheric_co2, returns, rows, run, sunspots, verdict

FILES = ("forecast.png", "idata.nc", "latent.png", "summary.csv")


def test_quick_run_writes_everything_and_may_run_again(tmp_path, capsys):
    for _ in range(2):
        found = run(tmp_path / "out", quick=True, progress=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(FILES)
    printed = capsys.readouterr().out
    assert "Carbon dioxide" in printed and "wandering volatility" in printed and "wall time" in printed
    with (tmp_path / "out" / "summary.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [line["model"] for line in written] == [row.model for row in found] == 2 * [
        "deep Markov", "linear-Gaussian", "seasonal naive",
    ]  # fmt: skip
    assert [float(line["crps"]) for line in written] == [row.crps for row in found]


def test_idata_can_be_read_and_has_dates(tmp_path):
    import xarray

    run(tmp_path, quick=True, progress=False)
    with xarray.open_dataset(tmp_path / "idata.nc", group="constant_data") as constant:
        assert constant["date"].values[-1, -1] < np.datetime64("1998-01-01")
    with xarray.open_dataset(tmp_path / "idata.nc", group="posterior") as posterior:
        assert {"series", "time", "state"} <= set(posterior["z"].dims)


def test_rows_are_in_the_units_of_the_series():
    task = sunspots()
    futures = task.futures()
    shifted = (futures.values + 10 / task.scale).expand(3, *futures.values.shape)
    outcome = Outcome("x", math.nan, shifted, torch.zeros_like(futures.values), 0.0)
    row = rows(task, [outcome])[0]
    assert row.crps == pytest.approx(10.0, rel=1e-4)  # draws that are all 10 sunspots off
    assert row.log_score == pytest.approx(-math.log(task.scale))  # a density of 1 per scaled unit
    assert row.coverage == 0.0


def test_verdict_says_who_wins_and_whether_the_band_holds():
    def row(name, crps, coverage=0.9):
        return Row("s", name, 0.0, 0.0, crps, coverage, 0.0)

    assert "Lowest CRPS: deep, 50 % below that of b." in verdict([row("deep", 1.0), row("a", 4.0), row("b", 2.0)])
    assert "LOSES here, by 100 %" in verdict([row("deep", 2.0), row("a", 1.0)])
    assert "within 80 to 97 %" in verdict([row("deep", 1.0, 0.97), row("a", 4.0)])
    assert "OUTSIDE 80 to 97 %" in verdict([row("deep", 1.0, 0.98), row("a", 4.0)])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_deep_band_covers_what_it_says_where_nonlinearity_pays(tmp_path):
    deep, linear, naive = run(tmp_path, progress=False, tasks=[returns()])
    low, high = COVERAGE
    assert low <= deep.coverage <= high
    assert deep.crps < 0.97 * linear.crps < naive.crps
    assert deep.log_score > linear.log_score + 0.2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_deep_model_is_no_worse_than_the_linear_one_that_it_contains(tmp_path):
    deep, linear, naive = run(tmp_path, progress=False, tasks=[atmospheric_co2()])
    low, high = COVERAGE
    assert low <= deep.coverage <= high
    assert deep.crps <= linear.crps < 0.9 * naive.crps
    assert deep.log_score >= linear.log_score > naive.log_score
    assert deep.bound > linear.bound - 0.02  # the encoder and the network learn without losing the exact fit


def test_names_are_those_of_the_command_line():
    assert callable(demo.run)
