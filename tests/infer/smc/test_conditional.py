"""Conditional SMC leaves the smoothing law as it is, with few particles, whatever the variant; and it moves.

The judge is a joint test (Geweke 2004): path and record are drawn from the model, so that the path is an exact draw
of its law given the record; after a move of the path, path and record must have the model's joint law again.
"""

import math

import pytest
import torch

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import (
    FeynmanKac,
    auxiliary,
    bootstrap,
    conditional_smc,
    guided,
    iterated_csmc,
    kalman_smoother,
    locally_optimal,
    sample_posterior,
)
from pyro_ssm.infer.smc import PseudoRandom
from pyro_ssm.infer.smc.conditional_stepper import ConditionalResampling, ConditionalStepper, future_log_weights
from pyro_ssm.models import StateSpaceModel
from tests.contracts.toys import joint, remembering, series, simulate, toy
from tests.infer.smc.programs import D, Replayed, Walk

SERIES = 6000
VARIANTS = {
    "plain": dict(ancestor_sampling=False),
    "plain, stratified": dict(ancestor_sampling=False, resampling="stratified"),
    "plain, multinomial": dict(ancestor_sampling=False, resampling="multinomial"),
    "plain, adaptive": dict(ancestor_sampling=False, ess_threshold=0.6),
    "ancestors": {},
    "ancestors, stratified": dict(resampling="stratified"),
    "ancestors, multinomial": dict(resampling="multinomial"),
    "ancestors, adaptive": dict(ess_threshold=0.7),
    "backward": dict(backward_sampling=True),
}


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def guess(state, k, memory):
    """A proposal that is not the model's."""
    before = torch.zeros(1, 1, dtype=D) if state is None else 0.5 * state
    return torch.distributions.Independent(torch.distributions.Normal(before, torch.ones((), dtype=D)), 1)


BUILDERS = {
    "bootstrap": bootstrap,
    "locally optimal": locally_optimal,
    "auxiliary": auxiliary,
    "guided": lambda model, data: guided(model, guess, data, looks_ahead=False),
}


def drawn(model, num_times=4, hide=True):
    """Paths and records of the model, some entries of the records hidden."""
    d, p = model.initial.state_dim, model.emission.obs_dim
    times = series(num_times).times
    z, y = simulate(
        model, times, torch.randn(SERIES, num_times, d, dtype=D), torch.randn(SERIES, num_times, p, dtype=D)
    )
    data = TimeSeries(times, y)
    mask = torch.ones(num_times, p, dtype=torch.bool)
    if hide and num_times > 2:
        mask[2] = False
    return z, data.hide(~mask.expand(y.shape))


def assert_joint(model, data, z):
    """Whitened by the exact covariance, the path and what was seen of the record are independent standard normals."""
    mean, square = joint(model, data.times)
    seen = torch.cat([torch.ones_like(z[0], dtype=torch.bool).flatten(), data.mask[0].flatten()])
    mean, root = mean[seen], torch.linalg.cholesky(square[seen][:, seen])
    found = torch.cat([z.flatten(1), data.values.flatten(1)], 1)[:, seen]
    white = torch.linalg.solve_triangular(root, (found - mean).mT, upper=False)
    n = white.shape[1]
    assert (white.mean(1).abs() < 4.5 / math.sqrt(n)).all(), white.mean(1) * math.sqrt(n)
    off = (white @ white.mT / n - torch.eye(len(white))) * math.sqrt(n)
    spread = 1 + torch.eye(len(white)) * (math.sqrt(2) - 1)
    assert (off.abs() < 4.8 * spread).all(), off.abs().max()
    ordered = torch.special.ndtr(white).sort(-1).values  # Kolmogorov-Smirnov
    grid = torch.arange(1, n + 1) / n
    distance = torch.maximum((grid - ordered).abs(), (ordered - grid + 1 / n).abs()).amax(-1)
    assert (distance * math.sqrt(n) < 2.3).all(), distance * math.sqrt(n)  # P = 5e-5 each


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("log_scale", [-0.7, -1.6])
def test_the_smoothing_law_is_invariant(variant, builder, log_scale):
    """Three particles, two sweeps, observations that say little or much: an error of one step would show."""
    model = toy(1, 1)
    model.emission.log_scale.data.fill_(log_scale)
    z, data = drawn(model)
    fk = BUILDERS[builder](model, data)
    path = z
    for _ in range(2):
        path = conditional_smc(fk, path, 3, **VARIANTS[variant]).path
    assert (path != z).any(-1).double().mean() > 0.2
    assert_joint(model, data, path)


@pytest.mark.parametrize("options", [dict(ancestor_sampling=False), dict(ancestor_sampling=True)])
def test_memory(options):
    """Nothing but `extend` and `log_step`; ancestor sampling scores a past by the whole rest of the path."""
    model = remembering(1, 1)
    z, data = drawn(model, 3, hide=False)
    found = conditional_smc(bootstrap(model, data), z, 4, **options)
    assert_joint(model, data, found.path)
    assert found.moved.double().mean() > 0.3


