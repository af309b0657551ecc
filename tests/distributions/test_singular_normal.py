import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_ssm.components import Affine
from pyro_ssm.distributions import SingularNormal, affine_law
from pyro_ssm.distributions.moments import gaussian_moments

ROOT = torch.tensor([[2.0, 0.0], [1.0, 0.5]])
SINGULAR = torch.tensor([[2.0, 0.0], [1.0, 0.0]])


def test_is_the_normal_law_where_it_is_regular():
    loc, x = torch.randn(4, 2), torch.randn(3, 4, 2)
    ours, wanted = SingularNormal(loc, scale_tril=ROOT), MultivariateNormal(loc, scale_tril=ROOT)
    torch.testing.assert_close(ours.log_prob(x), wanted.log_prob(x))
    torch.testing.assert_close(ours.expand((3, 4)).log_prob(x), wanted.log_prob(x))
    torch.testing.assert_close(ours.entropy(), wanted.entropy())


def test_draws_of_a_singular_law_stay_in_its_plane():
    law = SingularNormal(torch.zeros(5, 2), scale_tril=SINGULAR, validate_args=False)
    x = law.rsample((1000,))
    torch.testing.assert_close(x[..., 0], 2 * x[..., 1])
    assert abs(float(x[..., 1].var()) - 1.0) < 0.1
    mean, root = gaussian_moments(law.expand((3, 5)))
    assert mean.shape == (3, 5, 2) and torch.equal(root[0, 0], SINGULAR)


def test_a_singular_law_has_no_density():
    law = SingularNormal(torch.zeros(2), scale_tril=SINGULAR, validate_args=False)
    for ask in (lambda: law.log_prob(torch.zeros(2)), law.entropy, lambda: law.expand((3,)).log_prob(torch.zeros(2))):
        with pytest.raises(NotImplementedError, match="has no density.*Integrate the states out"):
            ask()


def test_units_far_apart_are_not_singular():
    root = torch.diag(torch.tensor([1e-8, 1.0, 1e8], dtype=torch.float64))
    wanted = -1.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    torch.testing.assert_close(SingularNormal(root.new_zeros(3), scale_tril=root).log_prob(root.new_zeros(3)), wanted)


def test_affine_law_broadcasts():
    parts = Affine(torch.randn(3, 1, 2, 2), torch.randn(1, 2), ROOT.expand(5, 2, 2))
    state = torch.randn(3, 5, 2)
    law = affine_law(parts, state)
    assert law.batch_shape == (3, 5)
    torch.testing.assert_close(law.mean[1, 2], parts.matrix[1, 0] @ state[1, 2] + parts.offset[0])
