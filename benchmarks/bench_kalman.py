"""The linear-Gaussian log-likelihood, and its gradient with respect to all parameters, against every peer.

python benchmarks/bench_kalman.py            # one series to T = 2000 and 64 series, states 1 to 16
python benchmarks/bench_kalman.py all        # also T = 20000, states 64, and the slow peers there
python benchmarks/bench_kalman.py torch      # the small table, with the compiled library left aside
"""

import os
import sys

from harness import Case, largest_difference, pin_threads, run

pin_threads(1)
SIZE = sys.argv[1] if len(sys.argv) > 1 else "small"
if SIZE == "torch":
    os.environ["PYRO_SSM_COMPILED"] = "0"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from peers import linear_gaussian as peers  # noqa: E402

from pyro_ssm.ops import info, kalman_log_likelihood, tria  # noqa: E402

jax.config.update("jax_enable_x64", True)

#: name, n, p, T, series, own parameters for each
SMALL = [
    ("Nile", 1, 1, 100, 1, False),
    ("settles", 4, 2, 200, 1, False),
    ("settles", 4, 2, 2000, 1, False),
    ("settles", 16, 4, 200, 1, False),
    ("settles", 16, 4, 2000, 1, False),
    ("structural", 13, 1, 2000, 1, False),
    ("settles", 4, 2, 2000, 64, False),
    ("own parameters", 4, 2, 200, 64, True),
]
LARGE = [
    ("settles", 4, 2, 20000, 1, False),
    ("settles", 64, 8, 2000, 1, False),
    ("settles", 16, 4, 2000, 64, False),
    ("own parameters", 16, 4, 200, 64, True),
]


def structural(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Level, slope and eleven monthly dummies: slow to settle."""
    F = np.zeros((13, 13))
    F[0, 0] = F[0, 1] = F[1, 1] = 1.0
    F[2, 2:] = -1.0
    F[np.arange(3, 13), np.arange(2, 12)] = 1.0
    H = np.zeros((1, 13))
    H[0, 0] = H[0, 2] = 1.0
    Q = np.zeros((13, 13))
    Q[0, 0], Q[1, 1], Q[2, 2] = 0.3, 0.03, 0.1
    return {"m": np.zeros(13), "L": np.eye(13), "F": F, "b": np.zeros(13), "Q": Q, "H": H, "d": np.zeros(1),
            "R": np.ones((1, 1))}  # fmt: skip


def parameters(name: str, n: int, p: int, series: int, own: bool) -> dict[str, np.ndarray]:
    """A stable random system with eigenvalues below 0.95 (or the one that is named)."""
    rng = np.random.default_rng(0)
    if name == "structural":
        return structural(rng)
    if name == "Nile":
        one = np.ones((1, 1))
        return {"m": np.full(1, 1120.0), "L": 100.0 * one, "F": one, "b": np.zeros(1), "Q": 1469.2**0.5 * one, "H": one,
                "d": np.zeros(1), "R": 15098.5**0.5 * one}  # fmt: skip
    lead = (series,) if own else ()
    rotation = np.linalg.qr(rng.normal(size=(*lead, n, n)))[0]
    return {
        "m": rng.normal(size=(*lead, n)),
        "L": np.broadcast_to(np.eye(n), (*lead, n, n)).copy(),
        "F": 0.95 * rotation,
        "b": 0.1 * rng.normal(size=(*lead, n)),
        "Q": np.tril(0.3 * rng.normal(size=(*lead, n, n)) / n**0.5, -1) + 0.5 * np.eye(n),
        "H": rng.normal(size=(*lead, p, n)) / n**0.5,
        "d": 0.1 * rng.normal(size=(*lead, p)),
        "R": np.tril(0.1 * rng.normal(size=(*lead, p, p))) + 0.5 * np.eye(p),
    }


def ours(q: dict[str, np.ndarray], y: np.ndarray, gradient: bool, moved: bool):
    """This package's operator; ``moved``: the initial law stands one transition before the first observation."""
    tensors = {name: torch.tensor(x, requires_grad=gradient) for name, x in q.items()}
    values = torch.tensor(y)
    mask = torch.ones_like(values, dtype=torch.bool)
    by_hand = moved and SIZE == "torch"  # plain torch takes a system with something missing for one that varies
    if moved and not by_hand:  # a time more, at which nothing is seen
        values, mask = (torch.cat([torch.zeros_like(x[..., :1, :]), x], -2) for x in (values, mask))

    def total():
        m, L, F, b, Q, H, d, R = tensors.values()
        if by_hand:
            m, L = (F @ m.unsqueeze(-1)).squeeze(-1) + b, tria(torch.cat([F @ L, Q], -1))
        time = (x.unsqueeze(-3) if x.dim() > 1 and e == 2 else x.unsqueeze(-2)
                for x, e in ((F, 2), (b, 1), (Q, 2), (H, 2), (d, 1), (R, 2)))  # fmt: skip
        return kalman_log_likelihood(values, mask, m, L, *time).sum()

    def value():
        with torch.no_grad():
            return {"value": total()}

    def both():
        found = total()
        grads = torch.autograd.grad(found, list(tensors.values()))
        return {"value": found.detach(), **dict(zip(tensors, grads, strict=True))}

    return both if gradient else value


def agree(rtol: float):
    """Answers are equal; of the gradient of a root its lower triangle counts."""

    def lower(answer):
        return {k: np.tril(np.asarray(x)) if k in ("L", "Q", "R") else x for k, x in answer.items()}

    return lambda mine, theirs: largest_difference(lower(mine), lower(theirs), rtol, 1e-9)


def cases(sizes, gradient: bool):
    for name, n, p, T, series, own in sizes:
        q = parameters(name, n, p, series, own)
        rng = np.random.default_rng(1)
        y = rng.normal(size=(T, p) if series == 1 else (series, T, p))
        if name == "Nile":
            y = 900.0 + 150.0 * y
        label = f"{name}: n={n}, p={p}, T={T}, {series} series"
        work = n**2 * T * series
        mine, mine_moved = (ours(q, y, gradient, moved) for moved in (False, True))
        yield Case(label, mine, peers.dynamax(q, y, gradient), "dynamax", agree=agree(1e-6))
        if series == 1 and n <= 16 and T <= 2000 and name != "structural" and SIZE != "torch":
            yield Case(label, mine_moved, peers.cuthbert(q, y, gradient), "cuthbert", agree=agree(1e-6))
        if name != "structural" and work <= 4e6:  # its transition noise is singular, which GaussianHMM cannot take
            yield Case(label, mine_moved, peers.pyro_hmm(q, y, gradient), "Pyro GaussianHMM", agree=agree(1e-5))
        if not gradient and not own:
            yield Case(label, mine, peers.statsmodels(q, y, gradient), "statsmodels", agree=agree(1e-6))


if __name__ == "__main__":
    print(info())
    sizes = SMALL + (LARGE if SIZE == "all" else [])
    suffix = {"small": "", "all": "_all", "torch": "_torch"}[SIZE]
    for gradient, what in ((True, "gradient"), (False, "value")):
        if SIZE == "torch" and not gradient:
            break
        run(
            f"kalman_{what}{suffix}",
            list(cases(sizes, gradient)),
            packages=["jax", "dynamax", "cuthbert", "statsmodels"],
            repeats=5,
            min_seconds=0.02,
        )
