"""Interpolation of intensive-care records (PhysioNet 2012), as Rubanova et al. (2019), table 5: a fraction of it.

The protocol: 41 columns scaled to [0, 1], times in parts of 48 hours, 80 / 20 by stays; a latent ODE (state 20, noise
0.01) with an ODE-RNN that runs backward (state 40) reads all observations of a stay and reconstructs them. Theirs: the
8000 stays of sets A and B, 100 epochs. Here: set A (4000 stays), and as many steps as the minutes allow; the number is
what that gives, no reproduction of the table. Two errors are given: over all observed entries of the test stays; and as
their code averages, which takes the mean over all columns of the error of each, 0 for those of a stay that were never
observed, then over stays and 3 draws (to our reading; the paper does not say).

    nice -n 10 env OMP_NUM_THREADS=1 python benchmarks/physionet.py --minutes 10   # results/physionet.json and .md
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import physionet2012
from torch import Tensor

import pyro_ssm as ssm

RESULTS = Path(__file__).parent / "results"
PUBLISHED = (
    ("RNN-VAE", "5.930 ± 0.249"),
    ("latent ODE, RNN encoder", "3.907 ± 0.252"),
    ("GRU-D", "3.384 ± 0.274"),
    ("latent ODE, ODE-RNN encoder, Poisson", "2.789 ± 0.771"),
    ("ODE-RNN", "2.361 ± 0.086"),
    ("latent ODE, ODE-RNN encoder", "2.118 ± 0.271"),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="physionet")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--state", type=int, default=20)
    parser.add_argument("--recognition", type=int, default=40)
    parser.add_argument("--units", type=int, default=50)
    parser.add_argument("--poisson", action="store_true", help="the times of observation as a Poisson process")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--decay", type=float, default=0.999, help="of the learning rate, a step")
    parser.add_argument("--annealing", type=int, default=300, help="steps until the KL has its whole weight")
    parser.add_argument("--every", type=int, default=64)
    parser.add_argument("--test-stays", type=int, default=800, help="of the 800 test stays, to be read")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build(args: argparse.Namespace) -> tuple[ssm.StateSpaceModel, Any]:
    """The paper's sizes: networks of 3 hidden layers of 50 in the equations, an affine emission."""
    layers = (args.units,) * 3
    model = ssm.models.latent_ode(args.state, 41, hidden=layers, noise=0.01, poisson=args.poisson)
    model.initial.requires_grad_(False)
    field = ssm.blocks.MLP(args.recognition, layers, args.recognition, "tanh")
    backward = ssm.blocks.ODERNN(83, args.recognition, field, obs_dim=41, method="euler")
    encoder = ssm.blocks.Bidirectional(None, backward)
    return model, ssm.guides.InitialState(model, args.recognition, cell=encoder, head=(100,))


@torch.no_grad()
def errors(model: Any, guide: Any, data: ssm.TimeSeries) -> dict[str, float]:
    """Mean squared errors of the reconstruction, over observed entries and as the paper's code averages."""
    squares, counts, by_column = 0.0, 0, list[Tensor]()
    with torch.random.fork_rng(), ssm.infer.evaluating(model, guide):
        torch.manual_seed(0)
        bound = model.bind()
        for start in range(0, data.batch_shape[0], 100):
            part = data.minibatch(torch.arange(start, min(start + 100, data.batch_shape[0])))
            path = guide.path(part, bound).sample((3,))
            off = torch.where(part.mask, bound.emission(path, part.times, None).mean - part.values, 0.0).square()
            seen = part.mask.sum(-2)
            squares, counts = squares + float(off.sum()) / 3, counts + int(seen.sum())
            by_column.append((off.sum(-2) / seen.clamp(min=1)).mean((0, 2)))
    return {"entries": squares / counts, "columns": float(torch.cat(by_column).mean())}


def baseline(train: ssm.TimeSeries, test: ssm.TimeSeries) -> float:
    """Mean squared error, over observed entries, of each column's mean."""
    mean = torch.where(train.mask, train.values, 0.0).sum((0, 1)) / train.mask.sum((0, 1)).clamp(min=1)
    return float((test.values - mean)[test.mask].square().mean())


def table(result: dict[str, Any]) -> str:
    found, size = result["test"], result["size"]
    lines = ["# physionet: interpolation, mean squared error x 1e-3", "", "| | MSE x 1e-3 |", "|---|---|"]
    lines += [f"| this script, averaged as we read the paper's code | {1e3 * found['columns']:.3f} |"]
    lines += [f"| this script, over all observed entries | {1e3 * found['entries']:.3f} |"]
    lines += [f"| the mean of each column, over all observed entries | {1e3 * result['mean_of_column']:.3f} |"]
    lines += [f"| Rubanova et al. (2019), {name} | {value} |" for name, value in PUBLISHED]
    lines += [
        "",
        f"A fraction of the published experiment: {size['train']} training stays of set A (theirs: 6400 of A and B), "
        f"{result['epochs']:.2f} epochs (theirs: 100), {result['steps']} steps of {size['batch']} stays in "
        f"{result['seconds'] / 60:.1f} minutes on one thread of a shared processor; {size['test']} test stays, read "
        "once at the end. It says what this much training gives, and reproduces nothing.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    data = physionet2012()
    order = torch.randperm(data.batch_shape[0], generator=torch.Generator().manual_seed(42))
    cut = int(0.8 * len(order))
    train, test = (part(data, index) for index in (order[:cut], order[cut:][: args.test_stays]))
    torch.manual_seed(args.seed)
    model, guide = build(args)
    held = part(train, torch.arange(100))  # progress is told on training stays
    started, curve = time.monotonic(), list[tuple[int, float, float]]()

    def follow(step: int, bound: float) -> bool:
        seconds = time.monotonic() - started
        if step % args.every == 0:
            curve.append((step, round(seconds, 1), errors(model, guide, held)["entries"]))
            print(curve[-1], f"bound {bound:.3f}", flush=True)
        return seconds > 60 * args.minutes

    fitted = ssm.infer.fit(
        model,
        guide,
        train,
        num_epochs=args.epochs,
        batch_size=args.batch,
        by_length=True,
        lr=args.lr,
        schedule=lambda step: args.decay**step,
        annealing=ssm.infer.linear_annealing(0.01, args.annealing),
        clip_norm=100.0,
        checkpoint=RESULTS / f"{args.name}.ckpt",
        progress=False,
        callback=follow,
    )
    result = {
        "arguments": vars(args),
        "torch": torch.__version__,
        "size": {"train": cut, "test": test.batch_shape[0], "batch": args.batch},
        "steps": fitted.num_steps,
        "epochs": fitted.num_steps * args.batch / cut,
        "seconds": fitted.seconds,
        "mean_of_column": baseline(train, test),
        "test": errors(model, guide, test),
        "curve": {"columns": ["step", "seconds", "MSE of 100 training stays"], "rows": curve},
    }
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{args.name}.md").write_text(table(result))
    print(table(result))


def part(data: ssm.TimeSeries, index: Tensor) -> ssm.TimeSeries:
    """Some series, as a data set of its own."""
    return data.minibatch(index).replace(index=None, total=None)


if __name__ == "__main__":
    main()
