"""Extrapolation of periodic series from irregular times: a latent ODE against an RNN-VAE (Rubanova et al. 2019, 4.1).

Sines of random frequency and phase, 25 observations each at its own random times in [0, 5] with noise 0.05; both models
are trained on that span alone. The error is that of the mean of 20 posterior draws against the sine without noise, at
the times of the observations, at other random times of [0, 5], and going on to random times of (5, 10]. Both have the
same state, noise and guide of the start (an ODE-RNN that runs backward); the latent ODE's decoder is a network as
field, the RNN-VAE's a GRU of the same width that is told the gap before each time (twice as many parameters).

    nice -n 10 env OMP_NUM_THREADS=1 python benchmarks/toy_periodic.py      # results/toy_periodic.json and .md
"""

from __future__ import annotations

import argparse
import json
import math
import time
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


def train(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    data, *_ = sines(args.series, args.points, generator)
    held = sines(200, args.points, generator)
    model, guide = build(kind, args)
    started, curve = time.monotonic(), list[tuple[Any, ...]]()

    def follow(step: int, bound: float) -> bool:
        seconds = time.monotonic() - started
        if step % args.every == 0:
            curve.append((step, round(seconds, 1), *errors(model, guide, *held)))
            print(kind, curve[-1], f"bound {bound:.3f}", flush=True)
        return seconds > 60 * args.minutes

    fitted = ssm.infer.fit(
        model,
        guide,
        data,
        num_steps=args.steps,
        batch_size=args.batch,
        lr=args.lr,
        schedule=ssm.infer.warmup_cosine(args.steps, warmup=20),
        annealing=ssm.infer.linear_annealing(0.01, args.steps // 2),
        clip_norm=1.0,
        progress=False,
        callback=follow,
    )
    decoder = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "model": kind,
        "parameters": {"model": decoder, "guide": sum(p.numel() for p in guide.parameters())},
        "steps": fitted.num_steps,
        "seconds": fitted.seconds,
        "errors": errors(model, guide, *held)._asdict(),
        "curve": {"columns": ["step", "seconds", *Errors._fields], "rows": curve},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="toy_periodic")
    parser.add_argument("--minutes", type=float, default=6.0, help="wall time of each model's training")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--series", type=int, default=1000)
    parser.add_argument("--points", type=int, default=25)
    parser.add_argument("--state", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def table(runs: list[dict[str, Any]], args: argparse.Namespace) -> str:
    lines = ["# toy_periodic: mean squared error against the sine (its variance is 0.5)", ""]
    lines += [
        "| | observed times | other times of [0, 5] | times of (5, 10] | parameters, model + guide | steps | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        sizes = run["parameters"]
        found = " | ".join(f"{value:.4f}" for value in run["errors"].values())
        lines.append(
            f"| {run['model']} | {found} | {sizes['model']} + "
            f"{sizes['guide']} | {run['steps']} | {run['seconds'] / 60:.1f} |"
        )
    lines += [
        "",
        f"{args.series} training series of {args.points} observations, 200 others for the errors; one seed, one thread "
        "of a shared processor. Rubanova et al. show figures for this experiment, not numbers.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    runs = [train(kind, args) for kind in ("latent ODE", "RNN-VAE")]
    RESULTS.mkdir(exist_ok=True)
    result = {"arguments": vars(args), "torch": torch.__version__, "runs": runs}
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{args.name}.md").write_text(table(runs, args))
    print(table(runs, args))


if __name__ == "__main__":
    main()
