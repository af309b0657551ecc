"""What the tests of the particle filters share: repetitions as a batch, and the check of an unbiased likelihood."""

import math

import torch

from pyro_ssm.components import Gaussian, SampleOnly, Transition
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import particle_filter
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
