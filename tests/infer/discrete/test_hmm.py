"""Forward-backward, Viterbi and posterior paths against sums over all paths."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyro_ssm as ssm
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import Marginal, hmm_filter, hmm_smoother, sample_posterior_states, viterbi
from pyro_ssm.models import StateSpaceModel
from tests.infer.discrete.brute import (
    Brute,
    assert_gradients,
    chain_model,
    each,
    jump_model,
    normal_emission,
    random_data,
)


class Scaled(PyroModule):
    """A user's law by the index, with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.spread = nn.Parameter(torch.tensor([0.5, 1.0, 2.0]))

    def forward(self, index):
        return dist.Laplace(0.0, self.spread[index].unsqueeze(-1).expand(index.shape + (2,))).to_event(1)


CASES = {
    "normal": (lambda: chain_model(normal_emission()), {}),
    "normal, full": (lambda: chain_model(normal_emission(covariance="full")), {}),
    "inputs": (lambda: chain_model(normal_emission(), inputs=2), {"u": 2}),
    "jump, own times": (lambda: jump_model(normal_emission()), {"own_times": True}),
    "poisson": (lambda: chain_model(ssm.emissions.PoissonTable(3, 2)), {"counts": 5}),
    "categorical": (lambda: chain_model(ssm.emissions.CategoricalTable(3, 2, 4)), {"counts": 4}),
    "student": (lambda: chain_model(ssm.emissions.StudentTTable(3, 2)), {}),
    "by state": (lambda: chain_model(ssm.emissions.ByState(3, 2, Scaled())), {}),
    "network of the index": (lambda: chain_model(ssm.emissions.Normal(1, 2, 4)), {}),
}


def close(one, other, tolerance=1e-9):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_all_results_are_sums_over_paths(case, parallel):
    make, options = CASES[case]
    model, lengths = make(), torch.tensor([5, 3, 1])
    for given in ({}, {"lengths": lengths}):
        data = random_data((3,), **options, **given)
        filtered, smoothed, best = (f(model, data, parallel=parallel) for f in (hmm_filter, hmm_smoother, viterbi))
        assert filtered.exact and smoothed.exact
        for i, length, one in each(data):
            brute = Brute(model, one)
            close(filtered.log_likelihood[i].sum(), brute.log_likelihood)
            close(smoothed.probs[i][:length], brute.marginals())
            close(smoothed.pairwise[i][: length - 1], brute.pairwise())
            path, log_prob = brute.best()
            assert best.states[i][:length].tolist() == path.tolist()
            close(best.log_prob[i], log_prob)
            assert (filtered.log_likelihood[i][length:] == 0).all()
            close(smoothed.probs[i][length:], smoothed.probs[i][length - 1].expand(5 - length, 3))
            assert (best.states[i][length:] == path[-1]).all()


def test_filter_laws_are_sums_over_paths_of_what_is_seen_so_far():
    model, data = chain_model(normal_emission()), random_data(seed=5)
    filtered = hmm_filter(model, data)
    steps = torch.arange(data.num_times)[:, None]
    for k in range(data.num_times):
        until, before = data.hide(steps > k), data.hide(steps >= k)
        close(filtered.log_filtered[k].exp(), Brute(model, until).marginals()[k])
        close(filtered.log_predicted[k].exp(), Brute(model, before).marginals()[k])
        close(filtered.log_likelihood[: k + 1].sum(), Brute(model, until).log_likelihood)
    assert filtered.log_likelihood[2] == 0  # nothing seen


def test_missing_entry_and_refined_grid():
    model, data = jump_model(normal_emission()), random_data((2,), own_times=True)
    fine = data.refine(3)
    close(hmm_filter(model, fine).log_likelihood.sum(-1), hmm_filter(model, data).log_likelihood.sum(-1))
    close(hmm_smoother(model, fine).probs[:, fine.observed_index], hmm_smoother(model, data).probs)
    assert (hmm_filter(model, fine).log_likelihood[:, 1] == 0).all()


