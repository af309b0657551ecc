"""Moves of a parameter vector leave a density invariant and tune themselves."""

import math

import pytest
import torch

from pyro_ssm.infer.smc import HamiltonianMove, RandomWalkMove
from tests.infer.smc.programs import D

MOVES = {
    "random walk": RandomWalkMove,
    "HMC": HamiltonianMove,
    "MALA": lambda: HamiltonianMove(num_leapfrog=1),
}
ROOT = torch.tensor([[1.0, 0.0], [1.2, 0.5]], dtype=D)


def log_density(u):
    """Two correlated normals, bent into an egg: (x, y) -> (x, y + x^2 / 2) has unit Jacobian."""
    x = torch.linalg.solve_triangular(ROOT, bent(u, -1).mT, upper=False)
    return -0.5 * x.square().sum(0)


def bent(u, sign):
    return torch.stack([u[:, 0], u[:, 1] + sign * 0.5 * u[:, 0].square()], -1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", MOVES)
def test_exact_draws_stay_exact_draws(kind):
    num, move = 6000, MOVES[kind]()
    u = bent(torch.randn(num, 2, dtype=D) @ ROOT.mT, 1)
    start = u
    for _ in range(3):
        u, acceptance = move(log_density, u, adapt=False)
        assert 0.1 < acceptance.mean() < 0.999
    assert (u != start).any(-1).double().mean() > 0.3
    white = torch.linalg.solve_triangular(ROOT, bent(u, -1).mT, upper=False)
    assert (white.mean(1).abs() < 4.5 / math.sqrt(num)).all()
    assert ((white @ white.mT / num - torch.eye(2)).abs() < 4.5 * math.sqrt(2 / num)).all()
    ordered, grid = torch.special.ndtr(white).sort(-1).values, torch.arange(1, num + 1) / num
    assert ((grid - ordered).abs().amax(-1) * math.sqrt(num) < 2.3).all()


@pytest.mark.parametrize("kind", MOVES)
def test_tuning_reaches_its_acceptance_on_every_scale(kind):
    move, scale = MOVES[kind](), torch.tensor([1e-3, 50.0], dtype=D)
    u = torch.zeros(6, 2, dtype=D)
    for _ in range(600):
        u, _ = move(lambda u: -0.5 * (u / scale).square().sum(-1), u, adapt=True)
    accepted, draws = [], []
    for _ in range(300):
        u, acceptance = move(lambda u: -0.5 * (u / scale).square().sum(-1), u, adapt=False)
        accepted.append(acceptance)
        draws.append(u)
    assert abs(torch.stack(accepted).mean() - move._target(2)) < 0.12
    spread = torch.stack(draws).flatten(0, 1).std(0) / scale
    assert (spread > 0.5).all() and (spread < 2.0).all()


@pytest.mark.parametrize("kind", MOVES)
def test_what_lies_outside_is_never_accepted(kind):
    """A density that is 0 or NaN below 0: chains stay where they may be, and each by itself."""

    def half(u):
        return torch.where(u[:, 0] > 0, -u[:, 0], torch.where(u[:, 0] < -0.1, math.nan, -math.inf)) + 0 * u.sum(-1)

    move, u = MOVES[kind](), torch.rand(50, 1, dtype=D)
    for _ in range(30):
        u, acceptance = move(half, u, adapt=True)
        assert (u > 0).all() and ((acceptance >= 0) & (acceptance <= 1)).all()


def test_numbers():
    with pytest.raises(ValueError, match="`num_leapfrog` must be at least 1"):
        HamiltonianMove(0)
