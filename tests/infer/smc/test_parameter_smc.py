"""SMC over parameters: posterior and evidence that are known by quadrature."""

import math

import arviz as az
import pytest
import torch

from pyro_ssm.diagnostics import to_inference_data
from pyro_ssm.infer import (
    bootstrap,
    ibis,
    kalman_filter,
    locally_optimal,
    particle_gibbs,
    pmmh,
    smc_sampler,
    smc_squared,
)
from pyro_ssm.infer.smc.moves import AdaptiveWalk, walk_root
from pyro_ssm.predict import posterior_draws
from tests.infer.smc.known_posterior import D, assert_mean, judged, logs, priors, quadrature

RUNS = 6
KINDS = {
    "ibis": lambda model, data: ibis(model, data, 300, progress=False),
    "ibis without waste": lambda model, data: ibis(model, data, 300, num_ancestors=60, progress=False),
    "tempering": lambda model, data: smc_sampler(model, data, 300, progress=False),
    "tempering without waste": lambda model, data: smc_sampler(model, data, 300, num_ancestors=60, progress=False),
    "tempering of estimates": lambda model, data: smc_sampler(
        model, data, 200, 40, filter=locally_optimal, num_moves=3, progress=False
    ),
    "smc squared": lambda model, data: smc_squared(model, data, 200, 20, progress=False),
}
SLOW = {"tempering of estimates": pytest.mark.slow, "ibis without waste": pytest.mark.slow}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW.get(kind, ())) for kind in KINDS])
def test_posterior_and_evidence(kind):
    """Independent runs give the standard error of what they find."""
    model, data, known = judged()
    runs = [KINDS[kind](model, data) for _ in range(RUNS)]
    x = torch.stack([logs(run, model)[0] for run in runs])
    assert_mean(x.mean(1), known.mean, known.std)
    assert_mean(((x - known.mean) ** 2).mean(1), known.std**2, known.std**2, precision=0.4)
    assert_mean(torch.stack([run.states[0].mean(0) for run in runs]), known.states, torch.tensor(0.5), 5.0)
    ratio = torch.stack([(run.log_evidence - known.log_evidence).exp() for run in runs])
    assert_mean(ratio, 1.0, 1.0)
    for run in runs:
        assert abs(float(run.increments.sum() - run.log_evidence)) < 1e-9
        assert bool((run.ess <= x.shape[1] + 1e-6).all())
        assert bool((run.acceptance[~run.acceptance.isnan()] > 0.1).all())


def test_increments_are_the_evidence_of_each_beginning():
    model, data, _ = judged(one=True)
    runs = torch.stack([ibis(model, data, 400, progress=False).increments.cumsum(0) for _ in range(RUNS)])
    for k in (3, 7):
        before, _ = data.split(k)
        assert_mean((runs[:, k - 1] - quadrature(model, before).log_evidence).exp(), 1.0, 1.0)


def test_temperatures_keep_the_effective_sample_size():
    model, data, _ = judged()
    found = smc_sampler(model, data, 300, ess_threshold=0.95, num_moves=2, progress=False)
    assert bool((found.stages.diff() > 0).all()), found.stages
    assert float(found.stages[-1]) == 1.0
    assert len(found.stages) > 2
    assert torch.allclose(found.ess[:-1], torch.tensor(285.0, dtype=D), rtol=1e-6)
    assert float(found.ess[-1]) >= 285 - 1e-6


def test_particles_are_doubled_where_moves_are_rejected():
    """With two particles the estimates are so bad that little is accepted; the answer is right all the same."""
    model, data, known = judged(one=True)
    runs = [
        smc_squared(model, data, 200, 2, least_acceptance=0.25, max_particles=64, progress=False) for _ in range(RUNS)
    ]
    for run in runs:
        assert float(run.stages[0]) == 2
        assert float(run.stages[-1]) > 2
        assert bool((run.stages.diff() >= 0).all())
    assert_mean(torch.stack([logs(run, model)[0].mean(0) for run in runs]), known.mean, known.std)
    assert_mean(torch.stack([(run.log_evidence - known.log_evidence).exp() for run in runs]), 1.0, 1.0)


@pytest.mark.parametrize("sampler", [ibis, smc_sampler])
def test_draws_without_a_filters_path_get_exact_ones(sampler):
    model, data, _ = judged(one=True)
    found = sampler(model, data, 40, num_moves=1, progress=False)
    assert found.states.shape == (1, 40, 2, 8, 1)
    values = {name: value[0].unsqueeze(-1) for name, value in found.parameters.items()}
    again = kalman_filter(model.bind(values), data).log_likelihood.sum((-1, -2))
    assert torch.allclose(found.log_likelihood[0], again, atol=1e-10)


def test_arviz_and_predict_take_the_result():
    model, data, _ = judged()
    found = smc_squared(model, data, 60, 10, progress=False)
    idata = to_inference_data(found, model=model, data=data)
    assert dict(idata["posterior"]["z"].sizes) == {"chain": 1, "draw": 60, "series": 2, "time": 8, "state": 1}
    assert idata["sample_stats"].attrs["log_evidence"] == float(found.log_evidence)
    assert {"mean", "ess_bulk"} <= set(az.summary(idata, var_names=["emission.scale"]).columns)
    draws = posterior_draws(model, found, data)
    assert torch.equal(draws.states, found.states[0])
    assert torch.equal(draws.parameters["emission.scale"].flatten(), found.parameters["emission.scale"][0])


