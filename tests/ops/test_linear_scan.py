import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.ops import linear_scan, linear_scan_reference


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


CASES = {
    "plain": ((5, 2), (5, 2), (2,)),
    "no initial": ((5, 2), (5, 2), None),
    "one step": ((1, 3), (1, 3), (3,)),
    "batch": ((2, 3, 7, 2), (2, 3, 7, 2), (2, 3, 2)),
    "constant coefficient": ((1, 2), (3, 6, 2), (2,)),
    "one coefficient for all channels": ((6, 1), (2, 6, 3), None),
    "batch in the coefficient only": ((4, 6, 2), (6, 2), (1, 2)),
    "batch in the initial state only": ((6, 2), (6, 2), (3, 2)),
    "empty batch": ((0, 4, 2), (0, 4, 2), (0, 2)),
}


def make(case):
    torch.manual_seed(1)
    return [None if shape is None else rand(*shape).requires_grad_() for shape in CASES[case]]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_reference(case, reverse):
    args = make(case)
    fast, plain = (f(*args, reverse=reverse) for f in (linear_scan, linear_scan_reference))
    torch.testing.assert_close(fast, plain, rtol=1e-14, atol=1e-14)
    weight = torch.randn_like(plain)
    inputs = [x for x in args if x is not None]
    gradients = (torch.autograd.grad(h, inputs, weight) for h in (fast, plain))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "case", ["plain", "no initial", "one step", "constant coefficient", "batch in the coefficient only"]
)
def test_first_and_second_derivatives(case, reverse):
    args = make(case)

    def f(*inputs):
        return linear_scan(*inputs, *[None] * (3 - len(inputs)), reverse=reverse)

    inputs = [x for x in args if x is not None]
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


def test_third_derivative():
    a = torch.tensor([[0.7], [0.3], [1.1]], dtype=torch.float64, requires_grad=True)
    b = torch.ones(3, 1, dtype=torch.float64)
    derivatives = []
    for f in (linear_scan, linear_scan_reference):
        value = f(a, b, b[0]).pow(3).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, a, create_graph=True)
            value = grad.sum()
        derivatives.append(value)
    torch.testing.assert_close(*derivatives)


def test_reverse_is_the_flipped_scan():
    a, b, h = rand(7, 3), rand(7, 3), rand(3)
    flipped = linear_scan(a.flip(0), b.flip(0), h).flip(0)
    assert torch.equal(linear_scan(a, b, h, reverse=True), flipped)


def test_split_and_carry_equals_the_whole():
    a, b = rand(2, 9, 3), rand(2, 9, 3)
    whole = linear_scan(a, b)
    first = linear_scan(a[:, :4], b[:, :4])
    assert torch.equal(torch.cat([first, linear_scan(a[:, 4:], b[:, 4:], first[:, -1])], 1), whole)


def test_non_contiguous_arguments():
    a, b = rand(3, 2, 8).permute(1, 2, 0), rand(3, 16, 2).transpose(0, 2)[:, ::2]
    torch.testing.assert_close(linear_scan(a, b), linear_scan_reference(a, b), rtol=1e-14, atol=1e-14)


def test_no_steps():
    assert linear_scan(rand(0, 2), rand(0, 2), rand(2)).shape == (0, 2)


def test_float32_against_float64():
    torch.manual_seed(2)
    a, b = 1 - 1e-3 * torch.rand(4, 2000, 8, dtype=torch.float64), rand(4, 2000, 8)
    exact = linear_scan(a, b)
    assert (linear_scan(a.float(), b.float()) - exact).abs().max() < 1e-5 * exact.abs().max() * 10


def test_too_few_dims_are_refused():
    with pytest.raises(ValueError, match=r"`a` must be \(..., time, channels\)"):
        linear_scan(rand(3), rand(3, 1))
