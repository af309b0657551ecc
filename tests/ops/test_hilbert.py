"""Hilbert's curve visits every cell once, and each cell lies beside the last."""

import itertools

import pytest
import torch

from pyro_ssm.ops import hilbert_index, hilbert_order


@pytest.mark.parametrize(("dim", "bits"), [(1, 4), (2, 1), (2, 4), (3, 3), (4, 2), (5, 1)])
def test_neighbours_on_the_curve_are_neighbours_in_space(dim, bits):
    points = torch.tensor(list(itertools.product(range(2**bits), repeat=dim)))
    index = hilbert_index(points, bits)
    assert torch.equal(index.sort().values, torch.arange(len(points)))
    along = points[index.argsort()]
    assert (along.diff(dim=0).abs().sum(-1) == 1).all()


def test_the_largest_index_fits():
    corner = torch.full((1, 2), 2**31 - 1)
    assert 0 <= int(hilbert_index(corner, 31)) < 2**62
    with pytest.raises(ValueError, match="at most 62"):
        hilbert_index(corner, 32)


@pytest.mark.parametrize("dim", [1, 2, 5, 70])
def test_order_is_a_permutation_series_by_series(dim):
    states = torch.randn(40, 3, dim)
    order = hilbert_order(states)
    assert torch.equal(order.sort(0).values, torch.arange(40).unsqueeze(-1).expand(40, 3))
    for b in range(3):
        assert torch.equal(order[:, b], hilbert_order(states[:, b]))
    if dim == 1:
        assert (states.gather(0, order.unsqueeze(-1)).diff(dim=0) >= 0).all()


def test_order_keeps_neighbours_together():
    states = torch.randn(2000, 2)
    steps = states[hilbert_order(states)].diff(dim=0).norm(dim=-1).mean()
    assert steps < 0.2 * states.diff(dim=0).norm(dim=-1).mean()


def test_equal_and_broken_states_are_ordered_somehow():
    assert hilbert_order(torch.ones(5, 2)).sort().values.tolist() == list(range(5))
    assert hilbert_order(torch.full((5, 2), float("nan"))).sort().values.tolist() == list(range(5))