def test_a_wrong_kernel_is_found_out():
    """The judge can fail: an ordinary filter's line, two particles, is no draw of the smoothing law."""
    model = toy(1, 1)
    z, data = drawn(model)
    path = iterated_csmc(bootstrap(model, data), None, 1, 2, progress=False).states[0]
    with pytest.raises(AssertionError):
        assert_joint(model, data, path)


def test_two_dimensions_and_exact_posterior_draws():
    """From exact draws of the simulation smoother, one sweep; moments against the smoother's."""
    model, data = toy(2, 1), series(5, obs_dim=1, missing=True)
    start = sample_posterior(model, data, torch.Size([SERIES]))
    many = TimeSeries(data.times, data.values.expand(SERIES, 5, 1), mask=data.mask.expand(SERIES, 5, 1))
    exact = kalman_smoother(model, data)
    variance = (exact.scale_tril @ exact.scale_tril.mT).diagonal(dim1=-2, dim2=-1)
    for options in ({}, dict(backward_sampling=True)):
        path = conditional_smc(bootstrap(model, many), start, 4, **options).path
        z = (path - exact.mean) / variance.sqrt()
        assert (z.mean(0).abs() < 4.5 / math.sqrt(SERIES)).all()
        assert ((z.square().mean(0) - 1).abs() < 4.5 * math.sqrt(2 / SERIES)).all()


def test_the_kept_path_is_particle_zero_exactly():
    model, data = toy(), series(5, (3,), missing=True).replace(lengths=torch.tensor([5, 3, 1]))
    fk, path = bootstrap(model, data), torch.randn(3, 5, 2, dtype=D)
    for future in (None, future_log_weights(fk, path)):
        stepper = ConditionalStepper(fk, path, 6, ConditionalResampling("systematic"), 1.0, PseudoRandom(), future)
        step = stepper.init()
        for k in range(5):
            step = stepper.step(step) if k else step
            alive = data.step_mask[:, k]
            assert torch.equal(fk.state(step.cloud.particles)[0, alive], path[alive, k])
            if future is None and step.ancestors is not None:
                assert (step.ancestors[0] == 0).all()


@pytest.mark.parametrize("variant", ["plain", "ancestors", "backward"])
def test_ragged_series(variant):
    """A series that has ended keeps its last state, and its law is that of the shorter data."""
    model = toy(1, 1)
    z, data = drawn(model, 4, hide=False)
    ragged = data.replace(lengths=torch.full((SERIES,), 2))
    found = conditional_smc(bootstrap(model, ragged), z, 3, **VARIANTS[variant])
    assert_joint(model, data.split(2)[0], found.path[:, :2])
    assert torch.equal(found.path[:, 2:], found.path[:, 1:2].expand(-1, 2, -1)) and not found.moved[:, 2:].any()
    assert (found.log_likelihood[:, 2:] == 0).all()


@pytest.mark.parametrize("variant", ["plain", "ancestors", "backward"])
def test_one_time_two_particles_and_nothing_seen(variant):
    model = toy(1, 1)
    z, data = drawn(model, 1)
    assert_joint(model, data, conditional_smc(bootstrap(model, data), z, 2, **VARIANTS[variant]).path)
    z, data = drawn(model, 3)
    blank = data.hide(torch.ones_like(data.mask))
    found = conditional_smc(bootstrap(model, blank), z, 2, **VARIANTS[variant])
    assert (found.log_likelihood == 0).all()
    mean, square = joint(model, data.times)
    error = (found.path.squeeze(-1) - mean[:3]).mean(0) / square.diagonal()[:3].sqrt() * math.sqrt(SERIES)
    assert (error.abs() < 4.5).all()


def test_refined_grids():
    model, data = toy(1, 1), series(3, obs_dim=1).refine(2)
    exact = kalman_smoother(model, data)
    start = sample_posterior(model, data, torch.Size([SERIES]))
    many = TimeSeries(data.times, data.values.expand(SERIES, 3, 1), observed_index=data.observed_index)
    path = conditional_smc(bootstrap(model, many), start, 4).path
    z = (path - exact.mean) / exact.scale_tril.squeeze(-1)
    assert (z.mean(0).abs() < 4.5 / math.sqrt(SERIES)).all()
    assert ((z.square().mean(0) - 1).abs() < 4.5 * math.sqrt(2 / SERIES)).all()


