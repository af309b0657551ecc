"""Particle Gibbs draws from the joint posterior of parameters and path: quadrature over exact filters is the judge."""

import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample

from pyro_ssm.diagnostics import to_inference_data
from pyro_ssm.infer import kalman_filter, kalman_smoother, locally_optimal, particle_gibbs
from pyro_ssm.infer.smc import HamiltonianMove
from pyro_ssm.models import StateSpaceModel
from tests.contracts.toys import posterior, remembering, series, toy
from tests.infer.smc.known_posterior import assert_mean, judged, logs
from tests.infer.smc.programs import D, Walk, close


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def two_series():
    """Ragged, with missing entries."""
    data = series(6, (2,), obs_dim=1, missing=True)
    return data.replace(lengths=torch.tensor([6, 3]))


def with_offset():
    model = toy(1, 1)
    model.emission.offset = PyroSample(dist.Normal(torch.zeros(1, dtype=D), 1.0).to_event(1))
    return model


def with_rate():
    model = toy(1, 1)
    model.transition.rate = PyroSample(dist.LogNormal(torch.zeros(1, dtype=D), 0.7).to_event(1))
    return model


@torch.no_grad()
def quadrature(model, name, data, grid, log_prior):
    """Posterior mean and variance of one parameter, and the mean of the path, on a grid that covers it."""
    bound = model.bind({name: grid.reshape(-1, 1, 1)})
    weights = (kalman_filter(bound, data).log_likelihood.sum((-1, -2)) + log_prior).softmax(0)
    assert weights[[0, -1]].max() < 1e-6 * weights.max()
    mean = (weights * grid).sum()
    path = (weights.reshape(-1, 1, 1, 1) * kalman_smoother(bound, data).mean).sum(0)
    return mean, (weights * (grid - mean).square()).sum(), path


def assert_posterior(found, name, exact, data):
    """Chains are independent: their means give the standard errors."""
    mean, variance, path = exact
    draws = found.parameters[name].squeeze(-1)
    close(draws.mean(1), mean, bias=0)
    close((draws - mean).square().mean(1), variance, bias=0)
    real = data.step_mask
    close(found.states.mean(1)[:, real], path[real], bias=0)


def conjugate(model, data):
    """p(offset | z, y), from a standard normal prior."""
    seen, variance = data.mask.squeeze(-1), (2 * model.emission.log_scale.detach()).exp()

    def update(values, states):
        left = (data.values - states * model.emission.matrix.detach()).squeeze(-1)
        precision = 1 + seen.sum() / variance
        mean = torch.where(seen, left, 0.0).sum((-1, -2)).unsqueeze(-1) / variance / precision
        return {"emission.offset": mean + torch.randn_like(mean) / precision.sqrt()}

    return update


@pytest.mark.parametrize(
    "update, options",
    [
        pytest.param("hmc", dict(num_particles=10), marks=pytest.mark.slow),
        ("random_walk", dict(num_particles=10, num_moves=5, filter=locally_optimal, backward_sampling=True)),
        ("conjugate", dict(num_particles=4)),
    ],
)
def test_the_posterior_of_an_offset_is_that_of_quadrature(update, options):
    model, data = with_offset(), two_series()
    grid = torch.linspace(-5, 5, 400, dtype=D)
    exact = quadrature(model, "emission.offset", data, grid, -0.5 * grid.square())
    how = conjugate(model, data) if update == "conjugate" else update
    found = particle_gibbs(model, data, 60, num_chains=100, num_warmup=30, update=how, progress=False, **options)
    assert_posterior(found, "emission.offset", exact, data)
    if update == "conjugate":
        assert (found.acceptance == 1).all()


def test_the_posterior_of_a_rate_is_that_of_quadrature():
    """A positive parameter of the motion, which moves in its logarithm."""
    model, data = with_rate(), two_series()
    grid = torch.linspace(-6, 6, 600, dtype=D).exp()
    log_prior = dist.Normal(torch.zeros((), dtype=D), 0.7).log_prob(grid.log())  # equidistant in the logarithm
    exact = quadrature(model, "transition.rate", data, grid, log_prior)
    found = particle_gibbs(model, data, 50, num_particles=8, num_chains=100, num_warmup=30, progress=False)
    assert_posterior(found, "transition.rate", exact, data)
    assert 0.5 < found.acceptance.mean() < 0.95


def test_the_posterior_that_other_samplers_are_judged_by():
    """Two parameters, of the motion and of the observation, as in the tests of `pmmh` and `smc_squared`."""
    model, data, known = judged()
    found = particle_gibbs(model, data, 25, num_particles=10, num_chains=80, num_warmup=35, progress=False)
    x = logs(found, model)
    assert_mean(x.mean(1), known.mean, known.std)
    assert_mean(((x - known.mean) ** 2).mean(1), known.std**2, known.std**2, precision=0.4)
    assert_mean(found.states.mean(1), known.states, torch.tensor(0.5), sigmas=4.5, precision=0.3)


