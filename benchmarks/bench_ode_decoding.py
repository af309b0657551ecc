"""Decoding with a neural ODE: value and gradient of a loss over whole paths, against torchdiffeq.

Batch 512, a field 4-128-128-4 (tanh), 101 outputs on [0, 5]. Equal work: the same weights, starts, times and
tolerances; mean square of the path, gradients with respect to all weights and the starts. Ours holds every series to
the tolerance, torchdiffeq the mean over the batch. The last rows compare us with ourselves: every series on its own 101
times against all on shared ones (a ratio of 0.77 is 1.3 times the cost); there the answers are those of a gap-by-gap
solve by torchdiffeq.

    python benchmarks/bench_ode_decoding.py             # writes results/ode_decoding.json and .md
    python benchmarks/bench_ode_decoding.py adjoint     # and the adjoint of torchdiffeq (minutes)
"""

from __future__ import annotations

import sys
from functools import partial

from harness import Case, DisagreementError, pin_threads, run

pin_threads(1)

import torch  # noqa: E402  (threads are pinned before torch is imported)
import torchdiffeq  # noqa: E402

from pyro_ssm.dynamics import MLPDrift, NeuralODE  # noqa: E402
from pyro_ssm.ops import torchdiffeq_path  # noqa: E402

BATCH, STATE, HIDDEN, OUTPUTS, END = 512, 4, 128, 101, 5.0
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def answer(path: torch.Tensor, start: torch.Tensor, field: torch.nn.Module) -> torch.Tensor:
    """Loss and norms of gradients."""
    reads = [start, *field.parameters()]
    loss = path.square().mean()
    return torch.stack([loss.detach(), *(g.double().norm().float() for g in torch.autograd.grad(loss, reads))])


def ours(ode: NeuralODE, start: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    return answer(ode.solve(start, times), start, ode.field)


def theirs(field: MLPDrift, start: torch.Tensor, times: torch.Tensor, method: str, adjoint: bool = False):
    solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
    more = {"adjoint_params": tuple(field.parameters())} if adjoint else {}
    path = solve(lambda t, z: field(t, z, None), start, times.float(), method=method, **TOLERANCE, **more)
    return answer(path, start, field)


def close(tolerance: float, wanted: torch.Tensor | None = None):
    def agree(a: torch.Tensor, b: torch.Tensor) -> float:
        difference = float((a / (b if wanted is None else wanted) - 1).abs().max())
        if difference > tolerance:
            raise DisagreementError(f"loss or gradients differ by {difference:.2e} relative")
        return difference

    return agree


def main() -> None:
    torch.manual_seed(0)
    field = MLPDrift(STATE, (HIDDEN, HIDDEN), activation="tanh")
    start = torch.randn(BATCH, 1, STATE, requires_grad=True)
    shared = torch.linspace(0, END, OUTPUTS, dtype=torch.float64)
    own = torch.rand(BATCH, OUTPUTS, dtype=torch.float64).sort(-1).values * END
    own[:, 0], own[:, -1] = 0.0, END
    size = f"batch {BATCH}, {STATE}-{HIDDEN}-{HIDDEN}-{STATE}, {OUTPUTS} outputs"
    solver = {
        name: NeuralODE(field, method=name, **(TOLERANCE if name == "dopri5" else {})) for name in ("dopri5", "rk4")
    }
    cases = [
        Case(
            f"{method}, {size}",
            partial(ours, ode, start, shared),
            partial(theirs, field, start, shared, method),
            f"torchdiffeq {method}",
            agree=close(2e-3),
        )
        for method, ode in solver.items()
    ]
    coarse = NeuralODE(field, method="rk4", step_size=END / 25)
    cases.append(
        Case(
            f"rk4 in 25 steps, {size}",
            partial(ours, coarse, start, shared),
            partial(theirs, field, start, shared, "rk4"),
            "torchdiffeq rk4, a step an output",
            agree=close(2e-3),
        )
    )
    path = torchdiffeq_path(lambda t, z, u: field(t, z, u), start, own, method="dopri5", **TOLERANCE)
    reference = answer(path, start, field)
    cases += [
        Case(
            f"{method}, own times, {size}",
            partial(ours, ode, start, own),
            partial(ours, ode, start, shared),
            "ours, shared times",
            agree=close(2e-3, reference),
        )
        for method, ode in solver.items()
    ]
    if "adjoint" in sys.argv[1:]:
        cases.append(
            Case(
                f"dopri5, {size}",
                partial(ours, solver["dopri5"], start, shared),
                partial(theirs, field, start, shared, "dopri5", adjoint=True),
                "torchdiffeq dopri5, adjoint",
                agree=close(2e-3),
            )
        )
    run("ode_decoding", cases, packages=["torchdiffeq", "torch"], repeats=5)


if __name__ == "__main__":
    main()
