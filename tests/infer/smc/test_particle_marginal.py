"""A particle filter as the filter of `Marginal`: a bound for SVI, a target for NUTS only where it is smooth."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroSample

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import Marginal, ParticleMarginal, bootstrap, kalman_filter, locally_optimal, particle_filter
from pyro_ssm.infer.smc import FixedNoise, SoftResampling, StopGradientResampling, TransportResampling
from pyro_ssm.models import StateSpaceModel
from tests.contracts.toys import series, toy
from tests.infer.smc.programs import D, Walk, repeated

N = 20


def program(filter, num_times=5):
    model = toy(1, 1)
    model.requires_grad_(False)
    del model.transition.rate
    model.transition.rate = PyroSample(dist.LogNormal(torch.zeros(1, dtype=D), 0.5).to_event(1))
    return Marginal(model, filter), series(num_times, (2,), obs_dim=1)


def fixed(num_particles=N, num_times=5):
    generator = torch.Generator().manual_seed(2)
    normals = torch.randn(num_times, num_particles, 2, 1, dtype=D, generator=generator)
    return FixedNoise(normals, torch.rand(num_times, 1, 2, dtype=D, generator=generator))


def smooth(**options):
    return ParticleMarginal(
        N, **{"resampling": TransportResampling(), "ess_threshold": 1.0, "noise": fixed()} | options
    )


ROUGH = {
    "new noise": (smooth(noise=None), ["new noise at every evaluation"]),
    "ancestors": (smooth(resampling="systematic"), ["AncestorResampling chooses ancestors"]),
    "stop-gradient": (smooth(resampling=StopGradientResampling()), ["StopGradientResampling chooses ancestors"]),
    "soft": (smooth(resampling=SoftResampling()), ["SoftResampling chooses ancestors"]),
    "threshold": (smooth(ess_threshold=0.5), ["ess_threshold=0.5 decides"]),
    "default": (ParticleMarginal(N), ["new noise", "chooses ancestors", "ess_threshold=0.5"]),
}


@pytest.mark.parametrize("kernel", [NUTS, HMC])
@pytest.mark.parametrize("case", ROUGH)
def test_nuts_refuses_a_density_that_is_not_smooth(case, kernel):
    filter, reasons = ROUGH[case]
    assert not filter.for_nuts and len(filter.obstacles) == len(reasons)
    target, data = program(filter)
    with pytest.raises(ValueError) as refusal:
        MCMC(kernel(target), num_samples=1, warmup_steps=0, disable_progbar=True).run(data)
    assert all(reason in str(refusal.value) for reason in reasons)


def test_nuts_refuses_a_particle_filter_in_a_function():
    target, data = program(lambda model, data: particle_filter(bootstrap(model, data), N))
    with pytest.raises(ValueError, match=r"cannot be seen in a function.*ParticleMarginal"):
        MCMC(NUTS(target), num_samples=1, warmup_steps=0, disable_progbar=True).run(data)


@pytest.mark.parametrize(
    "filter",
    [smooth(), smooth(resampling="systematic", ess_threshold=0.0), smooth(build=locally_optimal), kalman_filter],
    ids=["transport", "importance sampling", "locally optimal", "exact"],
)
def test_nuts_takes_a_smooth_density(filter):
    assert filter is kalman_filter or filter.for_nuts
    target, data = program(filter)
    mcmc = MCMC(NUTS(target, max_tree_depth=2), num_samples=2, warmup_steps=1, disable_progbar=True)
    mcmc.run(data)
    assert mcmc.get_samples()["transition.rate"].shape == (2, 1)


def test_the_smooth_density_has_the_gradient_of_its_finite_differences():
    """What NUTS integrates along: the potential, and its slope, at many rates."""
    target, data = program(smooth(resampling=TransportResampling(tolerance=1e-10, max_iterations=10_000)))

    def density(rate):
        trace = pyro.poutine.trace(pyro.condition(target, data={"transition.rate": rate})).get_trace(data)
        return trace.log_prob_sum()

    for value in (0.2, 0.9, 3.0):
        rate = torch.tensor([value], dtype=D, requires_grad=True)
        (slope,) = torch.autograd.grad(density(rate), rate)
        with torch.no_grad():
            difference = (density(rate + 1e-5) - density(rate - 1e-5)) / 2e-5
        torch.testing.assert_close(slope[0], difference, rtol=1e-5, atol=1e-6)


def test_other_programs_may_be_rough():
    """SVI with an automatic guide, Predictive and plain traces initialise sites too, and ask for no smooth density."""
    filter = ParticleMarginal(N, resampling=StopGradientResampling())
    target, data = program(filter)
    guide = AutoNormal(target)
    svi = SVI(target, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    guide(data)  # sets itself up
    torch.manual_seed(3)
    loss = svi.evaluate_loss(data)
    torch.manual_seed(3)
    drawn = pyro.poutine.trace(guide).get_trace(data)
    rate = drawn.nodes["transition.rate"]["value"]
    with torch.no_grad():
        total = filter(target.model.bind({"transition.rate": rate}), data).total.sum()
    prior = dist.LogNormal(torch.zeros(1, dtype=D), 0.5).log_prob(rate).sum()
    assert loss == pytest.approx(float((drawn.log_prob_sum() - prior - total).detach()), rel=1e-9)
    drawn = Predictive(target, guide=guide, num_samples=3)(data.without_values())
    assert drawn["y"].shape == (3, 2, 5, 1)


def test_the_objective_of_svi_is_a_lower_bound():
    model, data = toy(1, 1), series(6, obs_dim=1)
    exact = kalman_filter(model, data).log_likelihood.sum().detach()
    many = repeated(data, 500)
    means = []
    for num in (5, 50):
        with torch.no_grad():
            trace = pyro.poutine.trace(Marginal(model, ParticleMarginal(num))).get_trace(many)
            trace.compute_log_prob()
        found = trace.nodes["y"]["log_prob"]
        assert found.mean() + 4 * found.std() / 500**0.5 < exact
        means.append(float(found.mean()))
    assert means[0] < means[1] - 0.1


def test_svi_by_the_stop_gradient_finds_the_mode():
    """The judge is the exact density on a grid."""
    target, data = program(ParticleMarginal(100, resampling=StopGradientResampling(), build=locally_optimal))
    guide = AutoDelta(target)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.97})
    svi = SVI(target, guide, optimizer, Trace_ELBO())
    for _ in range(100):
        svi.step(data)
    grid = torch.linspace(0.05, 4, 400, dtype=D)
    with torch.no_grad():
        exact = kalman_filter(target.model.bind({"transition.rate": grid[:, None, None]}), data).log_likelihood
        curve = exact.sum((-2, -1)) + dist.LogNormal(torch.zeros((), dtype=D), 0.5).log_prob(grid)
    best = float(grid[curve.argmax()])
    assert abs(float(guide.median()["transition.rate"]) - best) < 0.1 * best


@pytest.mark.slow
def test_nuts_draws_from_the_smooth_density_which_is_near_the_exact_posterior():
    """Both on a grid of log rates: the density of the filter, and the exact one."""
    resampling = TransportResampling(0.3)
    filter = ParticleMarginal(40, resampling=resampling, ess_threshold=1.0, noise=fixed(40), build=locally_optimal)
    target, data = program(filter)
    grid = torch.linspace(-1.8, 1.8, 61, dtype=D)
    prior = dist.Normal(torch.zeros((), dtype=D), 0.5).log_prob(grid)
    with torch.no_grad():
        bound = [target.model.bind({"transition.rate": rate.exp().reshape(1)}) for rate in grid]
        own, exact = (
            (torch.stack([f(model, data).log_likelihood.sum() for model in bound]) + prior).softmax(0)
            for f in (filter, kalman_filter)
        )

    def moments(density):
        mean = (density * grid).sum()
        return float(mean), float((density * (grid - mean).square()).sum().sqrt())

    mean, spread = moments(own)
    assert abs(mean - moments(exact)[0]) < 0.3 * spread and abs(spread / moments(exact)[1] - 1) < 0.1
    mcmc = MCMC(NUTS(target, max_tree_depth=3), num_samples=80, warmup_steps=60, disable_progbar=True)
    mcmc.run(data)
    draws = mcmc.get_samples()["transition.rate"].log()
    effective = float(mcmc.diagnostics()["transition.rate"]["n_eff"])
    assert effective > 20
    assert abs(float(draws.mean()) - mean) < 4 * spread / effective**0.5
    assert abs(float(draws.std()) / spread - 1) < 4 / (2 * effective) ** 0.5


def test_arguments_and_laws_are_checked():
    with pytest.raises(ValueError, match="`num_particles` must be at least 1"):
        ParticleMarginal(0)
    with pytest.raises(ValueError, match="`ess_threshold` is a fraction"):
        ParticleMarginal(3, ess_threshold=-0.1)
    with pytest.raises(TypeError, match="a name or a Resampling"):
        ParticleMarginal(3, resampling=None)
    model, data = toy(1, 1), series(4, obs_dim=1)
    drawn = StateSpaceModel(model.initial, Walk(model.transition), model.emission)
    with pytest.raises(NotImplementedError, match="step 1 .*fisher_score"):
        ParticleMarginal(5)(drawn, data)
    totals = []
    for run in (ParticleMarginal(5), lambda model, data: particle_filter(bootstrap(model, data), 5)):
        torch.manual_seed(0)
        with torch.no_grad():
            totals.append(run(drawn, data).total)
    assert torch.equal(*totals)
    assert isinstance(data, TimeSeries)
