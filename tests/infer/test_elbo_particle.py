"""ParticleELBO against Trace_ELBO, IWAE, exact likelihoods and finite differences."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroSample
from torch import nn

from benchmarks.datasets import polyphonic
from pyro_ssm.emissions import Bernoulli
from pyro_ssm.guides import GaussianMarkov, Guide, Structured
from pyro_ssm.infer import (
    IWAE,
    ParticleELBO,
    evidence_lower_bound,
    fit,
    guided,
    kalman_filter,
    kl_annealing,
    linear_annealing,
    local_parameters,
    particle_filter,
)
from pyro_ssm.infer.smc import ChoiceLogProb, FixedNoise, SoftResampling, TransportResampling
from pyro_ssm.models import srnn, vrnn
from tests.contracts.toys import normal, remembering, series, toy
from tests.infer.smc.programs import repeated

D = torch.float64


def random_rate(model):
    del model.transition.rate
    model.transition.rate = PyroSample(dist.LogNormal(torch.zeros(2, dtype=D), 0.3).to_event(1))
    return model


def ragged(num_times=6):
    data = series(num_times, (3,), missing=True)
    return data.replace(values=data.values, mask=data.mask, lengths=torch.tensor([num_times, 4, 1]))


CASES = {
    "Markov": lambda: (toy(), ragged()),
    "random parameters": lambda: (random_rate(toy()), ragged()),
    "mini-batch": lambda: (random_rate(toy()), ragged().minibatch(torch.tensor([2, 0]))),
    "memory": lambda: (remembering(), ragged()),
    "recurrent": lambda: (vrnn(2, 2, hidden_dim=4).double(), ragged()),
    "recurrent, mini-batch": lambda: (vrnn(2, 2, hidden_dim=4).double(), ragged().minibatch(torch.tensor([1, 2]))),
    "Markov and recurrent": lambda: (srnn(2, 2, hidden_dim=4).double(), ragged()),
    "refined": lambda: (toy(), series(4, (2,), missing=True).refine(2)),
    "one series": lambda: (toy(), series(5, missing=True)),
}


def noise_of(data, num_particles, dim=2):
    generator = torch.Generator().manual_seed(4)
    shape = (num_particles,) * (num_particles > 1) + data.batch_shape + (data.num_times, dim)
    return torch.randn(shape, dtype=D, generator=generator)


@pytest.fixture
def given_noise(monkeypatch):
    """Let the guide's path draw the given numbers, whether a step or a whole path at a time."""

    def give(noise):
        steps, plain = list(noise.split(1, -2)), torch.randn

        def randn(shape, **options):
            if tuple(shape) == tuple(noise.shape):
                return noise
            if tuple(shape) == tuple(steps[0].shape):
                return steps.pop(0)
            return plain(shape, **options)  # a look at the program's plates

        monkeypatch.setattr(torch, "randn", randn)

    return give


def value_and_gradient(loss, model, guide, data):
    torch.manual_seed(0)  # of the random parameters
    with local_parameters():
        value = loss(model, guide)(data)
    parameters = [*model.parameters(), *guide.parameters()]
    return value.detach(), torch.autograd.grad(value, parameters, materialize_grads=True, allow_unused=True)


@pytest.mark.parametrize("num_particles", [1, 5])
@pytest.mark.parametrize("case", CASES)
def test_without_resampling_it_is_the_importance_weighted_bound(case, num_particles, given_noise):
    """One particle: the evidence lower bound, whatever the threshold. The same noise, the same number and gradient."""
    model, data = CASES[case]()
    guide = Structured(model, 5, direction="past").double()
    with local_parameters():
        guide(data)  # sets the posterior of the parameters up
    noise = noise_of(data, num_particles)
    over = noise if num_particles > 1 else noise.unsqueeze(0)
    same = FixedNoise(over.movedim(-2, 0), torch.full((data.num_times, 1) + data.batch_shape, 0.5))
    threshold = 0.0 if num_particles > 1 else 1.0
    value, gradient = value_and_gradient(
        ParticleELBO(num_particles, ess_threshold=threshold, noise=same), model, guide, data
    )
    given_noise(noise)
    loss = Trace_ELBO() if num_particles == 1 else IWAE(num_particles)
    wanted, wanted_gradient = value_and_gradient(loss, model, guide, data)
    torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-7, atol=1e-9)
    assert any((g != 0).any() for g in gradient)


