"""Switching linear models against the sum over regimes, each path one dense Gaussian."""

import itertools

import pytest
import torch
from pyro.distributions import MultivariateNormal

import pyro_ssm as ssm
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import (
    enumerate_regimes,
    imm_filter,
    kalman_filter,
    kalman_smoother,
    kim_filter,
    kim_smoother,
    regime_log_probs,
    regime_start,
    regime_step,
    switching_system,
)
from pyro_ssm.models import StateSpaceModel
from tests.infer.discrete.brute import D, each, random_data, random_simplex
from tests.infer.gaussian.linear import step as one_step


def close(one, other, tolerance=1e-9):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def switching_model(K=2, n=2, p=2, inputs=0, recurrent=False, seed=0):
    torch.manual_seed(seed)
    regimes = [
        ssm.dynamics.LinearNormal(n, inputs, "full", matrix=0.7 * torch.eye(n) + 0.2 * torch.randn(n, n))
        for _ in range(K)
    ]
    looks = [ssm.emissions.LinearNormal(n, p, inputs, "full") for _ in range(K)]
    starts = [ssm.dynamics.NormalInitial(n, loc=torch.randn(n)) for _ in range(K)]
    chain = ssm.dynamics.MarkovChain(K, n if recurrent else inputs, matrix=random_simplex(K, K))
    model = StateSpaceModel(
        ssm.dynamics.SwitchingInitial(ssm.dynamics.CategoricalInitial(K, probs=random_simplex(K)), starts),
        ssm.dynamics.SwitchingLinear(chain, regimes, recurrent),
        ssm.emissions.SwitchingLinear(looks),
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def alone(model):
    """The linear-Gaussian model of the first regime."""
    parts = (model.initial.regimes[0], model.transition.regimes[0], model.emission.regimes[0])
    return [part for part in parts]


def dense_evidence(model, data):
    """The sum over regimes of one series, each path a dense Gaussian built block by block."""
    bound, T, K = model.bind(), data.num_times, model.transition.num_regimes
    times, inputs, totals = data.times, data.inputs, {}

    def held(k):
        return None if inputs is None else inputs[k : k + 1]

    weights = bound.initial.chain.log_weights(times[:1], held(0))[0]
    for path in itertools.product(range(K), repeat=T):
        log_prior = weights[path[0]]
        law = bound.initial.regimes[path[0]](times[:1], held(0))
        means, blocks = [law.mean[0]], {(0, 0): law.variance[0].diag()}
        for k in range(T - 1):
            table = bound.transition.chain.log_matrix(times[k : k + 1], times[k + 1 : k + 2], held(k))
            log_prior = log_prior + table[0, path[k], path[k + 1]]
            move = bound.transition.regimes[path[k + 1]].affine(times[k : k + 1], times[k + 1 : k + 2], held(k))
            F, b, Q = one_step(move)
            means.append(F @ means[-1] + b)
            for j in range(k + 1):
                blocks[k + 1, j] = F @ blocks[k, j]
                blocks[j, k + 1] = blocks[k + 1, j].T
            blocks[k + 1, k + 1] = F @ blocks[k, k] @ F.T + Q @ Q.T
        looks = [one_step(bound.emission.regimes[s].affine(times[k : k + 1], held(k))) for k, s in enumerate(path)]
        P = torch.cat([torch.cat([blocks[i, j] for j in range(T)], 1) for i in range(T)], 0)
        H = torch.block_diag(*(H for H, _, _ in looks))
        mean = H @ torch.cat(means) + torch.cat([d for _, d, _ in looks])
        covariance = H @ P @ H.T + torch.block_diag(*(R @ R.T for _, _, R in looks))
        seen = data.mask.flatten()
        law = MultivariateNormal(mean[seen], covariance[seen][:, seen])
        totals[path] = log_prior + law.log_prob(data.values.flatten()[seen])
    return totals


@pytest.mark.parametrize("inputs", [0, 1])
def test_enumeration_is_the_sum_of_dense_gaussians(inputs):
    model = switching_model(inputs=inputs)
    data = random_data((2,), T=4, u=inputs, own_times=True, lengths=torch.tensor([4, 2]))
    result = enumerate_regimes(model, data)
    for i, length, one in each(data):
        totals = dense_evidence(model, one)
        stacked = torch.stack(list(totals.values()))
        close(result.log_likelihood[i].sum(), stacked.logsumexp(0))
        assert (result.log_likelihood[i][length:] == 0).all()
        posterior = stacked.softmax(0)
        for k in range(length):
            for j in range(2):
                wanted = sum(w for w, path in zip(posterior, totals) if path[k] == j)
                close(result.probs[i][k, j], wanted)


def test_one_regime_is_the_kalman_filter_and_smoother():
    model, data = switching_model(K=1), random_data((3,), T=6, lengths=torch.tensor([6, 4, 1]))
    plain = StateSpaceModel(*alone(switching_model(K=1)))
    wanted, smoothed = kalman_filter(plain, data), kalman_smoother(plain, data)
    for result in (kim_filter(model, data), imm_filter(model, data)):
        assert result.exact
        close(result.log_likelihood, wanted.log_likelihood)
        close(result.mean, wanted.filtered_mean)
        close(result.scale_tril @ result.scale_tril.mT, wanted.filtered_scale_tril @ wanted.filtered_scale_tril.mT)
    result = kim_smoother(model, data)
    close(result.mean, smoothed.mean)
    close(result.scale_tril @ result.scale_tril.mT, smoothed.scale_tril @ smoothed.scale_tril.mT)
    close(result.probs, torch.ones_like(result.probs))
    exact = enumerate_regimes(model, data)
    close(exact.mean, smoothed.mean)
    close(
        exact.filtered_scale_tril @ exact.filtered_scale_tril.mT,
        wanted.filtered_scale_tril @ wanted.filtered_scale_tril.mT,
    )


def test_kim_is_exact_for_two_steps_and_imm_for_one():
    model, data = switching_model(K=3), random_data((2,), T=2)
    exact, kim, imm = enumerate_regimes(model, data), kim_filter(model, data), imm_filter(model, data)
    assert not kim.exact
    close(kim.log_likelihood, exact.log_likelihood)
    close(kim.log_filtered, exact.log_filtered)
    close(kim.mean, exact.filtered_mean)
    close(kim.scale_tril @ kim.scale_tril.mT, exact.filtered_scale_tril @ exact.filtered_scale_tril.mT)
    close(imm.log_likelihood[:, 0], exact.log_likelihood[:, 0])
    close(imm.mean[:, 0], exact.filtered_mean[:, 0])
    smoothed = kim_smoother(model, data)
    close(smoothed.probs, exact.probs)
    close(smoothed.pairwise.sum(-1), exact.probs[:, :1])


def test_filters_are_close_to_the_truth_on_simulated_series():
    """Approximations: total log-likelihood within a few hundredths a step, Kim not worse than IMM on the whole."""
    model = switching_model(K=2, seed=3)
    with torch.no_grad():
        _, y = model.bind()(TimeSeries(torch.arange(7.0).expand(40, 7).clone()))
    data = TimeSeries(torch.arange(7.0), y.double())
    exact, kim, imm = enumerate_regimes(model, data), kim_filter(model, data), imm_filter(model, data)
    gaps = [(r.log_likelihood.sum(-1) - exact.log_likelihood.sum(-1)).abs().mean() for r in (kim, imm)]
    assert gaps[0] < 0.02 and gaps[0] <= gaps[1] < 0.1
    assert (kim.log_filtered.exp() - exact.log_filtered.exp()).abs().mean() < 0.01
    assert (kim_smoother(model, data).probs - exact.probs).abs().mean() < 0.05


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("method", [kim_filter, imm_filter, kim_smoother])
def test_batch_ragged_and_draws_are_a_loop(method, recurrent):
    model = switching_model(recurrent=recurrent)
    data = random_data((3,), T=5, own_times=True, lengths=torch.tensor([5, 3, 1]))
    values = {"transition.regimes.0.matrix": torch.randn(2, 1, 2, 2).double()}
    bound = model.bind(values)
    whole = method(bound, data)
    assert whole.log_likelihood.shape == (2, 3, 5)
    for s in range(2):
        single = model.bind({name: v[s, 0] for name, v in values.items()})
        for i, length, one in each(data):
            for name, part in zip(whole._fields, method(single, one)):
                got = getattr(whole, name)[s][i][: part.shape[0]]
                if "scale_tril" in name:
                    got, part = got @ got.mT, part @ part.mT
                close(got, part)
            for name in ("mean", "log_likelihood"):
                tail = getattr(whole, name)[s][i][length:]
                kept = (
                    torch.zeros_like(tail) if name == "log_likelihood" else whole.mean[s][i][length - 1].expand_as(tail)
                )
                close(tail, kept)


def test_refined_grid_and_missing_steps():
    model, data = switching_model(), random_data((2,), T=3)
    fine = kim_filter(model, data.refine(2))
    assert fine.log_likelihood.shape == (2, 5) and (fine.log_likelihood[:, 1::2] == 0).all()
    close(kim_filter(model, data.refine(1)).log_likelihood, kim_filter(model, data).log_likelihood)
    close(enumerate_regimes(model, data.refine(2)).log_likelihood[:, 0], kim_filter(model, data).log_likelihood[:, 0])


def test_gradients_of_the_filters():
    model, data = switching_model(), random_data(T=3)
    named = dict(model.named_parameters())
    for method in (kim_filter, imm_filter, enumerate_regimes):
        total = method(model, data).log_likelihood.sum()
        grads = torch.autograd.grad(total, list(named.values()))
        for (name, parameter), grad in list(zip(named.items(), grads))[::3]:
            entry = tuple(0 for _ in parameter.shape)
            h, kept = 1e-6, parameter.data.clone()
            ends = []
            for sign in (1, -1):
                parameter.data[entry] = kept[entry] + sign * h
                ends.append(method(model, data).log_likelihood.sum().detach())
            parameter.data.copy_(kept)
            torch.testing.assert_close(grad[entry], (ends[0] - ends[1]) / (2 * h), rtol=1e-4, atol=1e-6, msg=name)


# ------------------------------------------------------------------------------------------- Rao-Blackwellised pieces


def test_regime_steps_along_all_paths_give_the_exact_evidence():
    """Particles that branch into every regime: their weights sum to the evidence."""
    K, data = 2, random_data((2,), T=4)
    model = switching_model(K)
    system, exact = switching_system(model, data), enumerate_regimes(model, data)
    regime = torch.arange(K)[:, None].expand(K, 2)
    log_weight, carry = regime_start(system, regime)
    log_weight = log_weight + system.log_initial[regime]
    for k in range(1, 4):
        prior = regime_log_probs(system, k, carry.regime).movedim(-1, 0)  # (K, *particles, batch)
        new = torch.arange(K).reshape((K,) + (1,) * carry.regime.dim())
        extra, carry = regime_step(carry, new.expand((K,) + carry.regime.shape), system.step(k))
        log_weight = log_weight + prior + extra
    evidence = log_weight.flatten(0, -2).logsumexp(0)
    close(evidence, exact.log_likelihood.sum(-1))
    mean = (log_weight.flatten(0, -2).softmax(0).unsqueeze(-1) * carry.mean.flatten(0, -3)).sum(0)
    close(mean, exact.filtered_mean[:, -1])


# --------------------------------------------------------------------------------------------------- as Pyro programs


def test_simulation_follows_the_density_of_the_state():
    """The law of one step: frequencies of regimes, moments of x in each."""
    model = switching_model(recurrent=True).bind()
    state = torch.tensor([[1.0, 0.5, -1.0]], dtype=D)
    t = torch.zeros(1, dtype=D)
    law = model.transition(state, t, t + 1, None)
    draws = law.sample((20_000,))[:, 0]
    log_p = model.transition.log_matrix(t, t + 1, None, state[:, 1:])[0, 1]
    for j in range(2):
        mine = draws[draws[:, 0] == j, 1:]
        p = log_p[j].exp()
        assert abs(len(mine) / 20_000 - p) < 4.5 * (p * (1 - p) / 20_000) ** 0.5
        F, b, Q = one_step(model.transition.regimes[j].affine(t, t + 1, None))
        wanted = MultivariateNormal(F @ state[0, 1:] + b, scale_tril=Q)
        assert ((mine.mean(0) - wanted.mean).abs() < 4.5 * wanted.stddev / len(mine) ** 0.5).all()
        x = torch.cat([torch.tensor([float(j)]), mine[0]])
        close(law.log_prob(x[None])[0], log_p[j] + wanted.log_prob(mine[0]))


def test_program_runs_and_wrong_methods_refuse():
    model, data = switching_model(recurrent=True), random_data((2,), T=3)
    z, y = model(data.without_values())
    assert z.shape == (2, 3, 3) and y.shape == (2, 3, 2) and set(z[..., 0].unique().tolist()) <= {0.0, 1.0}
    with pytest.raises(TypeError, match="recurrent model"):
        enumerate_regimes(model, data)
    with pytest.raises(TypeError, match="recurrent model"):
        regime_log_probs(switching_system(model, data), 1, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="2\\^30 paths"):
        enumerate_regimes(switching_model(), random_data(T=30))
    with pytest.raises(TypeError, match="kim_filter"):
        ssm.guides.Structured(model, hidden_dim=4)
    with pytest.raises(TypeError, match="kim_filter needs a switching linear model, got initial NormalInitial"):
        kim_filter(StateSpaceModel(*alone(switching_model())), data)
    with pytest.raises(ValueError, match="input_dim of at least 2"):
        ssm.dynamics.SwitchingLinear(ssm.dynamics.MarkovChain(1, 1), [ssm.dynamics.LinearNormal(2)], recurrent=True)
    with pytest.raises(TypeError, match="AffineGaussian"):
        ssm.dynamics.SwitchingLinear(ssm.dynamics.MarkovChain(1), [ssm.dynamics.MLPTransition(2, 4)])


def test_marginal_with_the_kim_filter():
    import pyro

    model, data = switching_model(), random_data((2,), T=4)
    trace = pyro.poutine.trace(ssm.infer.Marginal(model, filter=kim_filter)).get_trace(data)
    trace.compute_log_prob()
    close(trace.nodes["y"]["log_prob"], kim_filter(model, data).log_likelihood.sum(-1))
