import pyro.distributions as dist
import pytest
import torch

from pyro_ssm.distributions.moments import gaussian_moments, gaussian_parts

SCALE = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
LAWS = [
    dist.Normal(torch.ones(5, 2), torch.tensor([1.0, 2.0])).to_event(1),
    dist.Normal(torch.ones(5, 2), torch.tensor([1.0, 2.0])).to_event(1).expand([3, 5]),
    dist.MultivariateNormal(torch.ones(5, 2), scale_tril=SCALE),
    dist.MultivariateNormal(torch.ones(2), covariance_matrix=SCALE @ SCALE.T),
    dist.LowRankMultivariateNormal(torch.ones(5, 2), torch.ones(2, 1), torch.ones(2)),
]


@pytest.mark.parametrize("law", LAWS)
def test_moments_are_those_of_the_law(law):
    mean, root = gaussian_moments(law)
    torch.testing.assert_close(mean, law.mean)
    covariance = root @ root.mT
    torch.testing.assert_close(covariance.diagonal(dim1=-2, dim2=-1).expand(law.variance.shape), law.variance)
    assert (root.triu(1) == 0).all()
    if hasattr(law, "covariance_matrix"):
        torch.testing.assert_close(covariance.expand(law.covariance_matrix.shape), law.covariance_matrix)


def test_a_point_mass_has_no_spread():
    mean, root = gaussian_moments(dist.Delta(torch.ones(4, 2), event_dim=1))
    assert torch.equal(mean, torch.ones(4, 2)) and torch.equal(root, torch.zeros(4, 2, 2))


@pytest.mark.parametrize(
    "law, name",
    [
        (dist.Poisson(torch.ones(2)).to_event(1), r"Independent\(Poisson\)"),
        (dist.Normal(torch.ones(2, 2), 1.0).to_event(2), r"Independent\(Normal\) with event shape \(2, 2\)"),
        (dist.StudentT(3.0), "StudentT"),
    ],
)
def test_other_laws_are_refused(law, name):
    with pytest.raises(TypeError, match=f"got {name}.*Return Normal"):
        gaussian_moments(law)


def test_parts_keep_a_diagonal_and_what_does_not_vary():
    loc = torch.randn(5, 3, 2)
    mean, deviations, diagonal = gaussian_parts(dist.Normal(loc, torch.tensor([1.0, 2.0])).to_event(1))
    assert diagonal and torch.equal(mean, loc) and deviations.stride()[:2] == (0, 0)
    assert torch.equal(deviations, torch.tensor([1.0, 2.0]).expand(5, 3, 2))
    root = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    mean, got, diagonal = gaussian_parts(dist.MultivariateNormal(loc, scale_tril=root))
    assert not diagonal and got.stride()[0] == 0 and torch.equal(got, root.expand(5, 3, 2, 2))
    mean, zero, diagonal = gaussian_parts(dist.Delta(loc, event_dim=1))
    assert diagonal and torch.equal(mean, loc) and (zero == 0).all() and zero.shape == loc.shape