@pytest.mark.parametrize("gradient", ["pathwise", "score", "stop"])
@pytest.mark.parametrize("case", ["random parameters", "mini-batch", "memory", "recurrent", "Markov and recurrent"])
def test_value_is_that_of_the_filter_and_series_are_summed(case, gradient):
    model, data = CASES[case]()
    guide = Structured(model, 5, direction="past").double()
    loss = ParticleELBO(6, gradient=gradient, ess_threshold=1.0)
    guide(data)  # sets the posterior of the parameters up
    torch.manual_seed(1)
    value = loss.loss(model, guide, data)
    torch.manual_seed(1)
    with torch.no_grad():
        values = guide.parameters_given(data)
    scheme = "multinomial" if gradient == "score" else "systematic"
    found = particle_filter(guided(model.bind(values), guide, data), 6, resampling=scheme, ess_threshold=1.0)
    wanted = found.total.sum() * (1.0 if data.index is None else data.total / len(data.index))
    if values:
        prior = dist.LogNormal(torch.zeros(2, dtype=D), 0.3).to_event(1)
        rate, of = values["transition.rate"], guide.parameter_guide
        q = dist.LogNormal(of.locs.transition.rate, of.scales.transition.rate).to_event(1)
        wanted = wanted + prior.log_prob(rate) - q.log_prob(rate)
    assert value == pytest.approx(-float(wanted.detach()), abs=1e-9)
    torch.manual_seed(1)
    differentiable = loss.differentiable_loss(model, guide, data)
    assert differentiable.item() == pytest.approx(value, abs=1e-9)
    if gradient != "pathwise":
        return  # the others add terms for the choices: judged below
    parameters = [*model.parameters(), *guide.parameters()]
    slope = torch.autograd.grad(differentiable, parameters, materialize_grads=True, allow_unused=True)
    start = nn.utils.parameters_to_vector(parameters).detach()
    direction = torch.randn_like(start)

    def moved(step):
        nn.utils.vector_to_parameters(start + step * direction, parameters)
        torch.manual_seed(1)
        return loss.loss(model, guide, data)

    along = float(torch.cat([g.flatten() for g in slope]) @ direction)
    assert along == pytest.approx((moved(1e-6) - moved(-1e-6)) / 2e-6, rel=1e-4)  # too short to change an ancestor


def test_a_minibatch_stands_for_all_series():
    model, data = toy(), ragged()
    guide = Structured(model, 5, direction="past").double()
    noise = torch.randn(6, 4, 3, 2, dtype=D)
    uniforms = torch.rand(6, 1, 3, dtype=D)
    parts = []
    for index in ([0], [1], [2]):
        part = data.minibatch(torch.tensor(index))
        fixed = FixedNoise(noise[:, :, index], uniforms[..., index])
        parts.append(ParticleELBO(4, noise=fixed).loss(model, guide, part))
    whole = ParticleELBO(4, noise=FixedNoise(noise, uniforms)).loss(model, guide, data)
    assert sum(parts) / 3 == pytest.approx(whole, abs=1e-9)


# -------------------------------------------------------------------------------------------------- gradients


class Linear(Guide):
    """q(z_k | z_{k-1}, y_k) = N(a z_{k-1} + b y_k, s^2), constants of each series if they are given so."""

    looks_ahead = False

    def __init__(self, model, gain):
        super().__init__(model)
        self.gain = nn.Parameter(gain) if isinstance(gain, torch.Tensor) and gain.dim() == 0 else gain

    def encode(self, data, model):
        return data.values

    def step(self, state, k, context, memory=None):
        before = 0.0 if state is None else 0.3 * state
        return normal(before + self.gain * context[..., k, :], torch.ones(1, dtype=D))


