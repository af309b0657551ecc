"""Small hidden Markov models, and every sum over their paths written out."""

import itertools
import math

import torch

from pyro_ssm import dynamics, emissions
from pyro_ssm.data import TimeSeries
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.models.laws import observation_law, path_law

D = torch.float64


def random_simplex(*shape):
    return torch.softmax(torch.randn(*shape), -1)


def chain_model(emission, K=3, inputs=0, seed=0):
    torch.manual_seed(seed)
    model = StateSpaceModel(
        dynamics.CategoricalInitial(K, probs=random_simplex(K)),
        dynamics.MarkovChain(K, input_dim=inputs, matrix=random_simplex(K, K)),
        emission,
    ).double()
    if inputs:
        model.transition.input_matrix.data.normal_()
    return model


def jump_model(emission, K=3, seed=0):
    torch.manual_seed(seed)
    transition = dynamics.MarkovJump(K, rates=0.1 + torch.rand(K, K))
    return StateSpaceModel(dynamics.CategoricalInitial(K, probs=random_simplex(K)), transition, emission).double()


def normal_emission(K=3, p=2, covariance="diagonal", **kwargs):
    emission = emissions.NormalTable(K, p, covariance, scale=0.5 + torch.rand(K, p), **kwargs)
    if covariance == "full":
        with torch.no_grad():
            emission.scale_tril_unconstrained.add_(0.4 * torch.randn(K, p, p).tril(-1))
    return emission


def random_data(batch=(), T=5, p=2, u=0, own_times=False, missing=0.3, lengths=None, counts=None, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, dtype=D, generator=generator)

    times = (0.2 + rand(*(batch if own_times else ()), T)).cumsum(-1)
    values = 4 * rand(*batch, T, p) - 2 if counts is None else (counts * rand(*batch, T, p)).floor()
    mask = rand(*values.shape) >= missing
    if T > 3 and missing:
        mask[..., 2, :] = False
    mask[..., 0, 0] = True
    return TimeSeries(times, values, mask=mask, inputs=2 * rand(*batch, T, u) - 1 if u else None, lengths=lengths)


def each(data):
    """Every series of a batch, cut to its length."""
    for position in itertools.product(*(range(size) for size in data.batch_shape)):
        own = data.times[position] if data.has_own_times else data.times
        length = data.num_times if data.lengths is None else int(data.lengths[position])
        inputs = None if data.inputs is None else data.inputs[position][:length]
        mask = data.mask[position][:length]
        yield position, length, TimeSeries(own[:length], data.values[position][:length], mask=mask, inputs=inputs)


def all_paths(states, T):
    """Every path ``(paths, T, state)`` over a list of states."""
    return torch.tensor(list(itertools.product(states, repeat=T)), dtype=D)


def joint(model, data, paths):
    """log p(path, y) of one series for every path."""
    bound = model.bind()
    prior = path_law(bound, data).log_prob(paths)
    return prior + observation_law(bound, data, paths).log_prob(data.values)


class Brute:
    """Sums over all paths of one series."""

    def __init__(self, model, data):
        K, T = model.transition.num_states, data.num_times
        self.K = K
        self.paths = all_paths([[float(j)] for j in range(K)], T)
        self.terms = joint(model, data, self.paths)
        self.index = self.paths[..., 0].long()
        self.posterior = self.terms.softmax(0)

    @property
    def log_likelihood(self):
        return self.terms.logsumexp(0)

    def marginals(self):
        hot = torch.nn.functional.one_hot(self.index, self.K).to(D)
        return torch.einsum("p,ptk->tk", self.posterior, hot)

    def pairwise(self):
        hot = torch.nn.functional.one_hot(self.index, self.K).to(D)
        return torch.einsum("p,pti,ptj->tij", self.posterior, hot[:, :-1], hot[:, 1:])

    def best(self):
        return self.index[self.terms.argmax()], self.terms.max()


def assert_gradients(total, model, step=1e-5):
    """First and second derivatives of ``total()`` in each finite learnable entry are central differences."""
    parameters = list(model.parameters())
    grads = torch.autograd.grad(total(), parameters, create_graph=True)
    size = sum(g.square().sum() for g in grads)
    second = torch.autograd.grad(size, parameters)
    for p, g, h in zip(parameters, grads, second, strict=True):
        for i in range(p.numel()):
            entry = p.data.view(-1)
            kept = entry[i].item()
            if not math.isfinite(kept):
                assert g.view(-1)[i] == 0
                continue
            ends = []
            for moved in (kept + step, kept - step):
                entry[i] = moved
                value = total()
                slope = torch.autograd.grad(value, parameters)
                ends.append((value.detach(), sum(s.square().sum() for s in slope)))
            entry[i] = kept
            torch.testing.assert_close(
                g.view(-1)[i].detach(), (ends[0][0] - ends[1][0]) / (2 * step), rtol=1e-5, atol=1e-7
            )
            torch.testing.assert_close(h.view(-1)[i], (ends[0][1] - ends[1][1]) / (2 * step), rtol=1e-4, atol=1e-6)
