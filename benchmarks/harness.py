"""One way to measure, for every claim about speed.

A claim is a script ``benchmarks/bench_*.py`` that lists cases; in each case a peer and this package do equal work.
:func:`run` checks first that the two answers agree, then times them alternately in one process, and writes
``results/NAME.json`` and a table ``results/NAME.md``. The ratio is the point; absolute times are context.

    from harness import Case, pin_threads, run

    pin_threads(1)                       # before numpy, torch or jax are imported
    ...
    run("kalman", [Case("n=4, T=2000", ours=f, peer=g, peer_name="dynamax", rtol=1e-9)], packages=["dynamax", "jax"])
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
MIN_REPEATS = 5
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class DisagreementError(AssertionError):
    """Peer and ours do not give the same answer, so their times must not be compared."""


@dataclass(frozen=True)
class Case:
    """One row of a table: equal work by two implementations.

    Attributes:
        name: what is done, with its sizes.
        ours: does the work with this package and returns the answer, computed to the end (no lazy arrays).
        peer: does the same work with the peer.
        peer_name: who the peer is.
        rtol: relative tolerance of the answers.
        atol: absolute tolerance of the answers.
        agree: replaces the comparison by tolerances; takes (ours, peer) and raises DisagreementError, or returns a
            number that says how far the answers are apart.
    """

    name: str
    ours: Callable[[], Any]
    peer: Callable[[], Any]
    peer_name: str = "peer"
    rtol: float = 1e-6
    atol: float = 0.0
    agree: Callable[[Any, Any], float] | None = None


@dataclass(frozen=True)
class Times:
    """Seconds a call: one number a repeat, of the wall clock and of the process's CPU clock (all threads together)."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


class Spread(NamedTuple):
    """Median, smallest and largest of the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of some numbers."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """What was measured in one case.

    ``ratio_wall`` and ``ratio_cpu`` say how many times longer the peer takes: ``median`` is the ratio of the medians,
    ``low`` and ``high`` are the extremes over neighbouring pairs (peer, ours), which saw the same load of the machine.
    """

    name: str
    peer_name: str
    difference: float
    calls: dict[str, int]
    ours: Times
    peer: Times
    ratio_wall: Spread
    ratio_cpu: Spread


class Slope(NamedTuple):
    """Time grows as ``exp(intercept) * size ** slope``; ``residual`` is the largest deviation in log(time)."""

    slope: float
    intercept: float
    residual: float


def pin_threads(count: int) -> None:
    """Hold torch, BLAS, OpenMP and XLA to ``count`` threads; the operating system too, where it can.

    Call it first: the libraries read most of this once, when they are imported.

    Raises:
        ValueError: if count is not a positive number of the cores at hand.
        RuntimeError: if numpy or jax were imported before.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if not 1 <= count <= len(cores):
        raise ValueError(f"pin_threads: count must be between 1 and the {len(cores)} cores at hand, got {count}")
    early = [name for name in ("numpy", "jax") if name in sys.modules]
    if early:
        raise RuntimeError(f"pin_threads: call it before the import of {' and '.join(early)}")
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(count)
    flags = f"--xla_cpu_multi_thread_eigen={'true' if count > 1 else 'false'} intra_op_parallelism_threads={count}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores[:count])
    import torch

    torch.set_num_threads(count)


