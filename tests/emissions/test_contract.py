"""Every emission against the checks that hold for all components, and against masks."""

import pytest
import torch

from pyro_ssm import emissions
from pyro_ssm.binding import bind
from pyro_ssm.distributions import masked
from pyro_ssm.testing import EmissionContract, failures
from tests.blocks.component_checks import STEPS, call, check_component, jitter, tensors


def three(state, inputs):
    return torch.cat([torch.sin(state), state[..., :1] * state[..., 1:]], -1)


ALL = {"input_dim": 3, "memory_dim": 2, "activation": "tanh"}
MAKERS = {
    "LinearNormal": lambda: emissions.LinearNormal(2, 3),
    "LinearNormal, full, inputs": lambda: jitter(emissions.LinearNormal(2, 2, input_dim=3, covariance="full")),
    "FunctionNormal": lambda: emissions.FunctionNormal(2, 3, three),
    "FunctionNormal, full": lambda: jitter(emissions.FunctionNormal(2, 3, three, covariance="full")),
    "Normal": lambda: emissions.Normal(2, 3, 8),
    "Normal, all": lambda: emissions.Normal(2, 2, (8, 8), **ALL, network_scale=True),
    "Normal, affine": lambda: emissions.Normal(2, 3),
    "RBFNormal": lambda: jitter(emissions.RBFNormal(2, 3, torch.randn(4, 2))),
    "RBFNormal, full, inputs": lambda: jitter(
        emissions.RBFNormal(2, 2, torch.randn(4, 2), width=0.7, input_dim=3, covariance="full")
    ),
    "StudentT": lambda: emissions.StudentT(2, 3, 8),
    "StudentT, all": lambda: emissions.StudentT(2, 2, 8, **ALL, network_scale=True),
    "Bernoulli": lambda: emissions.Bernoulli(2, 3, 8),
    "Bernoulli, all": lambda: emissions.Bernoulli(2, 2, 8, **ALL),
    "Poisson": lambda: emissions.Poisson(2, 3, 8),
    "Poisson, all": lambda: emissions.Poisson(2, 2, 8, **ALL, link="exp"),
    "NegativeBinomial": lambda: emissions.NegativeBinomial(2, 3, 8),
    "NegativeBinomial, all": lambda: emissions.NegativeBinomial(2, 2, 8, **ALL, link="exp"),
    "Categorical": lambda: emissions.Categorical(2, 3, 8, num_classes=4),
    "Categorical, all": lambda: emissions.Categorical(2, 2, 8, **ALL, num_classes=2),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_contract(make):
    check_component(make)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_hidden_entries_add_nothing(make):
    """A record with NaN where nothing is seen: hidden steps add 0, seen entries what they add alone."""
    component = make()
    law = call(bind(component), *tensors(component, 4))
    y = law.sample()
    mask = torch.rand(4, STEPS, component.obs_dim) > 0.4
    mask[0] = False
    seen = masked(law, mask).log_prob(y.masked_fill(~mask, float("nan")))
    assert (seen[0] == 0).all()
    if getattr(component, "covariance", "diagonal") == "diagonal":
        torch.testing.assert_close(seen, (law.base_dist.log_prob(y) * mask).sum(-1))
    torch.testing.assert_close(masked(law, torch.ones_like(mask)).log_prob(y), law.log_prob(y))
    # what is hidden has no gradient, whatever stands there
    learnt = list(component.parameters())
    found, wanted = (
        torch.autograd.grad(masked(law, mask).log_prob(given).sum(), learnt, retain_graph=True)
        for given in (y.masked_fill(~mask, float("nan")), y)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    if getattr(component, "covariance", "diagonal") == "diagonal":
        by_entry = torch.autograd.grad((law.base_dist.log_prob(y) * mask).sum(), learnt, retain_graph=True)
        for one, other in zip(found, by_entry, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_public_contract(make):
    """The contract that users subclass for their own components holds for those of the package."""
    component = make()
    fields = {
        "make_component": lambda self: make(),
        "input_dim": getattr(component, "input_dim", 0),
        "memory_dim": getattr(component, "memory_dim", 0),
        "num_draws": 5000,
    }
    assert failures(type("Subject", (EmissionContract,), fields)) == {}
