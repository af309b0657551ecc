import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import constraints

from pyro_ssm.binding import bind, parameter_names
from pyro_ssm.blocks._conditioning import _SHORTEST_GAP
from pyro_ssm.components import AffineGaussian, Gaussian
from pyro_ssm.dynamics import FunctionTransition, GatedTransition, MLPTransition
from tests.blocks.component_checks import STEPS, TIMES
from tests.slopes import assert_slope

GAPS = (TIMES[1:] - TIMES[:-1]).float().unsqueeze(-1)


def test_gated_is_the_equation():
    transition = bind(GatedTransition(2, 8, input_dim=3, memory_dim=1, uses_gap=True, floor=0.01))
    z, u, m = (torch.randn(4, STEPS, size) for size in (2, 3, 1))
    law = transition(z, TIMES[:-1], TIMES[1:], u, m)
    x = torch.cat([z, u, m, GAPS.log().expand(4, -1, -1)], -1)
    hidden = F.relu(x @ transition.hidden.weight.T + transition.hidden.bias)
    gate = torch.sigmoid(transition.gate(hidden[..., :8]))
    proposal = transition.proposal(hidden[..., 8:])
    torch.testing.assert_close(law.mean, (1 - gate) * transition.linear(x) + gate * proposal)
    scale = F.softplus(transition.raw_scale(F.relu(proposal))) + 0.01
    torch.testing.assert_close(law.variance, scale**2)


def test_gated_starts_beside_the_identity():
    transition = GatedTransition(2, 8, input_dim=3)
    z, u = torch.randn(STEPS, 2), torch.randn(STEPS, 3)
    with torch.no_grad():
        transition.gate.weight.zero_()
        transition.gate.bias.fill_(-1e3)
    assert torch.equal(bind(transition)(z, TIMES[:-1], TIMES[1:], u).mean, z)


def test_gated_hidden_layers_start_as_two_separate_layers_would():
    """The bound of the uniform start depends on the number of features only."""
    bound = 1 / 5**0.5
    weight = GatedTransition(2, 4000, input_dim=3).hidden.weight
    assert weight.abs().max() <= bound and abs(weight.var().item() - bound**2 / 3) < 0.02 * bound**2


@pytest.mark.parametrize("residual", [True, False])
def test_mlp_is_the_equation(residual):
    transition = bind(MLPTransition(2, (8,), input_dim=3, uses_gap=True, residual=residual, floor=0.01))
    z, u = torch.randn(4, STEPS, 2), torch.randn(4, STEPS, 3)
    law = transition(z, TIMES[:-1], TIMES[1:], u)
    outputs = transition.network(torch.cat([z, u, GAPS.log().expand(4, -1, -1)], -1))
    torch.testing.assert_close(law.mean, outputs[..., :2] + (z if residual else 0))
    torch.testing.assert_close(law.variance, (F.softplus(outputs[..., 2:]) + 0.01) ** 2)
    assert isinstance(transition, Gaussian) and not isinstance(transition, AffineGaussian)


def test_gap_enters_only_when_asked():
    z = torch.zeros(2, 2)
    uneven = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    for make in (lambda g: MLPTransition(2, 8, uses_gap=g), lambda g: GatedTransition(2, 8, uses_gap=g)):
        for uses_gap in (False, True):
            law = bind(make(uses_gap))(z, uneven[:-1], uneven[1:], None)
            assert torch.equal(law.variance[0], law.variance[1]) != uses_gap


def test_a_gap_of_zero_is_the_shortest_gap():
    transition = MLPTransition(2, 8, uses_gap=True).double()
    z = torch.zeros(1, 2, dtype=torch.float64)
    short = torch.full((1,), _SHORTEST_GAP, dtype=torch.float64)
    start = torch.zeros(1, dtype=torch.float64)
    none, least = (bind(transition)(z, start, end, None) for end in (start, short))
    assert torch.equal(none.mean, least.mean) and torch.equal(none.variance, least.variance)
    loss = lambda: bind(transition)(z, start, start, None).log_prob(z + 0.1).sum()  # noqa: E731
    assert_slope(loss, list(transition.parameters()))


class Pendulum(PyroModule):
    """Krishnan, Shalit and Sontag (2017), figure 3."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5))
        self.b = PyroParam(torch.tensor(-0.1), constraint=constraints.interval(-1, 1))

    def forward(self, state, inputs):
        z0, z1 = state.split(1, -1)
        # drawn constants have leading dims that the state may lack
        mean = torch.broadcast_tensors(0.2 * z0 + torch.tanh(self.a * z1), 0.2 * z1 + torch.sin(self.b * z0))
        return torch.cat(mean, -1)


def test_function_gives_the_mean_and_its_constants_are_parameters():
    transition = FunctionTransition(2, Pendulum(), scale=1.0)
    assert parameter_names(transition) == ["scale", "function.b", "function.a"]
    z = torch.randn(4, STEPS, 2)
    law = bind(transition)(z, TIMES[:-1], TIMES[1:], None)
    wanted = torch.stack(
        [0.2 * z[..., 0] + torch.tanh(0.5 * z[..., 1]), 0.2 * z[..., 1] + torch.sin(-0.1 * z[..., 0])], -1
    )
    torch.testing.assert_close(law.mean, wanted)
    torch.testing.assert_close(law.variance, torch.ones_like(z))


def test_constants_of_a_function_may_be_drawn():
    transition = FunctionTransition(2, Pendulum())
    transition.function.a = PyroSample(dist.Normal(0.0, 1.0))
    z, drawn = torch.randn(STEPS, 2), torch.tensor([0.1, 0.9])
    law = bind(transition, {"function.a": drawn})(z, TIMES[:-1], TIMES[1:], None)
    for s in range(2):
        alone = bind(transition, {"function.a": drawn[s]})(z, TIMES[:-1], TIMES[1:], None)
        torch.testing.assert_close(law.mean[s], alone.mean)


def test_function_sees_inputs():
    transition = bind(FunctionTransition(2, lambda z, u: z + u))
    z, u = torch.randn(STEPS, 2), torch.randn(STEPS, 2)
    assert torch.equal(transition(z, TIMES[:-1], TIMES[1:], u).mean, z + u)


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match=r"`function` must be callable as f\(state, inputs\)"):
        FunctionTransition(2, 3.0)
    wrong = bind(FunctionTransition(2, lambda z, u: z[..., :1]))
    with pytest.raises(ValueError, match=r"`function` must return the next state of shape \(..., 5, 2\), got \(5, 1\)"):
        wrong(torch.zeros(STEPS, 2), TIMES[:-1], TIMES[1:], None)
    with pytest.raises(ValueError, match="`floor` must be positive"):
        MLPTransition(2, 8, floor=0.0)
