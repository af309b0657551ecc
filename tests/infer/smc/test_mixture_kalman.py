"""Switching linear models with their vector integrated out, against the sum over all regimes."""

import pytest
import torch
from pyro import distributions as dist
from pyro.nn import PyroSample

from pyro_ssm import dynamics, emissions
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import (
    OnlineParticleFilter,
    auxiliary,
    bootstrap,
    enumerate_regimes,
    hmm_filter,
    mixture_kalman,
    particle_filter,
    pmmh,
)
from pyro_ssm.infer.smc import FixedNoise, Moments
from pyro_ssm.models import StateSpaceModel
from tests.contracts.toys import series, toy
from tests.infer.smc.programs import D, assert_unbiased, repeated

T = 6


def switching(recurrent=False):
    torch.manual_seed(4)
    chain = dynamics.MarkovChain(2, input_dim=2) if recurrent else dynamics.MarkovChain(2)
    return StateSpaceModel(
        dynamics.SwitchingInitial(dynamics.CategoricalInitial(2), [dynamics.NormalInitial(2) for _ in range(2)]),
        dynamics.SwitchingLinear(chain, [dynamics.LinearNormal(2, scale=s) for s in (0.3, 1.0)], recurrent),
        emissions.SwitchingLinear([emissions.LinearNormal(2, 1, scale=s) for s in (0.4, 0.8)]),
    ).to(D)


def chain():
    torch.manual_seed(4)
    model = StateSpaceModel(
        dynamics.CategoricalInitial(3),
        dynamics.MarkovChain(3),
        emissions.NormalTable(3, 1, loc=torch.tensor([[-2.0], [0.0], [2.0]])),
    )
    return model.to(D)


def some_data(lengths=None):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(3, T, 1, dtype=D, generator=generator)
    values[:, 2] = torch.nan
    gaps = torch.rand(3, T, dtype=D, generator=generator) + 0.3
    return TimeSeries(gaps.cumsum(-1), values, lengths=lengths)


def test_evidence_against_enumeration():
    model, data = switching(), some_data().series(0)
    exact = enumerate_regimes(model, data).log_likelihood.sum()
    with torch.no_grad():
        found = particle_filter(mixture_kalman(model, repeated(data, 1000)), 20)
        blind = particle_filter(bootstrap(model, repeated(data, 1000)), 20)
    assert_unbiased(found.total, exact.detach())
    assert (found.log_likelihood[:, 2] == 0).all()
    assert found.total.std() < 0.5 * blind.total.std()


def test_filtered_means_and_ragged_series():
    model, data = switching(), some_data(torch.tensor([T, 1, 4]))
    moments = Moments(lambda weighed: weighed.particles.mean)
    with torch.no_grad():
        found = particle_filter(mixture_kalman(model, data), 20_000, collectors=[moments])
        exact = enumerate_regimes(model, data)
    torch.testing.assert_close(found.log_likelihood, exact.log_likelihood, rtol=0, atol=0.03)
    assert torch.equal(found.log_likelihood == 0, ~data.mask[..., 0])
    real = data.step_mask
    mean = found.collected["moments"].mean
    torch.testing.assert_close(mean[real], exact.filtered_mean[real], rtol=0, atol=0.05)


def test_step_by_step_and_under_random_parameters():
    model, data = switching(), some_data().series(0)
    filter = OnlineParticleFilter(model, 5000, build=mixture_kalman)
    state, increments = filter.init(data.times[0], data.values[0]), []
    for k in range(1, 3):
        state = filter.step(state, data.times[k], data.values[k], data.mask[k])
        increments.append(state.log_likelihood)
    exact = enumerate_regimes(model, data).log_likelihood[1:3]
    torch.testing.assert_close(torch.stack(increments), exact.detach(), rtol=0, atol=0.03)
    model = StateSpaceModel(
        dynamics.SwitchingInitial(dynamics.CategoricalInitial(2), [dynamics.NormalInitial(1)] * 2),
        dynamics.SwitchingLinear(dynamics.MarkovChain(2), [dynamics.OrnsteinUhlenbeck(1) for _ in range(2)]),
        emissions.SwitchingLinear([emissions.LinearNormal(1, 1)] * 2),
    ).to(D)
    model.transition.regimes[0].rate = PyroSample(dist.LogNormal(torch.zeros((), dtype=D), 1.0))
    found = pmmh(model, data, 4, 10, num_chains=2, num_warmup=2, filter=mixture_kalman, progress=False)
    assert found.states.shape == (2, 4, T, 1)  # regimes
    assert set(found.states.unique().tolist()) <= {0.0, 1.0}


def test_what_it_refuses():
    data = some_data()
    with pytest.raises(TypeError, match="recurrent"):
        mixture_kalman(switching(recurrent=True), data)
    with pytest.raises(TypeError, match="mixture_kalman needs a switching linear model"):
        mixture_kalman(toy(2, 1), series(4, obs_dim=1))
    noise = FixedNoise(torch.zeros(T, 10, 3, 1), torch.zeros(T, 1, 3))
    with pytest.raises(TypeError, match="is not drawn from them"):
        particle_filter(mixture_kalman(switching(), data), 10, noise=noise)


def test_auxiliary_filters_of_states_without_a_mean():
    """The default first stage sums over what is finite: a chain's states, or regimes at their means."""
    data = some_data().series(0)
    for model, exact in (
        (chain(), hmm_filter(chain(), data).log_likelihood.sum()),
        (switching(), enumerate_regimes(switching(), data).log_likelihood.sum()),
    ):
        with torch.no_grad():
            found = particle_filter(auxiliary(model, repeated(data, 1000)), 200, ess_threshold=1.0)
        assert_unbiased(found.total, exact.detach())


def test_the_first_stage_of_a_chain_is_exact():
    model, data = chain(), some_data()
    states = torch.arange(3, dtype=D).reshape(3, 1, 1, 1).expand(3, 3, 1, 1)
    with torch.no_grad():
        fk = auxiliary(model, data)
        particles = fk.extend(0, None, states[..., 0, :])
        found = fk.log_twist(0, particles)  # log p(y_1 | z_0 = i)
        moves = model.transition.log_matrix(data.times[..., :1], data.times[..., 1:2], None)
        seen = dist.Normal(model.emission.loc, model.emission.scale).log_prob(data.values[:, 1:2]).sum(-1)
        wanted = (moves.squeeze(-3) + seen.reshape(3, 1, 3)).logsumexp(-1).mT
    torch.testing.assert_close(found, wanted)
