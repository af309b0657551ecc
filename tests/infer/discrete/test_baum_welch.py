"""Baum-Welch: one step is the weighted maximum, the likelihood rises, and where it stops the gradient vanishes."""

import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample

import pyro_ssm as ssm
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import baum_welch, hmm_filter
from tests.infer.discrete.brute import chain_model, jump_model, normal_emission, random_data

EMISSIONS = {
    "normal": (normal_emission, {}),
    "normal, full": (lambda: normal_emission(covariance="full"), {}),
    "poisson": (lambda: ssm.emissions.PoissonTable(3, 2), {"counts": 6}),
    "categorical": (lambda: ssm.emissions.CategoricalTable(3, 2, 4), {"counts": 4}),
    "student": (lambda: ssm.emissions.StudentTTable(3, 2, df=4.0), {}),
}


def total(model, data):
    return hmm_filter(model, data).log_likelihood.sum()


@pytest.mark.parametrize("case", EMISSIONS)
def test_likelihood_rises_on_pooled_ragged_series_with_gaps(case):
    make, options = EMISSIONS[case]
    model = chain_model(make())
    data = random_data((4,), T=20, lengths=torch.tensor([20, 15, 7, 1]), **options)
    result = baum_welch(model, data, max_iterations=15, tolerance=0.0)
    trace = result.log_likelihood
    assert (trace.diff() > -1e-9 * trace.abs().max()).all() and trace[-1] > trace[0] + 1
    assert result.num_iterations == 15 and len(trace) == 16
    torch.testing.assert_close(trace[0], total(model, data).detach())  # the given model is not changed
    torch.testing.assert_close(trace[-1], total(result.model, data).detach())


@pytest.mark.parametrize("case", ["normal", "normal, full", "student"])
def test_where_it_converges_the_gradient_vanishes(case):
    model = chain_model(EMISSIONS[case][0](), K=3)
    torch.manual_seed(2)
    centre = torch.tensor([-4.0, 0.0, 4.0]).repeat_interleave(10).repeat(8)
    values = centre[:, None] + torch.randn(240, 2)
    values[torch.rand(240, 2) < 0.15] = float("nan")
    data = TimeSeries(torch.arange(240.0), values.double())
    result = baum_welch(model, data, max_iterations=400, tolerance=1e-14)
    held = {name for name, _ in model.named_parameters() if "probs" in name or "df" in name}  # these run to the edge
    parameters = {name: p for name, p in result.model.named_parameters() if name not in held}
    grads = torch.autograd.grad(total(result.model, data), list(parameters.values()))
    assert max(g.abs().max() for g in grads) < 1e-2
    assert result.log_likelihood[-1] > result.log_likelihood[0]


def test_one_state_is_the_sample_s_moments_in_one_step():
    data = random_data((3,), T=9, lengths=torch.tensor([9, 4, 6]))
    result = baum_welch(chain_model(normal_emission(K=1), K=1), data, max_iterations=1)
    for i in range(2):
        seen = data.values[..., i][data.mask[..., i]]
        torch.testing.assert_close(result.model.emission.loc[0, i], seen.mean())
        torch.testing.assert_close(result.model.emission.scale[0, i], seen.std(correction=0))


def test_fixed_parameters_stay():
    model = chain_model(normal_emission())
    model.initial.probs_unconstrained.requires_grad_(False)
    data = random_data((2,), T=15)
    result = baum_welch(model, data, fixed=["emission.scale", "transition.matrix"], max_iterations=5, tolerance=0.0)
    for part, name in (("emission", "scale"), ("transition", "matrix"), ("initial", "probs")):
        torch.testing.assert_close(getattr(getattr(result.model, part), name), getattr(getattr(model, part), name))
    assert not torch.equal(result.model.emission.loc, model.emission.loc)
    assert (result.log_likelihood.diff() >= -1e-9).all()
    jump = jump_model(normal_emission())
    kept = baum_welch(jump, data, fixed=["transition.rates"], max_iterations=3)
    torch.testing.assert_close(kept.model.transition.rates, jump.transition.rates)


def test_structural_zeros_stay():
    matrix = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    model = chain_model(normal_emission())
    model.transition = ssm.dynamics.MarkovChain(3, matrix=matrix).double()
    found = baum_welch(model, random_data((2,), T=15), max_iterations=10).model.transition.matrix
    assert (found[matrix == 0] == 0).all()


def test_it_finds_the_parameters_of_a_simulated_chain():
    emission = ssm.emissions.NormalTable(2, 1, loc=torch.tensor([-2.0, 2.0]))
    true = ssm.StateSpaceModel(ssm.dynamics.CategoricalInitial(2), ssm.dynamics.MarkovChain(2), emission).double()
    _, y = true.bind()(TimeSeries(torch.arange(300.0).expand(20, 300).clone()))
    start = ssm.emissions.NormalTable(2, 1, loc=torch.tensor([-0.5, 0.5]), scale=2.0)
    model = ssm.StateSpaceModel(ssm.dynamics.CategoricalInitial(2), ssm.dynamics.MarkovChain(2), start).double()
    result = baum_welch(model, TimeSeries(torch.arange(300.0), y.detach().double()))
    assert result.converged
    torch.testing.assert_close(
        result.model.emission.loc.squeeze(), torch.tensor([-2.0, 2.0]).double(), atol=0.08, rtol=0
    )
    torch.testing.assert_close(result.model.transition.matrix, true.transition.matrix, atol=0.02, rtol=0)


def test_errors_name_the_way_out():
    data = random_data()
    with pytest.raises(TypeError, match=r"no closed form for MarkovJump.*Marginal"):
        baum_welch(jump_model(normal_emission()), data)
    model = chain_model(normal_emission())
    with pytest.raises(ValueError, match="names \\['emission.sclae'\\]"):
        baum_welch(model, data, fixed=["emission.sclae"])
    model.emission.loc = PyroSample(dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    with pytest.raises(TypeError, match="have priors"):
        baum_welch(model, data)
