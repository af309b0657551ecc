"""One Brownian path on several grids."""

import pytest
import torch

from pyro_ssm.ops import BrownianPath

D = torch.float64


def draw(shape=(4000,), num=5, seed=0):
    times = torch.tensor([0.0, 0.3, 0.5, 1.5, 1.6], dtype=D)[:num]
    return BrownianPath.draw(times, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def test_increments_have_the_variance_of_their_gaps():
    noise = draw()
    z = noise.increments.square().mean((0, 2)) / noise.times.diff() - 1
    assert (z.abs() < 4.5 * (2 / 8000) ** 0.5).all()


def test_the_same_generator_gives_the_same_path_and_another_another():
    a, b, c = draw(), draw(), draw(seed=1)
    assert torch.equal(a.increments, b.increments) and a.seed == b.seed
    assert not torch.equal(a.increments, c.increments) and a.seed != c.seed


def test_refining_and_coarsening_are_the_same_path():
    noise = draw((3,))
    fine = noise.refine(6, generator=torch.Generator().manual_seed(3))
    assert fine.times.shape == (25,)
    torch.testing.assert_close(fine.times[::6], noise.times)
    torch.testing.assert_close(fine.coarsen(6).increments, noise.increments)
    torch.testing.assert_close(fine.coarsen(2).coarsen(3).values, noise.values)
    again = noise.refine(6, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again.increments, fine.increments)


def test_a_refined_path_is_brownian():
    """Increments of the bridge are independent with the variance of the short gaps."""
    fine = draw((20000,)).refine(3)
    x = (fine.increments / fine.times.diff().unsqueeze(-1).sqrt())[..., 0]
    covariance = x.T @ x / len(x)
    assert ((covariance - torch.eye(12, dtype=D)).abs() < 4.5 * (2 / len(x)) ** 0.5).all()


def test_own_grids_and_normals():
    times = torch.stack([torch.linspace(0, 1, 4, dtype=D), torch.linspace(0, 3, 4, dtype=D)])
    noise = BrownianPath.of_normal(times, torch.ones(2, 3, 1, dtype=D))
    torch.testing.assert_close(noise.increments[:, 0, 0], torch.tensor([1 / 3, 1.0], dtype=D).sqrt())
    torch.testing.assert_close(noise.normal, torch.ones(2, 3, 1, dtype=D))
    torch.testing.assert_close(noise.refine(2).coarsen(2).increments, noise.increments)


def test_wrong_shapes():
    with pytest.raises(ValueError, match="one less than there are times"):
        BrownianPath(torch.arange(4.0), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="must divide"):
        draw((1,)).coarsen(3)
    with pytest.raises(ValueError, match="at least 1"):
        draw((1,)).refine(0)
