"""Each neural emission against its law written by hand."""

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F

from pyro_ssm import emissions
from pyro_ssm.binding import bind
from pyro_ssm.components import Gaussian
from tests.blocks.component_checks import STEPS, TIMES

SIZES = {"state_dim": 2, "obs_dim": 3, "hidden": 8, "input_dim": 2, "memory_dim": 1}


def of(emission, floor=None):
    """A bound emission, its law on random states, and the outputs of its network."""
    emission = bind(emission)
    z, u, m = torch.randn(4, STEPS, 2), torch.randn(4, STEPS, 2), torch.randn(4, STEPS, 1)
    law = emission(z, TIMES[:-1], u, m)
    assert law.batch_shape == (4, STEPS) and law.event_shape == (3,) and law.base_dist.batch_shape == (4, STEPS, 3)
    return emission, law, emission.network(torch.cat([z, u, m], -1))


def check(law, wanted, y):
    torch.testing.assert_close(law.log_prob(y), wanted.to_event(1).log_prob(y))


def counts():
    return torch.randint(0, 30, (4, STEPS, 3)).float()


def test_bernoulli():
    _, law, outputs = of(emissions.Bernoulli(**SIZES))
    check(law, dist.Bernoulli(torch.sigmoid(outputs)), torch.randint(0, 2, (4, STEPS, 3)).float())


@pytest.mark.parametrize(("link", "function"), [("softplus", F.softplus), ("exp", torch.exp)])
def test_poisson(link, function):
    _, law, outputs = of(emissions.Poisson(**SIZES, link=link, floor=0.25))
    check(law, dist.Poisson(0.25 + function(outputs)), counts())


@pytest.mark.parametrize(("link", "function"), [("softplus", F.softplus), ("exp", torch.exp)])
def test_negative_binomial(link, function):
    r = torch.tensor([0.5, 2.0, 20.0])
    _, law, outputs = of(emissions.NegativeBinomial(**SIZES, link=link, floor=0.25, concentration=r))
    mean = 0.25 + function(outputs)
    torch.testing.assert_close((law.mean, law.variance), (mean, mean + mean**2 / r))
    check(law, dist.GammaPoisson(r, r / mean), counts())


def test_negative_binomial_of_large_concentration_is_poisson():
    emission, law, outputs = of(emissions.NegativeBinomial(**SIZES, concentration=1e7).double().float())
    double = bind(emissions.NegativeBinomial(2, 3, concentration=1e9).double())
    z = torch.randn(STEPS, 2, dtype=torch.float64)
    rate = 1e-4 + F.softplus(double.network(z))
    y = counts()[0].double()
    torch.testing.assert_close(
        double(z, TIMES[:-1], None).log_prob(y), dist.Poisson(rate).to_event(1).log_prob(y), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("make", [emissions.Poisson, emissions.NegativeBinomial])
def test_an_extreme_state_has_the_value_and_the_gradients_of_double_precision(make):
    for link in ("softplus", "exp"):
        emission, found = make(1, 1, link=link), []
        for dtype in (torch.float32, torch.float64):
            emission.to(dtype)
            law = bind(emission)(torch.tensor([[-1e4], [1e4]], dtype=dtype), TIMES[:2].to(dtype), None)
            log_prob = law.log_prob(torch.full((2, 1), 3.0, dtype=dtype))
            found.append([log_prob, *torch.autograd.grad(log_prob.sum(), list(emission.parameters()))])
        for single, double in zip(*found, strict=True):
            torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


def test_categorical():
    emission, law, outputs = of(emissions.Categorical(**SIZES, num_classes=5))
    codes = torch.randint(0, 5, (4, STEPS, 3))
    by_hand = outputs.reshape(4, STEPS, 3, 5).log_softmax(-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1).sum(-1)
    torch.testing.assert_close(law.log_prob(codes.float()), by_hand)
    total = sum(law.base_dist.log_prob(torch.full((4, STEPS, 3), float(c))).exp() for c in range(5))
    torch.testing.assert_close(total, torch.ones(4, STEPS, 3))


def test_categorical_draws_are_codes_in_the_dtype_of_values():
    law = emissions.Categorical(1, 2, num_classes=3)(torch.zeros(1, 1).expand(20000, 1, 1), TIMES[:1], None)
    draws = law.sample((2,))
    assert draws.dtype == torch.float32 and draws.shape == (2, 20000, 1, 2)
    frequency = torch.stack([(draws == c).float().mean((0, 1, 2)) for c in range(3)], -1)
    torch.testing.assert_close(frequency, law.base_dist.probs[0, 0], rtol=0, atol=0.015)
    expanded = law.expand((3, 20000, 1))
    assert expanded.sample().dtype == torch.float32 and expanded.sample().shape == (3, 20000, 1, 2)


def test_normal():
    scale = torch.tensor([0.1, 1.0, 3.0])
    emission, law, outputs = of(emissions.Normal(**SIZES, scale=scale))
    check(law, dist.Normal(outputs, scale), torch.randn(4, STEPS, 3))
    _, law, outputs = of(emissions.Normal(**SIZES, network_scale=True, floor=0.02))
    check(law, dist.Normal(outputs[..., :3], F.softplus(outputs[..., 3:]) + 0.02), torch.randn(4, STEPS, 3))
    assert isinstance(emission, Gaussian)


def test_student_t():
    scale, df = torch.tensor([0.1, 1.0, 3.0]), torch.tensor([2.5, 4.0, 30.0])
    emission, law, outputs = of(emissions.StudentT(**SIZES, scale=scale, df=df))
    check(law, dist.StudentT(df, outputs, scale), torch.randn(4, STEPS, 3))
    torch.testing.assert_close(law.variance, (scale**2 * df / (df - 2)).expand(4, STEPS, 3))
    _, law, outputs = of(emissions.StudentT(**SIZES, network_scale=True, floor=0.02))
    check(law, dist.StudentT(5.0, outputs[..., :3], F.softplus(outputs[..., 3:]) + 0.02), torch.randn(4, STEPS, 3))
    assert not isinstance(emission, Gaussian)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="`link` must be one of 'softplus', 'exp', got 'log'"):
        emissions.Poisson(2, 3, link="log")
    with pytest.raises(ValueError, match="`num_classes` must be at least 2"):
        emissions.Categorical(2, 3, num_classes=1)
    with pytest.raises(ValueError, match="`df` must lie above its floor 2"):
        emissions.StudentT(2, 3, df=2.0)
    with pytest.raises(ValueError, match="`obs_dim` must be at least 1"):
        emissions.Bernoulli(2, 0)
    with pytest.raises(ValueError, match="`scale` must lie above its floor"):
        emissions.Normal(2, 3, scale=1e-5)
