"""Diffusion resampling: the flow against what it must do, and the filter against the Kalman filter."""

import math

import pytest
import torch

from pyro_ssm.infer import ParticleMarginal, auxiliary, bootstrap, kalman_filter, particle_filter
from pyro_ssm.infer.smc import DiffusionResampling, FixedNoise, Genealogy, Weighted
from tests.contracts.toys import series, toy
from tests.infer.smc.programs import D, repeated


def weighted(x, log_weights, need=None, **parts):
    log_weights = log_weights.log_softmax(0)
    return Weighted({"x": x, **parts}, lambda: x, log_weights, log_weights.exp(), need)


def uneven(num, dim=1, batch=(), seed=0, dtype=D):
    """A cloud of two lumps, of uneven weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((num,) + batch + (dim,), dtype=D, generator=generator)
    log_weights = torch.logsumexp(torch.stack([-3 * (x[..., 0] - 1).square(), -3 * (x[..., 0] + 1.5).square()]), 0)
    uniforms = torch.rand((max(num, 64),) + batch, dtype=D, generator=generator)
    return (3 + 2 * x).to(dtype), log_weights.to(dtype), uniforms


def moved(x, log_weights, uniforms, **options):
    return DiffusionResampling(**options)(weighted(x, log_weights), uniforms).particles["x"]


def test_in_one_dimension_the_flow_maps_quantiles_to_quantiles():
    """It keeps the order of the points, and carries the Gaussian to the cloud: this leaves one map only."""
    x, log_weights, uniforms = uneven(800)
    found = moved(x, log_weights, uniforms, bandwidth=0.03, num_steps=48)[:, 0]
    net = torch.quasirandom.SobolEngine(1).draw(800, dtype=D)[:, 0]
    points = (net + uniforms[0]).frac()
    assert torch.equal(found.argsort(), points.argsort())
    ordered, order = x[:, 0].sort()
    cumulative = log_weights.softmax(0)[order].cumsum(0)
    wanted = ordered[torch.searchsorted(cumulative, points).clamp(max=799)]
    gap = (found - wanted).abs()
    assert gap.median() < 0.02 and gap.quantile(0.98) < 0.15, (gap.median(), gap.quantile(0.98))  # of a spread of 2.5
    plain = moved(x, torch.zeros_like(log_weights), uniforms)[:, 0]
    assert (plain - wanted).abs().median() > 0.3  # the weights matter


def test_the_steps_are_of_second_order():
    x, log_weights, uniforms = uneven(300, 2)
    exact = moved(x, log_weights, uniforms, bandwidth=0.5, num_steps=2000)
    few, many = (moved(x, log_weights, uniforms, bandwidth=0.5, num_steps=n) for n in (21, 81))  # steps in ratio 4
    order = math.log(float((few - exact).norm() / (many - exact).norm()), 4)
    assert order > 1.9, order


@pytest.mark.parametrize("dim", [1, 3])
def test_moments_are_kept_but_for_the_bandwidth(dim):
    errors = []
    for seed in range(40):
        x, log_weights, uniforms = uneven(200, dim, seed=seed)
        found, weights = moved(x, log_weights, uniforms), log_weights.softmax(0).unsqueeze(-1)
        mean = (weights * x).sum(0)
        variance = (weights * (x - mean).square()).sum(0)
        errors.append(torch.stack([(found.mean(0) - mean) / variance.sqrt(), found.var(0) / variance - 1]))
    mean, spread = torch.stack(errors).mean(0), torch.stack(errors).std(0)
    assert spread.max() < 0.12  # of 200 independent draws: 0.07 and 0.1
    assert (mean[0].abs() < 4 * spread[0] / 40**0.5).all()
    assert ((mean[1] + 0.01).abs() < 0.01 + 4 * spread[1] / 40**0.5).all()


def test_the_map_commutes_with_affine_maps_of_the_state():
    """And other parts of a particle are averaged as the state is."""
    x, log_weights, uniforms = uneven(50, 2)
    matrix = torch.tensor([[200.0, 0.0], [-190.0, 40.0]], dtype=D)
    skewed = weighted(x @ matrix.mT + 7, log_weights, carry=(x.square(), None))
    found = DiffusionResampling(0.3)(skewed, uniforms)
    plain = DiffusionResampling(0.3)(weighted(x, log_weights, carry=(x.square(), None)), uniforms)
    far = (found.particles["x"] - plain.particles["x"] @ matrix.mT - 7) / (x @ matrix.mT).std(0)
    assert far.abs().max() < 1e-3  # but for the ridge on the correlations
    lifted = (plain.particles["carry"][0] - plain.particles["x"].square()).amin()
    assert lifted >= -1e-12  # Jensen: the mean of squares is above the square of the mean
    assert plain.ancestors is None and torch.allclose(plain.log_weights.exp(), torch.tensor(1 / 50, dtype=D))


def test_a_batch_is_a_loop_and_series_without_need_stay():
    x, log_weights, uniforms = uneven(40, 2, (3, 2))
    whole = moved(x, log_weights, uniforms)
    for i in range(3):
        for j in range(2):
            alone = moved(x[:, i, j], log_weights[:, i, j], uniforms[:, i, j])
            assert torch.allclose(whole[:, i, j], alone, rtol=0, atol=1e-10)
    need = torch.tensor([[True, False], [False, True], [True, True]])
    cloud = weighted(x, log_weights, need)
    some = DiffusionResampling()(cloud, uniforms)
    for i in range(3):
        for j in range(2):
            wanted = whole if need[i, j] else x
            assert torch.equal(some.particles["x"][:, i, j], wanted[:, i, j])
            kept = cloud.log_weights[:, i, j]
            assert torch.allclose(some.log_weights[:, i, j], -torch.tensor(40.0, dtype=D).log() if need[i, j] else kept)


def test_float32():
    x, log_weights, uniforms = uneven(100, 2)
    wanted = moved(x, log_weights, uniforms)
    found = moved(x.float(), log_weights.float(), uniforms)
    assert found.dtype == torch.float32
    assert ((found - wanted).abs() < 1e-3).double().mean() > 0.97  # a draw between two particles may tip over


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("case", ["one weight", "copies", "one particle", "flat", "zero weights"])
def test_degenerate_clouds(case, dtype):
    x, log_weights, uniforms = uneven(30, 2, dtype=dtype)
    if case == "one weight":
        log_weights = torch.full_like(log_weights, -math.inf).index_fill(0, torch.tensor(4), 0.0)
    elif case == "copies":
        x = x[:1].expand(30, 2) + 100
    elif case == "one particle":
        x, log_weights = x[:1], log_weights[:1]
    elif case == "flat":
        x = torch.cat([x[:, :1], torch.full_like(x[:, :1], 1e4)], -1)
    else:
        log_weights = torch.where(x[:, 0] > 3, log_weights, -math.inf)
    x, log_weights = x.clone().requires_grad_(), log_weights.clone().requires_grad_()
    found = moved(x, log_weights, uniforms)
    slopes = torch.autograd.grad(found.square().sum(), (x, log_weights))
    rounding = 1e-9 if dtype == D else 1e-2
    # a cloud that is shifted arrives as much shifted, and only ratios of weights count: exact sums of the slopes
    tolerance = 1e-7 if dtype == D else 2e-4  # a flat direction is whitened by its rounding
    torch.testing.assert_close(slopes[0].sum(0), 2 * found.detach().sum(0), rtol=tolerance, atol=tolerance)
    assert abs(float(slopes[1].sum())) <= tolerance * (1 + float(slopes[1].abs().sum()))
    if case in ("one weight", "copies", "one particle"):
        wanted = x[4] if case == "one weight" else x[0]
        assert torch.allclose(found, wanted.expand_as(found), rtol=1e-5 if dtype == torch.float32 else 1e-9)
    elif case == "flat":
        assert torch.allclose(found[:, 1], x[:, 1], rtol=0, atol=rounding) and found[:, 0].std() > 1
    else:
        assert (found[:, 0] >= 3).all()


def test_gradient():
    x, log_weights, uniforms = uneven(7, 2)
    x, log_weights = x.requires_grad_(), log_weights.requires_grad_()
    assert torch.autograd.gradcheck(lambda *cloud: moved(*cloud, uniforms, bandwidth=0.4), (x, log_weights))


@torch.no_grad()
def test_the_likelihood_approaches_the_exact_one():
    model, data = toy(1, 1), series(6, obs_dim=1)
    exact = kalman_filter(model, data).log_likelihood.sum()
    errors = []
    for num, bandwidth in ((20, 0.5), (160, 0.1)):
        fk, resampling = bootstrap(model, repeated(data, 30)), DiffusionResampling(bandwidth)
        total = particle_filter(fk, num, resampling=resampling, ess_threshold=1.0).total
        errors.append(float(((total - exact).exp() - 1).square().mean().sqrt()))
    assert errors[1] < 0.55 * errors[0] and errors[1] < 0.3, errors  # 0.35 where noise is all


def test_it_is_smooth_for_nuts():
    noise = FixedNoise(torch.randn(5, 30, 2, 1, dtype=D), torch.rand(5, 64, 2, dtype=D))
    assert ParticleMarginal(30, resampling=DiffusionResampling(), ess_threshold=1.0, noise=noise).for_nuts


def test_what_cannot_be_done_says_so():
    with pytest.raises(ValueError, match=r"`bandwidth` must be in \(0, 5\), got 0"):
        DiffusionResampling(0.0)
    with pytest.raises(ValueError, match="`num_steps` must be at least 2, got 1"):
        DiffusionResampling(num_steps=1)
    x, log_weights, uniforms = uneven(10, 65)
    with pytest.raises(ValueError, match="as many particles as state dimensions, got 10 for 65"):
        moved(x, log_weights, uniforms)
    with pytest.raises(TypeError, match=r"DiffusionResampling averages.*torch\.int64"):
        x, log_weights, uniforms = uneven(10)
        DiffusionResampling()(weighted(x, log_weights, index=torch.arange(10)), uniforms)
    model, data = toy(1, 1), series(4, obs_dim=1)
    options = {"resampling": DiffusionResampling(), "ess_threshold": 1.0}
    with pytest.raises(ValueError, match="twist"):
        particle_filter(auxiliary(model, data), 10, **options)
    with pytest.raises(ValueError, match="follows ancestors"):
        particle_filter(bootstrap(model, data), 10, collectors=[Genealogy()], **options)