def test_one_time_one_state():
    model = chain_model(normal_emission(K=1), K=1)
    data = random_data(T=1, missing=0.0)
    alone = model.emission.law(torch.zeros(1, dtype=torch.long)).log_prob(data.values)
    close(hmm_filter(model, data).log_likelihood, alone)
    assert hmm_smoother(model, data).pairwise.shape == (0, 1, 1)
    assert viterbi(model, data).states.tolist() == [0] and sample_posterior_states(model, data).shape == (1, 1)


def test_sample_dims_of_parameters_are_a_loop():
    model, data = chain_model(normal_emission()), random_data((2,))
    values = {
        "transition.matrix": torch.softmax(torch.randn(4, 1, 3, 3).double(), -1),
        "emission.loc": torch.randn(4, 2, 3, 2).double(),
        "initial.probs": torch.softmax(torch.randn(4, 1, 3).double(), -1),
    }
    bound = model.bind(values)
    filtered, smoothed = hmm_filter(bound, data), hmm_smoother(bound, data)
    draws = sample_posterior_states(bound, data, (7,))
    assert draws.shape == (7, 4, 2, 5, 1) and viterbi(bound, data).states.shape == (4, 2, 5)
    for s in range(4):
        for i, _, one in each(data):
            alone = {k: v[s, i[0]] if v.shape[1] == 2 else v[s, 0] for k, v in values.items()}
            close(filtered.log_likelihood[s][i], hmm_filter(model.bind(alone), one).log_likelihood)
            close(smoothed.probs[s][i], hmm_smoother(model.bind(alone), one).probs)


def test_posterior_paths_have_the_posterior_s_frequencies():
    model, data = chain_model(normal_emission()), random_data(T=4)
    brute, num = Brute(model, data), 20_000
    draws = sample_posterior_states(model, data, (num,))[..., 0].long()
    code = (draws * 3 ** torch.arange(3, -1, -1)).sum(-1)
    counts = torch.bincount(code, minlength=81).double()
    p = brute.posterior
    z = (counts - num * p) / (num * p * (1 - p)).clamp_min(1e-12).sqrt()
    assert z[num * p > 5].abs().max() < 4.5
    assert counts[num * p < 1e-3].sum() <= 2


def test_impossible_moves_give_neither_nan_nor_a_visit():
    """A left-right chain: zeros of the matrix stay, gradients are finite, second order included."""
    matrix = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.7, 0.3], [0.0, 0.0, 1.0]])
    model = StateSpaceModel(
        ssm.dynamics.CategoricalInitial(3, probs=torch.tensor([1.0, 0.0, 0.0])),
        ssm.dynamics.MarkovChain(3, matrix=matrix),
        normal_emission(),
    ).double()
    data = random_data(T=6)
    close(hmm_filter(model, data).log_likelihood.sum(), Brute(model, data).log_likelihood)
    for form in (False, True):
        assert_gradients(lambda form=form: hmm_filter(model, data, parallel=form).log_likelihood.sum(), model)
        paths = sample_posterior_states(model, data, (200,))[..., 0]
        assert (paths.diff(dim=-1) >= 0).all() and (paths[:, 0] == 0).all()


def test_impossible_data_is_minus_infinity_not_nan():
    probs = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    model = chain_model(ssm.emissions.CategoricalTable(2, 1, 2, probs=probs), K=2)
    data = TimeSeries(torch.arange(3.0), torch.tensor([[0.0], [1.0], [0.0]]).double())
    terms = hmm_filter(model, data).log_likelihood
    assert abs(terms[0]) < 1e-12 and terms.sum() == -torch.inf