def largest_difference(ours: Any, peer: Any, rtol: float, atol: float, where: str = "answer") -> float:
    """The largest absolute difference between two answers: numbers, arrays, tensors, or nested dicts and sequences.

    Raises:
        DisagreementError: if structure or shape differ, if a number is not finite, or if a difference exceeds
            ``atol + rtol * max(abs(peer))``: relative to the largest entry of an array, not entry by entry.
    """
    import numpy as np

    if isinstance(ours, dict) and isinstance(peer, dict):
        if ours.keys() != peer.keys():
            raise DisagreementError(f"{where}: ours has the keys {sorted(ours)}, peer has {sorted(peer)}")
        return max((largest_difference(ours[k], peer[k], rtol, atol, f"{where}[{k!r}]") for k in ours), default=0.0)
    if isinstance(ours, (list, tuple)) and isinstance(peer, (list, tuple)):
        if len(ours) != len(peer):
            raise DisagreementError(f"{where}: ours has {len(ours)} entries, peer has {len(peer)}")
        pairs = enumerate(zip(ours, peer, strict=True))
        return max((largest_difference(a, b, rtol, atol, f"{where}[{i}]") for i, (a, b) in pairs), default=0.0)
    a, b = (np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=np.float64) for x in (ours, peer))
    if a.shape != b.shape:
        raise DisagreementError(f"{where}: ours has shape {a.shape}, peer has shape {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise DisagreementError(f"{where}: an answer is not finite")
    difference = float(np.max(np.abs(a - b), initial=0.0))
    allowed = atol + rtol * float(np.max(np.abs(b), initial=0.0))
    if difference > allowed:
        raise DisagreementError(f"{where}: the answers differ by {difference:.3g}, allowed is {allowed:.3g}")
    return difference


def _clock(function: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Wall and CPU seconds of one call, averaged over ``calls`` of them."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        function()
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def _calls_needed(function: Callable[[], Any], min_seconds: float) -> int:
    """How many calls fill ``min_seconds``, so that the resolution of the CPU clock does not matter."""
    calls = 1
    while (seconds := calls * _clock(function, calls)[0]) < min_seconds:
        calls = max(calls + 1, min(10 * calls, math.ceil(1.1 * calls * min_seconds / max(seconds, 1e-9))))
    return calls


def measure(case: Case, repeats: int = 7, min_seconds: float = 0.05) -> Row:
    """Check that the answers of a case agree, then time peer and ours alternately.

    The calls of the check and of the calibration warm both sides up. Garbage is collected before each repeat and not
    during it.

    Args:
        case: the work.
        repeats: how many pairs are timed; at least five.
        min_seconds: a repeat consists of as many calls as fill this time.

    Raises:
        ValueError: for fewer than five repeats.
        DisagreementError: if the answers differ.
    """
    if repeats < MIN_REPEATS:
        raise ValueError(f"measure: repeats must be at least {MIN_REPEATS}, got {repeats}")
    ours, peer = case.ours(), case.peer()
    if case.agree is not None:
        difference = float(case.agree(ours, peer))
    else:
        difference = largest_difference(ours, peer, case.rtol, case.atol)
    del ours, peer
    calls = {"ours": _calls_needed(case.ours, min_seconds), "peer": _calls_needed(case.peer, min_seconds)}
    times = {"ours": Times(), "peer": Times()}
    collecting = gc.isenabled()
    try:
        for _ in range(repeats):
            for side, function in (("peer", case.peer), ("ours", case.ours)):
                gc.collect()
                gc.disable()
                wall, cpu = _clock(function, calls[side])
                gc.enable()
                times[side].wall.append(wall)
                times[side].cpu.append(cpu)
    finally:
        (gc.enable if collecting else gc.disable)()
    return Row(
        name=case.name,
        peer_name=case.peer_name,
        difference=difference,
        calls=calls,
        ours=times["ours"],
        peer=times["peer"],
        ratio_wall=_ratio(times["peer"].wall, times["ours"].wall),
        ratio_cpu=_ratio(times["peer"].cpu, times["ours"].cpu),
    )


def _ratio(peer: Sequence[float], ours: Sequence[float]) -> Spread:
    pairs = [p / o for p, o in zip(peer, ours, strict=True)]
    return Spread(statistics.median(peer) / statistics.median(ours), min(pairs), max(pairs))


def fit_slope(sizes: Sequence[float], times: Sequence[float]) -> Slope:
    """Exponent of growth: least squares of log(time) on log(size).

    Raises:
        ValueError: for fewer than three points, lengths that differ, sizes all equal, or numbers not positive.
    """
    if len(sizes) != len(times) or len(sizes) < 3:
        raise ValueError(f"fit_slope: needs at least three pairs, got {len(sizes)} sizes and {len(times)} times")
    if min(*sizes, *times) <= 0 or min(sizes) == max(sizes):
        raise ValueError("fit_slope: sizes and times must be positive and the sizes not all equal")
    x, y = [math.log(size) for size in sizes], [math.log(seconds) for seconds in times]
    slope, intercept = statistics.linear_regression(x, y)
    residual = max(abs(b - intercept - slope * a) for a, b in zip(x, y, strict=True))
    return Slope(slope, intercept, residual)


def machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """What the times depend on: processor, cores, threads, versions. No path and no name of the machine."""
    import torch

    from pyro_ssm._version import __version__

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "cores_used": usable,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {"pyro_ssm": __version__}
        | {package: metadata.version(package) for package in ("torch", "pyro-ppl", *packages)},
    }


def table(name: str, rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """The rows as a Markdown page."""
    out = [f"# {name}", ""]
    out += ["| case | peer | ours, ms CPU | peer, ms CPU | peer / ours, CPU | peer / ours, wall | answers differ by |"]
    out += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row.name, row.peer_name, _spread(Spread.of(row.ours.cpu), 1e3), _spread(Spread.of(row.peer.cpu), 1e3)]
        cells += [f"**{_spread(row.ratio_cpu)}**", _spread(row.ratio_wall), f"{row.difference:.1e}"]
        out.append(f"| {' | '.join(cells)} |")
    repeats = {len(row.ours.wall) for row in rows}
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    out += ["", "Median (smallest to largest). A ratio above 1: the peer takes longer.", ""]
    counts = " or ".join(map(str, sorted(repeats)))
    out += [
        f"{facts['cpu']}, {facts['cores_used']} of {facts['cores']} cores, torch with {facts['threads']} thread(s); "
        f"{counts} repeats, peer and ours in turn, in one process. Python {facts['python']}; {versions}."
    ]
    return "\n".join(out) + "\n"


def _record(row: Row) -> dict[str, Any]:
    return asdict(row) | {"ratio_wall": row.ratio_wall._asdict(), "ratio_cpu": row.ratio_cpu._asdict()}


def _spread(spread: Spread, scale: float = 1.0) -> str:
    median, low, high = (f"{value * scale:.3g}" for value in spread)
    return f"{median} ({low} to {high})"


def run(
    name: str,
    cases: Sequence[Case],
    packages: Sequence[str] = (),
    repeats: int = 7,
    min_seconds: float = 0.05,
    results: Path = RESULTS,
) -> list[Row]:
    """Measure every case and write ``NAME.json`` and ``NAME.md``.

    Args:
        name: of the claim and of its two files.
        cases: what is compared.
        packages: distributions whose versions are recorded, besides torch's, Pyro's and this package's.
        repeats: see :func:`measure`.
        min_seconds: see :func:`measure`.
        results: folder of the two files.

    Returns:
        One row a case, so that a script can assert its claim.

    Raises:
        ValueError: if there is no case.
        DisagreementError: if the answers of a case differ; nothing is written then.
    """
    if not cases:
        raise ValueError(f"run: {name!r} has no cases")
    facts = machine(packages)
    rows = []
    for case in cases:
        try:
            rows.append(measure(case, repeats, min_seconds))
        except DisagreementError as error:
            raise DisagreementError(f"{name}, case {case.name!r} against {case.peer_name}: {error}") from error
        print(f"{case.name}: {_spread(rows[-1].ratio_cpu)} times {case.peer_name} (CPU)", flush=True)
    results.mkdir(parents=True, exist_ok=True)
    content = {"name": name, "machine": facts, "rows": [_record(row) for row in rows]}
    (results / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (results / f"{name}.md").write_text(table(name, rows, facts), encoding="utf-8")
    return rows
