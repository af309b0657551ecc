"""Recovery of two unknown constants of a nonlinear transition (Krishnan et al. 2017, figure 3).

z' ~ N([0.2 z_0 + tanh(alpha z_1), 0.2 z_1 + sin(beta z_0)], 1), y ~ N(z / 2, 0.1), first state N(0, 0.01) (variances);
alpha = 0.5, beta = -0.1, 5000 series of 25 steps. Learned by SVI with a structured guide.

    python benchmarks/krishnan_nonlinear.py       # writes results/krishnan_nonlinear.json and .md
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_ssm as ssm
from pyro_ssm.infer import fit, warmup_cosine

RESULTS = Path(__file__).parent / "results"
TRUTH = {"alpha": 0.5, "beta": -0.1}


class Motion(PyroModule):
    """The mean of the next state."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.1))
        self.beta = nn.Parameter(torch.tensor(0.1))

    def forward(self, state: Tensor, inputs: Tensor | None) -> Tensor:
        first, second = state.unbind(-1)
        return torch.stack(
            [0.2 * first + torch.tanh(self.alpha * second), 0.2 * second + torch.sin(self.beta * first)], -1
        )


def model() -> ssm.StateSpaceModel:
    made = ssm.StateSpaceModel(
        ssm.dynamics.NormalInitial(2, scale=0.1),
        ssm.dynamics.FunctionTransition(2, Motion(), scale=1.0),
        ssm.emissions.LinearNormal(2, 2, scale=math.sqrt(0.1)),
    )
    with torch.no_grad():
        made.emission.matrix.copy_(0.5 * torch.eye(2))
        made.emission.offset.zero_()
    made.requires_grad_(False)
    made.transition.function.requires_grad_(True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        data, _ = ssm.data.krishnan_nonlinear(generator=seed)
        made = model()
        guide = ssm.guides.Structured(made, 64, "both")
        fitted = fit(
            made,
            guide,
            data,
            num_steps=args.steps,
            batch_size=250,
            lr=5e-3,
            schedule=warmup_cosine(args.steps, warmup=100),
            progress=False,
        )
        found = {name: float(getattr(made.transition.function, name).detach()) for name in TRUTH}
        runs.append({**found, "seconds": fitted.seconds})
        print(runs[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "krishnan_nonlinear.json").write_text(json.dumps({"truth": TRUTH, "runs": runs}, indent=1) + "\n")
    lines = [
        "# krishnan_nonlinear",
        "",
        "| seed | alpha (0.5) | error | beta (-0.1) | error | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for seed, run in enumerate(runs):
        errors = {name: 100 * abs(run[name] / truth - 1) for name, truth in TRUTH.items()}
        lines.append(
            f"| {seed} | {run['alpha']:.4f} | {errors['alpha']:.1f} % | {run['beta']:.4f} | {errors['beta']:.1f} % "
            f"| {run['seconds']:.0f} |"
        )
    lines += [
        "",
        f"Each seed draws its own data and starts from 0.1, 0.1; {args.steps} Adam steps of 250 series, one CPU "
        "thread.",
        "",
    ]
    (RESULTS / "krishnan_nonlinear.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
