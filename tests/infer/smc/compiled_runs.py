"""Models, data and runs by which compiled steps are compared with the stepper."""

import pyro.distributions as dist
import torch

import pyro_ssm.infer.smc.filter as filter_module
from pyro_ssm import dynamics, emissions
from pyro_ssm.components import Emission, Transition
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import DiagonalNormal
from pyro_ssm.infer import particle_filter
from pyro_ssm.infer.smc import FixedNoise
from pyro_ssm.infer.smc.compiled_run import compiled_run
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.ops.resampling import SCHEMES

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


class Tangent(Transition):
    """A law of torch's own, whose scale is that of the inputs."""

    def __init__(self, dim):
        super().__init__()
        self.state_dim = dim

    def forward(self, state, time, next_time, inputs, memory=None):
        scale = 0.1 + inputs[..., :1].abs()
        return dist.Normal(torch.tanh(state), scale).to_event(1)


MODELS = {
    "volatility": lambda n: StateSpaceModel(
        dynamics.NormalInitial(n), dynamics.LinearNormal(n, matrix=0.9 * torch.eye(n) + 0.05, scale=0.4), Volatility(n)
    ),
    "Ornstein-Uhlenbeck, Laplace": lambda n: StateSpaceModel(
        dynamics.NormalInitial(n), dynamics.OrnsteinUhlenbeck(n, rate=0.3, mean=0.2), Log(n)
    ),
    "growth, law by law": lambda n: StateSpaceModel(
        dynamics.NormalInitial(n),
        dynamics.FunctionTransition(n, lambda z, u: 0.5 * z + 5 * z / (1 + z * z) + u[..., :1], scale=0.7),
        emissions.FunctionNormal(n, n, lambda z, u: 0.2 * z * z),
    ),
    "gated, own scales": lambda n: StateSpaceModel(
        dynamics.NormalInitial(n), dynamics.GatedTransition(n, 4, input_dim=2), Log(n)
    ),
    "user's law": lambda n: StateSpaceModel(dynamics.NormalInitial(n), Tangent(n), Volatility(n)),
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


def both(fk, n, num, monkeypatch, scheme="systematic", threshold=0.6, dtype=D, collectors=tuple):
    """The result in compiled steps, of the stepper, and whether the former served; ``collectors()`` makes some."""
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
        fast = particle_filter(fk, num, collectors=collectors(), **options)
        patch.setattr(filter_module, "compiled_run", lambda *args: None)
        slow = particle_filter(fk, num, collectors=collectors(), **options)
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
