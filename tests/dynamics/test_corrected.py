"""The linear motion that a network corrects."""

import math

import pytest
import torch
import torch.nn.functional as F
from pyro.distributions import MultivariateNormal

from pyro_ssm.binding import bind
from pyro_ssm.components import AffineGaussian, Gaussian
from pyro_ssm.dynamics import CorrectedTransition, LinearNormal, MLPTransition, NormalInitial, OrnsteinUhlenbeck
from pyro_ssm.testing.checks import perturb
from tests.blocks.component_checks import STEPS, TIMES


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_it_is_the_equation(covariance):
    transition = CorrectedTransition(LinearNormal(2, input_dim=3, covariance=covariance), (8,), input_dim=3, floor=0.1)
    perturb(transition, 0.3)
    bound = bind(transition)
    z, u = torch.randn(4, STEPS, 2), torch.randn(4, STEPS, 3)
    law = bound(z, TIMES[:-1], TIMES[1:], u)
    base = bound.base(z, TIMES[:-1], TIMES[1:], u)
    root = torch.linalg.cholesky(base.covariance_matrix) if covariance == "full" else torch.diag_embed(base.stddev)
    f, a = bound.network(torch.cat([z, u], -1)).chunk(2, -1)
    g = 0.1 + 0.9 * torch.log1p((math.e - 1) * a.exp())
    mean = base.mean + (root @ f.unsqueeze(-1)).squeeze(-1)
    wanted = MultivariateNormal(mean, root @ torch.diag_embed(g**2) @ root.mT)
    point = torch.randn(4, STEPS, 2)
    torch.testing.assert_close(law.mean, mean)
    torch.testing.assert_close(law.log_prob(point), wanted.log_prob(point), rtol=1e-4, atol=1e-4)
    assert isinstance(transition, Gaussian) and not isinstance(transition, AffineGaussian)


@pytest.mark.parametrize("base", [LinearNormal(2, covariance="full"), OrnsteinUhlenbeck(2)], ids=["linear", "decay"])
def test_it_starts_as_its_base(base):
    z, point = torch.randn(4, STEPS, 2), torch.randn(4, STEPS, 2)
    alone = base(z, TIMES[:-1], TIMES[1:], None).log_prob(point)
    with_network = CorrectedTransition(base, (8, 8), uses_gap=True)(z, TIMES[:-1], TIMES[1:], None).log_prob(point)
    torch.testing.assert_close(with_network, alone)


def test_the_first_gradient_reaches_the_last_layer_and_the_base():
    transition = CorrectedTransition(LinearNormal(2), 8)
    law = transition(torch.randn(4, STEPS, 2), TIMES[:-1], TIMES[1:], None)
    law.log_prob(torch.randn(4, STEPS, 2)).sum().backward()
    last = transition.network.layers[-1]
    for parameter in (last.weight, last.bias, transition.base.matrix, transition.base.scale_unconstrained):
        assert parameter.grad.abs().sum() > 0


def test_the_noise_never_vanishes():
    transition = CorrectedTransition(LinearNormal(2, scale=2.0), 8, floor=0.25)
    with torch.no_grad():
        transition.network.layers[-1].bias[2:] = -1e4
    variance = bind(transition)(torch.zeros(STEPS, 2), TIMES[:-1], TIMES[1:], None).variance
    torch.testing.assert_close(variance, torch.full_like(variance, 0.25))
    assert F.softplus(torch.tensor(-1e4)) == 0


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match="`base` must be a components.Transition, got NormalInitial"):
        CorrectedTransition(NormalInitial(2), 8)
    with pytest.raises(TypeError, match="CorrectedTransition needs a component that is AffineGaussian, got MLP"):
        CorrectedTransition(MLPTransition(2, 8), 8)
    for floor in (0.0, 1.0):
        with pytest.raises(ValueError, match="`floor`"):
            CorrectedTransition(LinearNormal(2), 8, floor=floor)
