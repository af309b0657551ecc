"""The likelihood of every builder is unbiased, and better proposals have less spread: linear-Gaussian judges."""

import math
from dataclasses import replace

import pyro.distributions as dist
import pytest
import torch

from pyro_ssm.dynamics import LinearNormal, NormalInitial
from pyro_ssm.emissions import CategoricalTable
from pyro_ssm.emissions import LinearNormal as Seen
from pyro_ssm.infer import (
    auxiliary,
    bootstrap,
    guided,
    hmm_filter,
    kalman_filter,
    kalman_smoother,
    locally_optimal,
    particle_filter,
)
from pyro_ssm.infer.smc import Moments
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.ops.resampling import SCHEMES
from tests.contracts.toys import Decay, See, Start, posterior, remembering, series, toy
from tests.infer.discrete.brute import jump_model, normal_emission
from tests.infer.discrete.brute import random_data as chain_data
from tests.infer.gaussian.linear import dense_log_likelihood, random_data, random_model
from tests.infer.smc.programs import Bend, D, Walk, assert_unbiased, close, repeated, totals

RUNS, N = 1000, 60


def mild(n=2, p=1, seed=0, T=6, **options):
    """A model whose observations say no more than the motion, with missing entries, irregular times and inputs."""
    model = random_model(n=n, p=p, seed=seed)
    model.emission.R = 2.0 * model.emission.R
    return model, random_data(num_times=T, p=p, **options)


BUILDERS = {
    "bootstrap": bootstrap,
    "locally optimal": locally_optimal,
    "auxiliary": auxiliary,
    "fully adapted": lambda model, data: auxiliary(model, data, base=locally_optimal(model, data)),
    "guided by the prior": lambda model, data: guided(model, prior(model, data), data),
}


def prior(model, data, wider=1.3):
    """A proposal by hand: the model's own motion, wider."""

    def propose(state, k, memory):
        times, inputs = data.times, data.inputs
        at = slice(max(k.start - 1, 0), max(k.start - 1, 0) + 1)
        held = None if inputs is None else inputs[..., at, :]
        if state is None:
            law = model.initial(times[..., k], held)
        else:
            law = model.transition(state, times[..., at], times[..., k], held)
        return dist.MultivariateNormal(law.loc, scale_tril=wider * law.scale_tril, validate_args=False)

    return propose


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("own_times", [False, True])
def test_likelihood_is_unbiased(name, own_times):
    model, data = mild(own_times=own_times)
    exact = dense_log_likelihood(model, data)
    found = particle_filter(BUILDERS[name](model, repeated(data, RUNS)), N)
    assert_unbiased(found.total, exact)
    if name != "guided by the prior":  # which weighs its own draws where nothing is seen
        assert (found.log_likelihood[:, ~data.mask.any(-1)] == 0).all()


@pytest.mark.parametrize("scheme", sorted(SCHEMES) + ["hilbert-systematic", "hilbert-ssp"])
def test_every_resampling_is_unbiased(scheme):
    model, data = mild(missing=0.0)
    exact = dense_log_likelihood(model, data)
    assert_unbiased(totals(bootstrap(model, repeated(data, RUNS)), N, resampling=scheme, ess_threshold=1.0), exact)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_every_threshold_is_unbiased(threshold):
    model, data = mild(T=4)
    exact = dense_log_likelihood(model, data)
    found = particle_filter(bootstrap(model, repeated(data, RUNS)), 100, ess_threshold=threshold)
    assert_unbiased(found.total, exact)
    if threshold != 0.5:
        assert (found.resampled[:, 1:] == bool(threshold)).all() and not found.resampled[:, 0].any()
    else:  # each series by its own need
        assert (found.resampled[:, 1:] == (found.ess[:, :-1] < 50)).all()


def test_better_proposals_have_less_spread():
    model, data = mild(n=3, p=2, seed=2)
    exact, many = dense_log_likelihood(model, data), repeated(data, 200)
    spread = {name: float((totals(BUILDERS[name](model, many), 300) - exact).std()) for name in BUILDERS}
    assert spread["locally optimal"] < 0.75 * spread["bootstrap"]
    assert spread["fully adapted"] < 0.75 * spread["bootstrap"]
    assert spread["bootstrap"] < spread["guided by the prior"]


