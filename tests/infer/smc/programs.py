"""What the tests of the particle filters share: repetitions as a batch, and the check of an unbiased likelihood."""

import math

import torch

from pyro_ssm.components import Gaussian, SampleOnly, Transition
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import particle_filter
from pyro_ssm.infer.smc import Noise
from pyro_ssm.infer.smc.draws import from_normals, normal_dim
from tests.contracts.toys import normal

D = torch.float64


def repeated(data, runs):
    """``runs`` independent repetitions of one series, as a batch."""

    def over(x):
        return None if x is None else x.expand((runs,) + x.shape)

    times = data.times if data.times.dim() == 1 else over(data.times)
    fresh = TimeSeries(times, over(data.values), inputs=over(data.inputs), observed_index=data.observed_index)
    return fresh.hide(~over(data.mask))


def assert_unbiased(total, exact, sigmas=4.0):
    """E exp(total - exact) = 1, within standard errors of the repetitions themselves; the spread must be moderate."""
    ratio = (total - exact).double().exp()
    error = ratio.std() / math.sqrt(len(ratio))
    assert error < 0.1, "too variable to show anything"
    assert abs(float(ratio.mean()) - 1) < sigmas * float(error), (float(ratio.mean()), float(error))


def close(found, wanted, sigmas=4.5, bias=4e-3):
    """Means over repetitions (dim 0) within their own standard errors, and a bias of the order of 1 / N."""
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - wanted).abs() < sigmas * error + bias).all(), (found.mean(0) - wanted) / error


class Replayed(Noise):
    """Noise by step and series: a batch, and each of its series alone, draw the same numbers."""

    def __init__(self, seed, series):
        self.seed, self.series = seed, series

    def restart(self, state_dim=None):
        self.calls = {}

    def _stack(self, k, shape, sample):
        call = self.calls[k, sample] = self.calls.get((k, sample), -1) + 1  # of this kind, at this step
        parts = []
        for b in self.series:
            generator = torch.Generator().manual_seed(self.seed + 100_000 * k + 1000 * b + call)
            parts.append(sample((shape[0],) + tuple(shape[2:]), generator=generator, dtype=D))
        return torch.stack(parts, 1)

    def draw(self, k, law, shape):
        return from_normals(law, self._stack(k, shape + (normal_dim(law),), torch.randn))

    def uniforms(self, k, shape, device):
        return self._stack(k, shape, torch.rand)


def totals(fk, num_particles, **options):
    return particle_filter(fk, num_particles, **options).total


class Bend(Transition, Gaussian):
    """A nonlinear motion: z' = 0.8 z + sin z + noise, whose scale may depend on the state."""

    def __init__(self, state_dim, by_state=False):
        super().__init__()
        self.state_dim, self.by_state = state_dim, by_state

    def forward(self, state, time, next_time, inputs, memory=None):
        loc = 0.8 * state + torch.sin(state)
        scale = 0.3 + 0.2 * torch.sigmoid(state) if self.by_state else torch.full_like(state[..., :1, :], 0.4)
        return normal(loc, scale)


class Walk(Transition, SampleOnly):
    """The law of the toy model's transition, of which only draws are given."""

    def __init__(self, transition):
        super().__init__()
        self.state_dim, self.transition = transition.state_dim, transition

    def forward(self, state, time, next_time, inputs, memory=None):
        law = self.transition(state, time, next_time, inputs, memory)

        class Draws:
            has_rsample = False
            batch_shape, event_shape, event_dim = law.batch_shape, law.event_shape, 1
            mean = law.mean

            def sample(self):
                return law.sample()

            def expand(self, shape):
                raise AssertionError("the law has its full shape")

            def log_prob(self, value):
                raise NotImplementedError

        return Draws()
