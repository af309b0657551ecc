"""What each gradient through resampling is unbiased for; the judge is the exact score of a linear-Gaussian model."""

import math

import pytest
import torch

from pyro_ssm.infer import auxiliary, bootstrap, guided, kalman_filter, locally_optimal, particle_filter
from pyro_ssm.infer.smc import (
    DiffusionResampling,
    FixedNoise,
    Genealogy,
    SoftResampling,
    StopGradientResampling,
    TransportResampling,
    Weighted,
    fisher_score,
)
from pyro_ssm.models import StateSpaceModel, vrnn
from tests.contracts.toys import posterior, remembering, series, toy
from tests.infer.smc.programs import D, Walk, assert_unbiased, repeated

NAMES = ("transition.rate", "emission.log_scale")


def setting(num_times=5):
    """A model, one series, its exact log-likelihood, and the score of two parameters."""
    model, data = toy(1, 1), series(num_times, obs_dim=1, missing=True)
    values = [torch.tensor([0.4], dtype=D, requires_grad=True), torch.tensor([-0.7], dtype=D, requires_grad=True)]
    exact = kalman_filter(model.bind(dict(zip(NAMES, values, strict=True))), data).log_likelihood.sum()
    score = torch.stack(torch.autograd.grad(exact, values)).squeeze(-1)
    return model, data, [value.detach() for value in values], exact.detach(), score


def gradients(model, data, values, runs, num_particles, build=bootstrap, **options):
    """log Z and its gradient ``(runs, 2)`` in independent repetitions, each with parameters of its own."""
    own = [value.expand(runs, 1).clone().requires_grad_() for value in values]
    bound = model.bind(dict(zip(NAMES, own, strict=True)))
    fk = build(bound, repeated(data, runs))
    total = particle_filter(fk, num_particles, differentiable=True, **options).total
    return total.detach(), torch.cat(torch.autograd.grad(total.sum(), own), -1)


def deviations(sample, wanted):
    """How many standard errors the mean of ``(runs, ...)`` is away."""
    return ((sample.mean(0) - wanted) / (sample.std(0) / math.sqrt(len(sample)))).abs()


@pytest.mark.parametrize("threshold", [1.0, 0.7])
@pytest.mark.parametrize("build", [bootstrap, locally_optimal, auxiliary])
def test_stop_gradient_is_unbiased_for_the_gradient_of_the_likelihood(build, threshold):
    model, data, values, exact, score = setting()
    options = {"ess_threshold": threshold, "build": build}
    total, slope = gradients(model, data, values, 4000, 10, resampling=StopGradientResampling(), **options)
    weighted = (total - exact).exp().unsqueeze(-1) * slope  # the gradient of Z-hat / Z
    assert (weighted.std(0) / math.sqrt(4000) < 0.12).all(), "too variable to show anything"
    assert (deviations(weighted, score) < 4).all()


def test_without_the_stop_gradient_the_gradient_is_biased():
    """The same check has the power to find what the plain choice leaves out."""
    model, data, values, exact, score = setting()
    total, slope = gradients(model, data, values, 4000, 10, resampling="systematic", ess_threshold=1.0)
    assert (deviations((total - exact).exp().unsqueeze(-1) * slope, score) > 8).any()


def test_stop_gradient_leaves_every_number_alone():
    model, data = toy(), series(6, (3,), missing=True)
    found = []
    for resampling in ("ssp", StopGradientResampling("ssp")):
        torch.manual_seed(0)
        found.append(particle_filter(bootstrap(model, data), 20, resampling=resampling, ess_threshold=0.7))
    assert torch.equal(found[0].log_likelihood, found[1].log_likelihood)
    assert found[0].resampled.any() and not found[0].resampled[:, 1:].all()


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8])
def test_soft_resampling_is_unbiased(alpha):
    model, data = toy(1, 1), series(4, obs_dim=1)
    exact = kalman_filter(model, data).log_likelihood.sum()
    fk = bootstrap(model, repeated(data, 1000))
    assert_unbiased(particle_filter(fk, 80, resampling=SoftResampling(alpha), ess_threshold=1.0).total, exact)


