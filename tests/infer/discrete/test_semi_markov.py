"""Hidden semi-Markov models against the sum over all segmentations."""

import itertools

import pytest
import torch
from torch.distributions import Categorical

import pyro_ssm as ssm
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import (
    hmm_filter,
    hmm_smoother,
    hsmm_filter,
    hsmm_smoother,
    hsmm_viterbi,
    sample_posterior_segments,
)
from pyro_ssm.models import StateSpaceModel
from tests.infer.discrete.brute import D, assert_gradients, each, joint, normal_emission, random_data, random_simplex

DURATIONS = {
    "categorical": lambda K, n: ssm.dynamics.CategoricalDuration(K, n, random_simplex(K, n)),
    "zeros": lambda K, n: ssm.dynamics.CategoricalDuration(K, n, torch.eye(n)[:K]),
    "poisson": lambda K, n: ssm.dynamics.PoissonDuration(K, n, torch.linspace(0.5, 2.0, K)),
    "negative binomial": lambda K, n: ssm.dynamics.NegativeBinomialDuration(K, n, 1.5, torch.linspace(0.5, 3.0, K)),
}


def semi_markov(duration, K=2, seed=0, self_moves=False):
    torch.manual_seed(seed)
    matrix = random_simplex(K, K) if self_moves else None
    transition = ssm.dynamics.SemiMarkov(K, duration, matrix)
    initial = ssm.dynamics.SemiMarkovInitial(transition, random_simplex(K))
    return StateSpaceModel(initial, transition, normal_emission(K, state_dim=2)).double()


class Segmentations:
    """Every way to cut 1..T into segments with states and durations, the last cut off by the end."""

    def __init__(self, model, data):
        bound, T = model.bind(), data.num_times
        K, n = model.transition.num_states, model.transition.duration.max_duration
        log_pi, log_A = bound.initial.probs.log(), bound.transition.matrix.log()
        log_d = bound.transition.duration.log_probs()[0]
        table = [bound.emission.law(torch.full((T,), j)) for j in range(K)]
        zero = torch.zeros((), dtype=D)
        seen = torch.stack(
            [torch.where(data.mask, law.base_dist.log_prob(data.values), zero).sum(-1) for law in table], -1
        )
        self.paths, self.starts, self.remaining, terms = [], [], [], []

        def grow(states, starts, remaining, log_p):
            if len(states) >= T:
                self.paths.append(states[:T])
                self.starts.append(starts[:T])
                self.remaining.append(remaining[:T])
                terms.append(log_p + sum(seen[k, j] for k, j in enumerate(states[:T])))
                return
            for j, d in itertools.product(range(K), range(1, n + 1)):
                move = log_pi[j] if not states else log_A[states[-1], j]
                more = log_p + move + log_d[j, d - 1]
                if more > -torch.inf:
                    grow(states + [j] * d, starts + [1] + [0] * (d - 1), remaining + list(range(d, 0, -1)), more)

        grow([], [], [], zero)
        self.terms = torch.stack(terms)
        self.weights = self.terms.softmax(0)
        self.paths, self.starts, self.remaining = (torch.tensor(x) for x in (self.paths, self.starts, self.remaining))


def close(one, other, tolerance=1e-9):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("self_moves", [False, True])
@pytest.mark.parametrize("kind", DURATIONS)
def test_all_results_are_sums_over_segmentations(kind, self_moves):
    model = semi_markov(DURATIONS[kind](2, 3), self_moves=self_moves)
    data = random_data((2,), T=5, lengths=torch.tensor([5, 3]))
    filtered, smoothed, best = hsmm_filter(model, data), hsmm_smoother(model, data), hsmm_viterbi(model, data)
    for i, length, one in each(data):
        brute = Segmentations(model, one)
        close(filtered.log_likelihood[i].sum(), brute.terms.logsumexp(0))
        assert (filtered.log_likelihood[i][length:] == 0).all()
        for k, j in itertools.product(range(length), range(2)):
            mine = brute.weights * (brute.paths[:, k] == j)
            close(smoothed.probs[i][k, j], mine.sum())
            close(smoothed.starts[i][k, j], (mine * brute.starts[:, k]).sum())
            for r in range(3):
                close(smoothed.remaining[i][k, j, r], (mine * (brute.remaining[:, k] == r + 1)).sum())
        assert (smoothed.starts[i][length:] == 0).all()
        close(best.log_prob[i], brute.terms.max())
        mine = (brute.paths == best.states[i][:length]) & (brute.remaining == best.remaining[i][:length])
        close(brute.terms[mine.all(-1)], brute.terms.max().reshape(1))  # there may be ties
        first = one.hide((torch.arange(length) > 1)[:, None])
        close(filtered.log_likelihood[i][:2].sum(), Segmentations(model, first).terms.logsumexp(0))


def test_the_program_has_the_same_density():
    """The states' own law (simulation, particle filters) and the recursions are one model."""
    model = semi_markov(DURATIONS["poisson"](2, 3))
    data = random_data(T=4)
    pairs = [[float(j), float(r)] for j in range(2) for r in range(1, 4)]
    paths = torch.tensor(list(itertools.product(pairs, repeat=4)), dtype=D)
    close(joint(model, data, paths).logsumexp(0), hsmm_filter(model, data).log_likelihood.sum())
    z, y = model(data.without_values())
    assert z.shape == (4, 2) and y.shape == (4, 2)


