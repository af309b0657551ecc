"""Walking, 3 frames -> the other 297 (CMU subject 35; Yildiz et al. 2019): a latent ODE, its guide of three frames.

The emission starts at the principal components of the training split, so that the state is a posture (and more); the
equation learns from windows of the training series, whose length grows, walked at paces of +-15 %, at last +-4 %:
two of the three validation series are slower than any of the 16 training series. The validation split chooses the
step; the test split is read once, with ``--test``. The error is the mean over series, frames 4 to 300 and 50 angles of
the squared difference to the mean of 50 draws: an MSE, as in the tables of ODE2VAE and of latent SDEs.

    nice -n 10 env OMP_NUM_THREADS=1 python benchmarks/mocap35.py --test      # results/mocap35.json and .md
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import mocap35
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_ssm as ssm

RESULTS = Path(__file__).parent / "results"
CONTEXT = 3
PUBLISHED = (
    ("npODE", "22.96"),
    ("neural ODE", "22.49 ± 0.88"),
    ("ODE2VAE", "10.06 ± 1.4"),
    ("ODE2VAE-KL", "8.09 ± 1.95"),
    ("ARCTA", "7.62 ± 0.93 (its own code prints RMSE)"),
    ("latent ODE (Li et al. 2020)", "5.98 ± 0.28"),
    ("SDE matching", "4.50 ± 0.32"),
    ("latent SDE (Li et al. 2020)", "4.03 ± 0.20"),
)
BASELINES = (
    ("zero", "33.67"),
    ("nearest training series by the first 3 frames", "23.08"),
    ("kernel average of training series", "18.58"),
    ("the truth, projected on 6 training components", "1.22"),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="mocap35")
    parser.add_argument("--minutes", type=float, default=12.0, help="wall time of all stages together")
    parser.add_argument("--horizons", type=int, nargs="+", default=[60, 120, 200, 240], help="frames of a window")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.1, 0.3, 0.5, 1.0], help="of the time, at stage ends"
    )
    parser.add_argument("--components", type=int, default=6, help="postures in the state")
    parser.add_argument("--pace", type=float, default=0.15, help="unit of the logarithm of the pace in the state")
    parser.add_argument(
        "--paces",
        type=float,
        nargs="+",
        default=[0.15, 0.15, 0.15, 0.04],
        help="its deviation in the windows, by stage",
    )
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--stride", type=int, default=5, help="frames between the starts of windows")
    parser.add_argument("--step-size", type=float, default=0.5, help="of the Runge-Kutta steps; a frame is 0.1")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--noise", type=float, default=2.5, help="standard deviation of an angle, not learnt")
    parser.add_argument(
        "--jitters",
        type=float,
        nargs="+",
        default=[0.1, 0.1, 0.1, 0.01],
        help="noise of the guide's postures, by stage",
    )
    parser.add_argument("--first", type=int, default=0, help="stage to begin with, from the weights that were kept")
    parser.add_argument("--decay", type=float, default=0.99, help="of the average of weights, a step")
    parser.add_argument("--every", type=int, default=25, help="steps between evaluations of the validation split")
    parser.add_argument("--test", action="store_true", help="read the test split")
    parser.add_argument("--trained", action="store_true", help="take the weights that an earlier run has kept")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Postures(PyroModule):
    """Features of the first frames, read as postures: the principal components that the state begins with.

    While it trains the postures get noise, so that a start beside the cycle is told to come back to it.
    """

    def __init__(self, mean: Tensor, axes: Tensor, hidden: int, jitter: float) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("axes", axes)  # (obs, k): a record to postures of unit variance
        self.jitter = jitter
        size = CONTEXT * axes.shape[-1]
        self.network = ssm.blocks.MLP(size, (hidden,), hidden - size, "tanh")

    def forward(self, data: ssm.TimeSeries, model: Any) -> Any:
        postures = ((data.values[..., :CONTEXT, :] - self.mean) @ self.axes).flatten(-2)
        if self.training and self.jitter > 0:
            postures = postures + self.jitter * torch.randn_like(postures)
        return ssm.guides.Context(torch.cat([postures, self.network(postures)], -1).unsqueeze(-2))


class Gait(PyroModule):
    """A cycle that everybody walks, and a pace that each keeps: :math:`\\dot z = e^s f(z),\\; \\dot s = 0`.

    The state is (z, s), all coordinates of unit variance.
    """

    def __init__(self, size: int, hidden: int, spread: float) -> None:
        super().__init__()
        self.state_dim, self.input_dim, self.spread = size + 1, 0, spread
        self.network = ssm.blocks.MLP(size, (hidden, hidden), size, "tanh")

    def forward(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        z, pace = state[..., :-1], state[..., -1:]
        return torch.cat([(self.spread * pace).exp() * self.network(z), torch.zeros_like(pace)], -1)


def build(args: argparse.Namespace, train: ssm.TimeSeries) -> tuple[ssm.StateSpaceModel, Any]:
    """The model with its emission at the principal components: a state of unit variance is a usual posture."""
    size, k = args.components + 1, args.components
    field = Gait(k, args.hidden, spread=args.pace)
    model = ssm.models.latent_ode(size, 50, field=field, noise=args.noise, method="rk4", step_size=args.step_size)
    record = train.values.reshape(-1, 50)
    mean = record.mean(0)
    _, spread, axes = torch.linalg.svd(record - mean, full_matrices=False)
    scale = spread[:k] / len(record) ** 0.5
    layer = model.emission.network.layers[-1]
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, :k] = axes[:k].T * scale
        layer.bias.copy_(mean)
    encoder = Postures(mean, axes[:k].T / scale, args.hidden, args.jitters[0])
    guide = ssm.guides.InitialState(model, args.hidden, encoder=encoder)
    with torch.no_grad():  # the start is the first posture, with a standard deviation of 0.1
        layer = guide.head.layers[-1]
        layer.weight.mul_(0.1)
        layer.weight[:k, :k] += torch.eye(k)
        layer.bias[size:] = -2.25
    return model, guide


def windows(data: ssm.TimeSeries, args: argparse.Namespace, horizon: int, spread: float) -> ssm.TimeSeries:
    """Windows of so many frames, each walked at a pace of its own, with times that begin at 0."""
    found = []
    for values in data.values:
        for start in range(0, data.num_times - horizon + 1, args.stride):
            longest = (data.num_times - 1 - start) / (horizon - 1)
            pace = math.exp(spread * float(torch.randn(()).clamp(-2, 2)))
            at = start + min(pace, longest) * torch.arange(horizon)
            before = at.floor().long().clamp(max=data.num_times - 2)
            part = (at - before).unsqueeze(-1)
            found.append((1 - part) * values[before] + part * values[before + 1])
    return ssm.TimeSeries(data.times[:horizon], torch.stack(found))


@torch.no_grad()
def error(model: nn.Module, guide: nn.Module, data: ssm.TimeSeries, num_samples: int = 50) -> tuple[float, Tensor]:
    """Mean squared error of frames 4 to 300 given the first 3, and that of each series."""
    seen = ssm.TimeSeries(data.times[:CONTEXT], data.values[:, :CONTEXT])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with ssm.infer.evaluating(model, guide):
            bound = model.bind()
            start = guide.start(seen, bound).sample((num_samples,))
            path = bound.transition.solve(start, data.times)
            mean = bound.emission(path, data.times, None).mean.mean(0)
    series = (mean - data.values)[:, CONTEXT:].square().mean((-1, -2))
    return float(series.mean()), series


class Best:
    """The averaged weights that did best on the validation split."""

    def __init__(self, model: nn.Module, guide: nn.Module, data: Any, args: argparse.Namespace) -> None:
        self.current, self.args = nn.ModuleList([model, guide]), args
        self.train, self.valid = data
        self.average = torch.optim.swa_utils.AveragedModel(
            self.current, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(args.decay)
        )
        self.curve: list[tuple[int, float, float]] = []
        self.state: dict[str, Tensor] = {}
        self.step, self.started, self.until = 0, time.monotonic(), 0.0

    def follow(self, step: int, bound: float) -> bool:
        self.step += 1
        self.average.update_parameters(self.current)
        seconds = time.monotonic() - self.started
        if self.step % self.args.every == 0:
            found = error(*self.average.module, self.valid)[0]
            if not self.curve or found < min(value for *_, value in self.curve):
                self.state = copy.deepcopy(self.average.module.state_dict())
                torch.save(self.state, RESULTS / f"{self.args.name}.pt")
            self.curve.append((self.step, round(seconds, 1), found))
            learnt = error(*self.average.module, self.train)[0] if self.step % (4 * self.args.every) == 0 else math.nan
            print(
                f"step {self.step}, {seconds / 60:.1f} min, bound {bound:.3f}, validation {found:.3f}, training "
                f"{learnt:.3f}",
                flush=True,
            )
        return seconds > self.until

    def restore(self) -> None:
        self.current.load_state_dict(self.state)


def table(result: dict[str, Any]) -> str:
    """The measured row beside the published ones."""
    lines = ["# mocap35: 3 frames -> 297, mean squared error", "", "| | test MSE |", "|---|---|"]
    lines += [f"| this script, latent ODE | {result['test']:.2f} |"]
    lines += [f"| {name} | {value} |" for name, value in (*PUBLISHED, *BASELINES)]
    chosen, over = result["chosen"], result["test"] - 10
    lines += [
        "",
        f"Target: at most 10; {f'missed by {over:.2f}' if over > 0 else 'reached'}. {result['minutes']:.1f} minutes on "
        f"one thread of a shared processor{result.get('note', '')}. Step {chosen['step']} did best on the validation "
        f"split ({chosen['validation']:.2f}, 3 series), and the test split (4 series: "
        f"{', '.join(f'{x:.2f}' for x in result['test_series'])}) was read once. Published numbers are means over "
        "several seeds; ours is one.",
        "",
        "What limits it: two of the three validation series are walked 12 to 17 % slower than the mean of the training "
        "series, whose paces differ by 2 %. A model that has learnt that narrow spread reaches an error of 3 to 5 on "
        "the training series (given 3 frames, in sample) and of about 28 on the validation split, which therefore "
        "chooses early weights that are less sure of themselves.",
        "",
    ]
    return "\n".join(lines)


def learn(args: argparse.Namespace, model: nn.Module, guide: nn.Module, train: ssm.TimeSeries) -> dict[str, Any]:
    """All stages; leaves model and guide at the weights that did best on the validation split."""
    best = Best(model, guide, (train, mocap35("valid")), args)
    stages = []
    plan = zip(args.horizons, args.shares, args.jitters, args.paces, strict=True)
    for i, (horizon, share, jitter, spread) in list(enumerate(plan))[args.first :]:
        guide.encoder.jitter = jitter
        best.until = 60 * args.minutes * share
        data = windows(train, args, horizon, spread)
        fitted = ssm.infer.fit(
            model,
            guide,
            data,
            num_steps=100_000,
            batch_size=args.batch,
            lr=args.lr * 0.6**i,
            optimizer=partial(torch.optim.AdamW, weight_decay=args.weight_decay),
            clip_norm=1.0,
            annealing=ssm.infer.linear_annealing(0.05, 300) if i == 0 else None,
            progress=False,
            callback=best.follow,
        )
        stages.append(
            {
                "horizon": horizon,
                "jitter": jitter,
                "pace": spread,
                "windows": data.batch_shape[0],
                "steps": fitted.num_steps,
            }
        )
    best.restore()
    step, _, validation = min(best.curve, key=lambda row: row[-1])
    return {
        "arguments": vars(args),
        "torch": torch.__version__,
        "minutes": (time.monotonic() - best.started) / 60,
        "stages": stages,
        "chosen": {"step": step, "validation": validation},
        "curve": {"columns": ["step", "seconds", "validation MSE"], "rows": best.curve},
    }


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    RESULTS.mkdir(exist_ok=True)
    train = mocap35("train")
    model, guide = build(args, train)
    if args.trained:
        nn.ModuleList([model, guide]).load_state_dict(torch.load(RESULTS / f"{args.name}.pt"))
        result = json.loads((RESULTS / f"{args.name}.json").read_text())
    else:
        if args.first:
            nn.ModuleList([model, guide]).load_state_dict(torch.load(RESULTS / f"{args.name}.pt"))
        result = learn(args, model, guide, train)
    if args.test:
        test, series = error(model, guide, mocap35("test"))
        result |= {"test": test, "test_series": series.tolist()}
        (RESULTS / f"{args.name}.md").write_text(table(result))
        print(test, series.tolist(), flush=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
