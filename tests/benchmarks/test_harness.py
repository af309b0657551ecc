"""The harness measures what it says: agreement first, equal turns, the right ratio, a complete record."""

import gc
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Case, DisagreementError, fit_slope, largest_difference, measure, run

ROOT = Path(__file__).parents[2]


class Work:
    """A stand-in that records its turns on a clock of its own: no test here depends on the load of the machine."""

    now = {"wall": 0.0, "cpu": 0.0}

    def __init__(self, name, seconds, log, answer=1.0, threads=1):
        self.name, self.seconds, self.log, self.answer, self.threads = name, seconds, log, answer, threads

    def __call__(self):
        self.log.append(self.name)
        seconds = self.seconds() if callable(self.seconds) else self.seconds
        self.now["wall"] += seconds
        self.now["cpu"] += seconds * self.threads
        return self.answer


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(Work, "now", {"wall": 0.0, "cpu": 0.0})
    clocks = SimpleNamespace(perf_counter=lambda: Work.now["wall"], process_time=lambda: Work.now["cpu"])
    monkeypatch.setattr(harness, "time", clocks)


def test_ratio_of_known_times(clock):
    log = []
    row = measure(Case("x", ours=Work("ours", 0.01, log), peer=Work("peer", 0.03, log, threads=2)), min_seconds=0.0)
    assert row.ratio_wall == pytest.approx((3, 3, 3))
    assert row.ratio_cpu == pytest.approx((6, 6, 6))
    assert row.ours.wall == pytest.approx([0.01] * 7)
    assert row.peer.cpu == pytest.approx([0.06] * 7)


def test_ratio_is_of_medians_and_its_range_of_pairs(clock):
    # The first two calls are the check and the calibration.
    seconds = iter([9, 9, 1, 2, 3, 4, 50])
    row = measure(Case("x", Work("ours", 1.0, []), Work("peer", lambda: next(seconds), [])), repeats=5, min_seconds=0.0)
    assert row.ratio_wall == pytest.approx((3, 1, 50))


def test_peer_and_ours_take_turns(clock):
    log = []
    measure(Case("x", Work("ours", 1.0, log), Work("peer", 1.0, log)), repeats=5, min_seconds=0.0)
    assert log[:4] == ["ours", "peer", "ours", "peer"]  # the check, the calibration
    assert log[4:] == ["peer", "ours"] * 5


def test_short_work_is_repeated_until_it_fills_the_time(clock):
    row = measure(Case("x", Work("ours", 0.001, []), Work("peer", 0.2, [])), min_seconds=0.05)
    assert row.calls["peer"] == 1
    assert 50 <= row.calls["ours"] <= 60
    assert row.ratio_wall == pytest.approx((200, 200, 200))


def test_clocks_are_those_of_the_system():
    def sleep():
        time.sleep(0.02)
        return 0

    row = measure(Case("sleep", sleep, sleep), repeats=5, min_seconds=0.0)
    assert min(row.ours.wall) >= 0.02
    assert max(row.ours.cpu) < 0.02  # sleeping takes wall time, not processor time


def test_garbage_collection_is_left_as_it_was(clock):
    assert gc.isenabled()
    seen = []
    case = Case("x", lambda: seen.append(gc.isenabled()) or Work("ours", 1.0, [])(), Work("peer", 1.0, []))
    measure(case, min_seconds=0.0)
    assert gc.isenabled()
    assert seen[2:] == [False] * 7


def test_disagreement_stops_before_timing(clock, tmp_path):
    log = []
    case = Case("T=3", Work("ours", 1.0, log, answer=1.0), Work("peer", 1.0, log, answer=1.1), "other", rtol=0.01)
    with pytest.raises(DisagreementError, match=r"claim, case 'T=3' against other: answer: .* differ by 0\.1"):
        run("claim", [case], results=tmp_path)
    assert log == ["ours", "peer"]
    assert list(tmp_path.iterdir()) == []


def test_own_comparison(clock):
    calls = []
    case = Case("x", Work("ours", 1.0, [], 1), Work("peer", 1.0, [], 5), agree=lambda a, b: calls.append((a, b)) or 4)
    assert measure(case).difference == 4
    assert calls == [(1, 5)]


