"""`fit` and the bounds on the package's own models and guides."""

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.nn import PyroSample

import pyro_ssm as ssm
from pyro_ssm.infer import (
    IWAE,
    FreeBits,
    evidence_lower_bound,
    fit,
    importance_log_likelihood,
    linear_annealing,
    sample_prior,
)

from .programs import simulate


def linear_model(random=False):
    torch.manual_seed(0)
    model = ssm.StateSpaceModel(
        ssm.dynamics.NormalInitial(state_dim=1),
        ssm.dynamics.OrnsteinUhlenbeck(state_dim=1),
        ssm.emissions.LinearNormal(state_dim=1, obs_dim=1),
    )
    if random:
        model.transition.rate = PyroSample(dist.LogNormal(torch.zeros(1), 0.5).to_event(1))
    return model


def data(ragged=True):
    return simulate(12, 6, ragged=ragged, missing=0.2).to(dtype=torch.float32)


@pytest.mark.parametrize(
    "loss",
    [None, IWAE(3), FreeBits(0.05), TraceMeanField_ELBO()],
    ids=["Trace_ELBO", "IWAE", "FreeBits", "TraceMeanField_ELBO"],
)
@pytest.mark.parametrize("random", [False, True], ids=["learned", "random"])
def test_bound_rises_and_stays_below_the_importance_estimate(loss, random):
    series = data()
    model = linear_model(random)
    guide = ssm.guides.Structured(model, hidden_dim=8)
    before = evidence_lower_bound(model, guide, series, num_samples=20).total
    fit(
        model,
        guide,
        series,
        loss=loss,
        lr=0.02,
        num_steps=60,
        batch_size=6,
        annealing=linear_annealing(0.2, 30),
        progress=False,
    )
    after = evidence_lower_bound(model, guide, series, num_samples=20).total
    assert after > before + 1
    if not random:
        estimate = importance_log_likelihood(model, guide, series, num_samples=500, batch=250)
        assert estimate.log_likelihood.shape == (12,)
        assert (estimate.bound <= estimate.log_likelihood + 1e-4).all()
        exact = ssm.infer.kalman_filter(model.bind(), series).log_likelihood.sum(-1)
        error = (estimate.log_likelihood - exact).abs() / estimate.standard_error.clamp_min(1e-3)
        assert (error < 5).all()


def test_free_bits_counts_real_steps_only():
    """With a high floor each real step costs exactly the floor, however long the padding."""
    series = data()
    longer = ssm.TimeSeries(
        torch.arange(9.0),
        torch.nn.functional.pad(series.values, (0, 0, 0, 3), value=float("nan")).masked_fill(
            ~torch.nn.functional.pad(series.mask, (0, 0, 0, 3)), float("nan")
        ),
        lengths=series.lengths,
    )
    model = linear_model()
    guide = ssm.guides.Structured(model, hidden_dim=8)
    for given in (series, longer):
        loss = FreeBits(1e5).loss(model, guide, given)
        assert round(loss / 1e5, 1) == int(series.lengths.sum())


def test_marginal_is_fitted_by_maximum_likelihood():
    series = data()
    model = linear_model()
    marginal = ssm.infer.Marginal(model, filter=ssm.infer.kalman_filter)
    result = fit(marginal, None, series, lr=0.05, num_steps=80, progress=False)
    exact = ssm.infer.kalman_filter(model.bind(), series).log_likelihood.sum()
    assert result.bounds[-1] > result.bounds[0] + 0.02
    assert result.bounds[-1] * result.num_observations == pytest.approx(exact.item(), abs=0.5)


def test_prior_draws_bind_to_a_model():
    model = linear_model(random=True)
    drawn = sample_prior(model, num_samples=5)
    assert drawn["transition.rate"].shape == (5, 1)
    series = data()
    many = model.bind({name: value.unsqueeze(1) for name, value in drawn.items()})  # a dim for the series
    together = ssm.infer.kalman_filter(many, series).log_likelihood
    for s in range(5):
        one = model.bind({name: value[s] for name, value in drawn.items()})
        torch.testing.assert_close(together[s], ssm.infer.kalman_filter(one, series).log_likelihood)


def test_a_single_series_needs_no_plate():
    series = data(ragged=False).series(0)
    model = linear_model()
    guide = ssm.guides.GaussianMarkov(model, hidden_dim=4)
    result = fit(model, guide, series, loss=IWAE(4), lr=0.02, num_steps=5, progress=False)
    estimate = importance_log_likelihood(model, result.guide, series, num_samples=300)
    exact = ssm.infer.kalman_filter(model.bind(), series).log_likelihood.sum()
    assert estimate.log_likelihood.shape == ()
    assert abs(estimate.total - exact) < 5 * estimate.standard_error + 1e-3
