"""Log-likelihoods alone are those of the whole filter: values, first and second derivatives, options, errors."""

import functools

import pytest
import torch

from pyro_ssm.infer import extended_kalman_filter, gaussian, kalman_filter, kalman_log_likelihood
from pyro_ssm.infer.filter_terms import log_likelihood_terms
from pyro_ssm.infer.marginal import MarginalLaw
from tests.infer.gaussian.linear import D, random_data, random_model
from tests.infer.gaussian.test_diffuse import unknown_model


def start(kind, **options):
    return (unknown_model if kind == "diffuse" else random_model)(**options)


@pytest.mark.parametrize("kind", ["proper", "diffuse"])
@pytest.mark.parametrize("method", ["auto", "sequential", "parallel"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([6, 2, 4])])
def test_terms_are_those_of_the_filter(kind, method, lengths):
    torch.manual_seed(0)
    model, data = start(kind), random_data((3,), lengths=lengths, missing=0.0 if kind == "diffuse" else 0.3)
    wanted = kalman_filter(model, data, method=method).log_likelihood
    torch.testing.assert_close(kalman_log_likelihood(model, data, method=method), wanted, rtol=1e-12, atol=1e-12)
    filter = functools.partial(kalman_filter, method=method)
    torch.testing.assert_close(log_likelihood_terms(filter, model.bind(), data), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["proper", "diffuse"])
def test_first_and_second_derivatives_are_those_of_the_filter(kind):
    torch.manual_seed(0)
    model, data = start(kind), random_data((2,))
    found = []
    for terms in (kalman_log_likelihood, lambda m, y: kalman_filter(m, y).log_likelihood):
        F = model.transition.F.detach().clone().requires_grad_()
        model.transition.F = F
        gradient = torch.autograd.grad(terms(model, data).sum(), F, create_graph=True)[0]
        found.append((gradient, torch.autograd.grad(gradient.square().sum(), F)[0]))
    for mine, wanted in zip(*found, strict=True):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-8)


def test_the_marginal_law_runs_no_more_than_it_needs(monkeypatch):
    """With the states' laws out of reach the density is still there; a filter without the attribute runs whole."""
    model, data = random_model(), random_data((3,))
    wanted = kalman_filter(model, data).log_likelihood.sum(-1)

    def refuse(*args, **options):
        raise AssertionError("the whole filter ran")

    monkeypatch.setattr(gaussian.kalman, "filter_steps", refuse)
    torch.testing.assert_close(MarginalLaw(model.bind(), data, kalman_filter).log_prob(data.values), wanted)
    with pytest.raises(AssertionError, match="the whole filter ran"):
        MarginalLaw(model.bind(), data, lambda m, y: kalman_filter(m, y)).log_prob(data.values)
    other = MarginalLaw(model.bind(), data, extended_kalman_filter).log_prob(data.values)
    torch.testing.assert_close(other, wanted)


def test_what_has_no_density_is_refused_as_by_the_filter():
    model, data = random_model(2, 2), random_data(missing=0.0)
    model.emission.R = torch.zeros(2, 2, dtype=D)
    model.emission.H = torch.ones(2, 2, dtype=D)  # two exact sensors of one thing
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        kalman_log_likelihood(model, data)
    broken = random_model()
    broken.transition.F = torch.full((3, 3), torch.nan, dtype=D)
    with pytest.raises(torch.linalg.LinAlgError, match="`matrix` of the transition is not finite"):
        kalman_log_likelihood(broken, data)
    with pytest.raises(ValueError, match="`method` must be one of 'auto', 'sequential', 'parallel', got 'fast'"):
        kalman_log_likelihood(random_model(), data, method="fast")
