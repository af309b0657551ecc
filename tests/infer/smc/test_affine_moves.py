"""What an affine transition does at each step, computed at once, is what the transition says."""

import pytest
import torch

from pyro_ssm import dynamics
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import bootstrap, particle_filter
from pyro_ssm.infer.smc.affine_moves import AffineMoves
from pyro_ssm.infer.smc.draws import from_normals
from pyro_ssm.infer.smc.model_steps import ModelSteps
from tests.contracts.toys import toy

D = torch.float64


def series(times, batch=(), inputs=0):
    generator = torch.Generator().manual_seed(0)
    gaps = torch.rand((*batch, times), dtype=D, generator=generator) + 0.1
    u = torch.randn((*batch, times, inputs), dtype=D, generator=generator) if inputs else None
    return TimeSeries(gaps.cumsum(-1), torch.randn((*batch, times, 1), dtype=D, generator=generator), inputs=u)


TRANSITIONS = {
    "linear": lambda: dynamics.LinearNormal(2, matrix=torch.tensor([[0.5, 0.2], [-0.3, 0.8]])),
    "linear with inputs": lambda: dynamics.LinearNormal(2, input_dim=3),
    "one state": lambda: dynamics.LinearNormal(1),
    "Ornstein-Uhlenbeck": lambda: dynamics.OrnsteinUhlenbeck(2, rate=torch.tensor([0.5, 2.0]), mean=0.7),
    "Ornstein-Uhlenbeck with inputs": lambda: dynamics.OrnsteinUhlenbeck(2, input_dim=3),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("name", TRANSITIONS)
def test_law_and_draw_are_those_of_the_transition(name, batch, dtype):
    transition = TRANSITIONS[name]().to(dtype)
    for parameter in transition.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    data = series(5, batch, getattr(transition, "input_dim", 0)).to(dtype=dtype)
    moves, n = AffineMoves(transition, data, False), transition.state_dim
    state, noise = torch.randn(6, *batch, 1, n, dtype=dtype), torch.randn(6, *batch, 1, n, dtype=dtype)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == D else {"rtol": 1e-5, "atol": 1e-5}
    for k in range(1, 5):
        inputs = None if data.inputs is None else data.inputs[..., k - 1 : k, :]
        law = transition(state, data.times[..., k - 1 : k], data.times[..., k : k + 1], inputs)
        mine = moves.law(k, state)
        torch.testing.assert_close(mine.log_prob(noise), law.log_prob(noise), **tolerance)
        torch.testing.assert_close(from_normals(mine, noise), from_normals(law, noise), **tolerance)
        assert mine.batch_shape == law.batch_shape and mine.event_shape == law.event_shape


@torch.no_grad()
def test_where_the_transition_itself_is_asked():
    class Other(dynamics.LinearNormal):
        def forward(self, state, time, next_time, inputs, memory=None):
            return super().forward(2 * state, time, next_time, inputs, memory)

    data, state = series(4).to(dtype=torch.float32), torch.ones(5, 1, 2)
    assert AffineMoves(dynamics.LinearNormal(2), data, False).law(1, state) is not None
    assert AffineMoves(dynamics.LinearNormal(2), data, True).law(1, state) is None
    assert AffineMoves(Other(2), data, False).law(1, state) is None
    with torch.enable_grad():
        assert AffineMoves(dynamics.LinearNormal(2), data, False).law(1, state) is None


@torch.no_grad()
def test_parameters_that_change_are_met():
    """In place between two runs and within one, and as another model within one (as iterated filtering does)."""
    model, data = toy(), series(6)
    data = data.replace(values=torch.randn(6, model.emission.obs_dim, dtype=D))
    fk = bootstrap(model, data)

    def run():
        torch.manual_seed(0)
        return particle_filter(fk, 50).total

    first = run()
    assert torch.equal(first, run())
    for parameter in model.transition.parameters():
        parameter.mul_(1.1)
    changed = run()
    assert not torch.equal(first, changed)
    fk = bootstrap(model, data)
    assert torch.equal(changed, run())

    steps, state = ModelSteps(model, data, "test"), torch.ones(4, 1, 2, dtype=D)
    means = [steps.law(k, state, None).mean for k in (1, 2, 3)]
    for parameter in model.transition.parameters():
        parameter.mul_(2)
    fresh = ModelSteps(model, data, "test")
    assert not torch.allclose(means[2], fresh.law(3, state, None).mean)
    torch.testing.assert_close(steps.law(3, state, None).mean, fresh.law(3, state, None).mean)
    other = toy()
    steps.model = other.bind()
    torch.testing.assert_close(steps.law(3, state, None).mean, ModelSteps(other, data, "x").law(3, state, None).mean)


CORRELATED = {
    "full": lambda: dynamics.LinearNormal(2, covariance="full", scale=torch.tensor([[1.0, 0], [0.5, 1]])),
    "Matern": lambda: dynamics.Matern(1.5, lengthscale=0.7),
    "singular": lambda: dynamics.LinearSDE(torch.tensor([[0.0, 1.0], [-4.0, -0.5]]), torch.tensor([[0.0], [1.0]])),
}


@pytest.mark.parametrize("name", CORRELATED)
@torch.no_grad()
def test_correlated_noise(name):
    """Matrices of all steps at once: the law of the transition, by an index on the host and by one on the device."""
    transition, data, state = CORRELATED[name]().to(D), series(5), torch.randn(4, 1, 2, dtype=D)
    moves = AffineMoves(transition, data, False)
    assert moves.steps is None  # a compiled run does not take them
    for k in range(1, 5):
        wanted = transition(state, data.times[k - 1 : k], data.times[k : k + 1], None)
        for index in (k, torch.tensor([k])):
            found = moves.law(index, state)
            assert found.batch_shape == wanted.batch_shape and found.event_shape == wanted.event_shape
            torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.covariance_matrix, wanted.covariance_matrix, rtol=1e-12, atol=1e-12)
