"""combiner_path equals its plain loop in values and in first and second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.ops import combiner_path, combiner_path_reference


def arguments(lead, num_times=5, state=2, hidden=3, features_lead=None, dtype=torch.float64):
    features_lead = lead if features_lead is None else features_lead
    shapes = [(*lead, num_times, state), (*features_lead, num_times, hidden), (state,), (hidden, state), (hidden,)]
    shapes += [(2 * state, hidden), (2 * state,)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("num_times", [1, 2, 7])
@pytest.mark.parametrize(("lead", "features_lead"), [((), ()), ((3,), (3,)), ((4, 3), (3,)), ((2, 1, 3), (2, 1, 3))])
def test_equals_the_plain_loop_with_gradients(lead, features_lead, num_times):
    args = arguments(lead, num_times, features_lead=features_lead)
    fast, slow = combiner_path(*args, 0.1), combiner_path_reference(*args, 0.1)
    weights = [torch.randn_like(part) for part in fast]
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(sum((w * p).sum() for w, p in zip(weights, fast, strict=True)), args)
    want = torch.autograd.grad(sum((w * p).sum() for w, p in zip(weights, slow, strict=True)), args)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_first_and_second_derivatives_by_finite_differences():
    args = arguments((2,), 3)
    assert gradcheck(combiner_path, (*args, 0.1))
    assert gradgradcheck(combiner_path, (*args, 0.1))


def test_a_non_contiguous_and_an_empty_batch():
    args = arguments((4,), 6)
    turned = [args[0].detach().transpose(0, 1).contiguous().transpose(0, 1), *args[1:]]
    torch.testing.assert_close(combiner_path(*turned)[0], combiner_path_reference(*args)[0])
    empty = arguments((0,), 6)
    assert combiner_path(*empty)[0].shape == (0, 6, 2)


def test_float32_stays_within_rounding_of_float64():
    args = arguments((8,), 100, state=4, hidden=16)
    single = combiner_path(*(arg.float() for arg in args))[0]
    double = combiner_path(*args)[0]
    assert (single.double() - double).abs().max() <= 1e-5 * double.abs().max()