def test_largest_difference_in_nested_answers():
    ours = {"value": 1.0, "grad": (torch.tensor([1.0, 2.0]), [np.array(3)])}
    peer = {"value": 1.0, "grad": (np.array([1.0, 2.5]), [3.0])}
    assert largest_difference(ours, peer, rtol=0.2, atol=0.0) == 0.5
    with pytest.raises(DisagreementError, match=r"answer\['grad'\]\[0\]: .* differ by 0.5, allowed is 0.25"):
        largest_difference(ours, peer, rtol=0.1, atol=0.0)
    assert largest_difference(ours, peer, rtol=0.0, atol=0.5) == 0.5


@pytest.mark.parametrize(
    ("ours", "peer", "message"),
    [
        ([1.0], [1.0, 2.0], "1 entries, peer has 2"),
        ({"a": 1.0}, {"b": 1.0}, "keys"),
        (np.zeros(2), np.zeros((2, 1)), r"shape \(2,\), peer has shape \(2, 1\)"),
        (math.nan, math.nan, "not finite"),
        (math.inf, math.inf, "not finite"),
    ],
)
def test_answers_of_different_kind_disagree(ours, peer, message):
    with pytest.raises(DisagreementError, match=message):
        largest_difference(ours, peer, rtol=1.0, atol=1.0)


@pytest.mark.parametrize("repeats", [0, 4])
def test_too_few_repeats(repeats):
    with pytest.raises(ValueError, match=f"at least 5, got {repeats}"):
        measure(Case("x", lambda: 1, lambda: 1), repeats=repeats)


def test_no_cases(tmp_path):
    with pytest.raises(ValueError, match="no cases"):
        run("claim", [], results=tmp_path)


def test_record_and_table(clock, tmp_path):
    case = Case("n=4", Work("ours", 0.002, []), Work("peer", 0.005, []), "other")
    rows = run("claim", [case], packages=["numpy"], repeats=5, min_seconds=0.0, results=tmp_path)
    record = json.loads((tmp_path / "claim.json").read_text())
    assert record["rows"][0]["ratio_cpu"] == pytest.approx({"median": 2.5, "low": 2.5, "high": 2.5})
    assert record["rows"][0]["ours"]["wall"] == rows[0].ours.wall
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["machine"]["versions"]["numpy"] == np.__version__
    page = (tmp_path / "claim.md").read_text()
    assert "| n=4 | other | 2 (2 to 2) | 5 (5 to 5) | **2.5 (2.5 to 2.5)** | 2.5 (2.5 to 2.5) | 0.0e+00 |" in page
    assert f"numpy {np.__version__}" in page
    for text in (page, json.dumps(record)):
        assert str(ROOT) not in text and str(Path.home()) not in text


def test_fit_slope_of_a_power_law():
    sizes = [100, 200, 400, 1000]
    slope = fit_slope(sizes, [3e-6 * size**1.5 for size in sizes])
    assert slope.slope == pytest.approx(1.5)
    assert math.exp(slope.intercept) == pytest.approx(3e-6)
    assert slope.residual == pytest.approx(0.0, abs=1e-12)


def test_fit_slope_shows_what_is_no_power_law():
    assert fit_slope([1, 2, 4], [1, 2, 1]) == pytest.approx((0.0, math.log(2) / 3, 2 * math.log(2) / 3))


@pytest.mark.parametrize(
    ("sizes", "times"), [([1, 2], [1, 2]), ([1, 2, 3], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [0, 1, 2])]
)
def test_fit_slope_refuses(sizes, times):
    with pytest.raises(ValueError, match="fit_slope"):
        fit_slope(sizes, times)


PIN = """
from benchmarks.harness import pin_threads
{before}
try:
    pin_threads({count})
except Exception as error:
    print(type(error).__name__, error)
else:
    import os, torch
    xla = "intra_op_parallelism_threads=1" in os.environ["XLA_FLAGS"]
    print(torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], xla)
"""


@pytest.mark.parametrize(
    ("count", "before", "printed"),
    [
        (1, "", "1 1 True"),
        (1, "import numpy", "RuntimeError pin_threads: call it before the import of numpy"),
        (0, "", "ValueError pin_threads: count must be between 1 and"),
    ],
)
def test_pin_threads(count, before, printed):
    script = PIN.format(count=count, before=before)
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith(printed), result.stderr