def test_filtered_moments_and_evidence_of_a_long_series():
    model = StateSpaceModel(
        NormalInitial(2), LinearNormal(2, matrix=torch.tensor([[0.9, 0.2], [-0.2, 0.8]])), Seen(2, 1, scale=0.7)
    )
    with torch.no_grad():
        _, y = model(series(40, obs_dim=1, dtype=torch.float32).without_values())
        data = series(40, obs_dim=1, dtype=torch.float32).replace(values=y)
        exact, runs = kalman_filter(model, data), 30
        found = particle_filter(bootstrap(model, repeated(data, runs)), 2000, collectors=[Moments()])
    for k in (0, 10, 39):
        for mine, wanted in (
            (found.collected["moments"].mean[:, k], exact.filtered_mean[k]),
            (
                found.collected["moments"].covariance[:, k],
                exact.filtered_scale_tril[k] @ exact.filtered_scale_tril[k].mT,
            ),
        ):
            error = mine.std(0) / math.sqrt(runs)
            assert ((mine.mean(0) - wanted).abs() < 4.5 * error + 2e-3).all()
    total = exact.log_likelihood.sum()
    assert abs(float(found.total.mean() + 0.5 * found.total.var() - total)) < 4 * float(found.total.std()) / runs**0.5


def test_smoothing_proposal_needs_its_twist():
    """The exact smoother as proposal: resampling by filter weights adds variance, by the exact twist it adds none."""
    torch.manual_seed(2)
    model = toy(1, 1)
    data = series(12, obs_dim=1, seed=4)
    smoothed = kalman_smoother(model, data)
    marginal = [smoothed.scale_tril[k] @ smoothed.scale_tril[k].mT for k in range(12)]

    def propose(state, k, memory):
        k = k.start
        if state is None:
            return dist.Normal(smoothed.mean[:1], smoothed.scale_tril[0]).to_event(1)
        # p(z_k | z_{k-1}, y) of the smoothed pair
        cross = smoothed.lag_one_covariance[k - 1].mT @ marginal[k - 1].inverse()
        loc = smoothed.mean[k] + (state - smoothed.mean[k - 1]) @ cross.mT
        scale = (marginal[k] - cross @ marginal[k - 1] @ cross.mT).sqrt()
        return dist.Normal(loc, scale).to_event(1)

    filtered = kalman_filter(model, data)

    def twist(k, state):
        """log p(z_k | y) - log p(z_k | y_<=k) is log p(y_>k | z_k) but for a constant."""
        late = dist.Normal(smoothed.mean[k], smoothed.scale_tril[k].squeeze(-1)).to_event(1)
        early = dist.Normal(filtered.filtered_mean[k], filtered.filtered_scale_tril[k].squeeze(-1)).to_event(1)
        return late.log_prob(state) - early.log_prob(state)

    with torch.no_grad():
        exact, many = filtered.log_likelihood.sum(), repeated(data, 200)
        fk = guided(model, propose, many, looks_ahead=True)
        with pytest.warns(UserWarning, match="direction='past'"):
            resampled = totals(fk, 50, ess_threshold=0.9)
        assert (totals(fk, 50, ess_threshold=0) - exact).abs().max() < 1e-9  # importance sampling from the posterior
        twisted = particle_filter(guided(model, propose, many, twist, looks_ahead=True), 50, ess_threshold=1.0)
        assert (twisted.total - exact).abs().max() < 1e-9
        assert_unbiased(resampled, exact)
        assert resampled.std() > 0.1
        # the weights reported are those of the filter, whatever was chosen by
        fk = guided(model, propose, many, twist, looks_ahead=True)
        found = particle_filter(fk, 500, ess_threshold=1.0, collectors=[Moments()]).collected["moments"]
        close(found.mean[:, 5], filtered.filtered_mean[5])


def test_memory_of_states_and_observations_moves_with_its_particle():
    model, data = remembering(1, 1), series(4, obs_dim=1, missing=False)
    exact = posterior(model, data)[1]
    with torch.no_grad():
        many = repeated(data, RUNS)
        assert_unbiased(totals(bootstrap(model, many), N, ess_threshold=1.0), exact)
        assert_unbiased(totals(auxiliary(model, many), N, ess_threshold=1.0), exact)

        def propose(state, k, memory):
            assert memory.shape == (N, RUNS, 1, 2)
            loc = 0.3 * memory[..., :1]
            return dist.Normal(loc, 1.2).to_event(1)

        assert_unbiased(totals(guided(model, propose, many), N), exact)
    assert bootstrap(model, data).log_backward is None


def test_a_transition_that_is_only_drawn():
    plain, data = toy(1, 1), series(5, obs_dim=1, missing=True)
    model = StateSpaceModel(plain.initial, Walk(plain.transition), plain.emission)
    with torch.no_grad():
        exact = kalman_filter(plain, data).log_likelihood.sum()
        fk = bootstrap(model, repeated(data, RUNS))
        assert_unbiased(totals(fk, N), exact)
    assert fk.log_backward is None
    with pytest.raises(TypeError, match="SampleOnly"):
        guided(model, prior(model, data), data)