@pytest.mark.parametrize("parallel", [False, True])
def test_a_long_float32_series_keeps_its_digits(parallel):
    model = chain_model(normal_emission(p=1), K=3).float()
    torch.manual_seed(3)
    T = 20_000
    values = 3 * torch.randn(T, 1).cumsum(0).sin() + torch.randn(T, 1)
    if parallel:  # the loop in float64 is the judge
        exact = hmm_filter(model.double(), TimeSeries(torch.arange(T), values.double()), parallel=True)
        total = exact.log_likelihood.sum()
        model.float()
        single = hmm_filter(model, TimeSeries(torch.arange(T), values), parallel=True).log_likelihood
        assert single.dtype == torch.float32
        assert abs(single.double().sum() / total - 1) < 1e-6
    else:
        data = TimeSeries(torch.arange(2000), values[:2000].double())
        one, two = (hmm_smoother(model.double(), data, parallel=form) for form in (False, True))
        close(one.log_likelihood, two.log_likelihood, 1e-11)
        close(one.probs, two.probs, 1e-11)
        a, b = (viterbi(model, data, parallel=form) for form in (False, True))
        assert torch.equal(a.states, b.states)
        close(a.log_prob, b.log_prob)


def test_errors_name_the_way_out():
    model, data = chain_model(normal_emission()), random_data()
    with pytest.raises(ValueError, match="needs observations"):
        hmm_filter(model, data.without_values())
    with pytest.raises(ValueError, match="has 1 columns, but the emission has obs_dim=2"):
        hmm_filter(model, random_data(p=1))
    gaussian = StateSpaceModel(
        ssm.dynamics.NormalInitial(1), ssm.dynamics.LinearNormal(1), ssm.emissions.LinearNormal(1, 2)
    )
    with pytest.raises(TypeError, match=r"hmm_filter needs a component that is FiniteState.*kalman_filter"):
        hmm_filter(gaussian, data)
    with pytest.raises(ValueError, match="3 states, its emission 2"):
        hmm_filter(chain_model(normal_emission(K=2)), data)


# ------------------------------------------------------------------------------------------------- in Pyro programs


def test_marginal_is_the_density_of_simulated_data_and_runs_in_nuts():
    model = chain_model(normal_emission(p=1))
    data = random_data((2,), p=1)
    model.emission.loc = PyroSample(dist.Normal(torch.zeros(3, 1).double(), 2.0).to_event(2))
    model.transition.matrix = PyroSample(dist.Dirichlet(torch.ones(3, 3).double()).to_event(1))
    exact = Marginal(model, filter=hmm_filter)
    trace = pyro.poutine.trace(exact).get_trace(data)
    trace.compute_log_prob()
    values = {name: trace.nodes[name]["value"] for name in ("emission.loc", "transition.matrix")}
    close(trace.nodes["y"]["log_prob"], hmm_filter(model.bind(values), data).log_likelihood.sum(-1))
    mcmc = MCMC(NUTS(exact, max_tree_depth=3), num_samples=3, warmup_steps=3, disable_progbar=True)
    mcmc.run(data)
    assert mcmc.get_samples()["emission.loc"].shape == (3, 3, 1)


def test_program_simulates_and_refuses_what_would_be_wrong():
    model = chain_model(normal_emission())
    data = random_data((2,))
    z, y = model(data.without_values())
    assert z.shape == (2, 5, 1) and set(z.unique().tolist()) <= {0.0, 1.0, 2.0}
    with pytest.raises(TypeError, match="Structured draws real states"):
        ssm.guides.Structured(model, hidden_dim=4)
    with pytest.raises(ValueError, match="hmm_filter"):
        NUTS(model).setup(0, data)
    path = ssm.models.path_law(model.bind(), data)
    assert not path.has_rsample and not path.expand((4, 2)).has_rsample


def test_forecast_starts_from_the_exact_last_state():
    """With a transition that stays and sharp emissions the forecast is the last value."""
    emission = ssm.emissions.NormalTable(2, 1, loc=torch.tensor([-5.0, 5.0]), scale=0.1)
    model = StateSpaceModel(
        ssm.dynamics.CategoricalInitial(2), ssm.dynamics.MarkovChain(2, matrix=torch.eye(2)), emission
    )
    data = TimeSeries(torch.arange(3.0), torch.tensor([[[-5.0]] * 3, [[5.0]] * 3]))
    future = ssm.predict.forecast(model, posterior=None, data=data, times=torch.tensor([3.0, 4.0]), num_samples=20)
    torch.testing.assert_close(future.values.mean(0), torch.tensor([[[-5.0]] * 2, [[5.0]] * 2]), rtol=0.05, atol=0.1)
