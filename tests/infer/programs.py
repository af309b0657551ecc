"""Small linear-Gaussian programs with known answers, written as plain Pyro."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_ssm.components import Initial, Transition
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import MarkovPath

DECAY, NOISE = 0.8, 0.5


class Start(Initial):
    state_dim = 1

    def forward(self, time, inputs, memory=None):
        return dist.Normal(torch.zeros(1, 1, dtype=torch.float64), 1.0).to_event(1)


class Decay(Transition):
    """z' ~ N(rate z, 0.6^2)."""

    state_dim = 1

    def __init__(self, rate: float = DECAY):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=torch.float64))

    def forward(self, state, time, next_time, inputs, memory=None):
        return dist.Normal(self.rate * state, 0.6).to_event(1)


def series_plate(data: TimeSeries) -> pyro.plate:
    return pyro.plate("series", data.total or len(data), subsample=data.index, dim=-1)


def path_mask(data: TimeSeries) -> Tensor | None:
    return None if data.lengths is None else data.step_mask


class Chain(PyroModule):
    """z_1 ~ N(0, 1), z' ~ N(rate z, 0.6^2), y ~ N(z, noise^2)."""

    def __init__(self, rate: float = DECAY, noise: float = NOISE):
        super().__init__()
        self.transition = Decay(rate)
        self.noise = PyroParam(torch.tensor(noise, dtype=torch.float64), constraint=constraints.positive)

    def forward(self, data: TimeSeries) -> Tensor:
        noise = self.noise
        law = MarkovPath(Start(), self.transition, data.times, step_mask=path_mask(data), batch_shape=data.batch_shape)
        with series_plate(data):
            z = pyro.sample("z", law)
            seen = dist.Normal(z, noise).mask(data.mask).to_event(2)
            pyro.sample("y", seen, obs=data.values)
        return z


def dense_joint(num_times: int) -> tuple[Tensor, Tensor]:
    """Covariance of the states and of the observations of a :class:`Chain` with its default parameters."""
    states = torch.zeros(num_times, num_times, dtype=torch.float64)
    states[0, 0] = 1.0
    for k in range(1, num_times):
        states[k, :k] = states[:k, k] = DECAY * states[k - 1, :k]
        states[k, k] = DECAY**2 * states[k - 1, k - 1] + 0.36
    return states, states + NOISE**2 * torch.eye(num_times, dtype=torch.float64)


def evidence(data: TimeSeries) -> Tensor:
    """log p(y) of each series under ``Chain()``, from the dense joint Gaussian of the entries that were seen."""
    _, seen = dense_joint(data.num_times)
    result = []
    for values, mask in zip(data.values[..., 0], data.mask[..., 0], strict=True):
        law = dist.MultivariateNormal(torch.zeros(int(mask.sum()), dtype=torch.float64), seen[mask][:, mask])
        result.append(law.log_prob(values[mask]))
    return torch.stack(result)


class ExactGuide(PyroModule):
    """The exact posterior of ``Chain()``, or of a chain moved by ``shift``."""

    def __init__(self, shift: float = 0.0):
        super().__init__(name="guide")
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def forward(self, data: TimeSeries) -> Tensor:
        states, seen = dense_joint(data.num_times)
        shift = self.shift
        means, covariances = [], []
        for values, mask in zip(data.values[..., 0], data.mask[..., 0], strict=True):
            gain = torch.linalg.solve(seen[mask][:, mask], states[mask]).T
            means.append(gain @ values[mask])
            covariances.append(states - gain @ states[mask])
        mean, cov = torch.stack(means).unsqueeze(-1), torch.stack(covariances)
        var = cov.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)

        def step(state, k, summary):
            if state is None:
                return dist.Normal(mean[:, k] + shift, var[:, k].sqrt()).to_event(1)
            last = slice(k.start - 1, k.stop - 1)
            slope = cov.diagonal(offset=1, dim1=-2, dim2=-1)[:, last].unsqueeze(-1) / var[:, last]
            loc = mean[:, k] + shift + slope * (state - mean[:, last] - shift)
            return dist.Normal(loc, (var[:, k] - slope**2 * var[:, last]).sqrt()).to_event(1)

        law = MarkovPath.over(step, data.num_times, 1, step_mask=path_mask(data), batch_shape=data.batch_shape)
        with series_plate(data):
            return pyro.sample("z", law)


class LinearGuide(PyroModule):
    """q(z_k | y_k): a normal law whose location and log-scale are linear in the observation."""

    def __init__(self):
        super().__init__(name="guide")
        self.net = nn.Linear(1, 2).double()
        nn.init.zeros_(self.net.weight)

    def forward(self, data: TimeSeries) -> Tensor:
        loc, raw = self.net(data.values).chunk(2, -1)

        def step(state, k, summary):
            return dist.Normal(loc[:, k], raw[:, k].exp()).to_event(1)

        law = MarkovPath.over(step, data.num_times, 1, step_mask=path_mask(data), batch_shape=data.batch_shape)
        with series_plate(data):
            return pyro.sample("z", law)


class PointGuide(PyroModule):
    """A degenerate guide without noise: z is a fixed linear function of y, and log q = 0."""

    def __init__(self):
        super().__init__(name="guide")
        self.gain = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, data: TimeSeries) -> Tensor:
        gain = self.gain
        with series_plate(data):
            return pyro.sample("z", dist.Delta(gain * data.values, event_dim=2))


def simulate(num_series: int, num_times: int, seed: int = 0, ragged: bool = False, missing: float = 0.0) -> TimeSeries:
    """Draws from ``Chain()``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_series, num_times, dtype=torch.float64, generator=generator)
    states, _ = dense_joint(num_times)
    z = noise @ torch.linalg.cholesky(states).T
    y = z + NOISE * torch.randn(z.shape, dtype=torch.float64, generator=generator)
    hidden = torch.rand(z.shape, generator=generator) < missing
    hidden[:, 0] = False
    y[hidden] = math.nan
    lengths = torch.randint(1, num_times + 1, (num_series,), generator=generator) if ragged else None
    if lengths is not None:
        lengths[0] = num_times
    return TimeSeries(torch.arange(float(num_times)), y.unsqueeze(-1), lengths=lengths)
