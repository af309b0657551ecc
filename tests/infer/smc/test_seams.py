"""Where runs meet what is around them: laws that refuse NaN, inference mode, transforms, NUTS far out, starts."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS

from pyro_ssm import dynamics, emissions
from pyro_ssm.components import Emission, Transition
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import DiagonalNormal
from pyro_ssm.infer import (
    Marginal,
    OnlineParticleFilter,
    ParticleMarginal,
    bootstrap,
    iterated_filtering,
    particle_filter,
    particle_gibbs,
    pmmh,
)
from pyro_ssm.infer.smc import FixedNoise, Moments, TransportResampling
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.ops import compiled
from tests.infer.smc.known_posterior import D, make_data, make_model

BATCH = TimeSeries(torch.arange(6.0), torch.zeros(3, 6, 1), lengths=torch.tensor([2, 6, 5]))


class Fails(Emission):
    """Normal, and at one time NaN or worse where the state is of the second series or there is no other."""

    def __init__(self, at, how="nan"):
        super().__init__()
        self.state_dim = self.obs_dim = 1
        self.at, self.how = at, how

    def forward(self, state, time, inputs, memory=None):
        loc = state
        if float(time.reshape(-1)[0]) == self.at:
            if self.how == "raise":
                raise ValueError("a mistake of the user's")
            bad = torch.ones(state.shape[1:-2], dtype=torch.bool)
            if bad.dim():
                bad[:1] = False
            loc = torch.where(bad[..., None, None], torch.full_like(state, torch.nan), state)
        return dist.Normal(loc, 1.0, validate_args=True if self.how == "always" else None).to_event(1)


def model_that_fails(at, how="nan"):
    return StateSpaceModel(dynamics.NormalInitial(1), dynamics.LinearNormal(1), Fails(at, how))


@pytest.mark.parametrize("resampling", ["systematic", "multinomial"])
def test_a_law_that_validates_its_arguments_names_the_step_and_the_series(resampling):
    with pyro.validation_enabled(True):
        with pytest.raises(ValueError, match=r"step 4 \(time 4\) of series 1: a weight is NaN"):
            particle_filter(bootstrap(model_that_fails(4.0), BATCH), 20, resampling=resampling, collectors=[Moments()])
        with pytest.raises(ValueError, match="step 0 .*a weight is NaN"):
            particle_filter(bootstrap(model_that_fails(0.0), BATCH), 20, resampling=resampling)


@pytest.mark.parametrize(("how", "says"), [("raise", "a mistake of the user's"), ("always", "Expected parameter loc")])
def test_what_is_no_matter_of_nan_comes_through(how, says):
    with pytest.raises(ValueError, match=says):
        particle_filter(bootstrap(model_that_fails(4.0, how), BATCH), 20)


def test_an_online_filter_counts_its_steps():
    filter = OnlineParticleFilter(model_that_fails(3.0), 20)
    state = filter.init(0.0, torch.zeros(1))
    for k in (1, 2):
        state = filter.step(state, k, torch.zeros(1))
    with pyro.validation_enabled(True), pytest.raises(ValueError, match=r"step 3 \(time 3\) of the series"):
        filter.step(state, 3, torch.zeros(1))


class SharedScale(Transition):
    def __init__(self):
        super().__init__()
        self.state_dim = 1
        self.scale = torch.full((1,), 0.5)

    def forward(self, state, time, next_time, inputs, memory=None):
        return DiagonalNormal(state.sin(), self.scale)


@pytest.mark.parametrize("transition", [lambda: dynamics.LinearNormal(1), SharedScale])
def test_a_model_made_in_inference_mode(transition):
    with torch.inference_mode():
        model = StateSpaceModel(dynamics.NormalInitial(1), transition(), emissions.LinearNormal(1, 1))
        found = particle_filter(bootstrap(model, BATCH), 50)
    assert found.log_likelihood.shape == (3, 6) and bool((found.log_likelihood[1] < 0).all())


def test_gradients_by_transforms_with_drawn_noise(monkeypatch):
    model, data = make_model(one=True).float(), make_data(6).to(dtype=torch.float32)

    def total(rate):
        torch.manual_seed(3)
        bound = model.bind({"transition.rate": rate})
        return particle_filter(bootstrap(bound, data), 30, ess_threshold=0, differentiable=True).total

    rate = torch.tensor(0.7, requires_grad=True)
    found = torch.func.grad(total)(rate.detach())
    without = compiled.library()._replace(functions=None)  # a transform has torch's own normals
    monkeypatch.setattr("pyro_ssm.ops.random.library", lambda: without)
    torch.testing.assert_close(found, torch.autograd.grad(total(rate), rate)[0], rtol=1e-3, atol=1e-3)


def test_nuts_rejects_what_a_filter_cannot_weigh():
    """A trajectory that leaves for infinity has density 0 there, as with an exact filter."""
    model, data = make_model(one=True), make_data(6)
    fixed = FixedNoise(torch.randn(6, 10, 1, dtype=D))
    smooth = ParticleMarginal(10, resampling=TransportResampling(), ess_threshold=1.0, noise=fixed)
    far = model.bind({"transition.rate": torch.tensor(torch.nan, dtype=D)})
    assert bool((smooth(far, data).total == -torch.inf).all())
    with pytest.raises(ValueError, match="NaN"):  # elsewhere it stays an error
        ParticleMarginal(10)(far, data)
    kernel = NUTS(Marginal(model, smooth), step_size=1e6, adapt_step_size=False, max_tree_depth=2)
    mcmc = MCMC(kernel, num_samples=3, warmup_steps=0, disable_progbar=True)
    mcmc.run(data)
    assert mcmc.get_samples()["transition.rate"].shape == (3,)


def test_a_builder_is_no_filter_of_a_marginal():
    with pytest.raises(TypeError, match="builds a particle filter and does not run it.*ParticleMarginal"):
        poutine.trace(Marginal(make_model(), bootstrap)).get_trace(make_data(4)).compute_log_prob()


SAMPLERS = {
    "pmmh": lambda model, data, start: pmmh(model, data, 2, 5, num_warmup=0, start=start, progress=False),
    "particle_gibbs": lambda model, data, start: particle_gibbs(model, data, 2, 5, start=start, progress=False),
    "iterated_filtering": lambda model, data, start: iterated_filtering(model, data, 5, 1, start=start, progress=False),
}


@pytest.mark.parametrize("run", SAMPLERS.values(), ids=SAMPLERS)
def test_starts_that_are_none(run):
    """Outside the support a chain would stay where it is, whatever the data: nothing to begin with."""
    model, data = make_model(), make_data(4)
    good = {"transition.rate": torch.tensor(0.7, dtype=D), "emission.scale": torch.tensor(0.3, dtype=D)}
    with pytest.raises(ValueError, match=r"`start`: transition.rate is .*outside the support of its prior"):
        run(model, data, good | {"transition.rate": torch.tensor(-1.0, dtype=D)})
    with pytest.raises(ValueError, match=r"`start` has \['transition.speed'\]"):
        run(model, data, good | {"transition.speed": 1.0})
    with pytest.raises(ValueError, match="one for all or one for each"):
        run(model, data, {name: value.expand(3) for name, value in good.items()})
    with pytest.raises(KeyError, match=r"emission\.scale"):
        run(model, data, {"transition.rate": 0.7})
