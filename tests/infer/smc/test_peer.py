"""The evidence of two models that are neither linear nor Gaussian, beside `particles` (Chopin): its mean and spread."""

import math

import numpy as np
import pytest
import torch
from pyro.distributions import Normal

from pyro_ssm.components import Emission, Gaussian, Initial, Transition
from pyro_ssm.data import TimeSeries
from pyro_ssm.emissions import FunctionNormal
from pyro_ssm.infer import bootstrap, guided, particle_filter
from pyro_ssm.models import StateSpaceModel
from tests.contracts.toys import normal
from tests.infer.smc.programs import D, repeated

particles = pytest.importorskip("particles")
from particles import state_space_models  # noqa: E402

RUNS = 150
MU, RHO, SIGMA = -1.02, 0.9702, 0.178  # Pitt and Shephard (1999)
START = SIGMA / math.sqrt(1 - RHO**2)


def full(value):
    return torch.full((1, 1), value, dtype=D)


class LogVolatility(Transition, Gaussian):
    state_dim = 1

    def forward(self, state, time, next_time, inputs, memory=None):
        return normal(MU + RHO * (state - MU), full(SIGMA))


class Returns(Emission):
    state_dim, obs_dim = 1, 1

    def forward(self, state, time, inputs, memory=None):
        return normal(torch.zeros_like(state), (0.5 * state).exp())


class Growth(Transition, Gaussian):
    """The nonlinear growth model of Gordon, Salmond and Smith (1993), whose drift knows the time."""

    state_dim = 1

    def forward(self, state, time, next_time, inputs, memory=None):
        wave = 8 * torch.cos(1.2 * (next_time - 1)).unsqueeze(-1)
        return normal(0.5 * state + 25 * state / (1 + state.square()) + wave, full(math.sqrt(10)))


class From(Initial, Gaussian):
    state_dim = 1

    def __init__(self, loc, scale):
        super().__init__()
        self.loc, self.scale = loc, scale

    def forward(self, time, inputs, memory=None):
        return normal(full(self.loc), full(self.scale))


def volatility():
    return StateSpaceModel(From(MU, START), LogVolatility(), Returns())


def growth():
    emission = FunctionNormal(1, 1, lambda z, u: 0.05 * z.square(), scale=1.0).double()
    return StateSpaceModel(From(0.0, 2.0), Growth(), emission).requires_grad_(False)


def pitt_shephard(data):
    """The proposal that `particles` brings: one Newton step of the observation's log density."""
    y = data.values[..., 0, :, :] if data.values.dim() > 2 else data.values

    def propose(state, k, memory):
        expected, scale = (full(0.0), START) if state is None else (MU + RHO * (state - MU), SIGMA)
        loc = expected + 0.5 * scale**2 * (y[k].square() * (-expected).exp() - 1)
        return Normal(loc, full(scale)).to_event(1)

    return lambda model, data: guided(model, propose, data)


CASES = {
    "volatility": (volatility, state_space_models.StochVol, "Bootstrap", 60, 200),
    "volatility, few particles": (volatility, state_space_models.StochVol, "Bootstrap", 60, 40),
    "volatility, guided": (volatility, state_space_models.StochVol, "GuidedPF", 60, 100),
    "growth": (growth, state_space_models.Gordon_etal, "Bootstrap", 40, 400),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_mean_and_spread_of_the_evidence(name):
    make, peer, kind, num_times, num_particles = CASES[name]
    torch.manual_seed(2)
    model = make()
    grid = TimeSeries(torch.arange(float(num_times)))
    data = grid.replace(values=model(grid)[1])
    build = pitt_shephard(data) if kind == "GuidedPF" else bootstrap
    ours = particle_filter(build(model, repeated(data, RUNS)), num_particles).total.numpy()

    np.random.seed(2)  # noqa: NPY002 (its global generator is what it draws from)
    theirs = []
    for _ in range(RUNS):
        fk = getattr(state_space_models, kind)(ssm=peer(), data=data.values[:, 0].numpy())
        run = particles.SMC(fk=fk, N=num_particles, resampling="systematic", ESSrmin=0.5)
        run.run()
        theirs.append(run.logLt)

    error = math.hypot(ours.std(), np.std(theirs)) / math.sqrt(RUNS)
    assert error < 0.15, "too variable to show anything"
    assert abs(ours.mean() - np.mean(theirs)) < 4 * error
    assert abs(math.log(ours.std() / np.std(theirs))) < 4 / math.sqrt(RUNS)  # of two normal samples: 4 errors
