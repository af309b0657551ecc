"""Importance estimates against the dense Gaussian evidence."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample

from pyro_ssm.infer import evidence_lower_bound, importance_log_likelihood

from .programs import Chain, ExactGuide, LinearGuide, evidence, series_plate, simulate


@pytest.mark.parametrize("ragged", [False, True])
def test_exact_posterior_gives_the_evidence_of_each_series(ragged):
    data = simulate(4, 6, ragged=ragged, missing=0.3)
    found = importance_log_likelihood(Chain(), ExactGuide(), data, num_samples=7, batch=3)
    torch.testing.assert_close(found.log_likelihood, evidence(data))
    torch.testing.assert_close(found.bound, evidence(data))
    torch.testing.assert_close(found.ess, torch.full((4,), 7.0, dtype=torch.float64))
    assert found.standard_error.max() < 1e-5


def test_error_is_within_the_standard_error():
    torch.manual_seed(0)
    data = simulate(30, 4)
    guide = ExactGuide(shift=0.2)
    found = importance_log_likelihood(Chain(), guide, data, num_samples=4000, batch=1000)
    errors = (found.log_likelihood - evidence(data)) / found.standard_error
    assert errors.abs().max() < 4
    assert 0.6 < errors.std() < 1.4  # the standard errors are neither too large nor too small
    assert (found.bound < found.log_likelihood).all()
    assert abs(found.total - evidence(data).sum()) < 4 * found.total_standard_error
    assert (found.ess < 4000).all() and (found.ess > 100).all()


def test_particles_side_by_side_are_draws_one_by_one():
    """The mean log weight of the plate of particles is that of a plain loop over traces."""
    data, model, guide = simulate(2, 3, ragged=True), Chain(), LinearGuide()
    torch.manual_seed(1)
    log_w = []
    for _ in range(400):
        drawn = pyro.poutine.trace(guide).get_trace(data)
        run = pyro.poutine.trace(pyro.poutine.replay(model, trace=drawn)).get_trace(data)
        drawn.compute_log_prob()
        run.compute_log_prob()
        terms = run.nodes["z"]["log_prob"] + run.nodes["y"]["log_prob"] - drawn.nodes["z"]["log_prob"]
        log_w.append(terms.detach())
    loop = torch.stack(log_w)
    plate = evidence_lower_bound(model, guide, data, num_samples=20000, batch=10000)
    assert ((plate.series - loop.mean(0)).abs() < 4 * loop.std(0) / math.sqrt(400)).all()
    torch.testing.assert_close(plate.standard_error * math.sqrt(20000), loop.std(0), rtol=0.2, atol=0)


def test_batches_of_series_are_not_scaled():
    data = simulate(6, 3)
    part = data.minibatch(torch.tensor([4, 1]))
    found = importance_log_likelihood(Chain(), ExactGuide(), part, num_samples=3)
    torch.testing.assert_close(found.log_likelihood, evidence(data)[[4, 1]])


def test_lower_bound_loses_exactly_the_divergence():
    """With the posterior's mean moved by s, KL = s^2 1' S^-1 1 / 2 for the posterior covariance S."""
    torch.manual_seed(0)
    data = simulate(3, 1)
    shift, variance = 0.4, 1 / (1 + 1 / 0.25)
    found = evidence_lower_bound(Chain(), ExactGuide(shift), data, num_samples=20000, batch=20000)
    torch.testing.assert_close(found.series, evidence(data) - shift**2 / (2 * variance), atol=0.03, rtol=0)
    assert (found.standard_error < 0.02).all()
    assert found.shared == 0 and found.total == found.series.sum()


class Level(PyroModule):
    """One random level for all series: level ~ N(0, 1), y_b ~ N(level, 1)."""

    def __init__(self):
        super().__init__()
        self.level = PyroSample(dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))

    def forward(self, data):
        level = self.level
        with series_plate(data):
            z = pyro.sample("z", dist.Normal(level[..., None, None], 1.0).to_event(2))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(2), obs=data.values)


def level_posterior(data):
    """The exact posterior: level ~ N(sum y / (n + 2), 2 / (n + 2)), z_b | level ~ N((level + y_b) / 2, 1 / 2)."""
    y = data.values[:, 0, 0]
    n = len(y)
    level = pyro.sample("level", dist.Normal(y.sum() / (n + 2), math.sqrt(2 / (n + 2))))
    with series_plate(data):
        loc = (level[..., None, None] + data.values) / 2
        pyro.sample("z", dist.Normal(loc, math.sqrt(0.5)).to_event(2))


def test_random_parameters_are_weighed_with_all_series():
    data = simulate(3, 1)
    y = data.values[:, 0, 0]
    joint = dist.MultivariateNormal(torch.zeros_like(y), 2 * torch.eye(3, dtype=y.dtype) + 1)
    found = importance_log_likelihood(Level(), level_posterior, data, num_samples=11, batch=4)
    assert found.log_likelihood.shape == ()
    torch.testing.assert_close(found.log_likelihood, joint.log_prob(y))
    bound = evidence_lower_bound(Level(), level_posterior, data, num_samples=11, batch=4)
    torch.testing.assert_close(bound.total, joint.log_prob(y))
    with pytest.raises(ValueError, match=r"\['level'\].*mini-batch"):
        importance_log_likelihood(Level(), level_posterior, data.minibatch([0, 1]), num_samples=2)
    fixed = {"level": torch.tensor(0.3, dtype=torch.float64)}
    guide = pyro.poutine.block(pyro.condition(level_posterior, fixed), hide=["level"])
    each = importance_log_likelihood(pyro.condition(Level(), fixed), guide, data, 5)
    torch.testing.assert_close(each.log_likelihood, dist.Normal(0.3, math.sqrt(2)).log_prob(y))


def test_counts_are_checked():
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, got 0"):
        importance_log_likelihood(Chain(), ExactGuide(), simulate(2, 2), num_samples=0)
    with pytest.raises(ValueError, match="`batch` must be at least 1, got -1"):
        evidence_lower_bound(Chain(), ExactGuide(), simulate(2, 2), batch=-1)