def test_soft_resampling_at_one_is_plain():
    model, data = toy(), series(6, (3,), missing=True)
    found = []
    for resampling in ("systematic", SoftResampling(1.0), SoftResampling(1.0 - 1e-12)):
        torch.manual_seed(0)
        total = particle_filter(
            bootstrap(model, data), 20, resampling=resampling, ess_threshold=0.7, differentiable=True
        ).total
        found.append((total, torch.autograd.grad(total.sum(), list(model.parameters()))))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][0], found[2][0], rtol=0, atol=1e-9)
    torch.testing.assert_close(found[0][1], found[2][1], rtol=0, atol=1e-7)


def test_soft_resampling_at_zero_keeps_the_whole_score():
    """The choice then depends on no parameter: the gradient of the likelihood is unbiased."""
    model, data, values, exact, score = setting(3)
    total, slope = gradients(model, data, values, 4000, 10, resampling=SoftResampling(0.0), ess_threshold=1.0)
    assert (deviations((total - exact).exp().unsqueeze(-1) * slope, score) < 4).all()


# ------------------------------------------------------------------------------------------------- transport


def cloud(batch=(), num=12, dtype=D):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((num,) + batch + (2,), dtype=D, generator=generator).to(dtype)
    log_weights = torch.randn((num,) + batch, dtype=D, generator=generator).log_softmax(0).to(dtype)
    return Weighted({"x": x, "carry": (x[..., :1].square(), None)}, lambda: x, log_weights, log_weights.exp(), None)


@pytest.mark.parametrize("tolerance", [1e-8, 0.5])
@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("batch", [(), (3, 2)])
def test_transport_keeps_every_weighted_mean(batch, dtype, tolerance):
    weighted = cloud(batch, dtype=dtype)
    moved = TransportResampling(tolerance=tolerance)(weighted, torch.empty(0))
    assert moved.ancestors is None and moved.log_weights.dtype == dtype
    rounding = 1e-12 if dtype == D else 2e-6
    for before, after in (
        (weighted.particles["x"], moved.particles["x"]),
        (weighted.particles["carry"][0], moved.particles["carry"][0]),
    ):
        wanted = (weighted.weights.unsqueeze(-1) * before).sum(0)
        found = (moved.log_weights.exp().unsqueeze(-1) * after).sum(0)
        torch.testing.assert_close(found, wanted, rtol=0, atol=rounding)
    torch.testing.assert_close(moved.log_weights.exp().sum(0), torch.ones(batch, dtype=dtype))
    assert (12 * moved.log_weights.exp() - 1).abs().max() < tolerance + (1e-10 if dtype == D else 1e-5)


def test_transport_with_little_regularisation_is_the_optimal_matching_in_one_dimension():
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=D)
    log_weights = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=D).log()
    moved = TransportResampling(0.01, 1e-8, 100_000)(
        Weighted(x, lambda: x, log_weights, log_weights.exp(), None), torch.empty(0)
    )
    assert torch.allclose(moved.particles[:, 0], torch.tensor([0.0, 0.0, 2.0, 3.0], dtype=D), atol=1e-6)


def fixed(data, num_particles, dim, rows=0):
    generator = torch.Generator().manual_seed(5)
    shape = (data.num_times, num_particles) + data.batch_shape + (dim,)
    normals = torch.randn(shape, dtype=D, generator=generator)
    uniforms = torch.rand((data.num_times, rows) + data.batch_shape, dtype=D, generator=generator)
    return FixedNoise(normals, uniforms if rows else None)


SMOOTH = {
    "transport": TransportResampling(tolerance=1e-12, max_iterations=10_000),
    "diffusion": DiffusionResampling(bandwidth=1.0),  # a narrower one bends too much for the differences
}


