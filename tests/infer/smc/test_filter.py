"""One call for every kind of series: batch = loop, padding and missing entries add nothing, errors name their place."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ssm.components import Emission
from pyro_ssm.data import TimeSeries
from pyro_ssm.guides import Structured
from pyro_ssm.infer import (
    FeynmanKac,
    Marginal,
    auxiliary,
    bootstrap,
    conditional_smc,
    fit,
    guided,
    kalman_filter,
    locally_optimal,
    particle_filter,
    particle_smoother,
)
from pyro_ssm.infer.smc import FixedNoise, Genealogy, Moments, ParticleCollapseWarning, Resampled, Resampling
from pyro_ssm.models import StateSpaceModel, observation_law, vrnn
from pyro_ssm.ops.resampling import SCHEMES
from tests.contracts.toys import Decay, See, Start, normal, remembering, series, toy
from tests.infer.smc.programs import D, assert_unbiased, repeated

N = 30


def fixed(data, dim, scheme="systematic", seed=0, batch=None):
    generator = torch.Generator().manual_seed(seed)
    batch = data.batch_shape if batch is None else batch
    normals = torch.randn((data.num_times, N) + batch + (dim,), dtype=D, generator=generator)
    rows = SCHEMES[scheme].rows(N)
    return normals, torch.rand((data.num_times, rows) + batch, dtype=D, generator=generator)


def ragged(own=False):
    data = series(7, (3,), own=own, missing=True)
    return TimeSeries(data.times, data.values, mask=data.mask, lengths=torch.tensor([7, 4, 1]))


@pytest.mark.parametrize("scheme", ["systematic", "multinomial"])
@pytest.mark.parametrize("make", [toy, remembering])
@pytest.mark.parametrize("own", [False, True])
@torch.no_grad()
def test_batch_is_a_loop_with_the_same_noise(make, own, scheme):
    model, data = make(), ragged(own)
    normals, uniforms = fixed(data, 2, scheme)
    noise = FixedNoise(normals, uniforms)
    options = {"resampling": scheme, "ess_threshold": 0.7}
    together = particle_filter(bootstrap(model, data), N, noise=noise, collectors=[Moments()], **options)
    assert together.resampled.any() and not together.resampled[0].all()
    for i, length in enumerate((7, 4, 1)):
        one = data.series(i)
        alone = FixedNoise(normals[:length, :, i], uniforms[:length, :, i])
        found = particle_filter(bootstrap(model, one), N, noise=alone, collectors=[Moments()], **options)
        assert torch.allclose(together.log_likelihood[i, :length], found.log_likelihood, rtol=0, atol=1e-12)
        assert (together.log_likelihood[i, length:] == 0).all()
        assert torch.allclose(together.ess[i, :length], found.ess, rtol=1e-9)
        assert torch.equal(together.resampled[i, :length], found.resampled) and not together.resampled[i, length:].any()
        # a series that has ended keeps its last cloud
        state = together.cloud.particles.state[:, i]
        assert torch.allclose(state, found.cloud.particles.state, rtol=0, atol=1e-12)
        assert torch.allclose(together.cloud.log_weights[:, i], found.cloud.log_weights, rtol=0, atol=1e-10)
        mean = together.collected["moments"].mean[i]
        assert torch.allclose(mean[:length], found.collected["moments"].mean, rtol=0, atol=1e-12)
        assert torch.allclose(mean[length:], mean[length - 1].expand(7 - length, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("build", [bootstrap, locally_optimal])
@torch.no_grad()
def test_padding_changes_nothing(build):
    data, model = ragged(), toy()
    garbage = data.replace(values=torch.where(data.step_mask.unsqueeze(-1), data.values, 1e6), mask=data.mask)
    noise = FixedNoise(*fixed(data, 2))
    one, other = (particle_filter(build(model, d), N, noise=noise) for d in (data, garbage))
    assert torch.equal(one.log_likelihood, other.log_likelihood)


@torch.no_grad()
def test_an_unseen_step_adds_exactly_nothing():
    model, data = toy(dtype=torch.float32), series(5, (2,), dtype=torch.float32)
    hidden = torch.zeros(2, 5, 2, dtype=torch.bool)
    hidden[:, 1], hidden[0, 3], hidden[1, 2, 0] = True, True, True
    found = particle_filter(bootstrap(model, data.hide(hidden)), N, ess_threshold=1.0)
    unseen = hidden.all(-1)
    assert (found.log_likelihood[unseen] == 0).all() and (found.log_likelihood[~unseen] != 0).all()
    assert (
        found.ess[0, 3] == found.ess[0, 3].clamp(max=N * (1 + 1e-5)) and found.ess[0, 1] > 0.999 * N
    )  # just resampled


@torch.no_grad()
def test_nothing_seen_at_all_one_step_one_particle():
    model = toy()
    empty = series(4).hide(torch.ones(4, 2, dtype=torch.bool))
    found = particle_filter(bootstrap(model, empty), N)
    assert (found.log_likelihood == 0).all() and torch.allclose(found.ess, torch.full((4,), float(N), dtype=D))
    single = series(4).split(1)[0]
    many = repeated(single, 1000)
    exact = kalman_filter(model, single).log_likelihood.sum()
    assert_unbiased(particle_filter(bootstrap(model, many), 100).total, exact)
    lone = particle_filter(bootstrap(model, series(4)), 1)
    assert (lone.ess == 1).all() and not lone.resampled.any()
    always = particle_filter(bootstrap(model, series(4)), 1, ess_threshold=1.0, collectors=[Genealogy()])
    assert always.resampled[1:].all()
    path, bound = always.collected["genealogy"].paths()[0], model.bind()  # its estimate is the density of one path
    assert torch.allclose(always.total, observation_law(bound, series(4), path).log_prob(series(4).values), atol=1e-12)


@torch.no_grad()
def test_refined_grid():
    model, data = toy(1, 1), series(4, obs_dim=1).refine(3)
    exact = kalman_filter(model, data).log_likelihood
    found = particle_filter(bootstrap(model, repeated(data, 1000)), 50)
    assert found.log_likelihood.shape == (1000, 10)
    assert_unbiased(found.total, exact.sum())
    between = [k for k in range(10) if k % 3]
    assert (found.log_likelihood[:, between] == 0).all()


@torch.no_grad()
def test_sample_dims_of_parameters():
    model, data = toy(1, 1), series(5, (2,), obs_dim=1)
    rates = torch.tensor([[0.3], [0.6], [1.2]], dtype=D)
    bound = model.bind({"transition.rate": rates.unsqueeze(1)})
    normals, uniforms = fixed(data, 1, batch=torch.Size([3, 2]))
    together = particle_filter(bootstrap(bound, data), N, noise=FixedNoise(normals, uniforms))
    assert together.log_likelihood.shape == (3, 2, 5)
    for s in range(3):
        alone = model.bind({"transition.rate": rates[s]})
        found = particle_filter(bootstrap(alone, data), N, noise=FixedNoise(normals[:, :, s], uniforms[:, :, s]))
        assert torch.allclose(together.log_likelihood[s], found.log_likelihood, rtol=0, atol=1e-12)


@torch.no_grad()
def test_restart_goes_on_where_it_stopped():
    for model in (toy(), remembering()):
        data = series(6, (2,))
        normals, uniforms = fixed(data, 2)
        noise = FixedNoise(normals, uniforms)
        whole = particle_filter(bootstrap(model, data), N, noise=noise)
        cloud = particle_filter(bootstrap(model, data.split(3)[0]), N, noise=noise).cloud
        rest = particle_filter(bootstrap(model, data), start=cloud, noise=noise, collectors=[Moments()])
        assert torch.allclose(rest.log_likelihood, whole.log_likelihood[:, 3:], rtol=0, atol=1e-12)
        assert torch.allclose(rest.cloud.log_weights, whole.cloud.log_weights, rtol=0, atol=1e-10)
        assert rest.collected["moments"].mean.shape == (2, 3, 2)
        assert particle_filter(bootstrap(model, data), start=cloud, quasi_random=True).log_likelihood.shape == (2, 3)
    with pytest.raises(ValueError, match="none is left"):
        particle_filter(bootstrap(model, data), start=rest.cloud)
    with pytest.raises(ValueError, match="`num_particles` is 7"):
        particle_filter(bootstrap(model, data), 7, start=cloud)


def test_gradient_is_that_of_the_estimate_with_its_ancestors():
    model, data = toy(1, 1), series(5, obs_dim=1, missing=True)
    noise = FixedNoise(*fixed(data, 1))

    def total(rate):
        bound = model.bind({"transition.rate": rate})
        return particle_filter(bootstrap(bound, data), N, noise=noise, differentiable=True).total

    rate = torch.tensor([0.5], dtype=D, requires_grad=True)
    (found,) = torch.autograd.grad(total(rate), rate)
    step = 1e-6  # too short to change an ancestor
    wanted = (total(rate.detach() + step) - total(rate.detach() - step)) / (2 * step)
    assert torch.allclose(found, wanted.detach(), rtol=1e-5)
    assert not particle_filter(bootstrap(model.bind({"transition.rate": rate}), data), N).total.requires_grad


@torch.no_grad()
def test_a_guide_is_a_proposal():
    model, data = toy(1, 1, torch.float32), series(5, obs_dim=1, dtype=torch.float32)
    exact = kalman_filter(model, data).log_likelihood.sum()
    guide = Structured(model, hidden_dim=4, direction="past")
    guide.head.weight.data[1:] = 0  # an untrained network, as wide as the prior
    guide.head.bias.data[1:] = 1.0
    assert_unbiased(particle_filter(guided(model, guide, repeated(data, 2000)), 99).total, exact)
    with pytest.warns(UserWarning, match="reads future data"):
        particle_filter(guided(model, Structured(model, hidden_dim=4), data), N)
    particle_filter(guided(model, Structured(model, hidden_dim=4), data), N, ess_threshold=0)  # silent
    with pytest.raises(TypeError, match="guides.Guide"):
        guided(model, "past", data)


def test_a_trained_guide_proposes_better_than_the_prior():
    model = toy(1, 1, torch.float32).requires_grad_(False)
    model.emission.log_scale.fill_(-2.0)
    times = torch.arange(6.0)
    with torch.no_grad():
        _, y = model(TimeSeries(times.expand(64, 6)))
    guide = Structured(model, hidden_dim=16, direction="past")
    fit(model, guide, TimeSeries(times, y), num_steps=300, lr=0.02, progress=False)
    one = TimeSeries(times, y[0])
    with torch.no_grad():
        exact, many = kalman_filter(model, one).log_likelihood.sum(), repeated(one, 400)
        learned = particle_filter(guided(model, guide, many), 60).total
        blind = particle_filter(bootstrap(model, many), 60).total
    assert_unbiased(learned, exact)
    assert (learned - exact).std() < 0.5 * (blind - exact).std()


@torch.no_grad()
def test_a_recurrent_model_and_its_guide():
    model = vrnn(2, 3, hidden_dim=5)
    data = ragged()
    data = TimeSeries(data.times, torch.randn(3, 7, 3), lengths=data.lengths)
    guide = Structured(model, 6, direction="past", structured=False)
    for fk in (bootstrap(model, data), guided(model, guide, data)):
        found = particle_filter(fk, 20, ess_threshold=1.0, collectors=[Genealogy()])
        assert (found.log_likelihood[1, 4:] == 0).all() and (found.log_likelihood[0] != 0).all()
        # the carry belongs to the path: run the memory again along the ancestral paths of the longest series
        paths, one = found.collected["genealogy"].paths()[:, 0], data.series(0)
        carry, summary = model.memory.start((20,))
        for k in range(7):
            gap = torch.ones(1, 1) if k == 0 else (one.times[k] - one.times[k - 1]).float().reshape(1, 1)
            carry, summary = model.memory.see_state(carry, paths[:, k : k + 1], gap, None)
            if k < 6:
                carry, summary = model.memory.see_observation(carry, one.values[k : k + 1], one.mask[k : k + 1])
        assert torch.allclose(summary, found.cloud.particles.summary[:, 0], atol=1e-5)


#: all that runs a particle filter
EVERY = {
    "bootstrap": lambda model, data: particle_filter(bootstrap(model, data), 60),
    "auxiliary": lambda model, data: particle_filter(auxiliary(model, data), 60),
    "locally optimal": lambda model, data: particle_filter(locally_optimal(model, data), 60),
    "smoother": lambda model, data: particle_smoother(bootstrap(model, data), 60, method="backward"),
    "conditional": lambda model, data: conditional_smc(bootstrap(model, data), torch.zeros(2, 6, 1, dtype=D), 60),
    "from a cloud": lambda model, data: particle_filter(
        bootstrap(model, data), start=particle_filter(bootstrap(model, data.split(2)[0]), 60).cloud
    ),
}


class TestErrors:
    @torch.no_grad()
    @pytest.mark.parametrize("how", EVERY)
    def test_every_weight_zero(self, how):
        class Box(Emission):
            state_dim, obs_dim = 1, 1

            def forward(self, state, time, inputs, memory=None):
                half = torch.full_like(state, 0.5)
                return dist.Uniform(state - half, state + half, validate_args=False).to_event(1)

        plain = toy(1, 1)
        model = plain if how == "locally optimal" else StateSpaceModel(plain.initial, plain.transition, Box())
        values = torch.zeros(2, 6, 1, dtype=D)
        values[1, 4] = 1e200
        data = TimeSeries(torch.arange(6.0), values, coords={"series": ["a", "b"]})
        with pytest.raises(ValueError, match=r"step 4 \(time 4\) of series 1 \('b'\): no particle can explain"):
            EVERY[how](model, data)

    @torch.no_grad()
    @pytest.mark.parametrize("batch", [(), (3,)])
    @pytest.mark.parametrize("scheme", sorted(SCHEMES))
    def test_nan_of_a_law(self, scheme, batch):
        class Breaks(Decay):
            def forward(self, state, time, next_time, inputs, memory=None):
                law = super().forward(state, time, next_time, inputs, memory)
                broken = torch.log(torch.where(next_time.unsqueeze(-1) > 2.5, -1.0, 1.0))  # NaN later on
                return normal(law.base_dist.loc + broken, law.base_dist.scale)

        model = StateSpaceModel(Start(1), Breaks(1), See(1, 1)).to(D)
        data = TimeSeries(torch.arange(6.0), torch.zeros(batch + (6, 1), dtype=D))
        with pytest.raises(ValueError, match=r"step 3 \(time 3\) of .*series.*: a weight is NaN"):
            particle_filter(bootstrap(model, data), 20, resampling=scheme, ess_threshold=1.0)
        unseen = data.hide(torch.arange(6).reshape(6, 1) > 2)
        with pytest.raises(ValueError, match="a particle is NaN"):
            particle_filter(bootstrap(model, unseen), 20)

    @torch.no_grad()
    def test_collapse_says_what_to_change(self):
        model, data = toy(1, 1), series(5, obs_dim=1)
        model.emission.log_scale = nn.Parameter(torch.tensor([-9.0], dtype=D))
        with pytest.warns(ParticleCollapseWarning, match=r"step \d \(time .*\) of the series.*locally_optimal"):
            particle_filter(bootstrap(model, data), 200)
        particle_filter(locally_optimal(model, data), 200)  # does not collapse

    def test_arguments(self):
        model, data = toy(), series(4)
        fk = bootstrap(model, data)
        for options, words in (
            ({"num_particles": 0}, "at least 1"),
            ({"num_particles": None}, "at least 1"),
            ({"num_particles": 5, "ess_threshold": 1.5}, r"\[0, 1\]"),
            ({"num_particles": 5, "resampling": "best"}, "systematic"),
            ({"num_particles": 5, "quasi_random": True, "resampling": "ssp"}, "leave"),
            ({"num_particles": 5, "collectors": [Moments(), Moments()]}, "another `name`"),
            ({"num_particles": 5, "noise": FixedNoise(torch.zeros(4, 5, 3), torch.zeros(4, 1))}, "step 0 needs"),
        ):
            with pytest.raises(ValueError, match=words):
                particle_filter(fk, **options)
        with pytest.raises(TypeError, match="a name or a Resampling"):
            particle_filter(fk, 5, resampling=3)
        with pytest.raises(ValueError, match="no values"):
            bootstrap(model, data.without_values())
        with pytest.raises(ValueError, match="1 columns"):
            bootstrap(model, series(4, obs_dim=1))
        with pytest.raises(TypeError, match="AffineGaussian"):
            locally_optimal(vrnn(2, 2), data)
        with pytest.raises(TypeError, match="memory"):
            locally_optimal(remembering(), data)
        with pytest.raises(ValueError, match=r"`active` must be bool of shape \(4,\)"):
            FeynmanKac(fk.initial, fk.propagate, fk.log_potential, 4, active=torch.ones(3, dtype=torch.bool))


@torch.no_grad()
def test_a_resampling_of_ones_own():
    """Soft resampling: choose by a mixture with equal weights, and correct for it."""

    class Soft(Resampling):
        def rows(self, num_particles):
            return 1

        def __call__(self, weighted, uniforms):
            from pyro_ssm.infer.smc.tree import take

            chosen_by = 0.5 * weighted.weights + 0.5 / len(weighted.weights)
            ancestors = SCHEMES["systematic"].ancestors(chosen_by, uniforms)
            batch = weighted.weights.shape[1:]
            ratio = take(weighted.weights / chosen_by, ancestors, batch)
            return Resampled(take(weighted.particles, ancestors, batch), (ratio / len(ratio)).log(), ancestors)

    model, data = toy(), series(5)
    exact = kalman_filter(model, data).log_likelihood.sum()
    found = particle_filter(bootstrap(model, repeated(data, 1000)), 80, resampling=Soft(), ess_threshold=1.0)
    assert_unbiased(found.total, exact)


@torch.no_grad()
def test_a_million_float32_particles():
    model, data = toy(1, 1, torch.float32), series(3, obs_dim=1, dtype=torch.float32)
    found = particle_filter(bootstrap(model, data), 10**6, ess_threshold=1.0)
    exact = kalman_filter(toy(1, 1), series(3, obs_dim=1)).log_likelihood
    variance = (1 / found.ess.double() - 1e-6).cumsum(-1)  # of the logarithm, by the weights until now
    assert ((found.log_likelihood - exact).abs() < 5 * variance.sqrt()).all()
    assert (variance < 5e-6).all()
    assert abs(float(found.cloud.weights.double().sum()) - 1) < 1e-5


@torch.no_grad()
def test_marginal_takes_a_particle_filter():
    model, data = toy(1, 1), series(5, obs_dim=1)
    program = Marginal(model, filter=lambda m, d: particle_filter(bootstrap(m, d), 50))
    import pyro

    torch.manual_seed(1)
    trace = pyro.poutine.trace(program).get_trace(data)
    trace.compute_log_prob()
    torch.manual_seed(1)
    assert trace.nodes["y"]["log_prob"] == particle_filter(bootstrap(model, data), 50).total


@torch.no_grad()
def test_memory_does_not_grow_with_time():
    """Without collectors that keep paths, no cloud outlives the step after its own."""
    import weakref

    alive = []

    def initial(draw, shape):
        return remember(torch.randn(shape))

    def remember(x):
        alive.append(weakref.ref(x))
        return x

    most = [0]

    def propagate(k, x, draw):
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        return remember(x + torch.randn_like(x))

    fk = FeynmanKac(initial, propagate, lambda k, previous, x: -x.square(), 30)
    particle_filter(fk, 50, collectors=[Moments(lambda x: x.unsqueeze(-1))])
    assert most[0] <= 3
