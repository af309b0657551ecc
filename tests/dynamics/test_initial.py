import pyro.distributions as dist
import pytest
import torch

from pyro_ssm.binding import bind
from pyro_ssm.dynamics import NormalInitial

FIRST = torch.zeros(3, 1, dtype=torch.float64)


def test_is_a_normal_with_its_parameters():
    initial = bind(NormalInitial(2, loc=torch.tensor([1.0, -1.0]), scale=torch.tensor([0.5, 2.0])))
    z = torch.randn(3, 1, 2)
    wanted = dist.Normal(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0])).to_event(1).log_prob(z)
    torch.testing.assert_close(initial(FIRST, None).log_prob(z), wanted)


def test_inputs_shift_the_mean():
    matrix, factor = torch.randn(2, 3), torch.tensor([[0.5, 0.0], [0.3, 2.0]])
    initial = bind(NormalInitial(2, input_dim=3, covariance="full", loc=1.0, scale=factor), {"input_matrix": matrix})
    inputs = torch.randn(3, 1, 3)
    law = initial(FIRST, inputs)
    torch.testing.assert_close(law.mean, 1 + inputs @ matrix.T)
    torch.testing.assert_close(law.covariance_matrix[0, 0], factor @ factor.T)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"`loc` must be a number or have shape \(2,\), got shape \(3,\)"):
        NormalInitial(2, loc=torch.zeros(3))
    with pytest.raises(ValueError, match="`covariance` must be one of 'diagonal', 'full'"):
        NormalInitial(2, covariance="dense")
    with pytest.raises(ValueError, match="`scale` must lie above its floor"):
        NormalInitial(2, scale=0.0)
    with pytest.raises(ValueError, match="`state_dim` must be at least 1"):
        NormalInitial(0)