@pytest.mark.parametrize("threshold", [1.0, 0.9])
@pytest.mark.parametrize("case", ["Markov", "memory", "recurrent"])
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_gradient_is_the_finite_difference_with_fixed_noise(name, case, threshold):
    torch.manual_seed(1)
    model = {"Markov": toy, "memory": remembering, "recurrent": lambda: vrnn(2, 2, hidden_dim=3).double()}[case]()
    plain = series(6, (3,), missing=True)
    data = plain.replace(values=plain.values, mask=plain.mask, lengths=torch.tensor([6, 4, 1]))
    resampling = SMOOTH[name]
    noise = fixed(data, 9, 2, resampling.rows(9))

    def total():
        fk = bootstrap(model, data)
        options = {"resampling": resampling, "ess_threshold": threshold, "noise": noise}
        found = particle_filter(fk, 9, differentiable=True, **options)
        assert found.resampled.any() and (threshold == 1 or not found.resampled[:, 1:].all())
        return found.total.sum()

    parameters = list(model.parameters())
    gradient = torch.autograd.grad(total(), parameters, allow_unused=True)
    direction = [torch.randn_like(p) for p in parameters]
    wanted = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True) if g is not None)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * 1e-5)
            ends.append(total())
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(d, alpha=sign * 1e-5)
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, wanted.detach(), rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_transport_likelihood_approaches_the_exact_one():
    model, data = toy(1, 1), series(6, obs_dim=1)
    exact = kalman_filter(model, data).log_likelihood.sum()
    gaps = []
    for num, epsilon in ((20, 1.0), (80, 0.3)):
        fk = bootstrap(model, repeated(data, 40))
        total = particle_filter(fk, num, resampling=TransportResampling(epsilon), ess_threshold=1.0).total
        gaps.append((total - exact).exp() - 1)
    error = [float(gap.square().mean().sqrt()) for gap in gaps]
    assert error[1] < 0.7 * error[0]
    assert abs(float(gaps[1].mean())) < 0.02 + 4 * float(gaps[1].std()) / 40**0.5


@torch.no_grad()
def test_transport_refuses_what_it_cannot_average():
    model, data = toy(1, 1), series(4, obs_dim=1)
    options = {"resampling": TransportResampling(), "ess_threshold": 1.0}
    with pytest.raises(ValueError, match="twist"):
        particle_filter(auxiliary(model, data), 10, **options)
    with pytest.raises(ValueError, match="follows ancestors"):
        particle_filter(bootstrap(model, data), 10, collectors=[Genealogy()], **options)
    weighted = cloud()
    with pytest.raises(TypeError, match=r"torch\.int64.*by ancestors"):
        TransportResampling()(weighted._replace(particles=(torch.arange(12),)), torch.empty(0))
    with pytest.raises(ValueError, match="`regularisation` must be greater than 0"):
        TransportResampling(0.0)
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\]"):
        SoftResampling(1.5)
    with pytest.raises(ValueError, match="needs `uniforms`"):
        particle_filter(bootstrap(model, data), 10, noise=fixed(data, 10, 1), ess_threshold=1.0)


# ---------------------------------------------------------------------------------------------- Fisher's identity


def scores(model, data, values, runs, num_particles, **options):
    own = [value.expand(runs, 1).clone().requires_grad_() for value in values]
    bound = model.bind(dict(zip(NAMES, own, strict=True)))
    found = fisher_score(bound, repeated(data, runs), num_particles, **options)
    return found, torch.cat(torch.autograd.grad(found.log_likelihood.sum(), own), -1)


@pytest.mark.parametrize(
    "method, build, num, within",
    [
        ("backward", bootstrap, 200, 0.06),
        ("backward", locally_optimal, 200, 0.04),
        ("path", bootstrap, 2000, 0.05),
        ("path", locally_optimal, 2000, 0.03),
    ],
)
def test_fisher_score_is_the_exact_score(method, build, num, within):
    model, data, values, exact, score = setting()
    found, slope = scores(model, data, values, 100, num, method=method, build=build)
    assert torch.equal(found.log_likelihood, found.filtered.total)
    error = slope.std(0) / 10
    assert (error < within).all()
    assert ((slope.mean(0) - score).abs() < 4 * error + 0.02).all()  # and a bias of the order of 1 / N