def test_posterior_paths_have_the_posterior_s_frequencies():
    model, data, num = semi_markov(DURATIONS["categorical"](2, 3)), random_data((2,), T=4), 20_000
    smoothed, draws = hsmm_smoother(model, data), sample_posterior_segments(model, data, (num,)).long()
    assert draws.shape == (num, 2, 4, 2)
    for j, r in itertools.product(range(2), range(3)):
        p = smoothed.remaining[..., j, r]
        found = ((draws[..., 0] == j) & (draws[..., 1] == r + 1)).double().mean(0)
        assert ((found - p).abs() < 4.5 * (p * (1 - p) / num).clamp_min(1e-9).sqrt()).all()
    for (i,), _, one in each(data):  # the joint density along the draws has the mean that it has under the posterior
        found, brute = joint(model, one, draws[:, i].double()), Segmentations(model, one)
        mean = (brute.weights * brute.terms).sum()
        spread = (brute.weights * (brute.terms - mean).square()).sum().sqrt()
        assert (found.mean() - mean).abs() < 4.5 * spread / num**0.5


def test_geometric_durations_are_a_markov_chain():
    """P(d) = (1 - a) a^(d - 1), cut far out, is a chain that stays with probability a."""
    a = 0.6
    duration = ssm.dynamics.NegativeBinomialDuration(3, 80, mean=a / (1 - a), concentration=1.0)
    model = semi_markov(duration, K=3)
    matrix = a * torch.eye(3) + (1 - a) / 2 * (1 - torch.eye(3))
    chain = StateSpaceModel(
        ssm.dynamics.CategoricalInitial(3, probs=model.initial.probs.detach().float()),
        ssm.dynamics.MarkovChain(3, matrix=matrix),
        normal_emission(3),
    ).double()
    chain.emission.load_state_dict(model.emission.state_dict())
    data = random_data((2,), T=12)
    close(hsmm_filter(model, data).log_likelihood, hmm_filter(chain, data).log_likelihood, 1e-6)
    close(hsmm_smoother(model, data).probs, hmm_smoother(chain, data).probs, 1e-6)


def test_gradients_and_draws_of_parameters():
    model, data = semi_markov(DURATIONS["zeros"](2, 3)), random_data((2,), T=5)
    assert_gradients(lambda: hsmm_filter(model, data).log_likelihood.sum(), model)
    model = semi_markov(DURATIONS["poisson"](2, 4))
    rate = torch.tensor([0.7, 1.9], dtype=D, requires_grad=True)

    def total(rate):
        return hsmm_filter(model.bind({"transition.duration.rate": rate}), data).log_likelihood.sum()

    assert torch.autograd.gradcheck(total, (rate,))
    values = torch.rand(3, 1, 2, dtype=D) + 0.5
    whole = hsmm_smoother(model.bind({"transition.duration.rate": values}), data)
    for s in range(3):
        alone = hsmm_smoother(model.bind({"transition.duration.rate": values[s, 0]}), data)
        close(whole.probs[s], alone.probs)
        close(whole.log_likelihood[s], alone.log_likelihood)


def test_durations_are_normalised_and_as_stated():
    for make in DURATIONS.values():
        log_probs = make(2, 5).log_probs()
        assert log_probs.shape == (1, 2, 5)
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(1, 2))
    far = ssm.dynamics.NegativeBinomialDuration(1, 400, mean=3.0, concentration=2.0).log_probs().exp()[0, 0].detach()
    d = torch.arange(1.0, 401.0)
    mean = (far * d).sum()
    torch.testing.assert_close(mean, torch.tensor(4.0), rtol=1e-4, atol=0)
    torch.testing.assert_close((far * (d - mean) ** 2).sum(), torch.tensor(3.0 + 9 / 2), rtol=1e-3, atol=0)


def test_marginal_simulates_and_errors_name_the_way_out():
    model, data = semi_markov(DURATIONS["poisson"](2, 4)), random_data((2,), T=5)
    marginal = ssm.infer.Marginal(model, filter=hsmm_filter)
    assert marginal(data.without_values()).shape == (2, 5, 2)
    with pytest.raises(TypeError, match="hmm_filter needs a component that is FiniteState"):
        hmm_filter(model, data)
    chain = StateSpaceModel(ssm.dynamics.CategoricalInitial(2), ssm.dynamics.MarkovChain(2), normal_emission(2))
    with pytest.raises(TypeError, match="hsmm_filter needs a semi-Markov model, got initial CategoricalInitial"):
        hsmm_filter(chain, data)
    with pytest.raises(TypeError, match="must be a Duration"):
        ssm.dynamics.SemiMarkov(2, Categorical(torch.ones(2)))
    one = TimeSeries(torch.zeros(1), torch.zeros(1, 2).double())
    assert abs(hsmm_smoother(model, one).starts.sum() - 1) < 1e-12 and hsmm_viterbi(model, one).states.shape == (1,)
