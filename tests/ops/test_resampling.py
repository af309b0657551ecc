"""Every scheme is unbiased, exact where it is deterministic, and keeps to its range."""

import math

import pytest
import torch

from pyro_ssm.ops.resampling import SCHEMES, ancestors_of, at_points

D = torch.float64
NAMES = sorted(SCHEMES)


def uniforms(name, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((SCHEMES[name].rows(shape[0]),) + tuple(shape[1:]), dtype=D, generator=generator)


def counts(ancestors):
    found = torch.zeros_like(ancestors)
    return found.scatter_add(0, ancestors, torch.ones_like(ancestors))


def some_weights(n=7, batch=(3,)):
    weights = torch.rand((n,) + batch, generator=torch.Generator().manual_seed(3)) ** 3
    weights[2] = 0
    weights[0, ..., 0], weights[-1, ..., -1] = 0, 0
    return weights


@pytest.mark.parametrize("name", NAMES)
def test_unbiased(name):
    runs, weights = 20_000, some_weights()
    repeated = weights.unsqueeze(-1).expand(weights.shape + (runs,))
    found = counts(SCHEMES[name].ancestors(repeated, uniforms(name, repeated.shape))).double()
    expected = len(weights) * weights.double() / weights.double().sum(0)
    error = found.std(-1) / math.sqrt(runs)
    # a count that is rare may not have been met at all: 5 in all the runs
    assert ((found.mean(-1) - expected).abs() <= 4.5 * error + 5 / runs).all()
    assert (found.sum(0) == len(weights)).all()
    assert (found[weights == 0] == 0).all()


@pytest.mark.parametrize("name", ["systematic", "ssp"])
def test_counts_are_the_floor_or_the_ceiling(name):
    weights = torch.rand(50, 400, dtype=D, generator=torch.Generator().manual_seed(1)) ** 2
    expected = 50 * weights / weights.sum(0)
    found = counts(SCHEMES[name].ancestors(weights, uniforms(name, weights.shape)))
    assert (found >= (expected - 1e-9).floor()).all() and (found <= (expected + 1e-9).ceil()).all()


def test_residual_keeps_the_floor():
    weights = torch.rand(50, 400, dtype=D, generator=torch.Generator().manual_seed(1)) ** 2
    found = counts(SCHEMES["residual"].ancestors(weights, uniforms("residual", weights.shape)))
    assert (found >= (50 * weights / weights.sum(0) - 1e-9).floor()).all()


@pytest.mark.parametrize("name", NAMES)
def test_equal_weights_give_one_offspring_where_deterministic(name):
    found = counts(SCHEMES[name].ancestors(torch.full((8, 5), 0.3), uniforms(name, (8, 5))))
    assert (found.sum(0) == 8).all()
    if name not in ("multinomial",):
        assert (found == 1).all()


def plain_inverse(weights, points):
    """min{i : W_1 + ... + W_i > p}, one point at a time."""
    total, chosen = weights.sum(), []
    for point in points:
        upto, i = weights[0].clone(), 0
        while upto <= point * total:
            i += 1
            upto = upto + weights[i]
        chosen.append(i)
    return torch.tensor(chosen)


def test_systematic_and_stratified_are_the_inverse_of_the_distribution_function():
    weights = torch.rand(37, dtype=D)
    for name, rows in (("systematic", 1), ("stratified", 37)):
        u = torch.rand(rows, dtype=D)
        # systematic: floor(N F + u) points lie below F, so the point of stratum j is (j + 1 - u) / N
        points = (torch.arange(37) + (1 - u if name == "systematic" else u)) / 37
        assert torch.equal(SCHEMES[name].ancestors(weights, u), plain_inverse(weights, points))


def test_multinomial_and_at_points_are_the_inverse_of_the_distribution_function():
    weights, u = torch.rand(29, dtype=D), torch.rand(30, dtype=D)
    sums = (-torch.log1p(-u)).cumsum(0)
    points = sums[:-1] / sums[-1]
    wanted = plain_inverse(weights, points)
    assert torch.equal(SCHEMES["multinomial"].ancestors(weights, u), wanted)
    assert torch.equal(at_points(weights, points), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_batch_is_a_loop(name):
    weights = some_weights(9, (2, 3))
    u = uniforms(name, weights.shape)
    found = SCHEMES[name].ancestors(weights, u)
    assert found.shape == weights.shape
    for i in range(2):
        for j in range(3):
            assert torch.equal(found[:, i, j], SCHEMES[name].ancestors(weights[:, i, j], u[:, i, j]))


@pytest.mark.parametrize("name", NAMES)
def test_a_million_float32_weights(name):
    weights = torch.rand(10**6, generator=torch.Generator().manual_seed(0)) ** 8
    weights[-5:] = 0
    ancestors = SCHEMES[name].ancestors(weights, uniforms(name, (10**6,)))
    found = counts(ancestors)
    assert int(ancestors.min()) >= 0 and int(ancestors.max()) < 10**6 - 5 and int(found.sum()) == 10**6
    expected = 10**6 * weights.double() / weights.double().sum()
    if name in ("systematic", "ssp"):
        assert (found - expected).abs().max() < 1 + 1e-6
    # no part of the cloud is lost: the offspring of each hundredth, within six standard deviations
    share = expected.reshape(100, -1).sum(1)
    assert ((found.reshape(100, -1).sum(1) - share).abs() < 6 * share.sqrt() + 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_weights_without_meaning_give_valid_indices(name):
    weights = torch.rand(6, 4)
    weights[:, 0], weights[3, 1], weights[:, 2] = 0, float("nan"), float("nan")
    found = SCHEMES[name].ancestors(weights, uniforms(name, weights.shape))
    assert ((found >= 0) & (found < 6)).all()
    assert torch.equal(found[:, 3], SCHEMES[name].ancestors(weights[:, 3], uniforms(name, weights.shape)[:, 3]))


@pytest.mark.parametrize("name", NAMES)
def test_one_particle(name):
    assert SCHEMES[name].ancestors(torch.tensor([0.2]), uniforms(name, (1,))).tolist() == [0]


def test_ssp_is_negatively_associated():
    weights = torch.tensor([0.15, 0.35, 0.3, 0.2]).unsqueeze(-1).expand(4, 40_000)
    found = counts(SCHEMES["ssp"].ancestors(weights, uniforms("ssp", weights.shape))).double()
    covariance = torch.cov(found)
    error = 4 / math.sqrt(40_000)
    assert (covariance - covariance.diag().diag() <= error).all()


def test_ancestors_of_counts():
    wanted = torch.tensor([[0, 1], [0, 1], [2, 1]])
    assert torch.equal(ancestors_of(counts(wanted)), wanted)