def test_backward_weights_take_variance_from_a_long_series():
    model, data, values, *_ = setting(60)
    spread = {method: scores(model, data, values, 40, 60, method=method)[1].std(0) for method in ("backward", "path")}
    assert (spread["backward"] < 0.9 * spread["path"]).all() and spread["backward"][0] < 0.5 * spread["path"][0]


def test_fisher_score_without_resampling_is_the_gradient_of_importance_sampling():
    """With one series never resampled both methods of a proposal without parameters weigh whole paths."""
    model, data = toy(), series(3, missing=True)

    def propose(state, k, memory):
        return torch.distributions.Independent(
            torch.distributions.Normal(torch.zeros(1, 2, dtype=D), 1.5), 1, validate_args=False
        )

    def build(bound, data):
        return guided(bound, propose, data)

    torch.manual_seed(0)
    total = particle_filter(build(model, data), 50, ess_threshold=0, differentiable=True).total
    wanted = torch.autograd.grad(total, list(model.parameters()))
    torch.manual_seed(0)
    found = fisher_score(model, data, 50, method="path", build=build, ess_threshold=0)
    # the same numbers; one run keeps its graph, the other may take compiled operators, which round differently
    torch.testing.assert_close(found.log_likelihood, total, rtol=1e-13, atol=1e-13)
    mine = torch.autograd.grad(found.log_likelihood, list(model.parameters()))
    torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ["backward", "path"])
def test_fisher_score_of_a_ragged_batch_is_that_of_its_series(method):
    model = toy()
    plain = series(5, (3,), missing=True)
    data = plain.replace(values=plain.values, mask=plain.mask, lengths=torch.tensor([5, 3, 1]))
    generator = torch.Generator().manual_seed(5)
    normals = torch.randn(5, 20, 3, 2, dtype=D, generator=generator)
    uniforms = torch.rand(5, 1, 3, dtype=D, generator=generator)
    options = {"method": method, "ess_threshold": 1.0}
    together = fisher_score(model, data, 20, noise=FixedNoise(normals, uniforms), **options).log_likelihood
    for i, length in enumerate((5, 3, 1)):
        noise = FixedNoise(normals[:length, :, i], uniforms[:length, :, i])
        alone = fisher_score(model, data.series(i), 20, noise=noise, **options).log_likelihood
        torch.testing.assert_close(together[i], alone)
        mine, wanted = (
            torch.autograd.grad(total, list(model.parameters()), retain_graph=True, materialize_grads=True)
            for total in (together[i], alone)
        )
        torch.testing.assert_close(mine, wanted)


def test_fisher_score_with_memory_goes_along_paths():
    model, data = remembering(1, 1), series(4, obs_dim=1, missing=False)
    with pytest.raises(ValueError, match="method='path'"):
        fisher_score(model, data, 10)
    value = model.transition.rate.detach().clone()

    def exact(rate):
        with torch.no_grad():
            model.transition.rate.copy_(rate)
        return posterior(model, data)[1]

    wanted = (exact(value + 1e-5) - exact(value - 1e-5)) / 2e-5
    exact(value)
    own = value.expand(200, 1).clone().requires_grad_()
    bound = model.bind({"transition.rate": own})
    total = fisher_score(bound, repeated(data, 200), 200, method="path").log_likelihood
    (slope,) = torch.autograd.grad(total.sum(), own)
    assert abs(float(slope.mean() - wanted)) < 4 * float(slope.std()) / math.sqrt(200) + 0.01


def test_fisher_score_refuses_what_it_cannot_do():
    model, data = toy(1, 1), series(4, obs_dim=1)
    with pytest.raises(ValueError, match="`method` must be one of"):
        fisher_score(model, data, 10, method="forward")
    drawn = StateSpaceModel(model.initial, Walk(model.transition), model.emission)
    with pytest.raises(TypeError, match="SampleOnly"):
        fisher_score(drawn, data, 10)
