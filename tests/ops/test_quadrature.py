import itertools
import math

import pytest
import torch

from pyro_ssm.ops import cubature_rule, gauss_hermite_rule, unscented_rule

D = torch.float64


def gaussian_moment(powers):
    """E of a monomial under N(0, I): the product of double factorials."""
    return math.prod(0 if p % 2 else math.prod(range(1, p, 2)) for p in powers)


def integrate(rule, powers):
    return (rule.mean_weights * (rule.points ** torch.tensor(powers)).prod(-1)).sum().item()


def rules(n):
    yield 3, cubature_rule(n)
    yield 3, unscented_rule(n)
    yield 3, unscented_rule(n, alpha=0.5, beta=2.0, kappa=0.7)
    yield from ((2 * order - 1, gauss_hermite_rule(n, order)) for order in (2, 3, 5))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_exact_for_polynomials_up_to_the_degree(n):
    for degree, rule in rules(n):
        for powers in itertools.product(range(degree + 1), repeat=n):
            if sum(powers) <= degree:
                assert integrate(rule, powers) == pytest.approx(gaussian_moment(powers), abs=1e-11)


def test_not_exact_one_degree_further():
    """So that the test above can fail."""
    assert abs(integrate(cubature_rule(1), [4]) - 3) > 1
    assert abs(integrate(gauss_hermite_rule(1, 4), [8]) - 105) > 1
    assert integrate(unscented_rule(1), [4]) == pytest.approx(3)  # kappa = 3 - n: the fourth moment along an axis
    assert integrate(unscented_rule(2), [4, 0]) == pytest.approx(3)


@pytest.mark.parametrize("order", [10, 40])
def test_gauss_hermite_of_high_order(order):
    rule = gauss_hermite_rule(1, order)
    for power in range(0, 19, 2):
        assert integrate(rule, [power]) == pytest.approx(gaussian_moment([power]), rel=1e-11)
    assert (rule.mean_weights * rule.points[:, 0].cos()).sum().item() == pytest.approx(math.exp(-0.5), rel=3e-8)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_what_a_rule_promises(n):
    for _, (points, w, v, c) in rules(n):
        torch.testing.assert_close(torch.stack([w.sum(), c.sum()]), torch.ones(2, dtype=D))
        assert (v >= 0).all()
        torch.testing.assert_close(v @ points, torch.zeros(n, dtype=D), rtol=0, atol=1e-12)
        torch.testing.assert_close((v[:, None] * points).T @ points, torch.eye(n, dtype=D))
        norms = points.norm(dim=-1)
        assert norms[0] == norms.min()


@pytest.mark.parametrize("alpha, beta, kappa", [(1.0, 0.0, 0.0), (1e-3, 2.0, 0.0), (0.6, 0.0, 2.0), (1.5, 1.0, -1.0)])
def test_unscented_covariance_is_the_classical_one(alpha, beta, kappa):
    """The textbook's weighted sum, whose centre weight may be negative, against the sum of squares."""
    n, p = 3, 2
    torch.manual_seed(0)
    rule = unscented_rule(n, alpha, beta, kappa)
    values = torch.randn(2 * n + 1, p, dtype=D)
    if alpha < 0.01:  # values of a smooth function at points that close
        values = values[:1] + alpha * values
    w = rule.mean_weights
    mean = w @ values
    covariance_weights = w.clone()
    covariance_weights[0] += 1 - alpha**2 + beta
    classical = ((values - mean) * covariance_weights[:, None]).T @ (values - mean)
    rest = values - rule.centre_weights @ values
    ours = (rest * rule.spread_weights[:, None]).T @ rest
    torch.testing.assert_close(ours, classical, rtol=1e-8, atol=1e-8 * classical.abs().max().item())


def test_unscented_identities():
    """alpha=1, beta=0, kappa=0 is cubature; in one dimension the default is Gauss-Hermite of order 3."""
    unscented, cubature = unscented_rule(4, 1.0, 0.0, 0.0), cubature_rule(4)
    assert unscented.mean_weights[0] == 0
    torch.testing.assert_close(unscented.points[1:], cubature.points)
    for one, other in zip(unscented[1:], cubature[1:], strict=True):
        torch.testing.assert_close(one[1:], other)
    one, other = unscented_rule(1), gauss_hermite_rule(1, 3)
    torch.testing.assert_close(one.mean_weights, other.mean_weights)
    torch.testing.assert_close(one.points.sort(0).values, other.points.sort(0).values)


def test_refusals_name_the_argument():
    with pytest.raises(ValueError, match="`alpha` must be positive, got 0"):
        unscented_rule(2, alpha=0)
    with pytest.raises(ValueError, match="n \\+ kappa must be positive"):
        unscented_rule(2, kappa=-2)
    with pytest.raises(ValueError, match="indefinite covariance.*Take kappa=0"):
        unscented_rule(4, kappa=-1)
    with pytest.raises(ValueError, match="10\\^8 = 100000000 points.*cubature"):
        gauss_hermite_rule(8, 10)
    with pytest.raises(ValueError, match="`order` must be an integer of at least 2, got 1"):
        gauss_hermite_rule(2, 1)
    with pytest.raises(ValueError, match="`n` must be an integer of at least 1, got 0"):
        cubature_rule(0)