def test_shapes_thinning_and_arviz():
    arviz = pytest.importorskip("arviz")
    model, data = with_rate(), two_series()
    found = particle_gibbs(model, data, 12, num_particles=5, num_chains=3, num_warmup=4, thin=2, progress=False)
    assert found.num_chains == 3 and found.states.shape == (3, 12, 2, 6, 1)
    assert found.parameters["transition.rate"].shape == (3, 12, 1) and found.log_likelihood.shape == (3, 12)
    idata = to_inference_data(found, model=model, data=data)
    assert idata["posterior"]["z"].sizes["chain"] == 3 and idata["posterior"]["z"].sizes["draw"] == 12
    assert float(arviz.rhat(idata["posterior"][["transition.rate"]])["transition.rate"].max()) > 0.5
    assert "log_evidence" in idata["sample_stats"] and "acceptance_rate" in idata["sample_stats"]


@pytest.mark.parametrize("update", ["hmc", "random_walk"])
def test_a_run_goes_on_from_its_checkpoint(tmp_path, update):
    model, data = with_rate(), two_series()
    options = dict(num_particles=5, num_chains=2, num_warmup=3, update=update, progress=False)
    torch.manual_seed(5)
    whole = particle_gibbs(model, data, 8, **options)
    torch.manual_seed(5)
    path = tmp_path / "gibbs.pt"
    particle_gibbs(model, data, 3, checkpoint=path, **options)
    torch.manual_seed(9)
    rest = particle_gibbs(model, data, 8, checkpoint=path, **options)
    assert torch.equal(whole.states, rest.states) and torch.equal(whole.acceptance, rest.acceptance)
    assert torch.equal(whole.parameters["transition.rate"], rest.parameters["transition.rate"])
    again = particle_gibbs(model, data, 8, checkpoint=path, **options)  # nothing left to do
    assert torch.equal(again.states, whole.states)
    with pytest.raises(ValueError, match="num_particles was 5 and is 6"):
        particle_gibbs(model, data, 8, checkpoint=path, **{**options, "num_particles": 6})


@pytest.mark.parametrize("ancestor_sampling", [False, True])
def test_models_with_memory(ancestor_sampling):
    """A rate whose posterior is a sum over a grid, with the dense Gaussian of paths and records at each."""
    model, data = remembering(1, 1), series(3, (2,), obs_dim=1)
    grid = torch.linspace(-5, 5, 61, dtype=D).exp()  # equidistant in the logarithm
    terms, paths = [], []
    for rate in grid:
        model.transition.rate.data.fill_(rate)
        laws, evidence = zip(*(posterior(model, data.series(b)) for b in range(2)), strict=True)
        terms.append(dist.Normal(torch.zeros((), dtype=D), 0.7).log_prob(rate.log()) + sum(evidence))
        paths.append(torch.stack([law.mean for law in laws]))
    weights = torch.stack(terms).detach().softmax(0)
    mean = (weights * grid.log()).sum()
    variance = (weights * (grid.log() - mean).square()).sum()
    path = torch.einsum("g,gbk->bk", weights, torch.stack(paths).detach())

    del model.transition.rate
    model.transition.rate = PyroSample(dist.LogNormal(torch.zeros(1, dtype=D), 0.7).to_event(1))
    found = particle_gibbs(
        model, data, 25, num_particles=6, num_chains=120, num_warmup=25, progress=False,
        ancestor_sampling=ancestor_sampling,
    )  # fmt: skip
    assert found.states.shape == (120, 25, 2, 3, 1)
    draws = found.parameters["transition.rate"].log().squeeze(-1)
    close(draws.mean(1), mean, bias=0)
    close((draws - mean).square().mean(1), variance, bias=0)
    close(found.states.mean(1).squeeze(-1), path, bias=0)


def test_a_single_series_and_given_starts():
    model, data = with_rate(), series(1, obs_dim=1)
    found = particle_gibbs(
        model, data, 2, num_particles=2, num_chains=1, num_warmup=0, start={"transition.rate": [0.5]}, progress=False
    )
    assert found.states.shape == (1, 2, 1, 1)
    given = {"transition.rate": torch.tensor([[0.5], [0.7]], dtype=D)}
    frozen = particle_gibbs(
        model, data, 3, num_particles=2, num_chains=2, start=given, update=lambda values, z: values, progress=False
    )
    assert torch.allclose(frozen.parameters["transition.rate"], given["transition.rate"].unsqueeze(1))


def test_what_cannot_be_done_says_so():
    data = series(3, obs_dim=1)
    with pytest.raises(ValueError, match="no random parameter"):
        particle_gibbs(toy(1, 1), data, 5, num_particles=5)
    with pytest.raises(ValueError, match="`num_samples` must be at least 1"):
        particle_gibbs(with_rate(), data, 0, num_particles=5)
    with pytest.raises(TypeError, match="`filter` must be a function of a bound model and data, got str"):
        particle_gibbs(with_rate(), data, 5, filter="bootstrap", progress=False)
    with pytest.raises(TypeError, match="returned KalmanFilter.*use pmmh"):
        particle_gibbs(with_rate(), data, 5, filter=kalman_filter, progress=False)
    with pytest.raises(TypeError, match="`update` must be one of"):
        particle_gibbs(with_rate(), data, 5, num_particles=5, update="nuts")
    with pytest.raises(TypeError, match="`update` must be one of"):
        particle_gibbs(with_rate(), data, 5, num_particles=5, update=HamiltonianMove)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        particle_gibbs(with_rate(), data, 5, num_particles=1, progress=False)
    model = with_rate()
    blind = StateSpaceModel(model.initial, Walk(model.transition), model.emission)
    with pytest.raises(TypeError, match="Walk is SampleOnly"):
        particle_gibbs(blind, data, 5, num_particles=5, progress=False)
