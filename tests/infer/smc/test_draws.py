"""Moments of the laws that filters draw from."""

import pyro.distributions as dist
import pytest
import torch

from pyro_ssm.distributions import DiagonalNormal
from pyro_ssm.distributions.moments import gaussian_moments
from pyro_ssm.infer.smc.draws import shared_moments

D = torch.float64


@pytest.mark.parametrize("loc", [(), (1,), (2,), (5, 1, 2), (7, 5, 1, 1)])
@pytest.mark.parametrize("scale", [(), (1,), (2,), (5, 1, 1), (5, 1, 2), (7, 1, 1, 2)])
def test_moments_of_a_diagonal_normal_whose_coordinates_share_a_number(loc, scale):
    """A scale of one number for two coordinates is that of both."""
    shape = torch.broadcast_shapes(loc, scale, (2,))
    m, s = torch.randn(loc, dtype=D), torch.rand(scale, dtype=D) + 0.5
    mean, root = shared_moments(DiagonalNormal(m.expand((*m.shape[:-1], 2)), s))
    wanted = dist.Normal(m.expand(shape), s.expand(shape)).to_event(1)
    torch.testing.assert_close(mean.expand(shape), wanted.mean)
    torch.testing.assert_close(root.expand((*shape, 2)), wanted.stddev.diag_embed())
    torch.testing.assert_close(root.expand((*shape, 2)), gaussian_moments(wanted)[1].expand((*shape, 2)))
