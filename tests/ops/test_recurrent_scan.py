"""gru_scan and elman_scan equal their plain loops and torch's modules, in values and derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.ops import elman_scan, elman_scan_reference, gru_scan, gru_scan_reference


def arguments(gates, batch=3, num_times=5, hidden=4):
    shapes = [(batch, num_times, gates * hidden), (batch, hidden), (gates * hidden, hidden), (gates * hidden,)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


CASES = [
    (gru_scan, gru_scan_reference, 3, ()),
    (elman_scan, elman_scan_reference, 1, (False,)),
    (elman_scan, elman_scan_reference, 1, (True,)),
]


@pytest.mark.parametrize("num_times", [1, 2, 7])
@pytest.mark.parametrize(("fast", "slow", "gates", "more"), CASES)
def test_equals_the_plain_loop_with_gradients(fast, slow, gates, more, num_times):
    args = arguments(gates, num_times=num_times)
    one, other = fast(*args, *more), slow(*args, *more)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(one)
    got = torch.autograd.grad((weights * one).sum(), args)
    want = torch.autograd.grad((weights * other).sum(), args)
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("fast", "slow", "gates", "more"), CASES[:2])
def test_first_and_second_derivatives_by_finite_differences(fast, slow, gates, more):
    args = arguments(gates, 2, 3, 2)
    assert gradcheck(fast, (*args, *more))
    assert gradgradcheck(fast, (*args, *more))


@pytest.mark.parametrize(("fast", "slow", "gates", "more"), CASES)
def test_an_empty_batch_and_a_non_contiguous_input(fast, slow, gates, more):
    assert fast(*arguments(gates, batch=0), *more).shape == (0, 5, 4)
    x, *rest = arguments(gates, batch=4, num_times=6)
    turned = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(fast(turned, *rest, *more), slow(x, *rest, *more))


@pytest.mark.parametrize("name", ["gru", "tanh", "relu"])
def test_equals_the_module_of_torch(name):
    module = nn.GRU(3, 4, batch_first=True) if name == "gru" else nn.RNN(3, 4, nonlinearity=name, batch_first=True)
    features, first = torch.randn(2, 6, 3), torch.randn(2, 4)
    products = nn.functional.linear(features, module.weight_ih_l0, module.bias_ih_l0)
    args = (products, first, module.weight_hh_l0, module.bias_hh_l0)
    got = gru_scan(*args) if name == "gru" else elman_scan(*args, name == "relu")
    torch.testing.assert_close(got, module(features, first.unsqueeze(0))[0])