@pytest.mark.parametrize("by_state", [False, True])
def test_nonlinear_motion_locally_optimal_agrees_with_bootstrap(by_state):
    model = StateSpaceModel(Start(1), Bend(1, by_state), See(1, 2)).to(D)
    data = series(5, obs_dim=2, missing=True)
    with torch.no_grad():
        reference = particle_filter(bootstrap(model, repeated(data, 40)), 5000).total
        best = totals(locally_optimal(model, repeated(data, RUNS)), N)
    level = float(reference.exp().mean().log())
    error = float((reference - level).exp().std()) / math.sqrt(40)
    ratio = (best - level).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * (float(ratio.std()) / math.sqrt(RUNS) + error)


def test_finite_states_agree_with_the_forward_algorithm():
    """A process made by hand, with discrete particles: no model in sight."""
    from pyro_ssm.infer import FeynmanKac

    torch.manual_seed(0)
    start, move = torch.tensor([0.6, 0.4, 0.0], dtype=D), torch.rand(3, 3, dtype=D) + torch.eye(3, dtype=D)
    move = move / move.sum(-1, keepdim=True)
    likelihood = torch.rand(6, 3, dtype=D) + 0.1
    alpha, exact = start * likelihood[0], 0.0
    for k in range(6):
        if k:
            alpha = (alpha @ move) * likelihood[k]
        exact, alpha = exact + alpha.sum().log(), alpha / alpha.sum()
    fk = FeynmanKac(
        initial=lambda draw, shape: torch.multinomial(start, shape.numel(), True).reshape(shape),
        propagate=lambda k, x, draw: torch.multinomial(move[x.reshape(-1)], 1).reshape(x.shape),
        log_potential=lambda k, previous, x: likelihood[k, x].log(),
        num_times=6,
        batch_shape=torch.Size([RUNS]),
        state=lambda x: torch.nn.functional.one_hot(x, 3).to(D),
    )
    found = particle_filter(fk, N, collectors=[Moments()])
    assert_unbiased(found.total, exact)
    last = found.collected["moments"].mean[:, -1]
    assert ((last.mean(0) - alpha).abs() < 4.5 * last.std(0) / math.sqrt(RUNS) + 2 / N).all()


@pytest.mark.parametrize("emission", [normal_emission, lambda: CategoricalTable(3, 2, 4)])
@torch.no_grad()
def test_hidden_markov_models_agree_with_the_forward_algorithm(emission):
    """A chain that jumps as the gaps allow, missing entries, one step unseen; filtered probabilities too."""
    model = jump_model(emission())
    data = chain_data(T=6, counts=4 if isinstance(model.emission, CategoricalTable) else None)
    exact = hmm_filter(model, data)
    regimes = Moments(lambda particles: torch.nn.functional.one_hot(particles.state[..., 0, 0].long(), 3).to(D))
    found = particle_filter(bootstrap(model, repeated(data, RUNS)), 500, collectors=[regimes])
    assert_unbiased(found.total, exact.log_likelihood.sum())
    close(found.collected["moments"].mean, exact.log_filtered.exp(), bias=1 / 500)
    assert (found.log_likelihood[:, 2] == 0).all()


def test_quasi_random_is_unbiased_and_far_less_variable():
    model = toy(1, 1)
    data = series(8, obs_dim=1)
    with torch.no_grad():
        exact = kalman_filter(model, data).log_likelihood.sum()
        fk = bootstrap(model, repeated(data, 300))
        quasi, pseudo = totals(fk, 64, quasi_random=True), totals(fk, 64)
        assert_unbiased(quasi, exact)
        assert quasi.std() < 0.35 * pseudo.std()
        two = StateSpaceModel(Start(2), Decay(2), See(2, 1)).to(D)
        exact = kalman_filter(two, data).log_likelihood.sum()
        quasi = totals(bootstrap(two, repeated(data, 300)), 64, quasi_random=True)
        assert_unbiased(quasi, exact)
        # a scale that is a matrix, and a process with a proposal of its own
        assert_unbiased(totals(locally_optimal(two, repeated(data, 300)), 64, quasi_random=True), exact)


def test_first_stage_by_hand():
    model, data = mild(missing=0.2)
    exact = dense_log_likelihood(model, data)
    fk = auxiliary(model, repeated(data, RUNS), lambda k, state: -0.1 * state.square().sum(-1))
    assert_unbiased(totals(fk, N, ess_threshold=1.0), exact)
    with pytest.raises(ValueError, match="twist already"):
        auxiliary(model, data, base=replace(bootstrap(model, data), log_twist=lambda k, x: 0))
