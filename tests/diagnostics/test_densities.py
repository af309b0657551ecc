"""Densities of draws, against sums by hand."""

import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample

import pyro_ssm as ssm
from pyro_ssm.diagnostics.densities import log_prior


@pytest.mark.parametrize("number", [1, 2, 3, 10])
def test_a_prior_that_depends_on_a_parameter(number):
    """With as many draws as rates it broadcasts, along the wrong dim; with more of them than were tried, too."""
    torch.manual_seed(0)
    model = ssm.StateSpaceModel(
        ssm.dynamics.NormalInitial(2), ssm.dynamics.OrnsteinUhlenbeck(2), ssm.emissions.LinearNormal(2, 1)
    )
    model.emission.scale = PyroSample(dist.LogNormal(torch.zeros(1), 1.0).to_event(1))

    def prior(transition):
        return dist.LogNormal(torch.zeros(2), model.emission.scale.squeeze(-1)).to_event(1)

    model.transition.rate = PyroSample(prior)
    drawn = ssm.infer.sample_prior(model, number)
    scale, rate = drawn["emission.scale"], drawn["transition.rate"]
    wanted = dist.LogNormal(0.0, 1.0).log_prob(scale).sum(-1) + dist.LogNormal(0.0, scale).log_prob(rate).sum(-1)
    assert torch.allclose(log_prior(model, drawn, number), wanted.double())
