"""What is recorded along a run agrees with the exact filter and smoother of a linear-Gaussian model."""

import math

import pytest
import torch

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import FeynmanKac, bootstrap, kalman_filter, kalman_smoother, particle_filter
from pyro_ssm.infer.smc import (
    Cloud,
    EvidenceVariance,
    FixedLag,
    Genealogy,
    MeanVariance,
    Moments,
    OnlineSmoothing,
    Quantiles,
    StateParticles,
    backward_indices,
)
from tests.contracts.toys import remembering, series, toy
from tests.infer.smc.programs import D, close, repeated

RUNS = 60


def calm(num_times):
    """A series without surprises."""
    data = series(num_times, obs_dim=1)
    return data.replace(values=0.5 * data.values)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_moments_of_a_function_and_quantiles():
    model, data = toy(1, 1), series(5, obs_dim=1, missing=True)
    exact, fk = kalman_filter(model, data), bootstrap(model, repeated(data, RUNS))
    square = Moments(lambda particles: fk.state(particles).square(), name="square")
    found = particle_filter(fk, 1000, collectors=[Moments(), square, Quantiles([0.1, 0.5, 0.9])]).collected
    mean, scale = exact.filtered_mean, exact.filtered_scale_tril.squeeze(-1)
    close(found["moments"].mean, mean)
    close(found["moments"].variance, scale**2)
    close(found["square"].mean, mean**2 + scale**2)
    for i, z in enumerate((-1.2815516, 0.0, 1.2815516)):
        close(found["quantiles"][i], mean + z * scale, bias=1e-2)


def test_moments_are_the_weighted_moments_of_the_cloud():
    found = particle_filter(bootstrap(toy(), series(4, (3,))), 20, collectors=[Moments(), Quantiles([0.0, 1.0])])
    x, w = found.cloud.particles.state.squeeze(-2), found.cloud.weights
    moments, quantiles = found.collected["moments"], found.collected["quantiles"]
    for b in range(3):
        assert torch.allclose(moments.covariance[b, -1], torch.cov(x[:, b].T, aweights=w[:, b], correction=0))
    assert torch.equal(quantiles[0, :, -1], x.amin(0)) and torch.equal(quantiles[1, :, -1], x.amax(0))


@pytest.mark.parametrize("lag", [0, 2, 9])
def test_fixed_lag_is_the_smoother_of_shorter_data(lag):
    model, data = toy(1, 1), series(6, obs_dim=1, missing=True)
    found = particle_filter(bootstrap(model, repeated(data, RUNS)), 1000, collectors=[FixedLag(lag)])
    until = [min(k + lag, 5) for k in range(6)]
    wanted = [kalman_smoother(model, data.split(u + 1)[0] if u < 5 else data).mean[k] for k, u in enumerate(until)]
    close(found.collected["fixed_lag"], torch.stack(wanted))


def test_fixed_lag_equals_the_genealogy():
    data = series(6, (2,))
    data = data.replace(lengths=torch.tensor([6, 4]))
    run = particle_filter(bootstrap(toy(), data), 40, collectors=[FixedLag(9), Genealogy()], ess_threshold=0.8)
    ancestry = run.collected["genealogy"]
    wanted = (run.cloud.weights[..., None, None] * ancestry.paths()).sum(0)
    assert torch.allclose(run.collected["fixed_lag"], wanted)
    short = particle_filter(bootstrap(toy(), data), 40, collectors=[FixedLag(1)]).collected["fixed_lag"]
    assert short.shape == (2, 6, 2)


def test_genealogy_traces_lines_and_draws_paths():
    run = particle_filter(bootstrap(toy(1, 1), series(6, (2,), obs_dim=1)), 50, collectors=[Genealogy()])
    ancestry = run.collected["genealogy"]
    paths = ancestry.paths()
    assert torch.equal(paths[..., -1, :], run.cloud.particles.state.squeeze(-2))
    for b in range(2):  # one line by hand
        n = 17
        for k in range(5, -1, -1):
            assert torch.equal(paths[17, b, k], ancestry.states[k, n, b])
            if ancestry.ancestors[k] is not None:
                n = int(ancestry.ancestors[k][n, b])
    drawn = ancestry.sample_paths(50)
    for b in range(2):
        lines = {tuple(path) for path in paths[:, b, :, 0].tolist()}
        assert {tuple(path) for path in drawn[:, b, :, 0].tolist()} <= lines
    with pytest.raises(ValueError, match="between 1 and the 50"):
        ancestry.sample_paths(51)