def test_no_draw_is_possible():
    model, data, _ = judged(one=True)
    far = data.replace(values=data.values * 1e200)
    with pytest.raises(ValueError, match=r"stage 0 of the sampler.*impossible at every draw"):
        ibis(model, far, 20, progress=False)
    with pytest.raises(ValueError, match="impossible at every draw"):
        smc_sampler(model, far, 20, progress=False)
    with pytest.raises(ValueError, match="impossible at every draw"):
        smc_squared(model, far, 20, 5, progress=False)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m, d: ibis(m, d, 20, filter=bootstrap), TypeError, "smc_squared"),
        (lambda m, d: smc_squared(m, d, 20, filter=kalman_filter), TypeError, "use ibis"),
        (lambda m, d: smc_sampler(m, d, 20, num_ancestors=7), ValueError, "divisor"),
        (lambda m, d: ibis(m, d, 1), ValueError, "`num_samples` must be at least 2, got 1"),
        (lambda m, d: ibis(m, d, 20, num_moves=0), ValueError, "`num_moves`"),
        (lambda m, d: smc_sampler(m, d, 20, ess_threshold=1.0), ValueError, "`ess_threshold`"),
        (lambda m, d: smc_sampler(m, d.without_values(), 20), ValueError, "no values"),
    ],
)
def test_errors(call, error, match):
    model, data, _ = judged(one=True)
    with pytest.raises(error, match=match):
        call(model, data)


def test_walks_of_several_chains_are_those_of_each():
    root = torch.randn(3, 2, 2, dtype=D).tril() + 2 * torch.eye(2, dtype=D)
    noise, rate = torch.randn(20, 3, 2, dtype=D), torch.rand(20, 3, dtype=D)
    together = AdaptiveWalk(root, 0.234)
    apart = [AdaptiveWalk(root[i : i + 1], 0.234) for i in range(3)]
    for e, p in zip(noise, rate, strict=True):
        together.learn(e, p)
        for i, walk in enumerate(apart):
            walk.learn(e[i : i + 1], p[i : i + 1])
    assert torch.allclose(together.root, torch.cat([walk.root for walk in apart]))
    assert torch.allclose(together.step(noise[0]), (together.root @ noise[0].unsqueeze(-1)).squeeze(-1))


def test_walk_learns_the_shape_and_rate_of_its_target():
    """On a Gaussian of very different scales the walk ends with their ratio, and is accepted as it should be."""
    scales = torch.tensor([1.0, 10.0], dtype=D)
    walk = AdaptiveWalk(torch.eye(2, dtype=D).expand(8, 2, 2), 0.234)
    x, rates = torch.zeros(8, 2, dtype=D), []
    for _ in range(2000):
        noise = torch.randn(8, 2, dtype=D)
        y = x + walk.step(noise)
        log_ratio = 0.5 * ((x / scales) ** 2 - (y / scales) ** 2).sum(-1)
        rate = log_ratio.clamp(max=0).exp()
        x = torch.where((torch.rand(8, dtype=D).log() < log_ratio).unsqueeze(-1), y, x)
        walk.learn(noise, rate)
        rates.append(rate.mean())
    assert abs(float(torch.stack(rates[1000:]).mean()) - 0.234) < 0.02
    covariance = walk.root @ walk.root.mT
    ratio = (covariance[:, 1, 1] / covariance[:, 0, 0]).sqrt().log().mean().exp()
    assert 7 < float(ratio) < 14, ratio


def test_root_of_a_weighted_cloud():
    x, weights = torch.randn(50, 3, dtype=D), torch.rand(50, dtype=D).softmax(0)
    root = walk_root(x, weights)
    exact = 2.38**2 / 3 * torch.cov(x.T, aweights=weights, correction=0)
    assert torch.allclose(root @ root.mT, exact, rtol=2e-2, atol=1e-2)
    still = 2.38 / math.sqrt(2) * 1e-6 * torch.eye(2, dtype=D)  # all members the same: it hardly moves
    assert torch.allclose(walk_root(torch.full((5, 2), 3.0, dtype=D)), still, rtol=1e-6, atol=1e-12)
    units = torch.tensor([1e-3, 1.0, 1e4], dtype=D)  # a walk knows no units
    assert torch.allclose(walk_root(units * x, weights), units.unsqueeze(-1) * root, rtol=1e-3)
    few = walk_root(units * x[:2])  # two members lie on a line
    assert bool((few.diagonal() > 1e-3 * units).all())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ibis", "smc squared", "pmmh", "particle gibbs"])
def test_simulation_based_calibration(kind):
    """Ranks of the truth among draws of its posterior are uniform."""
    from tests.infer.smc.known_posterior import make_data, make_model

    model, draws, ranks = make_model(), 15, []
    sampler = {
        "ibis": lambda data: ibis(model, data, 120, num_moves=4, progress=False),
        "smc squared": lambda data: smc_squared(model, data, 90, 15, progress=False),
        # the last draws of as many chains as draws are wanted: independent, whatever the autocorrelation
        "pmmh": lambda data: pmmh(model, data, 1, 15, num_chains=draws, num_warmup=80, progress=False),
        "particle gibbs": lambda data: particle_gibbs(
            model, data, 1, 8, num_chains=draws, num_warmup=40, progress=False
        ),
    }[kind]
    grid = make_data(6)
    for _ in range(80):
        truth = {name: law.sample() for name, law in priors(model)}
        _, y = model.bind(truth)(grid.without_values())
        found = sampler(grid.replace(values=y, mask=grid.mask))
        drawn = found.get_samples()
        some = torch.randperm(len(drawn["z"]))[:draws]
        ranks.append([int((drawn[name][some] < value).sum()) for name, value in truth.items()])
    for column in torch.tensor(ranks).T:
        counts = torch.bincount(column // 4, minlength=4).double()  # 16 ranks in 4 bins
        chi2 = float(((counts - 20) ** 2 / 20).sum())
        assert chi2 < 16.3, counts  # 0.1 % of a chi-square with 3 degrees of freedom
