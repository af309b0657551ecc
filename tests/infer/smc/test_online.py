"""On-line, the filter is the same as over the whole series: memory, times, inputs and missing entries included."""

import pytest
import torch

from pyro_ssm.guides import Structured
from pyro_ssm.infer import OnlineParticleFilter, bootstrap, guided, locally_optimal, particle_filter
from pyro_ssm.infer.smc import FixedNoise
from tests.contracts.toys import remembering, series, toy
from tests.infer.gaussian.linear import random_data, random_model
from tests.infer.smc.programs import D

N = 25


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def run(online, data):
    def at(x, k):
        return None if x is None else x[..., k, :]

    states = []
    for k in range(data.num_times):
        seen = (data.times[..., k], at(data.values, k), at(data.mask, k), at(data.inputs, k))
        states.append(online.init(*seen) if k == 0 else online.step(states[-1], *seen))
    return states


@pytest.mark.parametrize("kind", ["memory", "inputs", "locally optimal"])
@pytest.mark.parametrize("own", [False, True])
def test_equals_the_whole_series(kind, own):
    if kind == "memory":
        model, data, build = remembering(), series(5, (2,), own=own, missing=True), bootstrap
    else:
        model, data = random_model(n=2, p=2), random_data((2,), num_times=5, own_times=own)
        build = bootstrap if kind == "inputs" else locally_optimal
    noise = FixedNoise(torch.randn(5, N, 2, 2, dtype=D), torch.rand(5, 1, 2, dtype=D))
    whole = particle_filter(build(model, data), N, noise=noise)
    states = run(OnlineParticleFilter(model, N, build=build, noise=noise), data)
    found = torch.stack([state.log_likelihood for state in states], -1)
    assert torch.allclose(found, whole.log_likelihood, rtol=0, atol=1e-11)
    assert torch.allclose(torch.stack([state.ess for state in states], -1), whole.ess, rtol=1e-9)
    assert torch.allclose(states[-1].cloud.log_weights, whole.cloud.log_weights, rtol=0, atol=1e-9)
    assert states[-1].num_steps == 5 and states[-1].cloud.k == 4
    assert states[-1].mean.shape == (2, 2)


def test_the_state_is_all_there_is():
    """A step is a function of the state: two futures from one past."""
    online = OnlineParticleFilter(
        toy(1, 1), N, noise=FixedNoise(torch.randn(3, N, 1, dtype=D), torch.rand(3, 1, dtype=D))
    )
    now = online.init(0.0, torch.zeros(1, dtype=D))
    one, other = (online.step(now, 1.0, torch.full((1,), y, dtype=D)) for y in (0.5, 0.5))
    assert torch.equal(one.log_likelihood, other.log_likelihood)
    unseen = online.step(now, 1.0, torch.full((1,), float("nan"), dtype=D))
    assert unseen.log_likelihood == 0


def test_errors():
    model = toy(1, 1, torch.float32)
    online = OnlineParticleFilter(model, N)
    now = online.init(3.0, torch.zeros(1))
    with pytest.raises(ValueError, match="later than the last"):
        online.step(now, 3.0, torch.zeros(1))
    with pytest.raises(ValueError, match="`inputs` were given for one"):
        online.step(now, 4.0, torch.zeros(1), inputs=torch.zeros(2))
    with pytest.raises(ValueError, match=r"step 1 \(time 4\).*NaN|step 1 \(time 4\).*no particle"):
        online.step(now, 4.0, torch.full((1,), 1e30))
    ahead = Structured(model, hidden_dim=4, direction="both")
    with pytest.raises(ValueError, match="cannot look ahead"):
        OnlineParticleFilter(model, N, build=lambda m, d: guided(m, ahead, d)).init(0.0, torch.zeros(1))
    with pytest.raises(ValueError, match="at least 1"):
        OnlineParticleFilter(model, 0)
