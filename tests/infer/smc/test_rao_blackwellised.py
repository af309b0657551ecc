"""A switching linear model with its linear part integrated out, against the sum over all regimes."""

import itertools

import pytest
import torch

from pyro_ssm.components import Affine
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import FeynmanKac, particle_filter, rao_blackwellised
from pyro_ssm.infer.smc import Moments, Weighed, linear_step
from pyro_ssm.ops.kalman import kalman_filter_reference
from tests.infer.smc.programs import D, assert_unbiased, repeated

T = 5
START = torch.tensor([0.7, 0.3], dtype=D)
MOVE = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=D)
F = torch.tensor([[[0.9, 0.3], [0.0, 0.8]], [[-0.5, 0.0], [0.4, 0.6]]], dtype=D)
b = torch.tensor([[0.0, 0.0], [0.5, -0.5]], dtype=D)
Q = torch.tensor([0.3, 0.7], dtype=D)[:, None, None] * torch.eye(2, dtype=D)
H = torch.tensor([[[1.0, 0.0]], [[0.5, 1.0]]], dtype=D)
d = torch.zeros(2, 1, dtype=D)
R = torch.tensor([0.4, 0.9], dtype=D)[:, None, None]


def some_data():
    values = torch.tensor([0.3, -0.8, 1.2, 0.1, 0.9], dtype=D).reshape(T, 1)
    return TimeSeries(torch.arange(float(T)), values, mask=(torch.arange(T) != 2).reshape(T, 1))


def enumerated(data):
    """log p(y) and E[x_T | y], regime path by regime path."""
    terms, means = [], []
    for path in itertools.product(range(2), repeat=T):
        s = torch.tensor(path)
        log_prior = START[s[0]].log() + MOVE[s[:-1], s[1:]].log().sum()
        steps = kalman_filter_reference(
            data.values, data.mask, torch.zeros(2, dtype=D), torch.eye(2, dtype=D),
            F[s[1:]], b[s[1:]], Q[s[1:]], H[s], d[s], R[s],
        )  # fmt: skip
        terms.append(log_prior + steps.log_likelihood.sum())
        means.append(steps.filtered_mean[-1])
    terms = torch.stack(terms)
    return terms.logsumexp(0), (terms.softmax(0).unsqueeze(-1) * torch.stack(means)).sum(0)


def regimes(data):
    """Particles: (mean, root, regime)."""

    def update(k, s, mean, root):
        transition = None if k == 0 else Affine(F[s], b[s], Q[s])
        value, mask = data.values[..., k, :], data.mask[..., k, :]
        mean, root, weight = linear_step(mean, root, transition, Affine(H[s], d[s], R[s]), value, mask)
        return Weighed((mean, root, s), weight)

    def start(draw, shape):
        s = torch.multinomial(START, shape.numel(), True).reshape(shape)
        mean = torch.zeros(shape + (2,), dtype=D)
        return update(0, s, mean, torch.eye(2, dtype=D).expand(shape + (2, 2)))

    def step(k, particles, draw):
        mean, root, s = particles
        s = torch.multinomial(MOVE[s.reshape(-1)], 1).reshape(s.shape)
        return update(k, s, mean, root)

    return rao_blackwellised(start, step, data)


def test_evidence_and_mean_against_enumeration():
    data = some_data()
    exact, mean = enumerated(data)
    found = particle_filter(regimes(repeated(data, 1000)), 30, collectors=[Moments()])
    assert_unbiased(found.total, exact)
    assert (found.log_likelihood[:, 2] == 0).all()
    last = found.collected["moments"].mean[:, -1]
    assert ((last.mean(0) - mean).abs() < 4.5 * last.std(0) / 1000**0.5 + 5e-3).all()


def test_varies_less_than_a_filter_that_draws_both_parts():
    data = some_data()
    many = repeated(data, 300)
    exact, _ = enumerated(data)

    def observe(k, x, s):
        loc = (H[s] @ x.unsqueeze(-1)).squeeze(-1)
        law = torch.distributions.Normal(loc, R[s].squeeze(-1))
        return torch.where(many.mask[..., k, :], law.log_prob(many.values[..., k, :]), 0.0).sum(-1)

    def start(draw, shape):
        return torch.randn(shape + (2,), dtype=D), torch.multinomial(START, shape.numel(), True).reshape(shape)

    def move(k, particles, draw):
        x, s = particles
        s = torch.multinomial(MOVE[s.reshape(-1)], 1).reshape(s.shape)
        x = (F[s] @ x.unsqueeze(-1)).squeeze(-1) + b[s]
        return x + (Q[s] @ torch.randn_like(x).unsqueeze(-1)).squeeze(-1), s

    both = FeynmanKac(start, move, lambda k, previous, p: observe(k, *p), T, torch.Size([300]))
    blind = particle_filter(both, 60).total
    assert_unbiased(blind, exact)
    assert particle_filter(regimes(many), 60).total.std() < 0.5 * blind.std()


def test_data_it_cannot_take():
    with pytest.raises(ValueError, match="no values"):
        rao_blackwellised(None, None, some_data().without_values())
    with pytest.raises(ValueError, match="refined"):
        rao_blackwellised(None, None, some_data().refine(2))
