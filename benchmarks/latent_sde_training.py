"""Training a latent SDE on the stochastic Lorenz system, by the public API and by torchsde's `sdeint`, side by side.

The set-up is that of `bench_latent_sde_step.py` (torchsde's `latent_sde_lorenz`, features of the data given), on
standardised paths of the stochastic Lorenz system. Both start from the same weights, see the same increments at each
step (others at each), and take the same Adam steps; their bounds are compared all along, and their processor time.

    python benchmarks/latent_sde_training.py             # writes results/latent_sde_training.json and .md
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

# first, because it pins the threads before torch is imported
from bench_latent_sde_step import CONTEXT, HIDDEN, LATENT, OBS, OBS_SCALE, copy_weights, pair  # isort: skip

import torch
from peers.torchsde_latent_sde import LatentSDE
from pyro.infer import TraceMeanField_ELBO

import pyro_ssm as ssm

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--series", type=int, default=256)
    parser.add_argument("--times", type=int, default=100)
    args = parser.parse_args()
    torch.manual_seed(0)
    data, _ = ssm.data.lorenz(args.series, args.times + 1, generator=0)
    values = data.values.float()
    values = (values - values.mean((0, 1))) / values.std((0, 1))
    data = ssm.TimeSeries(torch.linspace(0, 1, args.times + 1, dtype=torch.float64), values)
    windows = torch.cat([values.roll(-k, 1) for k in range(4)], -1)  # what an encoder could read
    features = torch.tanh(windows @ torch.randn(4 * OBS, CONTEXT) / 2)
    by_time, values_by_time = (x.transpose(0, 1).contiguous() for x in (features, values))
    peer = LatentSDE(LATENT, CONTEXT, HIDDEN, OBS, OBS_SCALE)
    model, guide = pair(features)
    copy_weights(peer, model, guide)
    bound = TraceMeanField_ELBO()(model, guide)
    learnt = [p for p in (*model.parameters(), *guide.parameters()) if p.requires_grad]
    ours, theirs = (torch.optim.Adam(ps, lr=1e-2) for ps in (learnt, peer.parameters()))
    losses, seconds = [], [0.0, 0.0]
    for step in range(args.steps):
        torch.manual_seed(step)
        noise = torch.randn(args.series, args.times + 1, LATENT).transpose(0, 1).contiguous()
        row = []
        for which, optimizer in enumerate((ours, theirs)):
            torch.manual_seed(step)
            begin = time.process_time()
            optimizer.zero_grad()
            loss = bound(data) if which == 0 else peer.loss(by_time, values_by_time, noise)
            loss.backward()
            optimizer.step()
            seconds[which] += time.process_time() - begin
            row.append(loss.item() / values.numel())
        losses.append(row)
    record = {"losses": losses, "seconds": seconds, "arguments": vars(args)}
    (RESULTS / "latent_sde_training.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "latent_sde_training.md").write_text(table(record))
    print(table(record))


def table(record: dict) -> str:
    losses, (ours, theirs), args = record["losses"], record["seconds"], record["arguments"]
    shown = sorted({0, *range(9, len(losses), max(1, len(losses) // 10)), len(losses) - 1})
    lines = ["# latent_sde_training", "", "| step | ours | torchsde sdeint | difference |", "|---|---|---|---|"]
    lines += [f"| {k + 1} | {-a:.5f} | {-b:.5f} | {abs(a - b):.1e} |" for k in shown for a, b in [losses[k]]]
    apart = max(abs(a - b) for a, b in losses)
    lines += [
        "",
        f"Bounds in nats an observation, same first weights, same increments at each step, Adam at 1e-2; "
        f"{args['series']} series of {args['times']} Euler steps. Largest difference {apart:.1e}. Processor time "
        f"{ours:.1f} s, torchsde {theirs:.1f} s, ratio {theirs / ours:.2f}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