@pytest.mark.parametrize("log_bound", [None, 1.0])
def test_online_smoothing_of_sums(log_bound):
    """E[sum of z] and E[sum of z z'] given the data up to each time."""
    model, data = toy(1, 1), series(5, obs_dim=1, missing=True)
    fk = bootstrap(model, repeated(data, RUNS))

    def statistics(k, previous, particles):
        now = fk.state(particles)
        return torch.cat([now, now * 0 if previous is None else now * fk.state(previous)], -1)

    run = particle_filter(fk, 120, collectors=[OnlineSmoothing(statistics, log_bound=log_bound, trials=5)])
    for last in (1, 2, 4):
        smoothed = kalman_smoother(model, data.split(last + 1)[0] if last < 4 else data)
        mean = smoothed.mean.squeeze(-1)
        product = smoothed.lag_one_covariance.flatten() + mean[1:] * mean[:-1]
        found = run.collected["online_smoothing"][:, last]
        close(found, torch.stack([mean.sum(), product.sum()]), bias=2e-2)


def test_online_smoothing_varies_less_than_paths_and_keeps_what_has_ended():
    model, data = toy(1, 1), calm(150)
    total = OnlineSmoothing(lambda k, previous, particles: particles.state.squeeze(-2))
    fk = bootstrap(model, repeated(data, 40))
    run = particle_filter(fk, 30, collectors=[total, Genealogy()], resampling="multinomial", ess_threshold=1.0)
    naive = (run.cloud.weights.unsqueeze(-1) * run.collected["genealogy"].paths().sum(-2)).sum(0)
    assert run.collected["online_smoothing"][:, -1].std() < 0.7 * naive.std()
    short = data.split(6)[0]
    both = TimeSeries(short.times, short.values.expand(2, 6, 1), lengths=torch.tensor([6, 3]))
    found = particle_filter(bootstrap(model, both), 30, collectors=[total]).collected["online_smoothing"][1]
    assert torch.equal(found[3:], found[2].expand(3, 1))


def test_backward_indices_follow_their_law():
    model = toy(1, 1)
    fk = bootstrap(model, series(3, obs_dim=1))
    early = StateParticles(torch.tensor([-1.0, 0.0, 2.0], dtype=D).reshape(3, 1, 1), None, None)
    late = StateParticles(torch.tensor([-0.5, 0.5, 1.5], dtype=D).reshape(3, 1, 1), None, None)
    cloud = Cloud(early, torch.tensor([0.2, 0.5, 0.3], dtype=D).log(), 0)
    index = backward_indices(fk, cloud, late, 1, 20_000)
    for n in range(3):
        one = StateParticles(late.state[n : n + 1], None, None)
        wanted = (cloud.log_weights + fk.log_backward(1, early, one)).softmax(0)
        found = torch.bincount(index[:, n], minlength=3) / 20_000
        assert ((found - wanted).abs() < 4.5 * (wanted * (1 - wanted) / 20_000).sqrt()).all()


