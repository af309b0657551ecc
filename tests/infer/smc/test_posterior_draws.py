"""Random parameters as a real vector: bijection, density with its Jacobian, priors that depend on each other."""

import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample

from pyro_ssm.diagnostics import to_datasets
from pyro_ssm.infer.smc import ParticleMCMCResult, RandomParameters
from pyro_ssm.predict import posterior_draws
from tests.contracts.toys import series, toy
from tests.infer.smc.programs import D

STANDARD = dist.Normal(torch.zeros((), dtype=D), 1.0)


def hierarchical():
    """A scalar, a simplex, a vector whose law depends on the scalar, a bound that is another parameter, a function."""
    model = toy(2, 1)
    a, b, c = model.initial, model.transition, model.emission
    b.scale_of_rate = PyroSample(dist.Gamma(torch.tensor(2.0, dtype=D), 3.0))
    b.rate = PyroSample(
        lambda self: dist.LogNormal(torch.zeros(2, dtype=D), self.scale_of_rate.unsqueeze(-1)).to_event(1)
    )
    b.share = PyroSample(dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0], dtype=D)))
    c.log_scale = PyroSample(lambda self: dist.Uniform(b.rate.sum(-1, True) * 0 - 2, b.rate.sum(-1, True)).to_event(1))
    a.loc = PyroSample(lambda self: b.share[..., :2])
    return model


def by_hand(values):
    s, rate, share = values["transition.scale_of_rate"], values["transition.rate"], values["transition.share"]
    upper, log_scale = rate.sum(), values["emission.log_scale"]
    log_p = dist.Gamma(torch.tensor(2.0, dtype=D), 3.0).log_prob(s) + dist.LogNormal(0 * s, s).log_prob(rate).sum()
    log_p = log_p + dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0], dtype=D)).log_prob(share)
    return log_p + dist.Uniform(torch.tensor(-2.0, dtype=D), upper).log_prob(log_scale).sum()


def test_vector_and_values_are_a_bijection():
    torch.manual_seed(0)
    parameters = RandomParameters(hierarchical())
    names = {"transition.scale_of_rate", "transition.rate", "transition.share", "emission.log_scale"}
    assert set(parameters.names) == names and parameters.dim == 1 + 2 + 2 + 1
    u = parameters.draw(6).reshape(2, 3, -1)
    values = parameters.to_values(u)
    assert values["transition.share"].shape == (2, 3, 3) and values["transition.scale_of_rate"].shape == (2, 3)
    assert torch.equal(values["initial.loc"], values["transition.share"][..., :2])  # a function of another
    assert torch.allclose(parameters.to_vector(values), u, rtol=0, atol=1e-9)


