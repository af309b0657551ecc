"""Gradients by way of a reference, where one argument depends on another."""

import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.ops import composite_backward, kalman_log_likelihood
from tests.ops.kalman_systems import everything, system


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, grad):
        return composite_backward(torch.mul, ctx.saved_tensors, ctx.needs_input_grad, (grad,))


def test_an_argument_that_depends_on_another_counts_once():
    x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(Product.apply(x, x.square()), x, create_graph=True)
    assert slope == 12.0
    assert torch.autograd.grad(slope, x)[0] == 12.0


def test_kalman_filter_with_a_start_that_depends_on_the_motion():
    torch.manual_seed(0)
    y, m, L, F, *rest = system(2, 1, 3)

    def total(F):
        return kalman_log_likelihood(y, everything(y), m, L + 0.3 * F[0] @ F[0].mT, F, *rest).sum()

    F.requires_grad_()
    assert gradcheck(total, [F]) and gradgradcheck(total, [F])
