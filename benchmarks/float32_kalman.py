"""What float32 costs: the log-likelihood of five models with nearly exact sensors, beside Pyro's GaussianHMM.

Observation variance 1e-6, state noise 1, T = 10 000, H = I (HiPPO-LegS: four random rows), data drawn from the model
with seed 0; parameters are rounded to float32 first, so that both precisions see the same numbers.

    python benchmarks/float32_kalman.py
"""

import json
import math

from harness import RESULTS, machine, pin_threads

pin_threads(1)

import torch  # noqa: E402
from peers import linear_gaussian as peers  # noqa: E402

from pyro_ssm.ops import kalman_log_likelihood  # noqa: E402

T, SEED = 10_000, 0
D = torch.float64


def legs(n: int, dt: float) -> torch.Tensor:
    """exp(dt A) of the HiPPO-LegS matrix A (Gu et al. 2020), a stable system with a long memory."""
    i = torch.arange(n, dtype=D)
    A = -torch.sqrt(2 * i + 1).unsqueeze(1) * torch.sqrt(2 * i + 1)
    return torch.linalg.matrix_exp(dt * (A.tril(-1) - torch.diag(i + 1)))


def models() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """F and H of each."""
    eye = torch.eye(4, dtype=D)
    turn = torch.tensor([[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]], dtype=D)
    move = torch.tensor([[1.0, 0.1], [0.0, 1.0]], dtype=D)
    torch.manual_seed(SEED)
    return {
        "F = 0.95 I": (0.95 * eye, eye),
        "F = I": (eye, eye),
        "F = 0.9 rotation by 0.3": (0.9 * torch.block_diag(turn, turn), eye),
        "constant velocity, dt = 0.1": (torch.block_diag(move, move), eye),
        "HiPPO-LegS, n = 16, dt = 0.01": (legs(16, 0.01), torch.randn(4, 16, dtype=D)),
    }


def simulate(F: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(SEED)
    state, out = torch.randn(F.shape[0], dtype=D), []
    for _ in range(T):
        state = F @ state + torch.randn(F.shape[0], dtype=D)
        out.append(H @ state + 1e-3 * torch.randn(H.shape[0], dtype=D))
    return torch.stack(out)


def ours(q: dict[str, torch.Tensor], y: torch.Tensor, dtype: torch.dtype) -> tuple[float, list[torch.Tensor]]:
    tensors = {name: x.to(dtype, copy=True).requires_grad_() for name, x in q.items()}
    m, L, F, b, Q, H, d, R = tensors.values()
    first = F @ m + b, torch.linalg.cholesky(F @ L @ (F @ L).mT + Q @ Q.mT)
    values = y.to(dtype)
    time = (x.unsqueeze(0) for x in (F, b, Q, H, d, R))
    terms = kalman_log_likelihood(values, torch.ones_like(values, dtype=torch.bool), *first, *time)
    return float(terms.detach().double().sum()), list(torch.autograd.grad(terms.sum(), list(tensors.values())))


def pyro(q: dict[str, torch.Tensor], y: torch.Tensor, dtype: str) -> tuple[float, list[torch.Tensor]]:
    answer = peers.pyro_hmm({name: x.numpy() for name, x in q.items()}, y.numpy(), True, dtype)()
    return float(answer.pop("value")), list(answer.values())


def error(low: list[torch.Tensor], high: list[torch.Tensor]) -> float:
    """Of the whole gradient, relative, in the largest entry of each parameter's part."""
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(low, high, strict=True))


def main() -> None:
    rows = []
    for name, (F, H) in models().items():
        F, H = F.float().double(), H.float().double()
        n, p = F.shape[0], H.shape[0]
        y = simulate(F, H).float().double()
        eye = torch.eye(n, dtype=D)
        R = torch.tensor(1e-3).double() * torch.eye(p, dtype=D)
        zero = torch.zeros(n, dtype=D)
        q = {"m": zero, "L": eye, "F": F, "b": zero, "Q": eye, "H": H, "d": torch.zeros(p, dtype=D), "R": R}
        value, gradient = ours(q, y, D)
        low, low_gradient = ours(q, y, torch.float32)
        theirs, _ = pyro(q, y, "float64")
        their_low, their_gradient = pyro(q, y, "float32")
        rows.append(
            {
                "model": name,
                "log_likelihood": value,
                "ours_relative_error": abs(low - value) / abs(value),
                "ours_gradient_error": error(low_gradient, gradient),
                "pyro_float64_difference_nats": abs(theirs - value),
                "pyro_float32_error_nats": abs(their_low - value),
                "pyro_gradient_error": error(their_gradient, gradient),
            }
        )
        print(rows[-1])
        assert rows[-1]["ours_relative_error"] < 1e-6 and rows[-1]["ours_gradient_error"] < 1e-3
    head = ["model", "log-likelihood (float64)", "ours, float32: relative error", "of its gradient"]
    head += ["GaussianHMM, float32: off by, nats", "relative error of its gradient", "in float64: off by, nats"]
    keys = ["log_likelihood", "ours_relative_error", "ours_gradient_error", "pyro_float32_error_nats"]
    keys += ["pyro_gradient_error", "pyro_float64_difference_nats"]
    lines = ["# float32_kalman", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {row['model']} | " + " | ".join(f"{row[key]:.6g}" if key == "log_likelihood" else f"{row[key]:.1e}"
              for key in keys) + " |" for row in rows]  # fmt: skip
    facts = machine()
    lines += ["", f"T = {T}, H = I (LegS: four random rows), R = 1e-6 I, Q = I, initial law N(0, I), seed {SEED}. "
              f"torch {facts['versions']['torch']}, pyro-ppl {facts['versions']['pyro-ppl']}."]  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "float32_kalman.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "float32_kalman.json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
