"""Bayesian parameters of linear-Gaussian models: posteriors that are known, by NUTS, by AutoNormal, by AutoDelta."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroSample

from pyro_ssm import StateSpaceModel, TimeSeries
from pyro_ssm.data import load
from pyro_ssm.dynamics import LinearNormal, NormalInitial
from pyro_ssm.emissions import LinearNormal as LinearEmission
from pyro_ssm.infer import Marginal, kalman_filter
from tests.infer.gaussian.linear import dense

D = torch.float64


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(D)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def mean_model():
    """An autoregression around an unknown level, which has a prior of mean 1 and standard deviation 2."""
    model = StateSpaceModel(
        NormalInitial(1, covariance="full"),
        LinearNormal(1, covariance="full", matrix=torch.full((1, 1), 0.6)),
        LinearEmission(1, 1, covariance="full", matrix=torch.ones(1, 1)),
    )
    return model.requires_grad_(False)


def ragged_data():
    torch.manual_seed(1)
    values = 3.0 + torch.randn(3, 5, 1)
    values[0, 1] = values[2, 0] = torch.nan
    return TimeSeries(torch.arange(5.0), values, lengths=torch.tensor([5, 2, 4]))


def conjugate_posterior(model, data):
    """y_i ~ N(d 1, S_i) and d ~ N(1, 4): the posterior mean and standard deviation of d."""
    precision, weighted = torch.tensor(1 / 4), torch.tensor(1 / 4)
    for i in range(3):
        series = data.series(i)
        _, _, mean, covariance, _ = dense(model.bind(), series)  # bound: Pyro would set requires_grad again
        seen = series.mask.flatten()
        ones = torch.ones(int(seen.sum()))
        solved = torch.linalg.solve(covariance[seen][:, seen], ones)
        precision = precision + solved @ ones
        weighted = weighted + solved @ (series.values.flatten() - mean)[seen]
    return (weighted / precision).item(), precision.rsqrt().item()


@pytest.fixture
def level():
    """A program with a random level, its data, and the posterior mean and standard deviation."""
    model, data = mean_model(), ragged_data()
    answer = conjugate_posterior(model, data)
    model.emission.offset = PyroSample(dist.Normal(torch.ones(1), 2.0).to_event(1))
    return Marginal(model), data, *answer


def test_nuts_draws_the_conjugate_posterior(level):
    program, data, mean, deviation = level
    mcmc = MCMC(NUTS(program, max_tree_depth=4), num_samples=200, warmup_steps=80, disable_progbar=True)
    mcmc.run(data)
    draws = mcmc.get_samples()["emission.offset"].flatten()
    effective = float(mcmc.diagnostics()["emission.offset"]["n_eff"])
    assert effective > 40
    assert abs(draws.mean() - mean) < 4 * deviation / effective**0.5
    assert abs(draws.std() / deviation - 1) < 4 / (2 * effective) ** 0.5


def test_map_is_the_conjugate_mean(level):
    program, data, mean, deviation = level
    guide = AutoDelta(program)
    svi = SVI(program, guide, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO())
    for _ in range(30):
        svi.step(data)
    assert guide.median()["emission.offset"].item() == pytest.approx(mean, abs=1e-6 * deviation)


def test_autonormal_is_the_conjugate_posterior(level):
    """The family holds the answer, so the bound is tight: minus the log evidence."""
    program, data, mean, deviation = level
    guide = AutoNormal(program, init_scale=0.3)
    svi = SVI(
        program,
        guide,
        pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.98}),
        Trace_ELBO(num_particles=4, vectorize_particles=True),
    )
    for _ in range(150):
        svi.step(data)
    low, middle, high = (guide.quantiles([q])["emission.offset"].item() for q in (0.1586553, 0.5, 0.8413447))
    assert middle == pytest.approx(mean, abs=0.15 * deviation)
    assert (high - low) / 2 == pytest.approx(deviation, rel=0.15)


def test_nuts_draws_the_posterior_of_the_niles_level():
    """The standard deviation of the level's steps, by quadrature; forty years with a gap."""
    data = load("nile", dtype=D).split(40)[0].hide(torch.arange(40).unsqueeze(-1) % 9 == 4)
    model = StateSpaceModel(
        NormalInitial(1, loc=1000.0, scale=300.0),
        LinearNormal(1, matrix=torch.eye(1)),
        LinearEmission(1, 1, matrix=torch.ones(1, 1), scale=120.0),
    ).requires_grad_(False)
    prior = dist.LogNormal(torch.tensor([3.5]), 0.7)
    model.transition.scale = PyroSample(prior.to_event(1))
    grid = torch.linspace(0.5, 6.5, 601)
    scale = grid.exp().unsqueeze(-1)
    with torch.no_grad():
        curve = kalman_filter(model.bind({"transition.scale": scale}), data).log_likelihood.sum(-1)
    density = (curve + dist.Normal(3.5, 0.7).log_prob(grid)).softmax(0)
    mean = (density * grid).sum()
    deviation = (density * (grid - mean).square()).sum().sqrt()
    mcmc = MCMC(NUTS(Marginal(model), max_tree_depth=4), num_samples=200, warmup_steps=80, disable_progbar=True)
    mcmc.run(data)
    draws = mcmc.get_samples()["transition.scale"].flatten().log()
    effective = float(mcmc.diagnostics()["transition.scale"]["n_eff"])
    assert effective > 40
    assert abs(draws.mean() - mean) < 4 * deviation / effective**0.5
    assert abs(draws.std() / deviation - 1) < 4 / (2 * effective) ** 0.5
