"""The law of a path: contracts over several kinds of step, and what is its own."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_ssm.components import SampleOnly, Transition
from pyro_ssm.distributions import MarkovPath
from pyro_ssm.testing import PathLawContract
from tests.contracts.toys import Decay, Start, StateLeak, dense_normal, normal, series, toy

TIMES = torch.tensor([0.0, 0.4, 1.5, 1.7])


def components(parameters, **kinds):
    """Start and Decay whose parameters are the given tensors."""
    start, decay = kinds.get("start", Start)(2), kinds.get("decay", Decay)(2)
    for component, names in ((start, ("loc", "log_scale")), (decay, ("rate", "level", "log_scale"))):
        for name in names:
            del component._parameters[name]
            component.__dict__[name] = parameters.pop(0)
    return start, decay


class TestNormalSteps(PathLawContract):
    decay = Decay

    def make_parameters(self):
        names = ("rate", "level", "log_scale")
        return [Start(2).loc, Start(2).log_scale] + [getattr(Decay(2), name) for name in names]

    def make_law(self, parameters, step_mask):
        start, decay = components(list(parameters), decay=self.decay)
        return MarkovPath(start, decay, TIMES.double(), step_mask=step_mask, batch_shape=(3,))

    def conditional(self, parameters, before, k):
        loc, log_scale, rate, level, spread = parameters
        if k == 0:
            return normal(loc.expand(1, 2), log_scale.exp())
        decay = torch.exp(-rate * (TIMES[k] - TIMES[k - 1]))
        return normal(decay * before[..., -1:, :] + (1 - decay) * level, spread.exp() * (1 - decay**2).sqrt())


class FullNoise(Decay):
    """Steps that are multivariate normal, so that the path takes the general route."""

    def forward(self, state, time, next_time, inputs, memory=None):
        law = super().forward(state, time, next_time, inputs, memory)
        return dist.MultivariateNormal(law.mean, scale_tril=torch.diag_embed(law.base_dist.scale))


class TestMixedSteps(TestNormalSteps):
    """A normal start under multivariate normal steps: no cache, the same law."""

    decay = FullNoise


class TestGeneralSteps(PathLawContract):
    """Student-t steps throughout: cached, but not in the noise."""

    def make_parameters(self):
        return [torch.tensor([0.3, -0.2]), torch.tensor(0.5)]

    def make_law(self, parameters, step_mask):
        level, log_scale = parameters

        def step(state, k, summary):
            before = torch.zeros(1, 2) if state is None else state
            return dist.StudentT(6.0, 0.5 * before + level, log_scale.exp()).to_event(1)

        return MarkovPath.over(step, 3, 2, step_mask=step_mask, batch_shape=(3,))

    def conditional(self, parameters, before, k):
        last = before[..., -1:, :] if k else torch.zeros(1, 2)
        return dist.StudentT(6.0, 0.5 * last + parameters[0], parameters[1].exp()).to_event(1)


class TestDrawnAtOnce(PathLawContract):
    """A path whose draw is one function of the noise."""

    def make_parameters(self):
        return [torch.tensor([0.3, -0.2]), torch.tensor(-0.5)]

    def make_law(self, parameters, step_mask):
        level, log_scale = parameters

        def step(state, k, summary):
            before = torch.zeros(1, 2) if state is None else state
            return normal(0.5 * before + level, log_scale.exp().expand(2))

        def draw(shape):
            noise, states = torch.randn(shape), []
            state = torch.zeros(shape[:-2] + (2,))
            for k in range(shape[-2]):
                state = 0.5 * state + level + log_scale.exp() * noise[..., k, :]
                states.append(state)
            return torch.stack(states, -2), noise, log_scale.exp().expand(shape)

        return MarkovPath.over(step, 4, 2, step_mask=step_mask, batch_shape=(3,), draw=draw)

    def conditional(self, parameters, before, k):
        last = before[..., -1:, :] if k else torch.zeros(1, 2)
        return normal(0.5 * last + parameters[0], parameters[1].exp().expand(2))


class TestMemoryOfStates(PathLawContract):
    """Steps that see a memory of all states before."""

    def make_parameters(self):
        return [torch.tensor([[0.3, -0.2], [0.1, 0.4]])]

    def _components(self, parameters):
        torch.manual_seed(5)
        start, decay, memory = Start(2, 2), Decay(2, 2), StateLeak(2)
        del decay._parameters["memory_weight"]
        decay.__dict__["memory_weight"] = parameters[0]
        return start, decay, memory

    def make_law(self, parameters, step_mask):
        start, decay, memory = self._components(parameters)
        return MarkovPath(start, decay, TIMES.double(), None, memory, step_mask=step_mask, batch_shape=(3,))

    def conditional(self, parameters, before, k):
        start, decay, memory = self._components(parameters)
        m = memory.first.expand(before.shape[:-2] + (2,))
        for j in range(k):
            m = memory.keep * (m + before[..., j, :] @ memory.state_weight.T)
        m = m.unsqueeze(-2)
        if k == 0:
            return start(TIMES[:1].double(), None, memory=m)
        return decay(before[..., -1:, :], TIMES[k - 1 : k].double(), TIMES[k : k + 1].double(), None, memory=m)


def test_the_density_is_that_of_the_dense_joint_normal():
    model, data = toy(), series(num_times=5)
    path = MarkovPath(model.initial, model.transition, data.times)
    z = path.sample((6,)).clone()
    law = dense_normal(model, data.times)
    wanted = torch.distributions.MultivariateNormal(law.mean[:10], law.covariance_matrix[:10, :10])
    torch.testing.assert_close(path.log_prob(z), wanted.log_prob(z.flatten(1)))


def test_own_grids_are_a_loop_over_series():
    model, data = toy(), series(batch=(3,), own=True)
    path = MarkovPath(model.initial, model.transition, data.times)
    assert path.batch_shape == (3,)
    z = path.sample((2,)).clone()
    for i in range(3):
        one = MarkovPath(model.initial, model.transition, data.times[i])
        torch.testing.assert_close(path.log_prob(z)[:, i], one.log_prob(z[:, i]))


def test_one_time_has_no_transition():
    path = MarkovPath(Start(2), Decay(2), torch.zeros(1).double())
    z = path.rsample((3,))
    assert z.shape == (3, 1, 2)
    torch.testing.assert_close(
        path.log_prob(z.clone()), Start(2)(torch.zeros(1).double(), None).log_prob(z).squeeze(-1)
    )


class Jumps(Transition, SampleOnly):
    """Has no density."""

    state_dim = 2

    def forward(self, state, time, next_time, inputs, memory=None):
        class Law(dist.TorchDistribution):
            arg_constraints = {}

            def sample(self, sample_shape=()):
                return state + torch.poisson(torch.ones_like(state))

            def expand(self, shape):
                return self

            def log_prob(self, value):
                raise NotImplementedError

        return Law(state.shape[:-1], state.shape[-1:], validate_args=False)


def test_a_law_without_density_can_be_drawn_and_its_density_is_not_made_up():
    path = MarkovPath(Start(2), Jumps(), TIMES.double(), batch_shape=(3,))
    z = path.sample()
    assert z.shape == (3, 4, 2)
    with pytest.raises(NotImplementedError):
        path.log_prob(z)
    with pytest.raises(NotImplementedError):
        path.log_prob_steps(path.rsample())


def test_support_is_real_and_refuses_padding():
    path = MarkovPath(Start(2), Decay(2), TIMES.double(), batch_shape=(3,))
    assert path.support.event_dim == 2 and isinstance(path.support, constraints.independent)
    mask = torch.tensor([[True] * 4, [True] * 3 + [False], [True] * 4])
    padded = MarkovPath(Start(2), Decay(2), TIMES.double(), step_mask=mask)
    with pytest.raises(ValueError, match=r"unequal lengths.*Marginal"):
        _ = padded.support


def test_the_cache_lives_on_the_expanded_instance():
    path = MarkovPath(Start(2), Decay(2), TIMES.double())
    wide = path.expand((3,))
    z = wide.rsample()
    assert wide._fresh[0] is z and path._fresh is None
    assert wide.log_prob_steps(z) is wide._fresh[1]


def test_inputs_hold_until_the_next_time():
    """inputs[k] holds on [times[k], times[k + 1]): transition k -> k + 1 gets inputs[k], the initial law inputs[0]."""

    class Driven(Transition):
        state_dim = 1

        def forward(self, state, time, next_time, inputs, memory=None):
            return normal(inputs, torch.ones(1))

    class Begun(Start):
        def forward(self, time, inputs, memory=None):
            return normal(inputs, torch.ones(1))

    inputs = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    path = MarkovPath(Begun(1), Driven(), TIMES.double(), inputs)
    z = torch.tensor([[1.0], [1.0], [2.0], [3.0]])  # each at its mean
    torch.testing.assert_close(path.log_prob_steps(z), torch.full((4,), -0.9189385))
    torch.manual_seed(3)
    drawn = path.rsample((4000,)).mean(0)
    torch.testing.assert_close(drawn, z, atol=0.08, rtol=0.0)
