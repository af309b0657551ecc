"""The equations of Lorenz-63 from noisy observations of its states: SVISE, and a library of terms with a sparse prior.

One series: 401 observations in 10 units of time, x0 = (-8, 7, 27), noise 0.1 in each coordinate (Course and Nair 2023).
The library has all 20 monomials up to the third degree in each equation, 60 coefficients, of which 7 are true. Nothing
solves an equation. The prior of the coefficients is the relevance that ``infer.discover_equations`` learns for each
term, or (``--prior horseshoe``) a prior with sites of its own, over which the guide has an ``AutoNormal``.

    python benchmarks/lorenz_discovery.py --seed 1        # adds a run to results/lorenz_discovery.json and .md
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
    library = ssm.dynamics.TermLibrary(3, degree, scale=data.values.std(0), time_scale=0.1)
    if prior != "relevance":
        ssm.dynamics.with_sparse_prior(library, prior)
    model = ssm.StateSpaceModel(
        ssm.dynamics.NormalInitial(3, loc=data.values[0], scale=1.0).requires_grad_(False),
        ssm.dynamics.NeuralSDE(library, ssm.dynamics.ConstantDiffusion(1.0, 3, floor=1e-2)),
        ssm.emissions.LinearNormal(3, 3, matrix=torch.eye(3), scale=0.1).requires_grad_(False),
    )
    names = [f"transition.drift.{name}" for name in ("coefficients", "local_scale", "overall_scale")]

    def start(site: dict) -> torch.Tensor:
        return torch.full(site["fn"].shape(), 0.0 if site["name"].endswith("coefficients") else 0.1)

    posterior = AutoNormal(poutine.block(model, expose=names), init_scale=0.01, init_loc_fn=start)
    guide = ssm.guides.SVISE(model, data, scale=0.1, parameters=None if prior == "relevance" else posterior)
    return model, guide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--degree", type=int, default=3)
    parser.add_argument("--prior", default="relevance")
    parser.add_argument("--times", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    truth = lorenz()
    times = 0.025 * torch.arange(len(truth), dtype=torch.float64)
    data = ssm.TimeSeries(times, (truth + 0.1 * torch.randn_like(truth)).float())
    model, guide = build(data, args.degree, args.prior)
    begin = time.process_time()
    found = ssm.infer.discover_equations(
        model, guide, data, num_steps=args.steps, lr=1e-2, every=100, loss=ssm.infer.SolverFree(args.times),
        progress=False,
    )  # fmt: skip
    seconds = time.process_time() - begin
    true = torch.zeros_like(found.coefficients)
    for (equation, term), value in TRUTH.items():
        true[int(equation[2:]) - 1, found.library.names.index(term)] = value
    kept, deviations = found.kept(), found.terms.coefficients.abs() / found.terms.scale
    terms = [
        [f"dz{i + 1}", found.library.names[j], *(float(x[i, j]) for x in (found.coefficients, found.scale, true))]
        for i, j in (kept | (true != 0)).nonzero().tolist()
    ]
    with torch.no_grad(), ssm.infer.local_parameters():
        path = guide.at(guide.encode(data, guide.bind_model(guide.parameters_given(data))), data.times).loc
    run = {
        "processor seconds": seconds,
        "equations": found.equations(),
        "terms": terms,
        "missed": int((~kept & (true != 0)).sum()),
        "too many": int((kept & (true == 0)).sum()),
        "deviations": {"least true": float(deviations[true != 0].min()),
                       "largest false": float(deviations[true == 0].max())},
        "diffusion": model.transition.diffusion.scale.tolist(),
        "rmse": {"states": float((path - truth).square().mean().sqrt()),
                 "observations": float((data.values - truth).square().mean().sqrt())},
        "arguments": vars(args),
    }  # fmt: skip
    print(json.dumps(run, indent=1))
    RESULTS.mkdir(exist_ok=True)
    record = RESULTS / "lorenz_discovery.json"
    runs = json.loads(record.read_text())["runs"] if record.exists() else []
    runs = sorted([r for r in runs if r["arguments"] != run["arguments"]] + [run], key=lambda r: str(r["arguments"]))
    record.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    (RESULTS / "lorenz_discovery.md").write_text("\n".join(["# lorenz_discovery", "", *map(table, runs)]))


def table(run: dict) -> str:
    args, rmse, far = run["arguments"], run["rmse"], run["deviations"]
    lines = [f"## Seed {args['seed']}, {args['prior']} prior", ""]
    lines += ["| equation | term | true | found | posterior sd |", "|---|---|---|---|---|"]
    lines += [f"| {row[0]}/dt | {row[1]} | {row[4]:.4g} | {row[2]:.4g} | {row[3]:.2g} |" for row in run["terms"]]
    lines += [
        "",
        f"Of 60 coefficients, those are kept that are further than 3 posterior sd from 0: {run['missed']} of the 7 "
        f"true ones missed, {run['too many']} too many. The least true one is {far['least true']:.0f} sd from 0, the "
        f"largest false one {far['largest false']:.2f}. Root mean squared error of the states {rmse['states']:.3f}, of "
        f"the observations {rmse['observations']:.3f}. Learnt diffusion "
        f"{', '.join(f'{value:.2f}' for value in run['diffusion'])} (truth: none). "
        f"{run['processor seconds']:.0f} s of one processor, {args['steps']} steps of {args['times']} random times, "
        f"degree {args['degree']}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
