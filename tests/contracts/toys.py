"""Small linear-Gaussian components and a plain simulator: the dense joint normal is the reference of many tests."""

import torch
from pyro.distributions import Independent, Normal
from torch import nn

from pyro_ssm.components import Affine, AffineGaussian, Emission, Gaussian, Initial, Memory, Transition, gap
from pyro_ssm.data import TimeSeries
from pyro_ssm.models import StateSpaceModel


def normal(loc, scale):
    return Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)


class Start(Initial, Gaussian):
    """z_1 ~ N(loc + W m, exp(log_scale)^2)."""

    event_dims = {"loc": 1, "log_scale": 1, "memory_weight": 2}

    def __init__(self, state_dim, memory_dim=0):
        super().__init__()
        self.state_dim = state_dim
        self.loc = nn.Parameter(0.3 * torch.arange(1.0, state_dim + 1))
        self.log_scale = nn.Parameter(0.1 * torch.arange(state_dim).float())
        if memory_dim:
            self.memory_weight = nn.Parameter(0.4 * torch.ones(state_dim, memory_dim))

    def forward(self, time, inputs, memory=None):
        loc = self.loc
        if memory is not None:
            loc = loc + (self.memory_weight @ memory.unsqueeze(-1)).squeeze(-1)
        loc = loc.expand(torch.broadcast_shapes(loc.shape[:-1], time.shape) + loc.shape[-1:])
        return normal(loc, self.log_scale.exp())


class Decay(Transition, AffineGaussian):
    """Exact over any gap: e^{-r D} z + (1 - e^{-r D}) level + W m, variance s^2 (1 - e^{-2 r D})."""

    event_dims = {"rate": 1, "log_scale": 1, "level": 1, "memory_weight": 2}

    def __init__(self, state_dim, memory_dim=0):
        super().__init__()
        self.state_dim = state_dim
        self.rate = nn.Parameter(torch.linspace(0.4, 0.8, state_dim))
        self.level = nn.Parameter(torch.linspace(-0.5, 0.5, state_dim))
        self.log_scale = nn.Parameter(torch.linspace(-0.2, 0.2, state_dim))
        if memory_dim:
            self.memory_weight = nn.Parameter(-0.3 * torch.ones(state_dim, memory_dim))

    def _parts(self, time, next_time, memory):
        decay = torch.exp(-self.rate * gap(time, next_time, like=self.rate))
        offset = (1 - decay) * self.level
        if memory is not None:
            offset = offset + (self.memory_weight @ memory.unsqueeze(-1)).squeeze(-1)
        return decay, offset, self.log_scale.exp() * (1 - decay.square()).sqrt()

    def forward(self, state, time, next_time, inputs, memory=None):
        decay, offset, scale = self._parts(time, next_time, memory)
        loc = decay * state + offset
        return normal(loc, scale.expand(loc.shape))

    def affine(self, time, next_time, inputs, memory=None):
        decay, offset, scale = self._parts(time, next_time, memory)
        return Affine(torch.diag_embed(decay), offset, torch.diag_embed(scale))


class See(Emission, AffineGaussian):
    """y ~ N(C z + d + W m, exp(log_scale)^2)."""

    event_dims = {"matrix": 2, "offset": 1, "log_scale": 1, "memory_weight": 2}

    def __init__(self, state_dim, obs_dim, memory_dim=0):
        super().__init__()
        self.state_dim, self.obs_dim = state_dim, obs_dim
        self.matrix = nn.Parameter(torch.linspace(-0.5, 1.5, obs_dim * state_dim).reshape(obs_dim, state_dim))
        self.offset = nn.Parameter(torch.linspace(0.2, 0.4, obs_dim))
        self.log_scale = nn.Parameter(torch.linspace(-0.7, -0.4, obs_dim))
        if memory_dim:
            self.memory_weight = nn.Parameter(0.25 * torch.ones(obs_dim, memory_dim))

    def forward(self, state, time, inputs, memory=None):
        loc = (self.matrix @ state.unsqueeze(-1)).squeeze(-1) + self.offset
        if memory is not None:
            loc = loc + (self.memory_weight @ memory.unsqueeze(-1)).squeeze(-1)
        return normal(loc, self.log_scale.exp().expand(loc.shape))

    def affine(self, time, inputs, memory=None):
        offset = self.offset
        if memory is not None:
            offset = offset + (self.memory_weight @ memory.unsqueeze(-1)).squeeze(-1)
        return Affine(self.matrix, offset, torch.diag_embed(self.log_scale.exp()))


