"""Particle smoothers against exact ones: Kalman for linear-Gaussian models, forward-backward for finite chains."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from pyro_ssm.data import TimeSeries
from pyro_ssm.dynamics import CategoricalInitial, MarkovChain
from pyro_ssm.emissions import NormalTable
from pyro_ssm.infer import bootstrap, hmm_smoother, kalman_smoother, locally_optimal, particle_smoother
from pyro_ssm.infer.smc import Cloud, FixedNoise, StateParticles
from pyro_ssm.infer.smc.backward import metropolis_indices, rejection_indices
from pyro_ssm.models import StateSpaceModel
from tests.contracts.toys import Start, remembering, series, toy
from tests.infer.smc.programs import Bend, D, Replayed, calm, close, repeated

METHODS = ("genealogy", "backward", "rejection", "mcmc", "marginal", "two_filter", "two_filter_linear")
PATHS = METHODS[:4]
RUNS = 60


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def assert_kalman(model, data, num_particles=200, build=bootstrap, bias=6e-3, **options):
    """Moments, and of paths those of neighbours: averages over repetitions within their own errors."""
    exact = kalman_smoother(model, data)
    found = particle_smoother(build(model, repeated(data, RUNS)), num_particles, **options)
    close(found.mean, exact.mean, bias=bias)
    centred = found.states - exact.mean  # about the exact mean: squares about the found one are too small
    square = torch.einsum("m...ti,m...tj->...tij", found.weights.unsqueeze(-1) * centred, centred)
    close(square, exact.scale_tril @ exact.scale_tril.mT, bias=2 * bias)
    if found.joint and data.num_times > 1:
        lag_one = torch.einsum("m...ti,m...tj->...tij", centred[..., :-1, :], centred[..., 1:, :]) / len(centred)
        close(lag_one, exact.lag_one_covariance, bias=2 * bias)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [1, 2])
def test_smoothed_moments_are_those_of_the_kalman_smoother(method, dim):
    data = calm(5, missing=True)
    assert_kalman(toy(dim, 1), data, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_guided_processes_and_refined_grids(method):
    """A proposal that has seen the observation; half of the steps without one."""
    data = calm(3).refine(2)
    assert_kalman(toy(1, 1), data, build=locally_optimal, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_ragged_series_and_own_times(method):
    data = calm(5, batch=(2,), own=True, missing=True)
    data = data.replace(lengths=torch.tensor([5, 2]))
    model = toy(1, 1)
    exact = kalman_smoother(model, data)
    times, values = data.times.expand(RUNS, 2, 5), data.values.expand(RUNS, 2, 5, 1)
    many = TimeSeries(times, values, mask=data.mask.expand(RUNS, 2, 5, 1), lengths=data.lengths.expand(RUNS, 2))
    found = particle_smoother(bootstrap(model, many), 150, method=method)
    close(found.mean[:, 0], exact.mean[0], bias=8e-3)
    close(found.mean[:, 1, :2], exact.mean[1, :2], bias=8e-3)
    close(found.variance[:, 1, :2], exact.scale_tril[1, :2, :, 0] ** 2, bias=2e-2)
    assert torch.equal(found.states[:, :, 1, 2:], found.states[:, :, 1, 1:2].expand(-1, -1, 3, -1))  # held
    assert torch.allclose(found.weights.sum(0), torch.ones((), dtype=D))


def chain(seed=0):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.tensor([[0.8, 0.15, 0.05], [0.2, 0.6, 0.2], [0.1, 0.0, 0.9]], dtype=D)
    initial = CategoricalInitial(3, probs=torch.tensor([0.5, 0.3, 0.2], dtype=D))
    emission = NormalTable(3, 1)
    model = StateSpaceModel(initial, MarkovChain(3, matrix=matrix), emission).double()
    model.emission.loc.data = torch.tensor([[-1.0], [0.0], [1.5]], dtype=D)
    return model, TimeSeries(torch.arange(6.0), torch.randn(6, 1, generator=generator, dtype=D))


def occupied(found):
    """Smoothed probabilities of each state, ``(*batch, time, K)``."""
    hits = (found.states == torch.arange(3)).to(found.weights)
    return (found.weights.unsqueeze(-1) * hits).sum(0)


@pytest.mark.parametrize("method", METHODS[:5])
def test_finite_chains_as_the_number_of_particles_grows(method):
    model, data = chain()
    exact = hmm_smoother(model, data).probs
    few = occupied(particle_smoother(bootstrap(model, repeated(data, RUNS)), 20, method=method))
    many = occupied(particle_smoother(bootstrap(model, repeated(data, RUNS)), 500, method=method))
    close(many, exact)
    ratio = (few - exact).square().mean() / (many - exact).square().mean()
    assert ratio > 12, ratio  # 25 by theory


@pytest.mark.parametrize("method", METHODS[5:])
def test_two_filters_refuse_whole_numbers(method):
    model, data = chain()
    with pytest.raises(ValueError, match="whole numbers"):
        particle_smoother(bootstrap(model, data), 20, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_a_loop(method):
    data = series(4, (3,), missing=True)
    whole = particle_smoother(bootstrap(toy(), data), 20, method=method, noise=Replayed(7, range(3)))
    for b in range(3):
        one = TimeSeries(data.times, data.values[b : b + 1], mask=data.mask[b : b + 1])
        alone = particle_smoother(bootstrap(toy(), one), 20, method=method, noise=Replayed(7, [b]))
        assert torch.allclose(whole.states[:, b], alone.states[:, 0], rtol=0, atol=1e-12)
        assert torch.allclose(whole.weights[:, b], alone.weights[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_times, num_particles", [(1, 50), (1, 2), (3, 2), (3, 1)])
def test_small_numbers(method, num_times, num_particles):
    data = series(num_times, (2,), obs_dim=1)
    found = particle_smoother(bootstrap(toy(2, 1), data), num_particles, method=method)
    assert found.states.shape == (num_particles, 2, num_times, 2) and found.mean.shape == (2, num_times, 2)
    assert (found.weights >= 0).all()
    assert torch.allclose(found.mean, (found.weights.unsqueeze(-1) * found.states).sum(0), rtol=0, atol=1e-12)
    assert torch.allclose(found.weights.sum(0), torch.ones((), dtype=D))


@pytest.mark.parametrize("method", METHODS)
def test_one_time_and_nothing_seen(method):
    assert_kalman(toy(1, 1), calm(1), method=method)
    blank = calm(4)
    assert_kalman(toy(1, 1), blank.hide(torch.ones_like(blank.mask)), method=method)


def test_float32():
    model, data = toy(1, 1, dtype=torch.float32), calm(5, dtype=torch.float32)
    for method in METHODS:
        assert_kalman(model, data, method=method, bias=1e-2)


def test_backward_draws_do_not_degenerate():
    """The early states of ancestral lines are copies of a few; their means vary the more."""
    fk = bootstrap(toy(1, 1), repeated(calm(60), 40))
    found = {method: particle_smoother(fk, 60, method=method) for method in METHODS}
    for method in METHODS[1:]:
        assert found[method].mean[:, 0].std() < 0.7 * found["genealogy"].mean[:, 0].std(), method
        assert found[method].ess[:, 0].mean() > 4 * found["genealogy"].ess[:, 0].mean(), method


def test_a_linear_cost_allows_for_many_particles():
    """Errors go on falling at the rate of N, where weighing all pairs would take 1e10 densities."""
    data = calm(4)
    exact = kalman_smoother(toy(1, 1), data)
    errors = []
    for num in (1000, 100_000):
        found = particle_smoother(bootstrap(toy(1, 1), repeated(data, 4)), num, method="two_filter_linear")
        errors.append(float((found.mean - exact.mean).square().mean().sqrt()))
        assert (found.ess[..., 1:-1] > 0.2 * num).all()
    assert errors[1] < 0.3 * errors[0] and errors[1] < 6e-3, errors


def test_ess_counts_copies_once():
    found = particle_smoother(bootstrap(toy(), series(3, (2,))), 40, method="backward")
    for b in range(2):
        for k in range(3):
            counts = torch.unique(found.states[:, b, k], dim=0, return_counts=True)[1].double()
            assert torch.allclose(found.ess[b, k], 1 / (counts / 40).square().sum())


def pair_law():
    model = toy(1, 1)
    fk = bootstrap(model, series(3, obs_dim=1))
    early = StateParticles(torch.tensor([-1.0, 0.0, 2.0, 3.0], dtype=D).reshape(4, 1, 1), None, None)
    late = StateParticles(torch.tensor([-0.5, 0.5, 2.0], dtype=D).reshape(3, 1, 1), None, None)
    cloud = Cloud(early, torch.tensor([0.2, 0.5, 0.3, 0.0], dtype=D).log(), 0)
    wanted = cloud.log_weights[:, None] + fk.log_backward(1, *(
        StateParticles(x, None, None) for x in (early.state.unsqueeze(1), late.state.unsqueeze(0))
    ))  # fmt: skip
    return fk, cloud, late, wanted.softmax(0)


@pytest.mark.parametrize("trials", [0, 1, 200])
def test_rejection_has_the_law_of_the_backward_kernel(trials):
    """Whether accepted at once, after a while, or weighed pair by pair in the end."""
    fk, cloud, late, wanted = pair_law()
    runs = 4000
    many = StateParticles(late.state.repeat_interleave(runs, 0), None, None)
    index = rejection_indices(fk, cloud, many, 1, fk.log_bound(1), trials).reshape(3, runs)
    assert_frequencies(index, wanted)


def test_metropolis_steps_leave_the_backward_kernel_invariant_and_reach_it():
    fk, cloud, late, wanted = pair_law()
    runs = 4000
    many = StateParticles(late.state.repeat_interleave(runs, 0), None, None)
    start = torch.cat([torch.multinomial(wanted[:, n], runs, True) for n in range(3)])
    assert_frequencies(metropolis_indices(fk, cloud, many, 1, start, 1).reshape(3, runs), wanted)
    far = torch.full_like(start, 2)
    assert_frequencies(metropolis_indices(fk, cloud, many, 1, far, 100).reshape(3, runs), wanted)


def assert_frequencies(index, wanted):
    for n in range(3):
        found = torch.bincount(index[n], minlength=4) / index.shape[1]
        error = (wanted[:, n] * (1 - wanted[:, n]) / index.shape[1]).sqrt()
        assert ((found - wanted[:, n]).abs() <= 4.5 * error).all()


def test_bounds():
    fk = bootstrap(toy(1, 1), series(4, (3,), own=True, obs_dim=1))
    assert fk.log_bound(2).shape == (3,)
    x = torch.linspace(-3, 3, 50, dtype=D).reshape(50, 1, 1, 1).expand(50, 3, 1, 1)
    pairs = fk.log_backward(2, StateParticles(x.unsqueeze(1), None, None), StateParticles(x.unsqueeze(0), None, None))
    assert (pairs.amax((0, 1)) <= fk.log_bound(2)).all()
    assert (pairs.amax((0, 1)) > fk.log_bound(2) - 0.01).all()
    for wrong in (-3.0, lambda k: -3.0):
        with pytest.raises(ValueError, match="no upper bound"):
            particle_smoother(fk, 30, method="rejection", log_bound=wrong)
    bent = StateSpaceModel(Start(1), Bend(1), toy(1, 1).emission).double()
    fk = bootstrap(bent, series(3, obs_dim=1))
    with pytest.raises(ValueError, match="needs `log_bound`"):
        particle_smoother(fk, 30, method="rejection")
    assert particle_smoother(fk, 30, method="rejection", log_bound=0.0, num_paths=5).paths.shape == (5, 3, 1)


def test_what_cannot_be_done_says_so():
    data = series(3)
    fk = bootstrap(toy(), data)
    with pytest.raises(ValueError, match="must be one of"):
        particle_smoother(fk, 10, method="fast")
    for method in METHODS[1:]:
        with pytest.raises(ValueError, match=f"{method}.*backward kernel"):
            particle_smoother(bootstrap(remembering(), data), 10, method=method)
    assert particle_smoother(bootstrap(remembering(), data), 10, method="genealogy").paths.shape == (10, 3, 2)
    with pytest.raises(ValueError, match="`log_step`"):
        particle_smoother(replace(fk, log_step=None), 10, method="two_filter")
    with pytest.raises(ValueError, match="no paths"):
        particle_smoother(fk, 10, method="marginal", num_paths=5)
    with pytest.raises(ValueError, match="and no paths"):
        _ = particle_smoother(fk, 10, method="marginal").paths
    with pytest.raises(ValueError, match="`num_paths` must be at least 1"):
        particle_smoother(fk, 10, num_paths=0)
    with pytest.raises(ValueError, match="`num_steps` must not be negative"):
        particle_smoother(fk, 10, num_steps=-1)
    with pytest.raises(ValueError, match="FixedNoise"):
        particle_smoother(fk, 10, noise=FixedNoise(torch.zeros(3, 10, 2), torch.zeros(3, 1)))


def test_blocks_of_pairs_change_nothing(monkeypatch):
    data = series(4, (2,))
    for method in ("backward", "marginal", "two_filter"):
        whole = particle_smoother(bootstrap(toy(), data), 15, method=method, noise=Replayed(3, range(2)))
        with monkeypatch.context() as patch:
            for name in ("backward", "two_filter"):
                patch.setattr(import_module(f"pyro_ssm.infer.smc.{name}"), "_PAIRS", 100)
            parts = particle_smoother(bootstrap(toy(), data), 15, method=method, noise=Replayed(3, range(2)))
        assert torch.allclose(whole.states, parts.states, rtol=0, atol=1e-12)
        assert torch.allclose(whole.weights, parts.weights, rtol=0, atol=1e-12)
