"""A linear-Gaussian model of two random parameters whose posterior is known by quadrature, and its judge."""

import math
from functools import cache
from typing import NamedTuple

import pyro.distributions as dist
import torch
from pyro.nn import PyroSample
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.dynamics import NormalInitial, OrnsteinUhlenbeck
from pyro_ssm.emissions import LinearNormal
from pyro_ssm.infer import kalman_filter, kalman_smoother
from pyro_ssm.models import StateSpaceModel

D = torch.float64
RATE, SCALE = dist.LogNormal(torch.tensor(-0.5, dtype=D), 0.7), dist.LogNormal(torch.tensor(-0.3, dtype=D), 0.35)


def make_model(one=False):
    """An Ornstein-Uhlenbeck process seen with noise: its rate has a prior, and unless ``one`` the noise's scale too."""
    model = StateSpaceModel(
        NormalInitial(1, scale=1.0),
        OrnsteinUhlenbeck(1, diffusion=1.0),
        LinearNormal(1, 1, matrix=torch.ones(1, 1), scale=0.8),
    ).double()
    model.requires_grad_(False)
    model.transition.rate = PyroSample(RATE)
    if not one:
        model.emission.scale = PyroSample(SCALE)
    return model


def make_data(num_times=20, batch=(), seed=3):
    """Records of the model at rate 0.6 and scale 0.8, at irregular times, two values missing."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        times = torch.cumsum(0.3 + torch.rand(num_times, dtype=D), 0)
        grid = TimeSeries(times.expand(batch + (num_times,)))
        values = {"transition.rate": torch.tensor(0.6, dtype=D), "emission.scale": torch.tensor(0.8, dtype=D)}
        _, y = make_model().bind(values)(grid)
        y[..., [1, 3], :] = math.nan
    return TimeSeries(times, y)


class Known(NamedTuple):
    """The posterior of the logarithms of the parameters, and of the states, by quadrature."""

    log_evidence: float
    mean: Tensor  # (dim,), of the logarithms
    std: Tensor
    states: Tensor  # (*batch, time, state), their mean
    best: Tensor  # where the likelihood is largest on the grid
    best_log_likelihood: float


def quadrature(model, data, size=41):
    """The grid's sums: the integrand is smooth and vanishes at the ends, where the rule is exact to many digits."""
    laws = [(float(prior.loc), float(prior.scale)) for _, prior in priors(model)]
    axes = [torch.linspace(m - 5 * s, m + 5 * s, size, dtype=D) for m, s in laws]
    grid = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    ones = (1,) * len(data.batch_shape)
    values = {name: grid[:, i].exp().reshape((-1,) + ones) for i, (name, _) in enumerate(priors(model))}
    bound = model.bind(values)
    log_likelihood = kalman_filter(bound, data).log_likelihood.reshape(len(grid), -1).sum(-1)
    log_prior = sum(prior.log_prob(grid[:, i].exp()) + grid[:, i] for i, (_, prior) in enumerate(priors(model)))
    joint = log_prior + log_likelihood
    cell = sum(math.log(float(axis[1] - axis[0])) for axis in axes)
    weights = joint.softmax(0)
    mean = weights @ grid
    std = (weights @ (grid - mean) ** 2).sqrt()
    states = torch.tensordot(weights, kalman_smoother(bound, data).mean, 1)
    best = int(log_likelihood.argmax())
    return Known(float(joint.logsumexp(0)) + cell, mean, std, states, grid[best], float(log_likelihood[best]))


def priors(model):
    found = [("transition.rate", RATE)]
    if "scale" in model.emission.__dict__.get("_pyro_samples", {}):
        found.append(("emission.scale", SCALE))
    return found


def logs(result, model):
    """Draws ``(chains, draws, dim)`` of the logarithms."""
    return torch.stack([result.parameters[name].log() for name, _ in priors(model)], -1)


@cache
def judged(one=False, num_times=8, batch=(2,)):
    """A model, data that teach something about it, and its posterior."""
    model, data = make_model(one), make_data(num_times, batch)
    return model, data, quadrature(model, data)


def assert_mean(found, exact, spread, sigmas=4.0, precision=0.2):
    """Independent estimates ``(runs, *)`` are right in the mean, by their own standard error, which must be small
    beside the posterior's ``spread``.
    """
    error = found.std(0) / math.sqrt(len(found))
    assert bool((error < precision * spread).all()), ("too variable to show anything", error / spread)
    score = (found.mean(0) - exact) / error
    assert bool((score.abs() < sigmas).all()), score
