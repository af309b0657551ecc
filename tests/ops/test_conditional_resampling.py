"""Ancestors given one of them: laws of each and of all, batches, weights of zero, many particles in float32."""

import pytest
import torch

from pyro_ssm.ops.conditional_resampling import CONDITIONAL_SCHEMES
from pyro_ssm.ops.resampling import at_unsorted_points

D = torch.float64
WEIGHTS = torch.tensor([0.05, 0.45, 0.0, 0.3, 0.2], dtype=D)
RUNS = 20_000


def drawn(name, chosen, weights=WEIGHTS):
    """``(N, runs)`` ancestors, one column a run."""
    scheme, (num, runs) = CONDITIONAL_SCHEMES[name], (len(weights), chosen.shape[0])
    uniforms = torch.rand(scheme.rows(num), runs, dtype=D)
    return scheme.ancestors(weights.unsqueeze(-1).expand(num, runs), chosen, uniforms)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", CONDITIONAL_SCHEMES)
def test_every_single_ancestor_has_the_law_of_the_weights(name):
    """The first drawn from it, the others given the first."""
    first = torch.multinomial(WEIGHTS, RUNS, True)
    ancestors = drawn(name, first)
    assert torch.equal(ancestors[0], first)
    for row in ancestors:
        found = torch.bincount(row, minlength=5) / RUNS
        assert ((found - WEIGHTS).abs() <= 4.5 * (WEIGHTS * (1 - WEIGHTS) / RUNS).sqrt()).all()


def test_systematic_counts_are_whole_parts_or_one_more():
    first = torch.multinomial(WEIGHTS, RUNS, True)
    counts = torch.nn.functional.one_hot(drawn("systematic", first), 5).sum(0)
    expected = 5 * WEIGHTS
    assert ((counts >= expected.floor() - 1e-9) & (counts <= (expected - 1e-9).ceil())).all()


def test_systematic_given_an_ancestor_is_systematic_where_one_fell():
    """Against its definition: points on a circle from a random one, kept where the first falls on the given one."""
    point = torch.rand(1, 400_000, dtype=D)
    points = (point + torch.arange(5).unsqueeze(-1) / 5) % 1.0
    free = at_unsorted_points(WEIGHTS.unsqueeze(-1).expand(5, 400_000), points)
    for i in (0, 3):
        kept = free[:, free[0] == i]
        given = drawn("systematic", torch.full((RUNS,), i))
        for row, wanted in zip(given[1:], kept[1:], strict=True):
            p, q = (torch.bincount(x, minlength=5) / len(x) for x in (row, wanted))
            error = (q * (1 - q)).clamp(min=1e-4).sqrt() * (1 / RUNS + 1 / kept.shape[1]) ** 0.5
            assert ((p - q).abs() < 4.5 * error).all()


@pytest.mark.parametrize("name", CONDITIONAL_SCHEMES)
def test_a_batch_is_a_loop(name):
    weights = torch.rand(7, 2, 3, dtype=D)
    chosen = torch.randint(7, (2, 3))
    uniforms = torch.rand(CONDITIONAL_SCHEMES[name].rows(7), 2, 3, dtype=D)
    whole = CONDITIONAL_SCHEMES[name].ancestors(weights, chosen, uniforms)
    for i in range(2):
        for j in range(3):
            one = CONDITIONAL_SCHEMES[name].ancestors(weights[:, i, j], chosen[i, j], uniforms[:, i, j])
            assert torch.equal(whole[:, i, j], one)


@pytest.mark.parametrize("name", CONDITIONAL_SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_extreme_weights_stay_in_range(name, dtype):
    num = 100_000
    for weights in (torch.zeros(num).index_fill(0, torch.tensor([num - 1]), 1.0), torch.full((num,), 1 / num)):
        for edge in (0.0, 1 - 2.0**-53):
            uniforms = torch.full((CONDITIONAL_SCHEMES[name].rows(num),), edge, dtype=D)
            found = CONDITIONAL_SCHEMES[name].ancestors(weights.to(dtype), torch.tensor(num - 1), uniforms)
            assert found.min() >= 0 and found.max() < num and (weights[found] > 0).all()


def test_points_in_any_order():
    weights = torch.tensor([0.2, 0.0, 0.5, 0.3], dtype=D)
    points = torch.rand(50_000, dtype=D)
    found = torch.bincount(at_unsorted_points(weights, points), minlength=4) / 50_000
    assert ((found - weights).abs() <= 4.5 * (weights * (1 - weights) / 50_000).sqrt()).all()
    edges = torch.tensor([0.0, 0.2, 0.7, 1 - 2.0**-53], dtype=D)
    assert at_unsorted_points(weights, edges).tolist() == [0, 2, 3, 3]
