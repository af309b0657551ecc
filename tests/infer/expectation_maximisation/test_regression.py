"""The constrained regression against the gradient of its objective."""

import pytest
import torch

from pyro_ssm.infer.expectation_maximisation.regression import ResidualMoments, coefficient_step, residual_covariance

D = torch.float64


def moments(rows=3, columns=4, steps=9, rank=None):
    x, e = torch.randn(steps, columns, dtype=D), torch.randn(steps, rows, dtype=D)
    if rank is not None:
        x = x[:, :rank] @ torch.randn(rank, columns, dtype=D)
    return ResidualMoments(torch.tensor([float(steps)], dtype=D), (x.T @ x)[None], e.T @ x, e.T @ e)


def objective(found, step, S):
    spread = found.ee - step @ found.ex.T - found.ex @ step.T + step @ found.xx[0] @ step.T
    return torch.trace(torch.linalg.solve(S, spread))


@pytest.mark.parametrize("kind", ["all", "columns", "entries"])
def test_the_gradient_vanishes_where_entries_are_free(kind):
    found = moments()
    free = torch.ones(3, 4, dtype=torch.bool)
    if kind == "columns":
        free[:, 1] = False
    if kind == "entries":
        free = torch.rand(3, 4) < 0.6
    root = torch.randn(3, 3, dtype=D).tril() + 2 * torch.eye(3, dtype=D)
    S = root @ root.T
    step = coefficient_step(found, free, S, diagonal=False).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(found, step, S), step)
    assert (step[~free] == 0).all()
    assert gradient[free].abs().max() < 1e-9 < gradient.abs().max() + (kind == "all")


def test_diagonal_rows_are_solved_alone_each_with_its_own_moments():
    parts = [moments(rows=1) for _ in range(3)]
    found = ResidualMoments(
        torch.cat([part.steps for part in parts]),
        torch.cat([part.xx for part in parts]),
        torch.cat([part.ex for part in parts]),
        torch.block_diag(*(part.ee for part in parts)),
    )
    free = torch.rand(3, 4) < 0.6
    step = coefficient_step(found, free, torch.eye(3, dtype=D), diagonal=True)
    noise = residual_covariance(found, step, diagonal=True)
    for i, part in enumerate(parts):
        alone = coefficient_step(part, free[i : i + 1], torch.eye(1, dtype=D), diagonal=False)
        torch.testing.assert_close(step[i : i + 1], alone)
        torch.testing.assert_close(noise[i : i + 1], residual_covariance(part, alone, diagonal=False)[0])


def test_collinear_regressors_get_the_smallest_step():
    found = moments(rank=2)
    step = coefficient_step(found, torch.ones(3, 4, dtype=torch.bool), torch.eye(3, dtype=D), diagonal=True)
    torch.testing.assert_close(step @ found.xx[0], found.ex, rtol=1e-8, atol=1e-8)


def test_units_do_not_matter():
    found = moments()
    units = torch.tensor([1e-6, 1.0, 1e3, 1e6], dtype=D)
    scaled = found._replace(xx=found.xx * units * units[:, None], ex=found.ex * units)
    free = torch.ones(3, 4, dtype=torch.bool)
    eye = torch.eye(3, dtype=D)
    torch.testing.assert_close(
        coefficient_step(scaled, free, eye, True) * units, coefficient_step(found, free, eye, True), rtol=1e-9, atol=0
    )
