"""The equations of Lorenz-63 from noisy observations of its states: SVISE, and a library of terms with a sparse prior.

One series: 401 observations in 10 units of time, x0 = (-8, 7, 27), noise 0.1 in each coordinate (Course and Nair 2023).
The library has all 20 monomials up to the third degree in each equation, 60 coefficients, of which 7 are true. Nothing
solves an equation. Every hundred steps the means of the coefficients are set by ``term_regression``.

    python benchmarks/lorenz_discovery.py                 # writes results/lorenz_discovery.json and .md
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import pyro_ssm as ssm

RESULTS = Path(__file__).parent / "results"
TRUTH = {("dz1", "z1"): -10.0, ("dz1", "z2"): 10.0, ("dz2", "z1"): 28.0, ("dz2", "z2"): -1.0, ("dz2", "z1 z3"): -1.0}
TRUTH |= {("dz3", "z3"): -8 / 3, ("dz3", "z1 z2"): 1.0}
EVERY = 100


def lorenz(step: float = 1e-3, each: int = 25, steps: int = 10_000) -> torch.Tensor:
    """States at every 0.025 (Runge-Kutta steps of 0.001)."""

    def f(z: torch.Tensor) -> torch.Tensor:
        return torch.stack([10 * (z[1] - z[0]), z[0] * (28 - z[2]) - z[1], z[0] * z[1] - 8 / 3 * z[2]])

    z = torch.tensor([-8.0, 7.0, 27.0], dtype=torch.float64)
    path = [z]
    for _ in range(steps):
        a = f(z)
        b = f(z + step / 2 * a)
        c = f(z + step / 2 * b)
        z = z + step / 6 * (a + 2 * b + 2 * c + f(z + step * c))
        path.append(z)
    return torch.stack(path)[::each]


def build(data: ssm.TimeSeries, degree: int, prior: str) -> tuple:
    scale = data.values.std(0)
    library = ssm.dynamics.TermLibrary(3, degree, scale=scale, time_scale=0.1)
    ssm.dynamics.with_sparse_prior(library, prior)
    model = ssm.StateSpaceModel(
        ssm.dynamics.NormalInitial(3, loc=data.values[0], scale=1.0),
        ssm.dynamics.NeuralSDE(library, ssm.dynamics.ConstantDiffusion(1.0, 3, floor=1e-2)),
        ssm.emissions.LinearNormal(3, 3, scale=0.1),
    )
    with torch.no_grad():
        model.emission.matrix.copy_(torch.eye(3))
    model.initial.requires_grad_(False)
    model.emission.requires_grad_(False)
    names = [f"transition.drift.{name}" for name in ("coefficients", "local_scale", "overall_scale")]

    def start(site: dict) -> torch.Tensor:
        return torch.full(site["fn"].shape(), 0.0 if site["name"].endswith("coefficients") else 0.1)

    posterior = AutoNormal(poutine.block(model, expose=names), init_scale=0.01, init_loc_fn=start)
    return model, ssm.guides.SVISE(model, data, scale=0.1, parameters=posterior), library, posterior


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--degree", type=int, default=3)
    parser.add_argument("--prior", default="horseshoe")
    parser.add_argument("--times", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    truth = lorenz()
    times = 0.025 * torch.arange(len(truth), dtype=torch.float64)
    data = ssm.TimeSeries(times, (truth + 0.1 * torch.randn_like(truth)).float())
    model, guide, library, posterior = build(data, args.degree, args.prior)
    begin = time.perf_counter()

    def regress(step: int, bound: float) -> None:
        if step % EVERY == 0 and step >= 2 * EVERY:
            found = ssm.infer.term_regression(model, guide, data, num_times=2000, num_particles=4)
            with torch.no_grad():
                posterior.locs.transition.drift.coefficients.copy_(found.coefficients)
                posterior.scales.transition.drift.coefficients = found.mean_field_scale
        if step % 500 == 0:
            print(step, round(bound, 3), f"{time.perf_counter() - begin:.0f} s", flush=True)

    def optimizer(parameters: list, lr: float) -> torch.optim.Optimizer:
        """A diffusion that is left over from the start hides small terms: it learns faster than the rest."""
        own = {id(p) for p in model.transition.diffusion.parameters()}
        rest = [p for p in parameters if id(p) not in own]
        return torch.optim.Adam(
            [{"params": rest}, {"params": [p for p in parameters if id(p) in own], "lr": 5 * lr}], lr=lr
        )

    result = ssm.infer.fit(
        model, guide, data, loss=ssm.infer.SolverFree(args.times), num_steps=args.steps, lr=1e-2, optimizer=optimizer,
        schedule=ssm.infer.warmup_cosine(args.steps, 50, final=0.02), callback=regress, progress=False,
    )  # fmt: skip
    with ssm.infer.local_parameters():
        last = ssm.infer.term_regression(model, guide, data, num_times=4000, num_particles=10)
    mean, spread = last.coefficients, library.in_units(last.scale)
    found = {}
    for i, j in (mean.abs() > 0.05).nonzero().tolist():
        key = (f"dz{i + 1}", library.names[j])
        found[key] = (float(library.in_units(mean)[i, j]), float(spread[i, j]))
    with torch.no_grad():
        path = guide.at(guide.encode(data, guide.bind_model(guide.parameters_given(data))), data.times).loc
    record = {
        "seconds": result.seconds,
        "equations": library.equations(mean, 0.05),
        "terms": [[*key, *found.get(key, (0.0, 0.0)), TRUTH.get(key, 0.0)] for key in {**TRUTH, **found}],
        "diffusion": model.transition.diffusion.scale.tolist(),
        "rmse": {"states": float((path - truth).square().mean().sqrt()),
                 "observations": float((data.values - truth).square().mean().sqrt())},
        "arguments": vars(args),
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "lorenz_discovery.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "lorenz_discovery.md").write_text(table(record))


def table(record: dict) -> str:
    lines = ["# lorenz_discovery", "", "| equation | term | true | found | posterior sd |", "|---|---|---|---|---|"]
    lines += [f"| {row[0]}/dt | {row[1]} | {row[4]:.4g} | {row[2]:.4g} | {row[3]:.2g} |" for row in record["terms"]]
    wrong = sum(row[4] == 0 for row in record["terms"])
    rmse, args = record["rmse"], record["arguments"]
    lines += [
        "",
        f"{wrong} terms too many (scaled coefficient above 0.05). Root mean squared error of the states "
        f"{rmse['states']:.3f}, of the observations {rmse['observations']:.3f}. Learnt diffusion "
        f"{', '.join(f'{value:.2f}' for value in record['diffusion'])}. {record['seconds']:.0f} s on one thread, "
        f"{args['steps']} steps of {args['times']} random times, degree {args['degree']}, {args['prior']} prior.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
