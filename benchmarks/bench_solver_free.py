"""What a training step costs without a solver: drift evaluations at equal bound, and the slope in the latent dimension.

Two claims. (1) On an Ornstein-Uhlenbeck state with a linear emission (64 series, 6 observations in 2 units of time; the
exact likelihood of held-out series is the judge), ``PosteriorSDE`` on an Euler grid and the solver-free guides are
trained for as many steps each, and scored by their bounds of held-out series. The prior's
drift is counted in each training step; the solver evaluates as many of its posterior drift besides, one after another.
(2) The time of a gradient step of ``SolverFree`` for latent dimension 4 to 1024, diagonal form, with a drift that is
linear in the dimension; the slope of log time on log dimension, of the last octaves and of all.

    python benchmarks/bench_solver_free.py            # writes results/solver_free.json and .md
    python benchmarks/bench_solver_free.py --steps 100 --dims 4 16 64
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from harness import RESULTS, fit_slope, machine, pin_threads

pin_threads(1)

import torch  # noqa: E402  (threads are pinned before torch is imported)
from pyro import poutine  # noqa: E402
from pyro.nn import PyroModule  # noqa: E402

import pyro_ssm as ssm  # noqa: E402
from pyro_ssm.infer import SolverFree, evidence_lower_bound  # noqa: E402

SERIES, REFINE, TIMES = 64, 20, 10
EXACT = SolverFree(8, times="quadrature", order=8)


class Counted(PyroModule):
    """A drift that counts the states at which it is evaluated."""

    def __init__(self, drift: PyroModule) -> None:
        super().__init__()
        self.drift, self.state_dim = drift, drift.state_dim
        self.count = [0]  # one list, which a bound copy shares

    def forward(self, time: torch.Tensor, state: torch.Tensor, inputs: torch.Tensor | None) -> torch.Tensor:
        self.count[0] += state.shape[:-1].numel()
        return self.drift(time, state, inputs)


def linear(exact: bool = False) -> ssm.StateSpaceModel:
    drift = ssm.dynamics.LinearDrift(torch.tensor([[-0.7]]), 0.3)
    sde = ssm.dynamics.NeuralSDE(drift if exact else Counted(drift), ssm.dynamics.ConstantDiffusion(0.8, 1))
    move = ssm.dynamics.discretize(sde, "exact") if exact else sde
    emission = ssm.emissions.LinearNormal(1, 1, scale=0.4)
    model = ssm.StateSpaceModel(ssm.dynamics.NormalInitial(1), move, emission)
    with torch.no_grad():
        emission.matrix.fill_(0.8)
    return model.requires_grad_(False)


def simulated(series: int) -> ssm.TimeSeries:
    times = torch.linspace(0, 2, 6, dtype=torch.float64)
    with torch.no_grad(), poutine.block():
        empty = ssm.TimeSeries(times, torch.zeros(series, 6, 1)).without_values()
        return ssm.TimeSeries(times, linear(exact=True)(empty)[1])


def at_equal_bound(steps: int) -> list[dict]:
    torch.manual_seed(0)
    train, held = simulated(SERIES), simulated(200)
    exact = float(ssm.infer.kalman_filter(linear(exact=True).bind(), held).log_likelihood.sum() / 200)
    rows = [{"guide": "exact (Kalman)", "bound": exact}]
    families = {
        "PosteriorSDE, Euler": lambda model: ssm.guides.PosteriorSDE(model, 32, drift_hidden=64),
        "PosteriorSDE, Euler, tilt": lambda model: ssm.guides.PosteriorSDE(model, 32, drift_hidden=64, tilt=True),
        "ARCTA": lambda model: ssm.guides.ARCTA(model, 5, 32),
        "SDEMatching": lambda model: ssm.guides.SDEMatching(model, 32, hidden=32),
        "SVISE (its own series)": lambda model: ssm.guides.SVISE(model, train),
    }
    for name, make in families.items():
        torch.manual_seed(1)
        model, solves = linear(), name.startswith("Posterior")
        guide, drift = make(model), model.transition.drift
        data, loss = (train.refine(REFINE), None) if solves else (train, SolverFree(TIMES))
        drift.count[0] = 0
        schedule, lr = ssm.infer.warmup_cosine(steps, 20), 3e-2 if name.startswith("SVISE") else 3e-3
        fitted = ssm.infer.fit(model, guide, data, loss=loss, num_steps=steps, lr=lr, schedule=schedule, progress=False)
        per_step = round(drift.count[0] / (steps * SERIES))
        scored, judge = (train, exact) if name.startswith("SVISE") else (held, exact)
        if scored is train:
            judge = float(ssm.infer.kalman_filter(linear(exact=True).bind(), train).log_likelihood.sum() / SERIES)
        with torch.no_grad():
            if solves:
                bound = float(evidence_lower_bound(model, guide, held.refine(REFINE), num_samples=30).series.mean())
            else:
                terms = EXACT.terms(model, guide, scored)
                bound = float((terms.likelihood - terms.start - terms.path).mean())
        row = {"guide": name, "bound": bound, "below": judge - bound, "prior": per_step}
        row |= {"posterior": per_step if solves else 0, "milliseconds": 1e3 * fitted.seconds / steps}
        print(row, flush=True)
        rows.append(row)
    return rows


def by_dimension(dims: list[int]) -> dict:
    """A drift of 2 d weights, an emission of 4 observations, 16 series of 20 times."""
    found: dict = {"dims": dims}
    for name in ("SVISE", "ARCTA", "SDEMatching"):
        seconds = []
        for d in dims:
            torch.manual_seed(0)
            rates = torch.nn.Parameter(torch.rand(d))
            sde = ssm.dynamics.NeuralSDE(
                lambda t, z, u, r=rates: torch.sin(z) - r * z, ssm.dynamics.ConstantDiffusion(0.5, d), state_dim=d
            )
            model = ssm.StateSpaceModel(ssm.dynamics.NormalInitial(d), sde, ssm.emissions.LinearNormal(d, 4))
            data = ssm.TimeSeries(torch.arange(20.0), torch.randn(16, 20, 4))
            guide = {
                "SVISE": lambda m=model, x=data: ssm.guides.SVISE(m, x),
                "ARCTA": lambda m=model: ssm.guides.ARCTA(m, 2, 32),
                "SDEMatching": lambda m=model: ssm.guides.SDEMatching(m, 32, hidden=32),
            }[name]()
            loss = SolverFree(TIMES)
            with ssm.infer.local_parameters():

                def step(loss=loss, model=model, guide=guide, data=data) -> None:
                    loss.differentiable_loss(model, guide, data).backward()

                step()
                each = []
                for _ in range(7):
                    begin = time.process_time()
                    step()
                    each.append(time.process_time() - begin)
            seconds.append(statistics.median(each))
        print(name, [round(1e3 * s, 1) for s in seconds], flush=True)
        found[name] = {"seconds": seconds}
        if len(dims) >= 3:
            found[name] |= {"slope": fit_slope(dims, seconds).slope, "last": fit_slope(dims[-3:], seconds[-3:]).slope}
    return found


def table(rows: list[dict], sizes: dict, facts: dict, steps: int) -> str:
    lines = [
        "# solver_free",
        "",
        f"Ornstein-Uhlenbeck, {SERIES} series, {steps} steps of training each; bounds in nats a series, of held-out "
        f"series (SVISE: of its own, against their own likelihood); the solver takes {REFINE} Euler steps a gap.",
        "",
        "| guide | bound | below exact | prior drift, evaluations a series and step | posterior drift | ms a step |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "below" not in row:
            lines.append(f"| {row['guide']} | {row['bound']:.4f} | | | | |")
            continue
        lines.append(
            f"| {row['guide']} | {row['bound']:.4f} | {row['below']:.4f} | {row['prior']} | {row['posterior']} "
            f"| {row['milliseconds']:.1f} |"
        )
    dims = sizes["dims"]
    lines += ["", f"A gradient step, ms CPU, 16 series of 20 times, {TIMES} random times, by latent dimension:", ""]
    lines += [f"| guide | {' | '.join(map(str, dims))} | slope | slope of the last three |"]
    lines += ["|---|" + "---|" * (len(dims) + 2)]
    for name, row in sizes.items():
        if name != "dims":
            cells = " | ".join(f"{1e3 * s:.1f}" for s in row["seconds"])
            lines.append(f"| {name} | {cells} | {row.get('slope', 0):.2f} | {row.get('last', 0):.2f} |")
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    lines += ["", f"{facts['cpu']}, torch with {facts['threads']} thread. Python {facts['python']}; {versions}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--dims", type=int, nargs="+", default=[4, 16, 64, 256, 512, 1024])
    args = parser.parse_args()
    sizes, rows = by_dimension(args.dims), at_equal_bound(args.steps)
    facts = machine()
    RESULTS.mkdir(exist_ok=True)
    record = {"bounds": rows, "dimensions": sizes, "machine": facts, "arguments": vars(args)}
    (RESULTS / "solver_free.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "solver_free.md").write_text(table(rows, sizes, facts, args.steps))


if __name__ == "__main__":
    main()