def bound_and_slope(data, gain, runs, **options):
    """log Z-hat and its derivative with respect to the guide's gain, in repetitions, each with a gain of its own."""
    model = toy(1, 1)
    own = torch.full((runs, 1, 1), gain, dtype=D, requires_grad=True)
    guide = Linear(model, own)
    loss = ParticleELBO(4, **options)
    total = loss._log_likelihood(model.bind(), guide, repeated(data, runs))
    (slope,) = torch.autograd.grad(total.sum(), own)
    return total.detach(), slope.flatten()


def test_the_score_gradient_is_that_of_the_bound():
    """Unbiased where every step resamples; without the score term it is not. The judge: differences of the bound."""
    data, runs = series(4, obs_dim=1, seed=3), 80_000
    options = {"resampling": "multinomial", "ess_threshold": 1.0}
    ends = []
    for gain in (-0.6, -0.2):
        torch.manual_seed(0)  # common random numbers
        ends.append(bound_and_slope(data, gain, runs, **options)[0])
    difference = (ends[1] - ends[0]) / 0.4
    wanted, error = float(difference.mean()), float(difference.std()) / runs**0.5
    found = {}
    for gradient in ("pathwise", "score"):
        # Simpson's rule over gains: the mean slope between the ends, up to the fourth derivative
        slopes = [bound_and_slope(data, g, runs, gradient=gradient, **options)[1] for g in (-0.6, -0.4, -0.2)]
        mean = sum(w * float(s.mean()) for w, s in zip((1, 4, 1), slopes, strict=True)) / 6
        spread = sum((w / 6) ** 2 * float(s.var()) / runs for w, s in zip((1, 4, 1), slopes, strict=True)) ** 0.5
        found[gradient] = (mean - wanted) / math.hypot(spread, error)
        assert spread < 0.06, "too variable to show anything"
    assert abs(found["score"]) < 4
    assert abs(found["pathwise"]) > 8


def test_the_stop_gradient_teaches_a_guide_nothing():
    """Weighted by Z-hat its mean is the gradient of the evidence, which does not depend on the guide."""
    data, runs = series(4, obs_dim=1, seed=3), 20_000
    exact = kalman_filter(toy(1, 1), data).log_likelihood.sum().detach()
    total, slope = bound_and_slope(data, 0.2, runs, gradient="stop", ess_threshold=1.0)
    weighted = (total - exact).exp() * slope
    assert abs(float(weighted.mean())) < 4 * float(weighted.std()) / runs**0.5
    plain, pathwise = bound_and_slope(data, 0.2, runs, gradient="pathwise", ess_threshold=1.0)
    assert abs(float(pathwise.mean())) > 8 * float(pathwise.std()) / runs**0.5


def test_choices_are_weighed_as_they_were_drawn():
    model, data = toy(), ragged()
    guide = Structured(model, 5, direction="past").double()

    def twist(k, state):
        return torch.where(data.step_mask[:, k + 1], -state.square().sum(-1), torch.zeros((), dtype=D))

    for threshold in (0.8, 1.0):
        fk = guided(model, guide, data, twist=twist)
        clouds = []

        class Keep(ChoiceLogProb):
            def collect(self, step, clouds=clouds):
                super().collect(step)
                clouds.append(step)

        found = particle_filter(fk, 7, resampling="multinomial", ess_threshold=threshold, collectors=[Keep()])
        choices = found.collected["choices"]
        for k, step in enumerate(clouds):
            for b in range(3):
                if not found.resampled[b, k]:
                    assert choices[b, k] == 0
                    continue
                weights = (
                    step.previous.weights[:, b]
                    * twist(k - 1, step.previous.particles.state[:, b, 0].unsqueeze(1))[:, b].exp()
                )
                wanted = (weights / weights.sum())[step.ancestors[:, b]].log().sum()
                torch.testing.assert_close(choices[b, k], wanted)
        assert found.resampled.any() and (choices[found.resampled] < 0).all()


