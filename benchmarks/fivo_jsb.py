"""Three bounds of a variational recurrent network on the JSB chorales: ELBO, IWAE and FIVO, nats per time step.

The three are the same program: `ParticleELBO` with one particle, without resampling, and with it, of one model (VRNN,
Chung et al. 2015) and one guide that reads the past. First for weights that were never trained, with the emission's
output bias at the notes' shares, as the code of Maddison et al. (2017) starts; there the published program gives
-12.199, -11.981 and -11.580 (4 particles, test split, sizes as here). Weights are random, so that the numbers differ by
seed; their order must not, and the script fails if it does.

With ``--steps`` each bound then trains a model of its own, from the same weights, with as many steps and as many
particles a step (the ELBO takes batches that are N times as large). The three take turns, some hundred steps a turn, so
that a run that ends early (``--minutes``) still compares like with like. After each turn the three
bounds are measured on the validation and the test split, and, since a bound favours the model that it trained, with
more particles too: the judge common to all is the greatest of them, as in table 1 of the paper (JSB, N = 4: -8.60 after
training by ELBO, -7.86 by IWAE, -6.90 by FIVO, judged with 128 particles). The turn is chosen on the validation
split, by the bound that was trained.

After a thousand steps the order is the published one for both seeds (FIVO of the second was stopped after 500), with
differences of 0.2 to 0.9 nats, while all bounds are still rising; in the first few hundred steps the ELBO, with its
larger batches, is ahead of IWAE. The ELBO's model hardly uses its state: its three bounds are one number.

    python benchmarks/fivo_jsb.py                                # untrained only: under a minute
    python benchmarks/fivo_jsb.py --steps 3000 --seeds 2         # and training by each of the three
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import polyphonic

import pyro_ssm as ssm
from pyro_ssm.infer import ParticleELBO

RESULTS = Path(__file__).parent / "results"
PUBLISHED = {"elbo": -12.199, "iwae": -11.981, "fivo": -11.580}
PUBLISHED_TRAINED = {"elbo": -8.60, "iwae": -7.86, "fivo": -6.90}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--judge-particles", type=int, default=128)
    parser.add_argument("--state", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--untrained", type=int, default=3, help="models that are not trained")
    parser.add_argument("--seeds", type=int, default=2, help="models that are trained by each bound")
    parser.add_argument("--repeats", type=int, default=3, help="evaluations of a bound that are averaged")
    parser.add_argument("--steps", type=int, default=0, help="of training by each bound")
    parser.add_argument("--turn", type=int, default=500, help="steps between two measurements")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no turn begins that would end later")
    parser.add_argument("--batch", type=int, default=16, help="series a step; N times as many for the ELBO")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--checkpoints", type=Path, help="folder from which to go on; default a temporary one")
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


def measured(bounds: dict[str, ParticleELBO], repeats: int, model, guide, data: ssm.TimeSeries) -> dict[str, float]:
    """Each bound of all series over all their steps, averaged over repetitions."""
    steps, found = int(data.lengths.sum()), {}
    with ssm.infer.evaluating(model, guide):
        for name, loss in bounds.items():
            found[name] = -statistics.fmean(loss.loss(model, guide, data) for _ in range(repeats)) / steps
    return found


def untrained(args: argparse.Namespace, train: ssm.TimeSeries, test: ssm.TimeSeries) -> list[dict[str, float]]:
    rows = []
    for seed in range(args.untrained):
        rows.append(measured(losses(args.particles), args.repeats, *build(args, train, seed), test))
        print(f"untrained, seed {seed}: {line(rows[-1])}", flush=True)
        if not rows[-1]["elbo"] < rows[-1]["iwae"] < rows[-1]["fivo"]:
            raise SystemExit(f"seed {seed}: the bounds are not in order: {rows[-1]}")
    return rows


def judged(args: argparse.Namespace, model, guide, data: ssm.TimeSeries) -> dict[str, float]:
    """The three bounds with the particles of training, those of many particles, and the greatest of all."""
    few = measured(losses(args.particles), args.repeats, model, guide, data)
    many = measured(losses(args.judge_particles), 1, model, guide, data)
    found = few | {f"{name}_many": many[name] for name in ("iwae", "fivo")}
    return found | {"judge": max(found.values())}


def one_turn(args: argparse.Namespace, splits: dict[str, ssm.TimeSeries], name: str, seed: int, steps: int, folder):
    """Train until ``steps`` have been taken in all, and measure."""
    model, guide = build(args, splits["train"], seed)
    fitted = ssm.infer.fit(
        model,
        guide,
        splits["train"],
        loss=losses(args.particles)[name],
        num_steps=steps,
        batch_size=args.batch * (args.particles if name == "elbo" else 1),
        by_length=True,
        lr=args.lr,
        checkpoint=folder / f"{name}_{seed}.pt",
        progress=False,
    )
    return {
        "bound": name,
        "seed": seed,
        "steps": fitted.num_steps,
        "seconds": fitted.seconds,
        "valid": judged(args, model, guide, splits["valid"]),
        "test": judged(args, model, guide, splits["test"]),
    }


def chosen(args: argparse.Namespace, curve: list[dict]) -> list[dict]:
    """Of each seed and bound, the turn with the best trained bound on the validation split."""
    rows = []
    for seed in range(args.seeds):
        for name in PUBLISHED:
            turns = [row for row in curve if row["bound"] == name and row["seed"] == seed]
            rows += [max(turns, key=lambda row: row["valid"][row["bound"]])] if turns else []
    return rows


def line(row: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in row.items())


def table(args: argparse.Namespace, result: dict) -> str:
    n, many = args.particles, args.judge_particles
    rows = [("published, untrained", PUBLISHED)]
    rows += [(f"untrained, seed {seed}", row) for seed, row in enumerate(result["untrained"])]
    lines = ["# Bounds of a VRNN, JSB chorales", "", "| | ELBO | IWAE | FIVO |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {row['elbo']:.3f} | {row['iwae']:.3f} | {row['fivo']:.3f} |" for name, row in rows]
    lines += [
        "",
        f"Nats per step: totals of all test sequences over {result['test_steps']} steps; {n} particles, "
        f"state {args.state}, hidden {args.hidden}, mean of {args.repeats} evaluations. Published: the code of "
        "Maddison et al. (2017), other random weights.",
    ]
    best = chosen(args, result["curve"])
    if not best:
        return "\n".join(lines) + "\n"
    columns = ("elbo", "iwae", "fivo", "iwae_many", "fivo_many", "judge")
    lines += [
        "",
        f"| trained by | steps | ELBO | IWAE {n} | FIVO {n} | IWAE {many} | FIVO {many} | greatest |",
        "| --- " * 8 + "|",
        *(f"| {name}, published | | | | | | | {value:.2f} |" for name, value in PUBLISHED_TRAINED.items()),
    ]
    for row in best:
        numbers = " | ".join(f"{row['test'][column]:.3f}" for column in columns)
        lines.append(f"| {row['bound']}, seed {row['seed']} | {row['steps']} | {numbers} |")
    last = max(row["steps"] for row in result["curve"])
    seconds = {name: max(r["seconds"] for r in result["curve"] if r["bound"] == name) for name in PUBLISHED}
    lines += [
        "",
        f"Test split, of the turn that was best on the validation split by the trained bound, of at most {last} steps. "
        f"Batches of {args.batch} ({args.batch * n} for the ELBO), Adam with rate {args.lr}, one core; seconds at "
        f"most: {', '.join(f'{name} {value:.0f}' for name, value in seconds.items())}. Independent notes with the "
        "training split's shares give -11.06.",
    ]
    return "\n".join(lines) + "\n"


def write(args: argparse.Namespace, result: dict) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "fivo_jsb.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.out / "fivo_jsb.md").write_text(table(args, result), encoding="utf-8")


def train_in_turns(args: argparse.Namespace, splits: dict[str, ssm.TimeSeries], result: dict, folder: Path) -> None:
    """Rounds of turns, one turn for each seed and bound; results are written after each round."""
    started, longest = time.monotonic(), 0.0
    for steps in range(args.turn, args.steps + 1, args.turn):
        began = time.monotonic()
        if began - started + longest > 60 * args.minutes:
            print(f"out of time before step {steps}", flush=True)
            break
        for seed in range(args.seeds):
            for name in losses(args.particles):
                row = one_turn(args, splits, name, seed, steps, folder)
                result["curve"].append(row)
                print(f"{name}, seed {seed}, {steps} steps, {row['seconds']:.0f} s: {line(row['test'])}", flush=True)
        longest = max(longest, time.monotonic() - began)
        result["seconds"] = time.monotonic() - started
        write(args, result)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    splits = {name: polyphonic("jsb", name) for name in ("train", "valid", "test")}
    result = {
        "arguments": {name: value for name, value in vars(args).items() if name not in ("out", "checkpoints")},
        "torch": torch.__version__,
        "test_steps": int(splits["test"].lengths.sum()),
        "published": {"untrained": PUBLISHED, "trained": PUBLISHED_TRAINED},
        "untrained": untrained(args, splits["train"], splits["test"]),
        "curve": [],
        "seconds": 0.0,
    }
    write(args, result)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.checkpoints or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        train_in_turns(args, splits, result, folder)


if __name__ == "__main__":
    main()