class TestVariance:
    def test_of_the_evidence_is_unbiased_when_it_always_resamples(self):
        """Lee and Whiteley: E[V Z^2] = Var Z, under multinomial resampling at every step."""
        model, data = toy(1, 1), series(5, obs_dim=1, missing=True)
        exact = kalman_filter(model, data).log_likelihood.sum()
        run = particle_filter(
            bootstrap(model, repeated(data, 4000)),
            40,
            resampling="multinomial",
            ess_threshold=1.0,
            collectors=[EvidenceVariance()],
        )
        ratio = (run.total - exact).exp()
        mine = run.collected["evidence_variance"][:, -1] * ratio**2
        empirical = (ratio - ratio.mean()).square()
        error = math.sqrt(float(mine.var() + empirical.var()) / 4000)
        assert abs(float(mine.mean() - empirical.mean())) < 4 * error
        assert error < 0.25 * float(empirical.mean())

    def test_of_the_evidence_with_adaptive_resampling(self):
        model, data = toy(1, 1), series(6, obs_dim=1)
        run = particle_filter(
            bootstrap(model, repeated(data, 500)), 300, resampling="multinomial", collectors=[EvidenceVariance()]
        )
        assert run.resampled.any() and not run.resampled[:, 1:].all()
        assert 0.8 < float(run.collected["evidence_variance"][:, -1].mean() / run.total.var()) < 1.25

    def test_with_a_lag_over_a_long_series(self):
        model, data = toy(1, 1), calm(150)
        lagged, whole = EvidenceVariance(lag=8, name="lagged"), EvidenceVariance()
        run = particle_filter(
            bootstrap(model, repeated(data, 200)), 200, resampling="multinomial", collectors=[lagged, whole]
        )
        variance = float(run.total.var())
        found = run.collected["lagged"][:, -1]
        assert 0.7 < float(found.mean()) / variance < 1.35  # the empirical one has an error of 10 % itself
        first = run.collected["evidence_variance"]
        assert found.std() < first[:, -1].std()
        assert torch.allclose(first[:, :8], run.collected["lagged"][:, :8])

    def test_of_a_mean(self):
        model, data = toy(1, 1), calm(30)
        run = particle_filter(
            bootstrap(model, repeated(data, 400)),
            200,
            resampling="multinomial",
            collectors=[Moments(), MeanVariance(lag=6)],
        )
        empirical = run.collected["moments"].mean[:, 10:].var(0)
        found = run.collected["mean_variance"][:, 10:].mean(0)
        assert 0.85 < float((found / empirical).mean()) < 1.15

    def test_a_series_that_has_ended_adds_nothing(self):
        data = series(6, (2,)).replace(lengths=torch.tensor([6, 3]))
        for lag in (None, 2):
            run = particle_filter(bootstrap(toy(), data), 50, collectors=[EvidenceVariance(lag)])
            found = run.collected["evidence_variance"][1]
            assert torch.allclose(found[3:], found[2].expand(3))


def test_what_needs_more_than_there_is_says_so():
    with pytest.raises(ValueError, match="backward kernel"):
        particle_filter(
            bootstrap(remembering(), series(3)), 10, collectors=[OnlineSmoothing(lambda k, p, x: x.state.squeeze(-2))]
        )
    with pytest.raises(ValueError, match="upper bound"):
        total = OnlineSmoothing(lambda k, p, x: x.state.squeeze(-2), log_bound=-10.0)
        particle_filter(bootstrap(toy(), series(3)), 10, collectors=[total])
    with pytest.raises(ValueError, match="two particles"):
        particle_filter(bootstrap(toy(), series(3)), 1, collectors=[EvidenceVariance()])
    for wrong in (lambda: FixedLag(-1), lambda: EvidenceVariance(0), lambda: Quantiles([2.0])):
        with pytest.raises(ValueError, match="must be"):
            wrong()


def test_a_resampling_without_ancestors_is_refused():
    from pyro_ssm.infer.smc import Resampled, Resampling

    class Mix(Resampling):
        def rows(self, num_particles):
            return 1

        def __call__(self, weighted, uniforms):
            return Resampled(weighted.particles, weighted.log_weights * 0 - math.log(10), None)

    fk = FeynmanKac(lambda draw, shape: torch.randn(shape), lambda k, x, draw: x, lambda k, previous, x: -x.square(), 3)
    assert particle_filter(fk, 10, resampling=Mix(), ess_threshold=1.0).resampled[1:].all()
    for collector in (FixedLag(1, lambda x: x.unsqueeze(-1)), Genealogy(), EvidenceVariance()):
        with pytest.raises(ValueError, match="follows ancestors"):
            particle_filter(fk, 10, resampling=Mix(), ess_threshold=1.0, collectors=[collector])
