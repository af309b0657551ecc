"""What surrounds compiled steps: collectors, their own draws, laws that they cannot draw from, and errors."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ssm import dynamics
from pyro_ssm.components import Transition
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import DiagonalNormal
from pyro_ssm.infer import FeynmanKac, bootstrap, particle_filter
from pyro_ssm.infer.smc import (
    Collector,
    EvidenceVariance,
    FixedLag,
    FixedNoise,
    GaussianSteps,
    Genealogy,
    MeanVariance,
    Moments,
    Quantiles,
)
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.ops import compiled
from tests.infer.smc.compiled_runs import MODELS, D, Volatility, assert_equal, both, record

pytestmark = [
    pytest.mark.skipif(
        compiled.library().functions is None, reason=f"the compiled library is not in use: {compiled.library().reason}"
    ),
    pytest.mark.filterwarnings("ignore::pyro_ssm.infer.smc.ParticleCollapseWarning"),  # wild data
]


class Everything(Collector):
    name = "everything"

    def start(self, fk, num_particles):
        self.steps = []

    def collect(self, step):
        self.steps.append(step)

    def result(self):
        return self.steps


def collectors():
    statistics = [Moments(), Quantiles([0.1, 0.5]), EvidenceVariance(3), MeanVariance(2), FixedLag(2), Genealogy()]
    return [Everything(), *statistics]


def assert_same_tree(one, other):
    if isinstance(one, torch.Tensor):
        if one.is_floating_point():
            return torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
        return torch.testing.assert_close(one, other)
    if isinstance(one, (tuple, list)):
        assert type(one) is type(other)
        for a, b in zip(one, other, strict=True):
            assert_same_tree(a, b)
        return None
    assert type(one) is type(other) and one == other
    return None


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize("name", ["volatility", "growth, law by law"])
def test_collectors_see_the_steps_of_the_stepper(name, batch, ragged, threshold, monkeypatch):
    model = MODELS[name](2).to(D)
    lengths = torch.arange(batch[0]) * 3 + 2 if batch and ragged else None
    data = record(model, batch, D, lengths=lengths, hide=ragged)
    fast, slow, served = both(bootstrap(model, data), 2, 200, monkeypatch, threshold=threshold, collectors=collectors)
    assert served
    assert_equal(fast, slow)
    for key, found in slow.collected.items():
        assert_same_tree(fast.collected[key], found)
    seen = [step.ancestors is not None for step in fast.collected["everything"]]
    assert any(seen) == (threshold > 0)


@pytest.mark.parametrize("name", ["volatility", "growth, law by law", "gated, own scales"])
def test_two_steps_and_one(name, monkeypatch):
    model = MODELS[name](1).to(D)
    for times in (1, 2):
        fast, slow, served = both(
            bootstrap(model, record(model, (2,), D, times=times)), 1, 30, monkeypatch, threshold=1.0
        )
        assert served == (times > 1)
        assert_equal(fast, slow)


class Changing(Transition):
    """Normal at first, then not; or a law that does not exist."""

    state_dim = 1

    def __init__(self, at, law):
        super().__init__()
        self.at, self.law = at, law

    def forward(self, state, time, next_time, inputs, memory=None):
        if float(time) < self.at:
            return DiagonalNormal(0.5 * state, torch.ones(1, dtype=state.dtype))
        return self.law(state)


def plain(times=8):
    return TimeSeries(torch.arange(float(times)), torch.ones(times, 1, dtype=D))


@pytest.mark.parametrize("at", [0, 3])
def test_a_law_that_is_not_normal_is_left_to_the_stepper(at, monkeypatch):
    transition = Changing(at, lambda x: dist.Laplace(x, torch.ones_like(x)).to_event(1))
    model = StateSpaceModel(dynamics.NormalInitial(1), transition, Volatility(1)).to(D)
    with torch.no_grad():
        found = particle_filter(bootstrap(model, plain()), 50, collectors=[Everything()])
    assert found.log_likelihood.shape == (8,)
    assert [step.k for step in found.collected["everything"]] == list(range(8))  # from the beginning, once
    correlated = dist.MultivariateNormal
    transition.law = lambda x: correlated(x, scale_tril=torch.eye(1, dtype=D))
    with torch.no_grad():
        fast, slow, served = both(bootstrap(model, plain()), 1, 50, monkeypatch)
    assert not served
    assert torch.equal(fast.log_likelihood, slow.log_likelihood)


@pytest.mark.parametrize("batched", [False, True])
def test_a_law_that_is_nan_is_named(batched, monkeypatch):
    """... at the step that it moves to, and for the series whose it is, by either engine."""
    transition = Changing(2, lambda x: DiagonalNormal(bad(x), torch.ones(1, dtype=x.dtype)))

    def bad(x):
        x = x.clone()
        x[:, 1 if batched else slice(None)] = torch.nan
        return x

    model = StateSpaceModel(dynamics.NormalInitial(1), transition, Volatility(1)).to(D)
    data = plain().replace(values=torch.ones(3, 8, 1, dtype=D)) if batched else plain()
    messages = []
    for engine in ("compiled", "stepper"):
        with monkeypatch.context() as patch, torch.no_grad(), pytest.raises(ValueError, match="NaN") as error:
            if engine == "stepper":
                patch.setattr("pyro_ssm.infer.smc.filter.compiled_run", lambda *args: None)
            particle_filter(bootstrap(model, data), 50)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "step 3" in messages[0]


def test_an_error_of_a_law_is_the_error_of_the_run():
    def refuses(x):
        raise ZeroDivisionError("of mine")

    model = StateSpaceModel(dynamics.NormalInitial(1), Changing(4, refuses), Volatility(1)).to(D)
    with torch.no_grad(), pytest.raises(ZeroDivisionError, match="of mine"):
        particle_filter(bootstrap(model, plain()), 50)


def test_a_law_is_asked_of_particles_without_weight_too(monkeypatch):
    """One that only those break is no error where they are not moved: weights of 0 are never chosen."""

    def law(k, x):
        if bool((x > 0.5).any()):
            raise ValueError("out of the domain")
        return DiagonalNormal(0.1 * x, torch.full((1,), 0.1, dtype=x.dtype))

    fk = FeynmanKac(
        lambda draw, shape: torch.linspace(-1, 1, shape[0], dtype=D).unsqueeze(-1),
        lambda k, x, draw: draw(law(k, x), x.shape[:-1]),
        lambda k, previous, x: torch.where(x.squeeze(-1) > 0.5, -torch.inf, 0.0),
        3,
        gaussian=GaussianSteps(lambda: None, lambda k, x: torch.where(x.squeeze(-1) > 0.5, -torch.inf, 0.0), law),
    )
    with torch.no_grad():
        found = particle_filter(fk, 100, ess_threshold=1.0)
    assert math.isclose(float(found.log_likelihood[0]), math.log(0.75), rel_tol=1e-6)


def walk(dim, batch=(), times=3):
    """A random walk from 0 that nothing is seen of."""
    one, batch = torch.ones(dim), torch.Size(batch)
    return FeynmanKac(
        lambda draw, shape: torch.zeros((*shape, dim)),
        lambda k, x, draw: draw(DiagonalNormal(x, one), x.shape[:-1]),
        lambda k, previous, x: x[..., 0] * 0,
        times,
        batch,
        gaussian=GaussianSteps(lambda: None, lambda k, x: x[..., 0] * 0, lambda k, x: DiagonalNormal(x, one)),
    )


@pytest.mark.parametrize(("dim", "batch", "num"), [(1, (), 60_000), (3, (2,), 20_000), (5000, (), 40), (70, (3,), 300)])
@torch.no_grad()
def test_the_draws_of_the_steps_are_independent_standard_normals(dim, batch, num):
    torch.manual_seed(3)
    clouds = particle_filter(walk(dim, batch), num, ess_threshold=0, collectors=[Genealogy()]).collected["genealogy"]
    first, second = clouds.states[1], clouds.states[2] - clouds.states[1]
    both_steps = torch.stack([first, second]).double().flatten(1)
    count = both_steps.shape[1]
    bound = 5 / math.sqrt(count)
    for moment, wanted in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        error = (both_steps**moment).mean(1) - wanted
        spread = math.sqrt({1: 1, 2: 2, 3: 15, 4: 96}[moment])
        assert bool((error.abs() < bound * spread).all()), moment
    assert abs(float((both_steps[0] * both_steps[1]).mean())) < bound  # steps do not share numbers
    neighbours = (both_steps[0, 1:] * both_steps[0, :-1]).mean()
    assert abs(float(neighbours)) < bound
    assert len(both_steps[0].unique()) > 0.99 * count - 10  # nor do tiles


@torch.no_grad()
def test_a_seed_repeats_a_run_with_any_number_of_threads():
    fk, threads = walk(1, times=4), torch.get_num_threads()
    found = []
    try:
        for num in (1, 2, 1):
            torch.set_num_threads(num)
            torch.manual_seed(5)
            found.append(particle_filter(fk, 100_000, ess_threshold=1.0).cloud.particles)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    torch.manual_seed(6)
    assert not torch.equal(found[0], particle_filter(fk, 100_000, ess_threshold=1.0).cloud.particles)


@pytest.mark.parametrize("scheme", ["systematic", "stratified"])
@torch.no_grad()
def test_the_uniforms_of_the_steps_are_uniform(scheme):
    """Resampling a particle of probability p in each of many series: it has p N offspring on average."""
    torch.manual_seed(4)
    series, num, p = 4000, 3, torch.tensor([0.2, 0.3, 0.5])
    still = torch.full((1,), 1e-6)

    def law(k, x):
        return DiagonalNormal(x, still)

    def potential(k, x):
        return p.log().unsqueeze(-1).expand(num, series) if k == 0 else torch.zeros(num, series)

    fk = FeynmanKac(
        lambda draw, shape: torch.arange(3.0).reshape(3, 1, 1).expand(3, series, 1).contiguous(),
        lambda k, x, draw: draw(law(k, x), x.shape[:-1]),
        lambda k, previous, x: potential(k, x),
        3,
        torch.Size([series]),
        gaussian=GaussianSteps(lambda: None, potential, law),
    )
    states = particle_filter(fk, num, ess_threshold=1.0, resampling=scheme, collectors=[Genealogy()])
    chosen = states.collected["genealogy"].states[1].round().squeeze(-1)
    for i in range(3):
        counts = (chosen == i).sum(0).double()
        error = float(counts.mean() - num * p[i])
        assert abs(error) < 5 * float(counts.std()) / math.sqrt(series), i


def test_fixed_noise_of_another_type_goes_to_the_stepper():
    model = MODELS["growth, law by law"](1)
    data = record(model, (), torch.float32)
    noise = FixedNoise(torch.zeros(9, 10, 1, dtype=D), torch.zeros(9, 1))
    with torch.no_grad():
        assert particle_filter(bootstrap(model, data), 10, noise=noise).log_likelihood.shape == (9,)