# --------------------------------------------------------------------------------------- the bounds and training


def test_bounds_are_in_order_for_a_guide_of_the_past():
    """ELBO <= IWAE <= FIVO <= log-likelihood: a long series, a guide that is only roughly right."""
    model = toy(1, 1)
    with torch.no_grad():
        _, y = model(series(30, obs_dim=1).without_values())
    data = series(30, obs_dim=1)
    data = data.replace(values=y)
    guide, many = Linear(model, torch.tensor(0.4, dtype=D)), repeated(data, 400)
    exact = float(kalman_filter(model, data).log_likelihood.sum().detach())
    bounds = {
        "elbo": -ParticleELBO(1).loss(model, guide, many) / 400,
        "iwae": -ParticleELBO(16, ess_threshold=0).loss(model, guide, many) / 400,
        "fivo": -ParticleELBO(16).loss(model, guide, many) / 400,
    }
    assert bounds["elbo"] < bounds["iwae"] - 1 and bounds["iwae"] < bounds["fivo"] - 0.5
    assert bounds["fivo"] < exact
    assert exact - bounds["fivo"] < 0.3 * (exact - bounds["iwae"])


@torch.no_grad()
def test_bounds_of_an_untrained_recurrent_network_on_chorales(shared_data):
    """The order of Maddison et al. (2017): the program of benchmarks/fivo_jsb.py on eight sequences."""
    shared_data("polyphonic_npz/jsb.npz")
    data = polyphonic("jsb", "test").minibatch(torch.arange(8)).replace(total=None, index=None).trim()
    assert data.is_ragged
    model = vrnn(8, 88, hidden_dim=16, emission=Bernoulli)
    guide = Structured(model, 16, direction="past", structured=False)
    model.emission.network.layers[-1].bias.fill_(-3.0)  # few notes sound
    losses = (ParticleELBO(1), ParticleELBO(4, ess_threshold=0.0), ParticleELBO(4))
    bounds = torch.tensor([[-loss.loss(model, guide, data) for _ in range(5)] for loss in losses])
    error = bounds.std(1) / 5**0.5
    for one, other in ((0, 1), (1, 2)):
        assert bounds[other].mean() - bounds[one].mean() > 4 * torch.hypot(error[one], error[other])


def test_trains_model_and_guide_through_svi_and_through_fit():
    data = series(5, (4,), obs_dim=1, missing=True)
    bounds = []
    for how in ("svi", "fit"):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model = toy(1, 1)
        model.transition.rate = PyroSample(dist.LogNormal(torch.zeros(1, dtype=D), 0.3).to_event(1))
        guide = Structured(model, 6, direction="past").double()
        before = {name: p.clone() for name, p in [*model.named_parameters(), *guide.named_parameters()]}
        loss = ParticleELBO(8, ess_threshold=1.0)
        start = evidence_lower_bound(model, guide, data, 200).total
        if how == "svi":
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss)
            for _ in range(40):
                svi.step(data)
            names = set(pyro.get_param_store().keys())
            assert {"emission.matrix", "guide.head.weight"} <= names
            assert any("parameter_guide" in name for name in names)
        else:
            fitted = fit(model, guide, data, loss=loss, lr=0.02, num_steps=40, progress=False, batch_size=2)
            assert fitted.num_steps == 40
        after = dict([*model.named_parameters(), *guide.named_parameters()])
        moved = {name for name, p in before.items() if not torch.equal(p, after[name])}
        assert moved == set(before) - {"encoder.distance.weight"}  # of refined grids only
        bounds.append(float(evidence_lower_bound(model, guide, data, 200).total - start))
    assert min(bounds) > 1.0


