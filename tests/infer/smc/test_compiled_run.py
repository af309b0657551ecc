"""A run in compiled steps is the run of the stepper with the same numbers."""

import pytest
import torch

import pyro_ssm.infer.smc.filter as filter_module
from pyro_ssm import dynamics
from pyro_ssm.distributions import DiagonalNormal
from pyro_ssm.infer import FeynmanKac, bootstrap, particle_filter
from pyro_ssm.infer.smc import FixedNoise, GaussianSteps
from pyro_ssm.infer.smc.compiled_run import compiled_run
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.ops import compiled
from tests.infer.smc.compiled_runs import MODELS, D, Volatility, assert_equal, both, record

pytestmark = [
    pytest.mark.skipif(
        compiled.library().functions is None, reason=f"the compiled library is not in use: {compiled.library().reason}"
    ),
    pytest.mark.filterwarnings("ignore::pyro_ssm.infer.smc.ParticleCollapseWarning"),  # wild data
]


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
