import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample

from pyro_ssm.binding import bind
from pyro_ssm.components import AffineGaussian, Gaussian
from pyro_ssm.emissions import FunctionNormal
from tests.blocks.component_checks import STEPS, TIMES


class Beacon(PyroModule):
    """The distance to a beacon of unknown place."""

    def __init__(self):
        super().__init__()
        self.place = torch.nn.Parameter(torch.tensor([1.0, -2.0]))

    def forward(self, state, inputs):
        return (state - self.place).norm(dim=-1, keepdim=True)


def test_is_the_equation():
    factor = torch.tensor([[0.5, 0.0], [0.3, 2.0]])
    emission = FunctionNormal(3, 2, lambda z, u: torch.sin(z[..., :2]) + u, scale=factor, covariance="full")
    assert isinstance(emission, Gaussian) and not isinstance(emission, AffineGaussian)
    z, u = torch.randn(4, STEPS, 3), torch.randn(4, STEPS, 2)
    law = bind(emission)(z, TIMES[:-1], u)
    torch.testing.assert_close(law.mean, torch.sin(z[..., :2]) + u)
    torch.testing.assert_close(law.covariance_matrix[1, 2], factor @ factor.T)
    plain = bind(FunctionNormal(3, 2, lambda z, u: z[..., :2], scale=0.7))(z, TIMES[:-1], None)
    torch.testing.assert_close(plain.variance, torch.full((4, STEPS, 2), 0.49))


def test_constants_of_a_function_may_be_drawn():
    emission = FunctionNormal(2, 1, Beacon())
    emission.function.place = PyroSample(dist.Normal(torch.zeros(2), 1.0).to_event(1))
    z, drawn = torch.randn(STEPS, 2), torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    law = bind(emission, {"function.place": drawn})(z, TIMES[:-1], None)
    torch.testing.assert_close(law.mean[..., 0], (z - drawn[:, None]).norm(dim=-1))


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match=r"`function` must be callable as f\(state, inputs\)"):
        FunctionNormal(2, 1, 3.0)
    wrong = bind(FunctionNormal(2, 1, lambda z, u: z))
    with pytest.raises(ValueError, match=r"`function` must return an observation of shape \(..., 5, 1\), got \(5, 2\)"):
        wrong(torch.zeros(STEPS, 2), TIMES[:-1], None)
    with pytest.raises(ValueError, match="`covariance` must be one of 'diagonal', 'full'"):
        FunctionNormal(2, 1, lambda z, u: z, covariance="dense")
