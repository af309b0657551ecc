"""Gaussian integrals of radial basis functions against Gauss-Hermite quadrature."""

import numpy as np
import pytest
import torch

from pyro_ssm.ops import radial_basis, radial_moments

D = torch.float64


def case(n, K=3, lead=(2, 4)):
    torch.manual_seed(n)
    root = (0.4 * torch.randn(*lead, n, n, dtype=D)).tril()
    return torch.randn(*lead, n, dtype=D), root, torch.randn(K, n, dtype=D), 0.5 + torch.rand(K, n, dtype=D)


def quadrature(n, size=100):
    """Points and weights of the standard normal in n dims."""
    x, w = np.polynomial.hermite_e.hermegauss(size)
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*[x] * n, indexing="ij")], -1)
    weight = np.prod(np.stack([axis.ravel() for axis in np.meshgrid(*[w / w.sum()] * n, indexing="ij")], -1), -1)
    return torch.as_tensor(grid), torch.as_tensor(weight)


@pytest.mark.parametrize("n", [1, 2])
def test_moments_are_those_of_quadrature(n):
    mean, root, centers, width = case(n)
    found = radial_moments(mean, root @ root.mT, centers, width)
    points, weight = quadrature(n)
    x = (mean.unsqueeze(-2) + points @ root.mT).requires_grad_()  # (..., points, n)
    rho = radial_basis(x, centers, width)
    torch.testing.assert_close(found.value, (weight.unsqueeze(-1) * rho).sum(-2), rtol=1e-8, atol=1e-10)
    product = torch.einsum("q,...qi,...qj->...ij", weight, rho, rho)
    torch.testing.assert_close(found.product, product, rtol=1e-8, atol=1e-10)
    for i in range(len(centers)):
        (gradient,) = torch.autograd.grad(rho[..., i].sum(), x, retain_graph=True)
        slope = (weight.unsqueeze(-1) * gradient).sum(-2)
        torch.testing.assert_close(found.slope[..., i, :], slope, rtol=1e-8, atol=1e-10)


def test_a_point_mass_gives_values_and_derivatives():
    mean, root, centers, width = case(2)
    found = radial_moments(mean, torch.zeros_like(root), centers, width)
    rho = radial_basis(mean, centers, width)
    torch.testing.assert_close(found.value, rho)
    torch.testing.assert_close(found.product, rho.unsqueeze(-1) * rho.unsqueeze(-2))
    away = (centers - mean.unsqueeze(-2)) / width.square()
    torch.testing.assert_close(found.slope, rho.unsqueeze(-1) * away)


def test_batch_is_a_loop_and_single_precision_agrees():
    mean, root, centers, width = case(2)
    P = root @ root.mT
    all_at_once = radial_moments(mean, P, centers, width)
    alone = radial_moments(mean[1, 2], P[1, 2], centers, width)
    single = radial_moments(mean.float(), P.float(), centers.float(), width.float())
    for batch, one, half in zip(all_at_once, alone, single, strict=True):
        torch.testing.assert_close(batch[1, 2], one)
        torch.testing.assert_close(half.double(), batch, rtol=1e-4, atol=1e-5)


def test_gradients():
    mean, root, centers, width = (x.requires_grad_() for x in case(2, K=2, lead=()))
    assert torch.autograd.gradcheck(lambda m, L, c, w: radial_moments(m, L @ L.mT, c, w), (mean, root, centers, width))
    assert torch.autograd.gradcheck(radial_basis, (mean, centers, width))