def test_a_fit_resumes_and_validates(tmp_path):
    model, data = toy(1, 1), series(4, (4,), obs_dim=1)
    guide = GaussianMarkov(model, 4, direction="past").double()
    options = {"loss": ParticleELBO(4), "progress": False, "checkpoint": tmp_path / "fit.pt", "lr": 0.01}
    fit(model, guide, data, num_steps=2, validation=data, validate_every=2, **options)
    again = fit(model, guide, data, num_steps=4, validation=data, validate_every=2, **options)
    assert again.num_steps == 4 and len(again.validation) == 2


@pytest.mark.parametrize("resampling", [SoftResampling(0.5), TransportResampling(), "ssp", "hilbert-stratified"])
def test_other_resamplings(resampling):
    model, data = toy(), ragged()
    guide = Structured(model, 5, direction="past").double()
    loss = ParticleELBO(6, resampling=resampling, ess_threshold=1.0).differentiable_loss(model, guide, data)
    loss.backward()
    assert guide.head.weight.grad.abs().sum() > 0


def test_a_look_ahead_guide_is_warned_of_and_may_have_a_twist():
    model, data = toy(1, 1), series(4, (2,), obs_dim=1)
    guide = Structured(model, 5, direction="future").double()
    ParticleELBO(4, ess_threshold=0).loss(model, guide, data)
    torch.manual_seed(2)
    with pytest.warns(UserWarning, match="direction='past'"):
        plain = ParticleELBO(4, ess_threshold=1.0).loss(model, guide, data)
    flat = partial(guided, twist=lambda k, state: torch.zeros_like(state[..., 0]))  # changes the warning alone
    torch.manual_seed(2)
    assert ParticleELBO(4, build=flat, ess_threshold=1.0).loss(model, guide, data) == pytest.approx(plain, abs=1e-12)


def test_what_it_cannot_do_is_refused():
    model, data = toy(1, 1), series(4, (2,), obs_dim=1)
    guide = Structured(model, 5, direction="past").double()
    with pytest.raises(ValueError, match="`num_particles` must be at least 1"):
        ParticleELBO(0)
    with pytest.raises(ValueError, match="`ess_threshold` is a fraction"):
        ParticleELBO(4, ess_threshold=2.0)
    with pytest.raises(ValueError, match="`gradient` must be one of"):
        ParticleELBO(4, gradient="reinforce")
    with pytest.raises(ValueError, match="resampling='multinomial', got 'ssp'"):
        ParticleELBO(4, gradient="score", resampling="ssp")
    with pytest.raises(ValueError, match="brings its own resampling"):
        ParticleELBO(4, gradient="stop", resampling=SoftResampling())
    with pytest.raises(ValueError, match="must be one of"):
        ParticleELBO(4, resampling="best")
    with pytest.raises(TypeError, match="unbound StateSpaceModel, got function"):
        ParticleELBO(4).loss(lambda data: None, guide, data)
    with pytest.raises(TypeError, match="unbound StateSpaceModel, got BoundStateSpaceModel"):
        ParticleELBO(4).loss(model.bind(), guide, data)
    with pytest.raises(TypeError, match=r"guides\.Guide.*got function"):
        ParticleELBO(4).loss(model, lambda data: None, data)
    with pytest.raises(TypeError, match="one TimeSeries"):
        ParticleELBO(4).loss(model, guide, data.values)
    with kl_annealing(0.5), pytest.raises(ValueError, match="KL annealing"):
        ParticleELBO(4).loss(model, guide, data)
    with kl_annealing(1.0):
        ParticleELBO(4).loss(model, guide, data)
    with pytest.raises(ValueError, match="KL annealing"):
        fit(model, guide, data, loss=ParticleELBO(4), annealing=linear_annealing(0.1, 5), num_steps=2, progress=False)
    # a proposal that is drawn without a gradient
    law = dist.Poisson(torch.ones(1, dtype=D)).to_event(1)

    def counted(bound, guide, data):
        return guided(bound, lambda state, k, memory: law, data)

    with pytest.raises(NotImplementedError, match="step 0 .*Poisson.* not reparameterised"):
        ParticleELBO(4, build=counted).differentiable_loss(model, guide, data)
