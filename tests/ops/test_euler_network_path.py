"""euler_network_path equals its plain loop in values and in first and second derivatives; so does the softplus."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.ops import CoordinateScale, euler_network_path, euler_network_path_reference, softplus

D = torch.float64


def arguments(lead=(3,), steps=5, n=2, widths=(4, 3), given_lead=None, own_gaps=False, dtype=D, noise=1.0):
    def rand(*shape):
        return torch.randn(*shape, dtype=dtype).mul_(0.5).requires_grad_()

    given_lead = lead if given_lead is None else given_lead
    gaps = 0.1 + torch.rand(*(lead if own_gaps else ()), steps, dtype=dtype)
    network = [rand(widths[0], n)]
    for i, o in zip(widths, (*widths[1:], n), strict=True):
        network += [rand(o, i), rand(o)]
    epsilon = rand(*lead, steps, n).detach().mul_(noise).requires_grad_()
    return [epsilon, rand(*lead, n), rand(*given_lead, steps, widths[0]), gaps], network


def diffusions(n=2, hidden=3, dtype=D):
    def rand(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    shapes = [(n, hidden)] * 3 + [(n,)]
    return {
        "constant": torch.rand(n, dtype=dtype).add_(0.2).requires_grad_(),
        "softplus": CoordinateScale(*(rand(*shape) for shape in shapes), 0.01, None),
        "sigmoid": CoordinateScale(*(rand(*shape) for shape in shapes), 0.1, 0.8),
    }


def tensors_of(args, network, diffusion):
    scale = list(diffusion[:4]) if isinstance(diffusion, CoordinateScale) else [diffusion]
    return [args[0], args[1], args[2], *network, *scale]


@pytest.mark.parametrize("kind", ["constant", "softplus", "sigmoid"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"steps": 1},
        {"lead": (), "widths": (4,)},
        {"lead": (4, 3), "given_lead": (3,), "own_gaps": True, "widths": (3, 4, 2)},
        {"lead": (700,), "steps": 2, "widths": (3,), "noise": 0.1},
    ],
)
@pytest.mark.parametrize("engine", ["compiled", "torch"], indirect=True)
def test_equals_the_plain_loop_with_gradients(kind, how, engine):
    args, network = arguments(**how)
    diffusion = diffusions()[kind]
    fast = euler_network_path(*args, network, diffusion)
    slow = euler_network_path_reference(*args, network, diffusion)
    weights = [torch.randn_like(part) for part in fast]
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    wanted = tensors_of(args, network, diffusion)
    for parts in ((0, 1, 2), (0,), (1, 2)):
        got, want = (
            torch.autograd.grad(
                sum((weights[i] * out[i]).sum() for i in parts), wanted, retain_graph=True, allow_unused=True
            )
            for out in (fast, slow)
        )
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["constant", "sigmoid"])
def test_first_and_second_derivatives_by_finite_differences(kind):
    args, network = arguments((2,), 3)
    diffusion = diffusions()[kind]
    tensors = tensors_of(args, network, diffusion)

    def path(*tensors):
        e, z, h, *others = tensors
        net, scale = others[: len(network)], others[len(network) :]
        scale = CoordinateScale(*scale, *diffusion[4:]) if len(scale) > 1 else scale[0]
        return tuple(euler_network_path(e, z, h, args[3], net, scale))

    assert gradcheck(path, tensors)
    assert gradgradcheck(path, tensors)


def test_a_non_contiguous_and_an_empty_batch():
    args, network = arguments((4,), 6)
    diffusion = diffusions()["softplus"]
    turned = [args[0].detach().transpose(0, 1).contiguous().transpose(0, 1), *args[1:]]
    one, other = (euler_network_path(*a, network, diffusion)[0] for a in (turned, args))
    torch.testing.assert_close(one, other)
    empty, network = arguments((0,), 6)
    assert euler_network_path(*empty, network, diffusion)[0].shape == (0, 6, 2)


def test_float32_stays_within_rounding_of_float64():
    args, network = arguments((8,), 100, widths=(16, 16))
    diffusion = diffusions()["sigmoid"]
    double = euler_network_path(*args, network, diffusion)[0]
    low = CoordinateScale(*(part.float() for part in diffusion[:4]), *diffusion[4:])
    single = euler_network_path(*(arg.float() for arg in args), [w.float() for w in network], low)[0]
    assert (single.double() - double).abs().max() <= 1e-5 * double.abs().max()


class TestSoftplus:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_equals_torch_with_gradients(self, dtype):
        x = torch.linspace(-90, 90, 1001, dtype=dtype).requires_grad_()
        g = torch.randn(1001, dtype=dtype)
        mine, theirs = softplus(x), torch.nn.functional.softplus(x)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(mine, theirs, rtol=8 * eps, atol=0)
        (mine,), (theirs,) = torch.autograd.grad(mine, x, g), torch.autograd.grad(theirs, x, g)
        torch.testing.assert_close(mine, theirs, rtol=1e-7 if dtype == D else 8 * eps, atol=0)  # torch cuts off at 20

    def test_second_derivatives_transforms_and_compilers(self):
        x = torch.randn(7, dtype=D, requires_grad=True)
        assert gradcheck(softplus, x) and gradgradcheck(softplus, x)
        hessian = torch.func.jacrev(torch.func.grad(lambda x: softplus(x).sum()))(x.detach())
        slope = torch.sigmoid(x.detach())
        torch.testing.assert_close(hessian, torch.diag(slope * (1 - slope)))
        strided = torch.randn(4, 6, dtype=D)[:, ::2].requires_grad_()
        assert gradcheck(softplus, strided)
        assert softplus(torch.zeros(0)).shape == (0,)
