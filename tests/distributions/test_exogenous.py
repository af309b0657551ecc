"""Noise behind a value: replaying it gives the value back; under another law it gives draws of that law."""

import pyro.distributions as dist
import pytest
import torch

from pyro_ssm.distributions import SingularNormal, exogenous
from pyro_ssm.distributions.codes import CategoricalCodes

D = torch.float64
N = 40_000


def root(*rows):
    return torch.tensor(rows, dtype=D)


PAIRS = {
    "normal": (dist.Normal(root(0.0, 1.0), root(1.0, 2.0)).to_event(1), dist.Normal(root(3.0, 1.0), 0.5).to_event(1)),
    "laplace": (dist.Laplace(root(0.0), 1.0), dist.Laplace(root(1.0), 2.0)),
    "student": (dist.StudentT(3.0, root(0.0), 1.0), dist.StudentT(3.0, root(2.0), 0.1)),
    "lognormal": (dist.LogNormal(root(0.0), 0.3), dist.LogNormal(root(1.0), 0.2)),
    "multivariate": (
        dist.MultivariateNormal(root(0.0, 1.0), scale_tril=root([1.0, 0.0], [0.5, 2.0])),
        dist.MultivariateNormal(root(2.0, 1.0), scale_tril=root([0.3, 0.0], [-0.5, 1.0])),
    ),
    "low rank": (
        dist.LowRankMultivariateNormal(root(0.0, 0.0), root([1.0], [2.0]), root(0.5, 0.1)),
        dist.LowRankMultivariateNormal(root(0.0, 5.0), root([0.1], [2.0]), root(0.5, 1.0)),
    ),
    "poisson": (dist.Poisson(root(0.3, 4.0)).to_event(1), dist.Poisson(root(2.0, 1.0)).to_event(1)),
    "negative binomial": (
        dist.NegativeBinomial(root(3.0), logits=root(0.5)),
        dist.NegativeBinomial(root(1.5), logits=root(0.0)),
    ),
    "bernoulli": (dist.Bernoulli(root(0.2, 0.9)), dist.Bernoulli(root(0.7, 0.4))),
    "categorical": (
        CategoricalCodes(probs=root([0.1, 0.2, 0.7])),
        CategoricalCodes(probs=root([0.5, 0.3, 0.2])),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_same_law_gives_the_value_back(name):
    law = PAIRS[name][0]
    value = law.sample((500,))
    mechanism = exogenous(law)
    torch.testing.assert_close(mechanism.replay(mechanism.abduct(value)), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_another_law_gives_its_own_draws(name):
    torch.manual_seed(1)
    law, other = PAIRS[name]
    moved = exogenous(other).replay(exogenous(law).abduct(law.sample((N,)))).reshape(N, -1)
    if name == "categorical":
        moved = torch.nn.functional.one_hot(moved.long().squeeze(-1), 3).double()
        mean, variance = other.probs.reshape(-1), (other.probs * (1 - other.probs)).reshape(-1)
    elif name == "student":  # its fourth moment is infinite: judge by the quartiles
        inside = ((moved - 2.0).abs() < 0.1 * 0.764892).double()
        moved, mean, variance = inside, root(0.5), root(0.25)
    else:
        mean, variance = other.mean.reshape(-1), other.variance.reshape(-1)
    assert ((moved.mean(0) - mean).abs() < 5 * (variance / N).sqrt()).all()
    square = (moved - mean).square()
    assert ((square.mean(0) - variance).abs() < 5 * (square.var(0) / N).sqrt() + 1e-12).all()
    if name == "multivariate":
        covariance = torch.cov(moved.mT)[0, 1]
        assert (covariance - other.covariance_matrix[0, 1]).abs() < 0.05


def test_an_entry_without_noise_and_a_singular_covariance():
    still, moving = dist.Normal(root(1.0), root(0.0), validate_args=False), dist.Normal(root(2.0), root(3.0))
    assert exogenous(moving).replay(exogenous(still).abduct(root(1.0))) == 2.0
    law = SingularNormal(root(1.0, 0.0), scale_tril=root([2.0, 0.0], [1.0, 0.0]), validate_args=False)
    other = SingularNormal(root(0.0, 0.0), scale_tril=root([1.0, 0.0], [1.0, 0.0]), validate_args=False)
    value = law.sample((20,))
    expected = (value[:, :1] - 1.0) / 2
    torch.testing.assert_close(exogenous(other).replay(exogenous(law).abduct(value)), expected.expand(-1, 2))


def test_counts_keep_their_order():
    low, high = exogenous(dist.Poisson(root(3.0))), exogenous(dist.Poisson(root(3.5)))
    value = dist.Poisson(root(3.0)).sample((5000,))
    moved = high.replay(low.abduct(value))
    assert (moved >= value).all() and (moved > value).any()


def test_a_class_that_the_change_favours_most_is_kept():
    """Counterfactual stability: from class 0, whose odds rise against all others, nothing moves."""
    before, after = CategoricalCodes(probs=root([0.4, 0.3, 0.3])), CategoricalCodes(probs=root([0.6, 0.2, 0.2]))
    noise = exogenous(before).abduct(torch.zeros(5000, dtype=D))
    assert (exogenous(after).replay(noise) == 0).all()
    back = exogenous(before).replay(exogenous(after).abduct(torch.zeros(5000, dtype=D)))
    assert set(back.unique().tolist()) == {0.0, 1.0, 2.0}


def test_impossible_classes():
    before = CategoricalCodes(probs=root([0.5, 0.5, 0.0]))
    after = CategoricalCodes(probs=root([0.0, 0.5, 0.5]))
    moved = exogenous(after).replay(exogenous(before).abduct(before.sample((20_000,))))
    assert (moved > 0).all() and abs(float((moved == 1).double().mean()) - 0.5) < 0.02
    kept = exogenous(before).replay(exogenous(before).abduct(torch.zeros(500, dtype=D)))
    assert (kept == 0).all()


def test_a_law_without_mechanism_is_named():
    with pytest.raises(TypeError, match="values of a Dirichlet"):
        exogenous(dist.Dirichlet(torch.ones(3)))


def test_a_table_that_would_not_fit_says_so():
    with pytest.raises(ValueError, match="needs .* cumulative probabilities"):
        exogenous(dist.Poisson(torch.full((1000,), 1e7))).abduct(torch.full((1000,), 1e7))
