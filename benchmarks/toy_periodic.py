"""Extrapolation of periodic series from irregular times: a latent ODE against an RNN-VAE (Rubanova et al. 2019, 4.1).

Sines of random frequency and phase, 25 observations each at its own random times in [0, 5] with noise 0.05; both models
are trained on that span alone: first on short windows of it, then on longer ones, last on all of it. The error is that
of the mean of 20 posterior draws against the sine without noise, at the times of the observations, at other random
times of [0, 5], and going on to random times of (5, 10]. Both have the same state, noise and guide of the start (an
ODE-RNN that runs backward) and the same training, whose settings were not searched for either; the latent ODE's decoder
is a network as field, the RNN-VAE's a GRU of the same width that is told the gap before each time.

    nice -n 10 env OMP_NUM_THREADS=1 python benchmarks/toy_periodic.py      # results/toy_periodic.json and .md
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_ssm as ssm

RESULTS = Path(__file__).parent / "results"
SPAN, NOISE = 5.0, 0.05


class StandStill(PyroModule):
    """The field of a state that moves by jumps only."""

    def forward(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        return torch.zeros_like(state)


class DecoderCell(PyroModule):
    """A GRU as a jump: the next state, told the gap that it is for."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(1, hidden)
        self.widen, self.narrow = nn.Linear(size, hidden), nn.Linear(hidden, size)

    def forward(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        hidden = self.widen(state)
        lead = torch.broadcast_shapes(hidden.shape[:-1], inputs.shape[:-1])
        hidden, gap = hidden.expand(lead + hidden.shape[-1:]), inputs.expand(lead + (1,))
        moved = self.cell(gap.reshape(-1, 1), hidden.reshape(-1, hidden.shape[-1]))
        return self.narrow(moved).reshape(lead + (state.shape[-1],))


def sines(number: int, points: int, generator: torch.Generator) -> tuple[ssm.TimeSeries, Tensor, Tensor]:
    """Noisy observations at own random times of [0, 5], and the frequency and phase of each sine."""
    frequency = 0.4 + 0.4 * torch.rand(number, 1, generator=generator)
    phase = 2 * math.pi * torch.rand(number, 1, generator=generator)
    times = SPAN * torch.rand(number, points, generator=generator, dtype=torch.float64).sort(-1).values
    times[:, 0] = 0.0  # a path begins at the first time
    values = truth(times, frequency, phase)
    return with_gaps(times, values + NOISE * torch.randn(values.shape, generator=generator)), frequency, phase


def truth(times: Tensor, frequency: Tensor, phase: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * frequency * times.float() + phase).unsqueeze(-1)


def with_gaps(times: Tensor, values: Tensor | None) -> ssm.TimeSeries:
    """The gap after each time as its input."""
    gaps = torch.nn.functional.pad(times.diff(dim=-1), (0, 1)).float().unsqueeze(-1)
    return ssm.TimeSeries(times, values, inputs=gaps)


def build(kind: str, args: argparse.Namespace) -> tuple[ssm.StateSpaceModel, Any]:
    size, hidden = args.state, args.hidden
    if kind == "latent ODE":
        solver = {"method": "rk4", "step_size": 0.25}
        field = ssm.dynamics.MLPDrift(size, (hidden, hidden), activation="tanh")
        model = ssm.models.latent_ode(size, 1, field=field, emission_dim=hidden, noise=0.1, **solver)
    else:
        jumps = {"method": "euler", "jump": DecoderCell(size, hidden), "interpolation": None}
        model = ssm.models.latent_ode(size, 1, field=StandStill(), emission_dim=hidden, noise=0.1, **jumps)
    backward = ssm.blocks.ODERNN(3, hidden, obs_dim=1, method="euler")  # a value, its mask, the gap
    encoder = ssm.blocks.Bidirectional(None, backward)
    return model, ssm.guides.InitialState(model, hidden, cell=encoder)


def windows(data: ssm.TimeSeries, span: float, number: int = 3) -> ssm.TimeSeries:
    """Windows of so long a span, from anywhere in each series, with times that begin at 0 at the first observation."""
    found, clocks = [], []
    for times, values in zip(data.times, data.values, strict=True):
        for begin in ((SPAN - span) * torch.rand(number)).tolist():
            seen = (times >= begin) & (times <= begin + span)
            if int(seen.sum()) > 2:
                found.append(values[seen])
                clocks.append(times[seen] - times[seen][0])
    gaps = [torch.nn.functional.pad(clock.diff(), (0, 1)).float().unsqueeze(-1) for clock in clocks]
    return ssm.TimeSeries.from_sequences(found, clocks, gaps)


class Errors(NamedTuple):
    """Mean squared errors of the posterior mean."""

    observed: float  # at the times of the observations
    within: float  # at other random times of [0, 5]
    beyond: float  # at random times of (5, 10], after those of the observations


@torch.no_grad()
def errors(model: Any, guide: Any, data: ssm.TimeSeries, frequency: Tensor, phase: Tensor) -> Errors:
    """On times as dense as those of the observations: a decoder that steps has learnt gaps of that size."""
    generator, number = torch.Generator().manual_seed(1), data.num_times
    times = SPAN * torch.rand(2, data.batch_shape[0], number, generator=generator, dtype=torch.float64).sort(-1).values
    onward, others = torch.cat([data.times, SPAN + times[0]], -1), times[1]
    others[:, 0] = 0.0
    with torch.random.fork_rng(), ssm.infer.evaluating(model, guide):
        torch.manual_seed(0)
        bound = model.bind()
        start = guide.start(data, bound).sample((20,))
        squared = []
        for grid in (onward, others):
            path = bound.transition.solve(start, grid, with_gaps(grid, None).inputs)
            found = bound.emission(path, grid, None).mean.mean(0)
            squared.append((found - truth(grid, frequency, phase)).square().mean((0, 2)))
    return Errors(float(squared[0][:number].mean()), float(squared[1].mean()), float(squared[0][number:].mean()))


def train(kind: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data, *_ = sines(args.series, args.points, generator)
    held = sines(200, args.points, generator)
    model, guide = build(kind, args)
    decline, curve, done, seconds = ssm.infer.warmup_cosine(sum(args.steps)), list[tuple[Any, ...]](), 0, 0.0

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 20) * decline(done + step)  # each stage starts its moments anew

    def follow(step: int, bound: float) -> None:
        if (done + step) % args.every == 0:
            curve.append((done + step, *errors(model, guide, *held)))
            print(kind, seed, curve[-1], f"bound {bound:.3f}", flush=True)

    for stage, (span, steps) in enumerate(zip(args.spans, args.steps, strict=True)):
        fitted = ssm.infer.fit(
            model,
            guide,
            windows(data, span) if span < SPAN else data,
            num_steps=steps,
            batch_size=args.batch,
            lr=args.lr,
            schedule=factor,
            annealing=ssm.infer.linear_annealing(0.01, steps) if stage == 0 else None,
            clip_norm=1.0,
            progress=False,
            callback=follow,
        )
        done, seconds = done + fitted.num_steps, seconds + fitted.seconds
    return {
        "model": kind,
        "seed": seed,
        "parameters": {
            "model": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "guide": sum(p.numel() for p in guide.parameters()),
        },
        "steps": done,
        "seconds": seconds,
        "errors": errors(model, guide, *held)._asdict(),
        "curve": {"columns": ["step", *Errors._fields], "rows": curve},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="toy_periodic")
    parser.add_argument("--spans", type=float, nargs="+", default=[1.5, 3.0, SPAN], help="of the windows, by stage")
    parser.add_argument("--steps", type=int, nargs="+", default=[600, 600, 1300], help="of each stage")
    parser.add_argument("--series", type=int, default=1000)
    parser.add_argument("--points", type=int, default=25)
    parser.add_argument("--state", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--every", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    return parser.parse_args()


def table(runs: list[dict[str, Any]], args: argparse.Namespace) -> str:
    lines = ["# toy_periodic: mean squared error against the sine (its variance is 0.5)", ""]
    lines += [
        "| | seed | observed times | other times of [0, 5] | times of (5, 10] | parameters, model + guide | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        sizes, found = run["parameters"], " | ".join(f"{value:.4f}" for value in run["errors"].values())
        lines.append(
            f"| {run['model']} | {run['seed']} | {found} | {sizes['model']} + {sizes['guide']} | "
            f"{run['seconds'] / 60:.1f} |"
        )
    for kind in dict.fromkeys(run["model"] for run in runs):
        rows = [list(run["errors"].values()) for run in runs if run["model"] == kind]
        means = " | ".join(f"**{statistics.mean(column):.4f}**" for column in zip(*rows, strict=True))
        lines.append(f"| {kind}, mean | | {means} | | |")
    lines += [
        "",
        f"{args.series} training series of {args.points} observations, 200 others for the errors; {sum(args.steps)} "
        f"steps of {args.batch} series for each model and seed, on windows of "
        f"{', '.join(f'{span:g}' for span in args.spans)}; errors of the last step. One thread of a shared processor. "
        "Rubanova et al. show figures for this experiment, not numbers.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    runs = [train(kind, seed, args) for seed in args.seeds for kind in ("latent ODE", "RNN-VAE")]
    RESULTS.mkdir(exist_ok=True)
    result = {"arguments": vars(args), "torch": torch.__version__, "runs": runs}
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{args.name}.md").write_text(table(runs, args))
    print(table(runs, args))


if __name__ == "__main__":
    main()
