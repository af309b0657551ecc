"""Six guide families against the exact answer on a linear-Gaussian truth (Krishnan et al. 2017, figure 4).

The model is known and fixed (z_1 ~ N(0, 1), z_t ~ N(z_{t-1} + 0.05, 10), y_t ~ N(z_t / 2, 20), variances); only the
guides are trained, each in the same way. The judges are the exact negative log-likelihood a step (Kalman) and the root
mean squared error of the exact smoother.

    python benchmarks/krishnan_linear.py          # writes results/krishnan_linear.json and .md
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from datasets import dmm_synthetic9

import pyro_ssm as ssm
from pyro_ssm.infer import evidence_lower_bound, fit, kalman_smoother, warmup_cosine

RESULTS = Path(__file__).parent / "results"
FAMILIES = {
    "MF-L": ("past", False),
    "MF-R": ("future", False),
    "MF-LR": ("both", False),
    "ST-L": ("past", True),
    "ST-R (DKS)": ("future", True),
    "ST-LR": ("both", True),
}


def known_model() -> ssm.StateSpaceModel:
    model = ssm.StateSpaceModel(
        ssm.dynamics.NormalInitial(1),
        ssm.dynamics.LinearNormal(1, matrix=torch.eye(1), scale=math.sqrt(10.0)),
        ssm.emissions.LinearNormal(1, 1, scale=math.sqrt(20.0)),
    )
    with torch.no_grad():
        model.transition.offset.fill_(0.05)
        model.emission.matrix.fill_(0.5)
        model.emission.offset.fill_(0.0)
    return model.requires_grad_(False)


def steps_of(data: ssm.TimeSeries) -> int:
    return int(data.step_mask.sum())


def error(states: torch.Tensor, truth: torch.Tensor) -> float:
    return float((states - truth).square().mean().sqrt())


def evaluate(model: ssm.StateSpaceModel, guide: ssm.guides.Guide, data: ssm.TimeSeries, truth: torch.Tensor) -> dict:
    with torch.no_grad():
        bound = evidence_lower_bound(model, guide, data, num_samples=20).series.sum() / steps_of(data)
        mean = guide.path(data, model.bind()).rsample((400,)).mean(0)
    return {"nll_bound": -float(bound), "rmse": error(mean, truth)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--hidden", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = known_model()
    (train, z_train), (valid, z_valid) = dmm_synthetic9("train"), dmm_synthetic9("valid")
    exact = {}
    for name, data, truth in (("train", train, z_train), ("valid", valid, z_valid)):
        smoothed = kalman_smoother(model, data)
        nll = -float(smoothed.log_likelihood.sum()) / steps_of(data)
        exact[name] = {"nll": nll, "rmse": error(smoothed.mean, truth)}
    rows = {}
    for name, (direction, structured) in FAMILIES.items():
        torch.manual_seed(0)
        guide = ssm.guides.Structured(model, args.hidden, direction, structured)
        fitted = fit(
            model,
            guide,
            train,
            num_steps=args.steps,
            batch_size=args.batch,
            lr=3e-3,
            schedule=warmup_cosine(args.steps, warmup=100),
            progress=False,
        )
        scores = {"train": evaluate(model, guide, train, z_train), "valid": evaluate(model, guide, valid, z_valid)}
        rows[name] = {**scores, "seconds": fitted.seconds}
        print(name, rows[name], flush=True)
    RESULTS.mkdir(exist_ok=True)
    record = {"exact": exact, "families": rows, "arguments": vars(args)}
    (RESULTS / "krishnan_linear.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "krishnan_linear.md").write_text(table(exact, rows, args))


def table(exact: dict, rows: dict, args: argparse.Namespace) -> str:
    judge = exact["train"]
    lines = [
        "# krishnan_linear",
        "",
        "| guide | direction | structured | bound, nats a step | above exact | smoothed RMSE | above exact | held-out "
        "bound | held-out RMSE | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| exact (Kalman) | | | {judge['nll']:.4f} | | {judge['rmse']:.3f} | | {exact['valid']['nll']:.4f} "
        f"| {exact['valid']['rmse']:.3f} | |",
    ]
    for name, row in rows.items():
        direction, structured = FAMILIES[name]
        train, valid = row["train"], row["valid"]
        lines.append(
            f"| {name} | {direction} | {'yes' if structured else 'no'} | {train['nll_bound']:.4f} "
            f"| {100 * (train['nll_bound'] / judge['nll'] - 1):.2f} % | {train['rmse']:.3f} "
            f"| {100 * (train['rmse'] / judge['rmse'] - 1):.2f} % | {valid['nll_bound']:.4f} | {valid['rmse']:.3f} "
            f"| {row['seconds']:.0f} |"
        )
    lines += [
        "",
        f"5000 series of 25 steps (synthetic9 of Krishnan et al. 2017), known model; {args.steps} Adam steps of "
        f"{args.batch} series, hidden {args.hidden}, one CPU thread. Lower is better; the bound is the negative "
        "evidence lower bound over 20 draws, the smoothed state the mean of 400.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
