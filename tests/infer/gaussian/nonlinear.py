"""Nonlinear Gaussian models, and linear ones that hide that they are."""

import functools

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

from pyro_ssm import dynamics, emissions, infer
from pyro_ssm.components import Emission, Gaussian, Transition
from pyro_ssm.data import TimeSeries
from pyro_ssm.models import StateSpaceModel

D = torch.float64

FILTERS = {
    "extended": infer.extended_kalman_filter,
    "unscented": infer.unscented_kalman_filter,
    "scaled": functools.partial(infer.unscented_kalman_filter, alpha=0.3, beta=2.0, kappa=0.5),
    "cubature": infer.cubature_kalman_filter,
    "gauss_hermite": infer.gauss_hermite_kalman_filter,
}
SMOOTHERS = {
    "extended": infer.extended_kalman_smoother,
    "unscented": infer.unscented_kalman_smoother,
    "scaled": functools.partial(infer.unscented_kalman_smoother, alpha=0.3, beta=2.0, kappa=0.5),
    "cubature": infer.cubature_kalman_smoother,
    "gauss_hermite": infer.gauss_hermite_kalman_smoother,
}
ITERATED = {
    rule: functools.partial(infer.iterated_posterior_linearisation_smoother, rule=rule)
    for rule in ("taylor", "cubature", "unscented", "gauss_hermite")
}


class OpaqueTransition(Gaussian, Transition):
    """A transition that says no more than that it is Gaussian."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.state_dim = inner, inner.state_dim

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class OpaqueEmission(Gaussian, Emission):
    """An emission that says no more than that it is Gaussian."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.state_dim, self.obs_dim = inner, inner.state_dim, inner.obs_dim

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def opaque(model):
    """The same model, linear but not known to be."""
    return StateSpaceModel(model.initial, OpaqueTransition(model.transition), OpaqueEmission(model.emission))


class Noisy(Gaussian, Transition):
    """z' ~ N(sin z, (0.3 + 0.2 z^2)^2), coordinate by coordinate: the noise depends on the state."""

    event_dims = {"a": 1}

    def __init__(self, state_dim, a=1.0):
        super().__init__()
        self.state_dim, self.a = state_dim, torch.as_tensor(a, dtype=D)

    def forward(self, state, time, next_time, inputs, memory=None):
        return dist.Normal(torch.sin(self.a * state), 0.3 + 0.2 * self.a * state.square()).to_event(1)


class Frequency(PyroModule):
    """sin(w z): a function with a learnable constant."""

    def __init__(self, w=1.0):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(w, dtype=D))

    def forward(self, z, u):
        return z + 0.5 * torch.sin(self.w * z)


def sine(state_noise=0.3, obs_noise=0.3, start=0.5):
    """z' ~ N(z + 0.5 sin z, state_noise^2), y ~ N(z, obs_noise^2)."""
    return StateSpaceModel(
        dynamics.NormalInitial(1, scale=start),
        dynamics.FunctionTransition(1, Frequency(), scale=state_noise),
        emissions.FunctionNormal(1, 1, lambda z, u: z, scale=obs_noise),
    ).double()


def pendulum(dt=0.1):
    """Särkkä's: angle and velocity, the sine of the angle observed, correlated noise."""

    def move(z, u):
        angle, velocity = z[..., 0], z[..., 1]
        return torch.stack([angle + dt * velocity, velocity - 9.8 * dt * torch.sin(angle)], -1)

    q = torch.tensor([[dt**3 / 3, dt**2 / 2], [dt**2 / 2, dt]], dtype=D)
    root = torch.linalg.cholesky(0.05 * q)
    return StateSpaceModel(
        dynamics.NormalInitial(2, loc=torch.tensor([1.5, 0.0]), scale=0.2),
        dynamics.FunctionTransition(2, move, scale=root, covariance="full"),
        emissions.FunctionNormal(2, 1, lambda z, u: torch.sin(z[..., :1]), scale=0.3),
    ).double()


def growth():
    """The univariate nonlinear growth model; its drive 8 cos(1.2 k) enters as an input."""
    return StateSpaceModel(
        dynamics.NormalInitial(1, scale=1.0),
        dynamics.FunctionTransition(1, lambda z, u: 0.5 * z + 25 * z / (1 + z.square()) + u, scale=10.0**0.5),
        emissions.FunctionNormal(1, 1, lambda z, u: z.square() / 20, scale=1.0),
    ).double()


def lorenz(dt=0.02):
    def move(z, u):
        x, y, v = z.unbind(-1)
        return z + dt * torch.stack([10 * (y - x), x * (28 - v) - y, x * y - 8 / 3 * v], -1)

    return StateSpaceModel(
        dynamics.NormalInitial(3, loc=torch.tensor([1.0, 1.0, 25.0]), scale=1.0),
        dynamics.FunctionTransition(3, move, scale=0.1),
        emissions.FunctionNormal(3, 2, lambda z, u: z[..., :2], scale=1.0),
    ).double()


def simulate(model, batch=(), num_times=10, inputs=None, missing=0.0, lengths=None, seed=0):
    """A path and its record, drawn from the model."""
    torch.manual_seed(seed)
    bound = model.bind()
    times = torch.arange(float(num_times), dtype=D)
    given = None if inputs is None else inputs.expand(*batch, *inputs.shape[-2:])

    def held(k):
        return None if given is None else given[..., k : k + 1, :]

    with torch.no_grad():
        first = bound.initial(times[:1], held(0))
        states = [first.expand(torch.Size(batch) + (1,)).sample()]
        for k in range(num_times - 1):
            states.append(bound.transition(states[-1], times[k : k + 1], times[k + 1 : k + 2], held(k)).sample())
        path = torch.cat(states, -2)
        record = bound.emission(path, times, given).sample()
    mask = torch.rand(record.shape) >= missing
    mask[..., 0, 0] = True
    return path, TimeSeries(times, record, mask=mask, inputs=given, lengths=lengths)


def drive(num_times):
    return 8 * torch.cos(1.2 * torch.arange(num_times, dtype=D)).unsqueeze(-1)


def grid_filter(move, state_noise, look, obs_noise, start, y, inputs=None, half_width=8.0, points=1601):
    """The true filter of a scalar model by numerical integration: filtered means, deviations, log-likelihoods."""
    x = torch.linspace(-half_width, half_width, points, dtype=D)
    width = x[1] - x[0]
    law = dist.Normal(torch.zeros((), dtype=D), start).log_prob(x).exp()
    means, deviations, terms = [], [], []
    for k, value in enumerate(y):
        if k:
            u = 0.0 if inputs is None else inputs[k - 1]
            kernel = dist.Normal(move(x, u), state_noise).log_prob(x[:, None]).exp()  # (to, from)
            law = kernel @ law * width
        law = law * dist.Normal(look(x), obs_noise).log_prob(value).exp()
        total = law.sum() * width
        law = law / total
        mean = (x * law).sum() * width
        means.append(mean)
        deviations.append((((x - mean).square() * law).sum() * width).sqrt())
        terms.append(total.log())
    return torch.stack(means), torch.stack(deviations), torch.stack(terms)
