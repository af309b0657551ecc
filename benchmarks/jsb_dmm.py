"""Deep Markov model on the JSB chorales: held-out bound and importance-sampled likelihood, nats per time step.

The protocol of Krishnan, Shalit and Sontag (2017), table 3: the split of Boulanger-Lewandowski et al. (2012), totals
over all test sequences divided by all test steps (4725). Published there (annealed): bound 6.926, importance-sampled
negative log-likelihood 6.388. The model is chosen by the bound on the validation split; the test split is read once,
after training.

    python benchmarks/jsb_dmm.py --minutes 50                  # CPU
    python benchmarks/jsb_dmm.py --device cuda --minutes 8     # GPU
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from datasets import polyphonic
from pyro.infer import Trace_ELBO

import pyro_ssm as ssm
from pyro_ssm.infer import evidence_lower_bound, importance_log_likelihood

RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="jsb_dmm")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=50.0)
    parser.add_argument("--steps", type=int, default=100_000, help="length of the schedule")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--annealing", type=int, default=3000)
    parser.add_argument("--state", type=int, default=100)
    parser.add_argument("--transition", type=int, default=200)
    parser.add_argument("--emission", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--cell", default="gru")
    parser.add_argument("--direction", default="future")
    parser.add_argument("--samples", type=int, default=2000, help="importance samples on the test split")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build(args: argparse.Namespace) -> tuple[ssm.StateSpaceModel, ssm.guides.Structured]:
    model = ssm.StateSpaceModel(
        ssm.dynamics.NormalInitial(args.state),
        ssm.dynamics.GatedTransition(args.state, args.transition),
        ssm.emissions.Bernoulli(args.state, 88, hidden=(args.emission, args.emission)),
    )
    return model, ssm.guides.Structured(model, args.hidden, args.direction, cell=args.cell)


def steps_of(data: ssm.TimeSeries) -> int:
    return int(data.lengths.sum())


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    train, valid, test = (polyphonic("jsb", split).to(device=device) for split in ("train", "valid", "test"))
    model, guide = build(args)
    model.to(device)
    guide.to(device)
    deadline = time.monotonic() + 60 * args.minutes
    fitted = ssm.infer.fit(
        model,
        guide,
        train,
        num_steps=args.steps,
        batch_size=args.batch,
        lr=args.lr,
        optimizer=partial(torch.optim.AdamW, betas=(0.9, 0.999), weight_decay=args.weight_decay),
        schedule=ssm.infer.warmup_cosine(args.steps, warmup=200),
        annealing=ssm.infer.linear_annealing(0.1, args.annealing),
        validation=valid,
        validation_loss=Trace_ELBO(),
        validate_every=200,
        patience=10**9,
        progress=False,
        callback=lambda step, loss: time.monotonic() > deadline,
    )
    with torch.no_grad():
        bounds = {
            name: -float(evidence_lower_bound(model, guide, data, num_samples=20).series.sum()) / steps_of(data)
            for name, data in (("valid", valid), ("test", test))
        }
        estimate = importance_log_likelihood(model, guide, test, num_samples=args.samples, batch=25)
    entries = 88 * steps_of(valid)
    result = {
        "arguments": {key: str(value) for key, value in vars(args).items() if key != "out"},
        "steps": fitted.num_steps,
        "seconds": fitted.seconds,
        "bound": bounds,
        "importance_nll": -float(estimate.log_likelihood.sum()) / steps_of(test),
        "importance_standard_error": float(estimate.standard_error.square().sum().sqrt()) / steps_of(test),
        "importance_ess_median": float(estimate.ess.median()),
        "curve": [(step, -bound * entries / steps_of(valid)) for step, bound in fitted.validation],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(args.name, {key: result[key] for key in ("steps", "seconds", "bound", "importance_nll")}, flush=True)


if __name__ == "__main__":
    main()