class Leak(Memory):
    """m' = m + U z, then m = a m' + b V (mask * y): linear, of two features, in the base class's loop."""

    features = 2
    sees_observations = True
    event_dims = {"keep": 1, "state_weight": 2, "value_weight": 2, "first": 1}

    def __init__(self, state_dim, obs_dim):
        super().__init__()
        self.first = nn.Parameter(torch.tensor([0.5, -0.2]))
        self.keep = nn.Parameter(torch.tensor([0.6, 0.3]))
        self.state_weight = nn.Parameter(0.2 * torch.ones(2, state_dim))
        self.value_weight = nn.Parameter(torch.linspace(-0.4, 0.5, 2 * obs_dim).reshape(2, obs_dim))

    def start(self, shape):
        first = self.first.expand(tuple(shape) + (1, 2))
        return first, first

    def see_state(self, carry, state, gap, inputs):
        after = carry + (self.state_weight @ state.unsqueeze(-1)).squeeze(-1)
        return after, after

    def see_observation(self, carry, values, mask):
        seen = torch.where(mask, values, torch.zeros((), dtype=values.dtype))
        after = self.keep * carry + (self.value_weight @ seen.unsqueeze(-1)).squeeze(-1)
        return after, after


class StateLeak(Leak):
    """The same without observations: m = a (m + U z)."""

    sees_observations = False

    def __init__(self, state_dim):
        super().__init__(state_dim, 1)
        del self.value_weight

    def see_state(self, carry, state, gap, inputs):
        after = self.keep * (carry + (self.state_weight @ state.unsqueeze(-1)).squeeze(-1))
        return after, after


def toy(state_dim=2, obs_dim=2, dtype=torch.float64):
    """A Markov model."""
    return StateSpaceModel(Start(state_dim), Decay(state_dim), See(state_dim, obs_dim)).to(dtype)


def remembering(state_dim=2, obs_dim=2, dtype=torch.float64):
    """A model whose memory sees states and observations."""
    return StateSpaceModel(
        Start(state_dim, 2), Decay(state_dim, 2), See(state_dim, obs_dim, 2), Leak(state_dim, obs_dim)
    ).to(dtype)


def simulate(model, times, noise_z, noise_y):
    """A plain loop over time: noise ``(n, time, .)`` to ``z`` and ``y``; reads these toys, memory and all."""
    a, b, c, memory = model.initial, model.transition, model.emission, model.memory
    with torch.no_grad():
        m = None if memory is None else memory.first.expand(len(noise_z), 2)
        zs, ys = [], []
        for k in range(noise_z.shape[1]):
            if k == 0:
                loc, scale = a.loc.expand(noise_z[:, 0].shape), a.log_scale.exp()
                if m is not None:
                    loc = loc + m @ a.memory_weight.T
            else:
                decay = torch.exp(-b.rate * float(times[k] - times[k - 1]))
                loc = decay * zs[-1] + (1 - decay) * b.level
                scale = b.log_scale.exp() * (1 - decay**2).sqrt()
                if m is not None:
                    loc = loc + m @ b.memory_weight.T
            zs.append(loc + scale * noise_z[:, k])
            if m is not None:
                m = m + zs[-1] @ memory.state_weight.T
            y = zs[-1] @ c.matrix.T + c.offset + c.log_scale.exp() * noise_y[:, k]
            if m is not None:
                y = y + m @ c.memory_weight.T
                m = memory.keep * m + y @ memory.value_weight.T
            ys.append(y)
    return torch.stack(zs, 1), torch.stack(ys, 1)


def joint(model, times):
    """Mean and covariance of the flat vector (z, y), by pushing unit noise through the simulator."""
    d, p, num = model.initial.state_dim, model.emission.obs_dim, len(times)
    size = num * (d + p)
    unit = torch.cat([torch.zeros(1, size), torch.eye(size)]).double()
    z, y = simulate(model, times, unit[:, : num * d].reshape(-1, num, d), unit[:, num * d :].reshape(-1, num, p))
    out = torch.cat([z.flatten(1), y.flatten(1)], 1)
    root = (out[1:] - out[0]).T
    return out[0], root @ root.T


def dense_normal(model, times):
    mean, square = joint(model, times)
    return torch.distributions.MultivariateNormal(mean, square)


def posterior(model, data):
    """p(z | y) and log p(y) of one series, entries of ``data.mask`` only, from the dense joint normal."""
    mean, square = joint(model, data.times)
    split = data.num_times * model.initial.state_dim
    seen = split + data.mask.flatten().nonzero()[:, 0]
    y = data.values.flatten()[data.mask.flatten()]
    evidence = torch.distributions.MultivariateNormal(mean[seen], square[seen][:, seen])
    gain = torch.linalg.solve(square[seen][:, seen], square[seen][:, :split]).T
    loc = mean[:split] + gain @ (y - mean[seen])
    return torch.distributions.MultivariateNormal(
        loc, square[:split, :split] - gain @ square[seen][:, :split]
    ), evidence.log_prob(y)


def series(num_times=4, batch=(), obs_dim=2, seed=1, own=False, missing=False, dtype=torch.float64):
    """Irregular times and some values."""
    gen = torch.Generator().manual_seed(seed)
    shape = (*batch, num_times) if own else (num_times,)
    times = torch.rand(shape, generator=gen, dtype=torch.float64).add(0.2).cumsum(-1)
    values = torch.randn(*batch, num_times, obs_dim, generator=gen, dtype=torch.float64).to(dtype)
    mask = None
    if missing:
        mask = torch.rand(values.shape, generator=gen) < 0.6
        mask[..., 0, :] = True
    return TimeSeries(times, values, mask=mask)
