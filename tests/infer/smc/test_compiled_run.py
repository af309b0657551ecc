"""A run in compiled steps is the run of the stepper with the same numbers."""

import pyro.distributions as dist
import pytest
import torch

import pyro_ssm.infer.smc.filter as filter_module
from pyro_ssm import dynamics, emissions
from pyro_ssm.components import Emission
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import DiagonalNormal
from pyro_ssm.infer import FeynmanKac, bootstrap, particle_filter
from pyro_ssm.infer.smc import GaussianSteps, FixedNoise
from pyro_ssm.infer.smc.compiled_run import compiled_run
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.ops import compiled
from pyro_ssm.ops.resampling import SCHEMES

pytestmark = [
    pytest.mark.skipif(
        compiled.library().functions is None, reason=f"the compiled library is not in use: {compiled.library().reason}"
    ),
    pytest.mark.filterwarnings("ignore::pyro_ssm.infer.smc.ParticleCollapseWarning"),  # wild data
]
D = torch.float64


class Volatility(Emission):
    def __init__(self, dim):
        super().__init__()
        self.state_dim = self.obs_dim = dim

    def forward(self, state, time, inputs, memory=None):
        return DiagonalNormal(state.new_zeros(()), (0.5 * state).exp())


class Log(Emission):
    """A law that is not normal."""

    def __init__(self, dim):
        super().__init__()
        self.state_dim = self.obs_dim = dim

    def forward(self, state, time, inputs, memory=None):
        return dist.Laplace(state, 1.0).to_event(1)


MODELS = {
    "volatility": lambda n: StateSpaceModel(
        dynamics.NormalInitial(n), dynamics.LinearNormal(n, matrix=0.9 * torch.eye(n) + 0.05, scale=0.4), Volatility(n)
    ),
    "Ornstein-Uhlenbeck, Laplace": lambda n: StateSpaceModel(
        dynamics.NormalInitial(n), dynamics.OrnsteinUhlenbeck(n, rate=0.3, mean=0.2), Log(n)
    ),
    "linear": lambda n: StateSpaceModel(
        dynamics.NormalInitial(n),
        dynamics.LinearNormal(n, input_dim=2),
        emissions.LinearNormal(n, n, scale=0.3),
    ),
}


def record(model, batch, dtype, times=9, own=False, lengths=None, hide=False):
    generator = torch.Generator().manual_seed(0)
    n = model.emission.obs_dim
    gaps = torch.rand((*batch, times) if own else (times,), dtype=D, generator=generator) + 0.3
    values = torch.randn((*batch, times, n), dtype=D, generator=generator)
    if hide:
        values[..., 3, :] = float("nan")  # nobody sees anything; an entry is missing; one series sees nothing
        values[..., 1, -1] = float("nan")
        if batch:
            values[0, 6] = float("nan")
    inputs = torch.randn((*batch, times, 2), dtype=D, generator=generator)
    data = TimeSeries(gaps.cumsum(-1), values, inputs=inputs, lengths=lengths)
    return data.to(dtype=dtype)


def both(fk, n, num, monkeypatch, scheme="systematic", threshold=0.6, dtype=D):
    """The result in compiled steps, of the stepper, and whether the former served."""
    generator, served = torch.Generator().manual_seed(1), []
    shape = tuple(fk.batch_shape)
    normals = torch.randn((fk.num_times, num, *shape, n), dtype=D, generator=generator).to(dtype)
    uniforms = torch.rand((fk.num_times, SCHEMES[scheme].rows(num), *shape), dtype=D, generator=generator)
    options = {"noise": FixedNoise(normals, uniforms), "resampling": scheme, "ess_threshold": threshold}

    def spy(*args):
        served.append(compiled_run(*args))
        return served[-1]

    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(filter_module, "compiled_run", spy)
        fast = particle_filter(fk, num, **options)
        patch.setattr(filter_module, "compiled_run", lambda *args: None)
        slow = particle_filter(fk, num, **options)
    return fast, slow, served[0] is not None


def assert_equal(fast, slow, dtype=D):
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == D else {"rtol": 2e-4, "atol": 2e-4}
    assert torch.equal(fast.resampled, slow.resampled)
    assert torch.equal(fast.log_likelihood == 0, slow.log_likelihood == 0)
    for name in ("log_likelihood", "ess"):
        torch.testing.assert_close(getattr(fast, name), getattr(slow, name), **tolerance)
    for one, other in zip(fast.cloud.particles, slow.cloud.particles, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **tolerance)
    torch.testing.assert_close(fast.cloud.log_weights, slow.cloud.log_weights, **tolerance)
    assert fast.cloud.k == slow.cloud.k


@pytest.mark.parametrize("num", [1, 65, 700])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2), (70,)], ids=str)
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_compiled_steps_are_those_of_the_stepper(name, n, batch, num, monkeypatch):
    model = MODELS[name](n).to(D)
    data = record(model, batch, D)
    fast, slow, served = both(bootstrap(model, data), n, num, monkeypatch)
    assert served
    assert_equal(fast, slow)


