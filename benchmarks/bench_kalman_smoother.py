"""The smoother and posterior paths after a Kalman filter: the compiled recursions against the references.

python benchmarks/bench_kalman_smoother.py
"""

from harness import Case, pin_threads, run

pin_threads(1)

import torch  # noqa: E402

from pyro_ssm import ops  # noqa: E402

#: n, p, T, series, the share of values that is missing
SIZES = [
    (4, 2, 2000, 1, 0.0),
    (4, 2, 2000, 1, 0.2),
    (4, 2, 2000, 64, 0.0),
    (16, 4, 200, 1, 0.0),
    (16, 4, 200, 1, 0.2),
    (4, 2, 200, 64, 0.2),
]


def system(n: int, p: int, T: int, series: int, missing: float):
    """What a filter of a stable random system left, and its motion."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    F = 0.95 * torch.linalg.qr(torch.randn(1, n, n))[0]
    b, Q = 0.1 * torch.randn(1, n), 0.5 * torch.eye(n).unsqueeze(0)
    H, d, R = torch.randn(1, p, n), torch.zeros(1, p), 0.5 * torch.eye(p).unsqueeze(0)
    y = torch.randn(series, T, p)
    steps = ops.kalman_filter(y, torch.rand_like(y) >= missing, torch.zeros(n), torch.eye(n), F, b, Q, H, d, R)
    return steps, (F, b, Q)


def smoother(steps, motion, conditionals, smooth):
    def laws():
        mean, root = smooth(steps, conditionals(steps, *motion))
        return {"mean": mean, "covariance": root @ root.mT}

    return laws


def sampler(steps, motion, conditionals, sample):
    noise = torch.randn_like(steps.filtered_mean)

    def path():
        return {"path": sample(conditionals(steps, *motion), noise[..., -1, :], noise[..., :-1, :])}

    return path


def cases():
    for n, p, T, series, missing in SIZES:
        steps, motion = system(n, p, T, series, missing)
        label = f"n={n}, p={p}, T={T}, {series} series" + (f", {missing:.0%} missing" if missing else "")
        fast, plain = ops.backward_conditionals, ops.backward_conditionals_reference
        ours = smoother(steps, motion, fast, ops.kalman_smoother)
        theirs = smoother(steps, motion, plain, ops.kalman_smoother_reference)
        yield Case(f"smoother: {label}", ours, theirs, "reference", rtol=1e-7, atol=1e-9)
        torch.manual_seed(1)
        ours = sampler(steps, motion, fast, ops.backward_sample)
        torch.manual_seed(1)
        theirs = sampler(steps, motion, plain, ops.backward_sample_reference)
        yield Case(f"draw: {label}", ours, theirs, "reference", rtol=1e-7, atol=1e-9)


if __name__ == "__main__":
    with torch.no_grad():
        run("kalman_smoother", list(cases()), repeats=5, min_seconds=0.02)
