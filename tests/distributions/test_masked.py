"""A hidden entry adds exactly 0 to the density; what stands in its place matters to nothing."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ssm.distributions import masked
from pyro_ssm.ops.reading import no_reading

NAN = float("nan")


def grads(total, parameters):
    return torch.autograd.grad(total, parameters, retain_graph=True)


UNIVARIATE = {
    "normal": (lambda a: dist.Normal(a, a.exp()), [0.3, -1.2, 2.0]),
    "lognormal": (lambda a: dist.LogNormal(a, a.exp()), [0.3, 1.2, 2.0]),
    "gamma": (lambda a: dist.Gamma(a.exp(), a.exp() + 1), [0.3, 1.2, 2.0]),
    "beta": (lambda a: dist.Beta(a.exp(), a.exp() + 1), [0.3, 0.2, 0.9]),
    "student": (lambda a: dist.StudentT(a.exp() + 2, a, a.exp()), [0.3, -1.2, 2.0]),
    "poisson": (lambda a: dist.Poisson(a.exp()), [0.0, 2.0, 5.0]),
    "negative binomial": (lambda a: dist.NegativeBinomial(a.exp(), logits=a), [0.0, 2.0, 5.0]),
    "bernoulli": (lambda a: dist.Bernoulli(logits=a), [0.0, 1.0, 1.0]),
    "uniform": (lambda a: dist.Uniform(a, a + 5.0), [0.8, 1.2, 2.0]),
    "half normal": (lambda a: dist.HalfNormal(a.exp()), [0.3, 1.2, 2.0]),
    "pareto": (lambda a: dist.Pareto(a.exp() * 0.1, a.exp()), [1.3, 1.2, 2.0]),
}


@pytest.mark.parametrize("garbage", [NAN, -1e30, 0.0, -1.0, 7.5], ids=str)
@pytest.mark.parametrize("name", UNIVARIATE)
def test_entries_are_those_of_the_model_without_the_hidden_ones(name, garbage):
    law, y = UNIVARIATE[name]
    a = torch.tensor([0.1, -0.3, 0.5], dtype=torch.float64, requires_grad=True)
    y = torch.tensor(y, dtype=torch.float64)
    seen = torch.tensor([True, False, True])
    hidden = torch.where(seen, y, torch.tensor(garbage, dtype=torch.float64))
    found = masked(law(a.unsqueeze(0)).to_event(1), seen).log_prob(hidden.unsqueeze(0))
    wanted = law(a[seen]).log_prob(y[seen]).sum()
    torch.testing.assert_close(found, wanted.unsqueeze(0))
    (gradient,) = grads(found.sum(), [a])
    torch.testing.assert_close(gradient, grads(wanted, [a])[0])
    assert gradient[1] == 0
    entries = masked(law(a.unsqueeze(0)).to_event(1), seen).log_prob_entries(hidden.unsqueeze(0))
    assert entries.shape == (1, 3) and entries[0, 1] == 0


@pytest.mark.parametrize("name", UNIVARIATE)
def test_all_hidden_adds_exactly_zero(name):
    law, _ = UNIVARIATE[name]
    a = torch.tensor([[0.1, -0.3]], dtype=torch.float64, requires_grad=True)
    total = masked(law(a).to_event(1), torch.zeros(1, 2, dtype=torch.bool)).log_prob(torch.full((1, 2), NAN).double())
    assert total.tolist() == [0.0]
    assert grads(total.sum(), [a])[0].tolist() == [[0.0, 0.0]]


def test_gradient_with_respect_to_a_hidden_value_is_zero():
    y = torch.tensor([[1.0, 2.0]], requires_grad=True)
    law = dist.LogNormal(torch.zeros(1, 2), 1.0).to_event(1)
    (gradient,) = grads(masked(law, torch.tensor([[True, False]])).log_prob(y).sum(), [y])
    assert gradient[0, 1] == 0 and gradient[0, 0] != 0


# ------------------------------------------------------------------------------------- multivariate normal


def dense_log_prob(y, loc, covariance):
    """The formula of the density, by hand."""
    r = y - loc
    return -0.5 * (r @ torch.linalg.inv(covariance) @ r + torch.logdet(covariance) + len(y) * math.log(2 * math.pi))


def laws(loc, root):
    """The same normal law in each of its parameterisations, and a low-rank one."""
    square = root @ root.mT
    low = dist.LowRankMultivariateNormal(loc, root[..., :2], root.diagonal(dim1=-2, dim2=-1).square())
    return {
        "scale_tril": (dist.MultivariateNormal(loc, scale_tril=root), square),
        "covariance_matrix": (dist.MultivariateNormal(loc, covariance_matrix=square), square),
        "precision_matrix": (dist.MultivariateNormal(loc, precision_matrix=torch.linalg.inv(square)), square),
        "low rank": (low, low.covariance_matrix),
    }


@pytest.mark.parametrize("kind", ["scale_tril", "covariance_matrix", "precision_matrix", "low rank"])
@pytest.mark.parametrize("seen", [[True, True, True], [True, False, True], [False, True, False], [False, False, False]])
def test_a_masked_multivariate_normal_is_the_exact_marginal(kind, seen):
    seen = torch.tensor(seen)
    loc = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    root = torch.tensor([[1.0, 0, 0], [0.7, 0.8, 0], [-0.5, 0.3, 1.2]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1.0, 0.2, -0.3], dtype=torch.float64)
    law, square = laws(loc, root)[kind]
    law = law.expand((4,))
    hidden = torch.where(seen, y, torch.tensor(NAN, dtype=torch.float64))
    found = masked(law, seen.expand(4, 3)).log_prob(hidden.expand(4, 3))
    if bool(seen.any()):
        wanted = dense_log_prob(y[seen], loc[seen], square[seen][:, seen])
    else:
        wanted = 0.0 * loc.sum() + 0.0 * square.sum()
    torch.testing.assert_close(found, wanted.expand(4))
    for a, b in zip(grads(found.sum(), [loc, root]), grads(4 * wanted, [loc, root]), strict=True):
        torch.testing.assert_close(a, b)
    if not bool(seen.any()):
        assert found.tolist() == [0.0] * 4


def test_masks_differ_over_times_and_series():
    torch.manual_seed(1)
    loc, root = torch.randn(2, 5, 3).double(), torch.randn(3, 3).double().tril() + 2 * torch.eye(3)
    mask, y = torch.rand(2, 5, 3) < 0.5, torch.randn(2, 5, 3).double()
    found = masked(dist.MultivariateNormal(loc, scale_tril=root), mask).log_prob(y)
    square = root @ root.mT
    for i in range(2):
        for k in range(5):
            s = mask[i, k]
            wanted = dense_log_prob(y[i, k][s], loc[i, k][s], square[s][:, s]) if s.any() else torch.zeros(()).double()
            torch.testing.assert_close(found[i, k], wanted)


def test_sample_dims_of_the_law_broadcast_against_the_mask():
    loc, mask = torch.randn(6, 2, 5, 3), torch.rand(2, 5, 3) < 0.5
    for law in (dist.Normal(loc, 1.0).to_event(1), dist.MultivariateNormal(loc, torch.eye(3))):
        found = masked(law, mask).log_prob(torch.zeros(2, 5, 3))
        wanted = (dist.Normal(loc, 1.0).log_prob(torch.tensor(0.0)) * mask).sum(-1)
        torch.testing.assert_close(found, wanted)


# ------------------------------------------------------------------------------------- other laws with event


@pytest.mark.parametrize(
    ("law", "y"),
    [
        (lambda a: dist.Dirichlet(a.exp()), [[0.2, 0.3, 0.5], [NAN, NAN, NAN]]),
        (lambda a: dist.OneHotCategorical(logits=a), [[0.0, 1.0, 0.0], [NAN, NAN, NAN]]),
        (lambda a: dist.Multinomial(4, logits=a), [[1.0, 1.0, 2.0], [NAN, NAN, NAN]]),
        (lambda a: dist.MultivariateStudentT(torch.tensor(5.0), a, torch.eye(3)), [[1.0, 1.0, 2.0], [NAN, NAN, NAN]]),
    ],
    ids=["dirichlet", "one-hot", "multinomial", "student"],
)
def test_laws_with_an_event_hide_whole_times(law, y):
    a = torch.tensor([[0.1, 0.2, -0.4], [0.5, 0.1, 0.0]], requires_grad=True)
    mask = torch.tensor([[True] * 3, [False] * 3])
    found = masked(law(a), mask).log_prob(torch.tensor(y))
    torch.testing.assert_close(found[0], law(a[0]).log_prob(torch.tensor(y)[0]))
    assert found[1] == 0
    (gradient,) = grads(found.sum(), [a])
    torch.testing.assert_close(gradient[0], grads(law(a[0]).log_prob(torch.tensor(y)[0]), [a])[0][0])
    assert gradient[1].tolist() == [0.0] * 3


def test_hiding_part_of_an_event_raises_and_names_the_way_out():
    law = masked(dist.Dirichlet(torch.ones(2, 3)), torch.tensor([[True, False, True], [True] * 3]))
    with pytest.raises(ValueError, match="all True or all False") as raised:
        law.log_prob(torch.full((2, 3), 1 / 3))
    assert "Dirichlet" in str(raised.value) and "multivariate normal" in str(raised.value)


def test_a_law_without_event_dim_raises():
    with pytest.raises(ValueError, match="one event dim"):
        masked(dist.Normal(torch.zeros(4, 3), 1.0), torch.ones(4, 3, dtype=torch.bool))


def test_entries_of_a_dependent_law_raise():
    with pytest.raises(TypeError, match="log_prob_entries"):
        masked(dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), torch.ones(2, dtype=torch.bool)).log_prob_entries(
            torch.zeros(2)
        )


# ------------------------------------------------------------------------------------------- as a law


def test_sampling_ignores_the_mask_and_expand_keeps_it():
    mask = torch.tensor([[True, False], [True, True]])
    law = masked(dist.Normal(torch.tensor([5.0, -5.0]), 1e-3).to_event(1), mask)
    assert law.batch_shape == (2,) and law.event_shape == (2,)
    assert law.sample((7,)).shape == (7, 2, 2)
    torch.testing.assert_close(law.sample((7,)).mean((0, 1)), torch.tensor([5.0, -5.0]), atol=0.01, rtol=0.0)
    wide = law.expand((3, 2))
    assert wide.sample().shape == (3, 2, 2)
    y = wide.sample()
    torch.testing.assert_close(wide.log_prob(y), law.log_prob(y))
    assert law.has_rsample and law.mean.tolist() == [5.0, -5.0]


def test_float32_stays_float32_and_integers_are_taken():
    mask = torch.ones(3, 2, dtype=torch.bool)
    assert (
        masked(dist.Normal(torch.zeros(3, 2), 1.0).to_event(1), mask).log_prob(torch.zeros(3, 2)).dtype == torch.float32
    )
    counts = masked(dist.Poisson(torch.ones(3, 2)).to_event(1), mask).log_prob(torch.ones(3, 2, dtype=torch.long))
    torch.testing.assert_close(counts, torch.full((3,), -2.0))


@pytest.mark.parametrize(
    "law, y",
    [
        (dist.MultivariateNormal(torch.zeros(4, 3), scale_tril=torch.eye(3) + torch.ones(3, 3).tril()), torch.randn),
        (dist.Normal(torch.zeros(4, 3), 2.0).to_event(1), torch.randn),
        (dist.Dirichlet(torch.ones(4, 3) + 1), lambda *shape: torch.rand(*shape).softmax(-1)),
    ],
    ids=["multivariate", "independent", "Dirichlet"],
)
def test_one_column_of_a_mask_stands_for_all(law, y):
    y, seen = y(4, 3), torch.tensor([True, False, True, False]).unsqueeze(-1)
    found, wanted = (masked(law, mask).log_prob(y) for mask in (seen, seen.expand(4, 3)))
    assert torch.equal(found, wanted) and (found[1::2] == 0).all() and (found[::2] != 0).all()


def test_without_a_look_at_numbers():
    """The same densities; a covariance without a root gives NaN where an error would need a look."""
    good, bad = 0.5 + torch.eye(2), 2 - torch.eye(2)
    law = dist.MultivariateNormal(torch.zeros(2, 2), torch.stack([good, good]))
    seen, y = torch.tensor([[True, True], [False, True]]), torch.ones(2, 2)
    wanted = masked(law, seen).log_prob(y)
    law.covariance_matrix = torch.stack([bad, good])
    with pytest.raises(RuntimeError, match="positive-definite"):
        masked(law, seen).log_prob(y)
    with no_reading():
        found = masked(law, seen).log_prob(y)
    assert found[0].isnan() and found[1] == wanted[1]