@pytest.mark.parametrize("scheme", ["systematic", "stratified"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("batch", [(), (3,), (70,)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_missing_ragged_and_own_times(name, batch, threshold, scheme, monkeypatch):
    model = MODELS[name](2).to(D)
    lengths = torch.arange(batch[0]) % 9 + 1 if batch else None
    data = record(model, batch, D, own=True, lengths=lengths, hide=True)
    fast, slow, served = both(bootstrap(model, data), 2, 40, monkeypatch, scheme, threshold)
    assert served and bool((fast.log_likelihood == 0).any())
    assert_equal(fast, slow)


@pytest.mark.parametrize("name", MODELS)
def test_single_precision_over_a_long_run_without_resampling(name, monkeypatch):
    model = MODELS[name](1)
    data = record(model, (2,), torch.float32, times=200)
    fast, slow, served = both(bootstrap(model, data), 1, 5000, monkeypatch, threshold=0.0, dtype=torch.float32)
    assert served
    exact = both(bootstrap(model.double(), data.to(dtype=D)), 1, 5000, monkeypatch, threshold=0.0)[1]
    wanted = exact.log_likelihood.sum(-1)
    scale = wanted.abs()
    assert bool(((fast.log_likelihood.double().sum(-1) - wanted).abs() < 1e-4 * scale).all())
    assert bool(((slow.log_likelihood.double().sum(-1) - wanted).abs() < 1e-4 * scale).all())


def test_by_hand_and_a_surprise(monkeypatch):
    """A process on plain tensors; weights that are all 0 are an error that names the step, with either engine."""

    def walk(potential):
        move = (torch.eye(1, dtype=D), torch.zeros(1, dtype=D), torch.ones(1, dtype=D))
        return FeynmanKac(
            lambda draw, shape: draw(DiagonalNormal(torch.zeros(1, dtype=D), torch.ones(1, dtype=D)), shape + (1,))[
                ..., 0, :
            ],
            lambda k, x, draw: draw(DiagonalNormal(x.unsqueeze(-2), torch.ones(1, dtype=D)), x.shape[:-1] + (1,))[
                ..., 0, :
            ],
            potential,
            6,
            gaussian=GaussianSteps(lambda: [move] * 5, lambda k, x: potential(k, None, x)),
        )

    fk = walk(lambda k, previous, x: -((x[..., 0] - k) ** 2))
    fast, slow, served = both(fk, 1, 50, monkeypatch)
    assert served
    torch.testing.assert_close(fast.log_likelihood, slow.log_likelihood, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fast.cloud.particles, slow.cloud.particles, rtol=1e-10, atol=1e-10)
    for value, what in ((-torch.inf, "no particle"), (torch.nan, "NaN"), (torch.inf, "infinite")):
        bad = walk(lambda k, previous, x: torch.full_like(x[..., 0], value if k == 3 else 0.0))  # noqa: B023
        with torch.no_grad(), pytest.raises(ValueError, match=f"step 3: .*{what}"):
            particle_filter(bad, 50)


def test_where_the_stepper_serves(monkeypatch):
    model = MODELS["volatility"](1)
    data = record(model, (), torch.float32)
    fk, systematic = bootstrap(model, data), filter_module.resampling_of("systematic")
    noise = filter_module.PseudoRandom()
    with torch.no_grad():
        assert compiled_run(fk, 10, systematic, 0.5, noise) is not None
        assert compiled_run(fk, 10, filter_module.resampling_of("multinomial"), 0.5, noise) is None
        assert compiled_run(fk, 10, filter_module.resampling_of("hilbert-systematic"), 0.5, noise) is None

        class Other(filter_module.PseudoRandom):
            pass

        assert compiled_run(fk, 10, systematic, 0.5, Other()) is None
        assert compiled_run(fk, 10, systematic, 0.5, FixedNoise(torch.zeros(9, 10, 1, dtype=D))) is None
    with torch.enable_grad():
        assert compiled_run(fk, 10, systematic, 0.5, noise) is None
    found = particle_filter(fk, 10, differentiable=True)
    assert found.log_likelihood.requires_grad


def test_states_that_a_law_keeps_stay_as_they_were():
    kept = []

    class Keeps(Volatility):
        def forward(self, state, time, inputs, memory=None):
            kept.append((state, state.clone()))
            return super().forward(state, time, inputs, memory)

    model = StateSpaceModel(dynamics.NormalInitial(1), dynamics.LinearNormal(1), Keeps(1))
    with torch.no_grad():
        particle_filter(bootstrap(model, record(model, (), torch.float32)), 20)
    assert len(kept) == 9 and all(torch.equal(a, b) for a, b in kept)
