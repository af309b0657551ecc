import pyro.distributions as dist
import pytest
import torch

from pyro_ssm import dynamics, emissions, infer
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import iterated_posterior_linearisation_smoother as iterated
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.models.laws import observation_law, path_law
from pyro_ssm.ops import gauss_hermite_rule
from tests.infer.gaussian.nonlinear import D, pendulum, simulate

RULES = ["taylor", "cubature", "unscented", "gauss_hermite"]


def sensor(look, noise=0.1, spread=1.0):
    """One state, seen once through ``look``."""
    return StateSpaceModel(
        dynamics.NormalInitial(1, scale=spread),
        dynamics.LinearNormal(1),
        emissions.FunctionNormal(1, 1, look, scale=noise),
    ).double()


def once(*values):
    return TimeSeries(torch.zeros(1), torch.tensor(values, dtype=D)[:, None, None])


def test_taylor_finds_the_most_probable_path():
    """The gradient of the model's own log-density vanishes there."""
    path, data = simulate(pendulum(), (3,), 15, missing=0.3, lengths=torch.tensor([15, 9, 1]))
    model = pendulum().bind()
    result = iterated(model, data, "taylor", tolerance=1e-10)
    assert result.converged.all()

    def slope(z):
        z = z.detach().requires_grad_()
        score = path_law(model, data).log_prob(z) + observation_law(model, data, z).log_prob(data.values)
        return torch.autograd.grad(score.sum(), z)[0]

    real = data.step_mask.unsqueeze(-1)
    assert (slope(result.mean) * real).abs().max() < 1e-5
    assert (slope(infer.extended_kalman_smoother(model, data).mean) * real).abs().max() > 1.0


def test_iterating_helps_where_an_observation_tells_much_more_than_the_prior():
    """z ~ N(0, 1) seen as z^3 + z with noise 0.05: the posterior by quadrature, which one pass misses."""
    look = lambda z, u: z**3 + z  # noqa: E731
    data, grid = once(2.0, -1.0, 0.3), torch.linspace(-4, 4, 40_001, dtype=D)
    weight = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(data.values[:, 0], 0.05).log_prob(look(grid, None))
    law = weight.softmax(-1)
    mean = (law * grid).sum(-1)
    deviation = (law * (grid - mean[:, None]).square()).sum(-1).sqrt()
    evidence = (weight.logsumexp(-1)) + (grid[1] - grid[0]).log()
    for rule, smoother in (("taylor", infer.extended_kalman_smoother), ("cubature", infer.cubature_kalman_smoother)):
        result, single = iterated(sensor(look, 0.05), data, rule), smoother(sensor(look, 0.05), data)
        assert result.converged.all() and result.iterations > 3
        error, before = (((r.mean[:, 0, 0] - mean) / deviation).abs().max() for r in (result, single))
        assert error < 0.1 and before > 1.0, rule  # measured 0.08 (the mode) and 0.05
        torch.testing.assert_close(result.scale_tril[:, 0, 0, 0], deviation, rtol=0.05, atol=0)
        off, off_before = ((r.log_likelihood[:, 0] - evidence).abs().max() for r in (result, single))
        assert off < off_before


@pytest.mark.parametrize("rule", RULES)
def test_result_is_a_fixed_point(rule):
    """Linearised once more around the result, the model gives the result again."""
    path, data = simulate(pendulum(), (2,), 12, missing=0.2)
    loose, tight = (iterated(pendulum(), data, rule, tolerance=t) for t in (1e-4, 1e-10))
    assert tight.iterations > loose.iterations and (tight.change <= 1e-10).all()
    deviation = tight.scale_tril.norm(dim=-1)
    assert ((loose.mean - tight.mean) / deviation).abs().max() < 1e-3
    again = iterated(pendulum(), data, rule, tolerance=1e-11)
    assert ((again.mean - tight.mean) / deviation).abs().max() < 1e-9


def test_line_search_finds_what_whole_steps_overshoot():
    """atan saturates: from far away a whole Gauss-Newton step lands farther on the other side."""
    look = lambda z, u: torch.atan(z)  # noqa: E731
    model, data = sensor(look, noise=0.05, spread=30.0), once(0.0, 0.2, -0.5)
    model.initial.loc.data.fill_(10.0)
    result = iterated(model, data, "taylor", tolerance=1e-9)
    assert result.converged.all()
    grid = torch.linspace(-5, 15, 200_001, dtype=D)
    score = dist.Normal(10.0, 30.0).log_prob(grid) + dist.Normal(data.values[:, 0], 0.05).log_prob(look(grid, None))
    torch.testing.assert_close(result.mean[:, 0, 0], grid[score.argmax(-1)], rtol=0, atol=1e-4)


def test_points_of_a_rule_may_be_given():
    path, data = simulate(pendulum(), (2,), 8)
    given, named = iterated(pendulum(), data, gauss_hermite_rule(2, 3)), iterated(pendulum(), data, "gauss_hermite")
    torch.testing.assert_close(given.mean, named.mean)
    assert "9 points" in given.method and "gauss_hermite" in named.method
    with pytest.raises(ValueError, match="`rule` has points in 3 dimensions, but the state has 2"):
        iterated(pendulum(), data, gauss_hermite_rule(3))
    with pytest.raises(ValueError, match="`rule` must be one of 'taylor', 'cubature'.*got 'simpson'"):
        iterated(pendulum(), data, "simpson")
    with pytest.raises(ValueError, match="`max_iterations` must be at least 1"):
        iterated(pendulum(), data, max_iterations=0)


def test_no_convergence_is_told():
    path, data = simulate(pendulum(), (3,), 12)
    with pytest.warns(RuntimeWarning, match="3 of 3 series did not converge in 1 iterations.*Raise `max_iterations`"):
        result = iterated(pendulum(), data, max_iterations=1)
    assert not result.converged.any() and result.iterations == 2 and (result.change > 1e-4).all()