def test_density_has_the_jacobian_of_the_transform():
    """log p_u(u) = log p(theta) + log |det d theta / d u|, the determinant by autograd; rows = one by one."""
    torch.manual_seed(1)
    parameters = RandomParameters(hierarchical())
    u = parameters.draw(4)
    together = parameters.log_prior(u)
    for row, found in zip(u, together, strict=True):
        values = parameters.to_values(row)

        def free(x):
            v = parameters.to_values(x)
            parts = [v[name][..., :-1] if name == "transition.share" else v[name] for name in parameters.names]
            return torch.cat([part.reshape(-1) for part in parts])

        jacobian = torch.autograd.functional.jacobian(free, row)
        wanted = by_hand(values) + jacobian.det().abs().log()
        assert torch.allclose(found, wanted, rtol=0, atol=1e-9)
        assert torch.allclose(parameters.log_prior(row), found, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(parameters.log_prior, u.requires_grad_())


def test_priors_that_do_not_take_rows_are_read_one_by_one():
    model = toy(2, 1)
    model.transition.level = PyroSample(dist.Normal(torch.zeros(2, dtype=D), 1.0).to_event(1))
    # correct for one vector of 2, wrong for a stack of them: a matrix product from the left
    turn = torch.tensor([[0.0, 1.0], [2.0, 0.5]], dtype=D)
    model.initial.loc = PyroSample(lambda self: dist.Normal(turn @ model.transition.level, 1.0).to_event(1))
    parameters = RandomParameters(model)
    assert not parameters._at_once
    u = torch.randn(2, 4, dtype=D)
    wanted = [STANDARD.log_prob(v[:2]).sum() + dist.Normal(turn @ v[:2], 1.0).log_prob(v[2:]).sum()
              for v in (parameters.to_vector(parameters.to_values(row)) for row in u)]  # fmt: skip
    order = parameters.names == ("transition.level", "initial.loc")
    if not order:
        wanted = [STANDARD.log_prob(v[2:]).sum() + dist.Normal(turn @ v[2:], 1.0).log_prob(v[:2]).sum()
                  for v in u]  # fmt: skip
    assert torch.allclose(parameters.log_prior(u), torch.stack(wanted), rtol=0, atol=1e-12)


def test_bind_puts_rows_before_the_batch():
    parameters = RandomParameters(hierarchical())
    data = series(4, (3,), obs_dim=1)
    bound = parameters.bind(parameters.draw(5), data)
    assert bound.parameter_shape == (5, 1)
    assert bound.transition.rate.shape == (5, 1, 1, 2)
    assert parameters.bind(parameters.draw(1)[0], data).transition.rate.shape == (1, 2)


def test_plates_of_a_prior_line_up_with_the_batch():
    model = toy(2, 1)
    model.transition.level = PyroSample(dist.Normal(torch.zeros(3, 2, dtype=D), 1.0).to_event(1))  # one a series
    parameters = RandomParameters(model)
    assert parameters.log_prior(torch.zeros(5, 6)).shape == (5,)
    assert parameters.bind(torch.zeros(5, 6), series(4, (3,), obs_dim=1)).transition.level.shape == (5, 3, 1, 2)


def test_out_of_the_support_by_rounding():
    model = toy(1, 1)
    model.transition.rate = PyroSample(dist.LogNormal(torch.zeros(1, dtype=D), 1.0).to_event(1))
    parameters = RandomParameters(model)
    found = parameters.log_prior(torch.tensor([[-2000.0], [0.0], [float("nan")]], dtype=D))
    assert found[0] == float("-inf") and found[2] == float("-inf")
    assert torch.allclose(found[1], STANDARD.log_prob(torch.zeros((), dtype=D)))


def test_refusals():
    with pytest.raises(ValueError, match="no random parameter"):
        RandomParameters(toy())
    with pytest.raises(TypeError, match="unbound"):
        RandomParameters(toy().bind())
    model = toy(1, 1)
    model.transition.rate = PyroSample(dist.Poisson(torch.ones(1)).to_event(1))
    with pytest.raises(TypeError, match="discrete"):
        RandomParameters(model)
    parameters = RandomParameters(hierarchical())
    with pytest.raises(KeyError, match="has no"):
        parameters.to_vector({})
    with pytest.raises(ValueError, match=r"must be \(\*lead, 6\)"):
        parameters.log_prior(torch.zeros(5))


@pytest.mark.parametrize("chains", [1, 3])
def test_draws_reach_predictions_and_arviz(chains):
    model = toy(1, 1)
    model.transition.rate = PyroSample(dist.LogNormal(torch.zeros(1, dtype=D), 1.0).to_event(1))
    data = series(4, (2,), obs_dim=1)
    rate, z = torch.rand(chains, 5, 1, dtype=D), torch.randn(chains, 5, 2, 4, 1, dtype=D)
    stats = torch.rand(2, chains, 5)
    found = ParticleMCMCResult({"transition.rate": rate}, z, stats[0], stats[1])
    draws = posterior_draws(model, found, data)
    assert torch.equal(draws.states, z.flatten(0, 1))
    groups = to_datasets(found, model=model, data=data)
    assert (groups["posterior"]["z"].values == z.numpy()).all()
    assert (groups["posterior"]["transition.rate"].values == rate.numpy()).all()
    assert (groups["sample_stats"]["log_evidence"].values == stats[0].numpy()).all()
    assert (groups["sample_stats"]["acceptance_rate"].values == stats[1].numpy()).all()
