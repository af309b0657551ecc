"""The sinh-arcsinh map: a bijection, and its derivatives."""

import pytest
import torch

from pyro_ssm.distributions import SinhArcsinh

D = torch.float64


def made(skew=0.4, log_tail=0.3):
    shape = torch.zeros(3, dtype=D)
    return SinhArcsinh(shape + 0.7, shape - 0.5, shape + skew, shape + log_tail)


def test_it_is_the_identity_up_to_location_and_scale():
    x = torch.linspace(-4, 4, 9, dtype=D).unsqueeze(-1)
    move = made(0.0, 0.0)
    torch.testing.assert_close(move(x), (0.7 + x * torch.tensor(-0.5, dtype=D).exp()).expand(9, 3))
    assert (move.curve(x).abs() < 1e-12).all()


@pytest.mark.parametrize(("skew", "log_tail"), [(0.4, 0.3), (-1.0, -0.4), (0.0, 0.2)])
def test_inverse_and_derivatives(skew, log_tail):
    move = made(skew, log_tail)
    x = torch.linspace(-3, 3, 12, dtype=D).unsqueeze(-1).expand(12, 3).clone().requires_grad_()
    y = move(x)
    torch.testing.assert_close(move.inv(y), x)
    slope = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
    torch.testing.assert_close(move.slope(x), slope)
    torch.testing.assert_close(move.log_abs_det_jacobian(x, y), slope.log())
    second = torch.autograd.grad(slope.sum(), x)[0]
    torch.testing.assert_close(move.curve(x), second / slope)
    z = y.detach().requires_grad_()
    law = torch.distributions.TransformedDistribution(torch.distributions.Normal(torch.zeros(3, dtype=D), 1.0), [move])
    score = torch.autograd.grad(law.log_prob(z).sum(), z)[0]
    torch.testing.assert_close(move.score(x), score)


def test_far_out_it_is_the_exact_value():
    """With a tail of 1, F' = s (cosh a + x sinh a / sqrt(1 + x^2)): s e^{-a} and s e^a far out."""
    move = made(2.0, 0.0)
    x = torch.tensor([-300.0, 0.0, 300.0], dtype=D)
    a = torch.tensor(2.0, dtype=D)
    wanted = -0.5 + (a.cosh() + a.sinh() * x / (1 + x.square()).sqrt()).log()
    torch.testing.assert_close(move.log_abs_det_jacobian(x, None), wanted, rtol=1e-9, atol=0)
    far = torch.tensor([-1e6, 1e150, 1e6], dtype=D)
    wanted = -0.5 + torch.stack([-a, a, a])
    torch.testing.assert_close(move.log_abs_det_jacobian(far, None), wanted, rtol=1e-9, atol=0)
    torch.testing.assert_close(move.inv(move(x)), x)
    assert move == move and move != made(2.0, 0.0)