@pytest.mark.parametrize("variant", ["plain", "ancestors", "ancestors, multinomial", "backward"])
def test_a_batch_is_a_loop(variant):
    data = series(4, (3,), missing=True)
    path = torch.randn(3, 4, 2, dtype=D)
    options = VARIANTS[variant]
    whole = conditional_smc(bootstrap(toy(), data), path, 5, noise=Replayed(3, range(3)), **options)
    for b in range(3):
        one = TimeSeries(data.times, data.values[b : b + 1], mask=data.mask[b : b + 1])
        alone = conditional_smc(bootstrap(toy(), one), path[b : b + 1], 5, noise=Replayed(3, [b]), **options)
        assert torch.equal(whole.moved[b], alone.moved[0])
        assert torch.allclose(whole.path[b], alone.path[0], rtol=0, atol=1e-12)
        assert torch.allclose(whole.log_likelihood[b], alone.log_likelihood[0], rtol=0, atol=1e-12)


def test_ancestor_and_backward_sampling_move_early_states():
    """Forty steps, eight particles: lines of the genealogy coalesce with the kept path."""
    model, data = toy(1, 1), series(40, obs_dim=1)
    many = TimeSeries(data.times, data.values.expand(20, 40, 1))
    rates = {}
    for variant in ("plain", "ancestors", "backward"):
        found = iterated_csmc(bootstrap(model, many), None, 15, 8, progress=False, **VARIANTS[variant])
        rates[variant] = found.update_rate.mean(0)
    early = slice(0, 10)
    assert rates["plain"][early].mean() < 0.25
    assert rates["ancestors"][early].mean() > 0.6 and rates["backward"][early].mean() > 0.6
    assert rates["plain"][-1] > 0.6


def test_iterated_sweeps_reach_the_smoother_from_afar():
    model, data = toy(1, 1), series(6, obs_dim=1, missing=True)
    exact, runs = kalman_smoother(model, data), 500
    many = TimeSeries(data.times, data.values.expand(runs, 6, 1), mask=data.mask.expand(runs, 6, 1))
    far = torch.full((runs, 6, 1), 3.0, dtype=D)
    found = iterated_csmc(bootstrap(model, many), far, 20, 5, thin=10, progress=False)
    assert found.states.shape == (2, runs, 6, 1) and found.log_likelihood.shape == (2, runs)
    z = (found.states[-1] - exact.mean) / exact.scale_tril.squeeze(-1)
    assert (z.mean(0).abs() < 4.5 / math.sqrt(runs)).all()
    assert ((z.square().mean(0) - 1).abs() < 4.5 * math.sqrt(2 / runs)).all()
    again = iterated_csmc(bootstrap(model, many), found.states[-1], 1, 5, progress=False)
    assert again.states.shape == (1, runs, 6, 1)


def test_float32():
    z, data = drawn(toy(1, 1))
    fk = bootstrap(toy(1, 1, dtype=torch.float32), data.to(dtype=torch.float32))
    for variant in ("plain", "ancestors", "backward"):
        path = conditional_smc(fk, z.float(), 3, **VARIANTS[variant]).path
        assert path.dtype == torch.float32
        assert_joint(toy(1, 1), data, path.double())


def test_transitions_without_a_density():
    model = toy(1, 1)
    z, data = drawn(model)
    blind = StateSpaceModel(model.initial, Walk(model.transition), model.emission)
    found = conditional_smc(bootstrap(blind, data), z, 4)  # plain, by itself
    assert_joint(model, data, found.path)
    with pytest.raises(ValueError, match="`log_step`"):
        conditional_smc(bootstrap(blind, data), z, 4, ancestor_sampling=True)


def test_what_cannot_be_done_says_so():
    data = series(4, (3,))
    fk, path = bootstrap(toy(), data), torch.zeros(3, 4, 2, dtype=D)
    with pytest.raises(ValueError, match="`num_particles` must be at least 2, got 1"):
        conditional_smc(fk, path, 1)
    with pytest.raises(ValueError, match=r"`path` must be \(3, 4\)"):
        conditional_smc(fk, path[0], 5)
    with pytest.raises(ValueError, match="NaN"):
        conditional_smc(fk, path * float("nan"), 5)
    with pytest.raises(ValueError, match="same work"):
        conditional_smc(fk, path, 5, ancestor_sampling=True, backward_sampling=True)
    with pytest.raises(ValueError, match="independent ancestors"):
        conditional_smc(fk, path, 5, backward_sampling=True, resampling="systematic")
    with pytest.raises(ValueError, match="at each step"):
        conditional_smc(fk, path, 5, backward_sampling=True, ess_threshold=0.5)
    with pytest.raises(ValueError, match="must be one of"):
        conditional_smc(fk, path, 5, resampling="ssp")
    with pytest.raises(ValueError, match="backward kernel"):
        conditional_smc(bootstrap(remembering(), data), path, 5, backward_sampling=True)
    walk = FeynmanKac(lambda draw, shape: torch.randn(shape), lambda k, x, draw: x, lambda k, previous, x: -(x**2), 2)
    with pytest.raises(ValueError, match="needs `extend`"):
        conditional_smc(walk, torch.zeros(2), 5)
    with pytest.raises(ValueError, match="at least `thin`"):
        iterated_csmc(fk, path, 2, 5, thin=3)
