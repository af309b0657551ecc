"""Three bounds of a variational recurrent network on the JSB chorales: ELBO, IWAE and FIVO, nats per time step.

The three are the same program: `ParticleELBO` with one particle, without resampling, and with it, of one model (VRNN,
Chung et al. 2015) and one guide that reads the past. First for weights that were never trained, with the emission's
output bias at the notes' shares, as the code of Maddison et al. (2017) starts; there the published program gives
-12.199, -11.981 and -11.580 (4 particles, test split, sizes as here). Weights are random, so that the numbers differ by
seed; their order must not, and the script fails if it does. With ``--steps`` each bound then trains a model of its own
for that many steps, and all three are measured on the test split.

    python benchmarks/fivo_jsb.py                # untrained only: under a minute
    python benchmarks/fivo_jsb.py --steps 400    # and a short training by each of the three

After a hundred steps all three have only just learnt the notes' shares (-11.06, independent notes) and agree; published
models (FIVO -6.90 with 4 particles) were trained for a thousand times as long.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from datasets import polyphonic

import pyro_ssm as ssm
from pyro_ssm.infer import ParticleELBO

RESULTS = Path(__file__).parent / "results"
PUBLISHED = {"elbo": -12.199, "iwae": -11.981, "fivo": -11.580}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--state", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=5, help="untrained models")
    parser.add_argument("--repeats", type=int, default=5, help="evaluations of a bound that are averaged")
    parser.add_argument("--steps", type=int, default=0, help="of training by each bound")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def losses(particles: int) -> dict[str, ParticleELBO]:
    return {
        "elbo": ParticleELBO(1),
        "iwae": ParticleELBO(particles, ess_threshold=0.0),
        "fivo": ParticleELBO(particles, ess_threshold=0.5),
    }


def build(args: argparse.Namespace, train: ssm.TimeSeries, seed: int):
    torch.manual_seed(seed)
    model = ssm.models.vrnn(args.state, 88, hidden_dim=args.hidden, emission=ssm.emissions.Bernoulli)
    guide = ssm.guides.Structured(model, args.hidden, direction="past", structured=False)
    played = (train.values.sum((0, 1)) / train.mask.sum((0, 1))).clamp(1e-4, 0.5)
    with torch.no_grad():
        model.emission.network.layers[-1].bias.copy_(played.logit())
    return model, guide


def measured(args: argparse.Namespace, model, guide, data: ssm.TimeSeries) -> dict[str, float]:
    """Each bound of all series over all their steps, averaged over repetitions."""
    steps, found = int(data.lengths.sum()), {}
    with ssm.infer.evaluating(model, guide):
        for name, loss in losses(args.particles).items():
            found[name] = -statistics.fmean(loss.loss(model, guide, data) for _ in range(args.repeats)) / steps
    return found


def untrained(args: argparse.Namespace, train: ssm.TimeSeries, test: ssm.TimeSeries) -> list[dict[str, float]]:
    rows = []
    for seed in range(args.seeds):
        rows.append(measured(args, *build(args, train, seed), test))
        print(f"untrained, seed {seed}: {line(rows[-1])}", flush=True)
        if not rows[-1]["elbo"] < rows[-1]["iwae"] < rows[-1]["fivo"]:
            raise SystemExit(f"seed {seed}: the bounds are not in order: {rows[-1]}")
    return rows


def trained(args: argparse.Namespace, train: ssm.TimeSeries, test: ssm.TimeSeries) -> dict[str, dict[str, float]]:
    rows = {}
    for name, loss in losses(args.particles).items():
        model, guide = build(args, train, 0)
        fitted = ssm.infer.fit(
            model,
            guide,
            train,
            loss=loss,
            num_steps=args.steps,
            batch_size=args.batch,
            by_length=True,
            lr=args.lr,
            schedule=ssm.infer.warmup_cosine(args.steps, args.steps // 20),
            progress=False,
        )
        rows[name] = measured(args, model, guide, test) | {"seconds": fitted.seconds}
        print(f"trained by {name}, {fitted.seconds:.0f} s: {line(rows[name])}", flush=True)
    return rows


def line(row: dict[str, float]) -> str:
    return ", ".join(f"{name} {row[name]:.3f}" for name in PUBLISHED)


def table(args: argparse.Namespace, result: dict) -> str:
    rows = [("published, untrained", PUBLISHED)]
    rows += [(f"untrained, seed {seed}", row) for seed, row in enumerate(result["untrained"])]
    rows += [(f"trained by {name}, {args.steps} steps", row) for name, row in result["trained"].items()]
    lines = ["# Bounds of a VRNN, JSB chorales", "", "| | ELBO | IWAE | FIVO |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {row['elbo']:.3f} | {row['iwae']:.3f} | {row['fivo']:.3f} |" for name, row in rows]
    lines += [
        "",
        f"Nats per step: totals of all test sequences over {result['test_steps']} steps; {args.particles} particles, "
        f"state {args.state}, hidden {args.hidden}, mean of {args.repeats} evaluations. Published: the code of "
        "Maddison et al. (2017), other random weights.",
    ]
    if result["trained"]:
        lines += [
            f"Training: batches of {args.batch}, Adam with rate {args.lr} and half a cosine, one core; seconds: "
            + ", ".join(f"{name} {row['seconds']:.0f}" for name, row in result["trained"].items())
            + ". Independent notes with the training split's shares give -11.06.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    train, test = polyphonic("jsb", "train"), polyphonic("jsb", "test")
    started = time.monotonic()
    result = {
        "arguments": {name: value for name, value in vars(args).items() if name != "out"},
        "torch": torch.__version__,
        "test_steps": int(test.lengths.sum()),
        "published": PUBLISHED,
        "untrained": untrained(args, train, test),
        "trained": trained(args, train, test) if args.steps else {},
        "seconds": time.monotonic() - started,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "fivo_jsb.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.out / "fivo_jsb.md").write_text(table(args, result), encoding="utf-8")


if __name__ == "__main__":
    main()
