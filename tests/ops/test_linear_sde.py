import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.ops import linear_sde_step, linear_sde_step_reference, stationary_root

D = torch.float64


def shift(n):
    """The integrated Wiener process of order n - 1: noise in the last coordinate alone."""
    F, L = torch.diag(torch.ones(n - 1, dtype=D), 1), torch.zeros(n, 1, dtype=D)
    L[-1] = 1.0
    return F, L


def shift_covariance(n, gap):
    f = math.factorial
    powers = [[2 * n - 1 - i - j for j in range(n)] for i in range(n)]
    rows = [[gap**p / (p * f(n - 1 - i) * f(n - 1 - j)) for j, p in enumerate(row)] for i, row in enumerate(powers)]
    return torch.tensor(rows, dtype=D)


def random_system(n, m, *lead):
    return torch.randn(*lead, n, n, dtype=D) - 1.5 * torch.eye(n, dtype=D), torch.randn(*lead, n, m, dtype=D)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 1), (3, 2), (5, 5), (2, 4)])
def test_is_the_block_exponential(n, m):
    F, L = random_system(n, m)
    gap = torch.tensor([0.4, 1.0, 2.2], dtype=D)
    ours, reference = linear_sde_step(F, L, gap), linear_sde_step_reference(F, L, gap)
    torch.testing.assert_close(ours.matrix, reference.matrix, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours.integral, reference.integral, rtol=1e-12, atol=1e-13)
    Q, wanted = (S @ S.mT for S in (ours.scale_tril, reference.scale_tril))
    torch.testing.assert_close(Q, wanted, rtol=1e-11, atol=1e-12)
    assert (ours.scale_tril.triu(1) == 0).all()


@pytest.mark.parametrize("gap", [1e-9, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_one_noise_keeps_every_digit_of_the_root(n, gap):
    F, L = shift(n)
    S = linear_sde_step(F, L, torch.tensor(gap, dtype=D)).scale_tril
    torch.testing.assert_close(S @ S.mT, shift_covariance(n, gap), rtol=1e-13, atol=0)
    units = torch.tensor([gap ** (n - 0.5 - i) for i in range(n)], dtype=D)
    root = torch.linalg.cholesky(shift_covariance(n, 1.0))  # of a unit gap, in units of the gap
    torch.testing.assert_close(S / units.unsqueeze(-1), root, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("gap", [1e-6, 1e-2, 1.0])
def test_one_noise_in_a_dense_basis(gap):
    """The covariance itself is singular to rounding for short gaps; its root is not: its determinant is exact."""
    n = 3
    T = torch.linalg.qr(torch.randn(n, n, dtype=D))[0]
    F, L = shift(n)
    S = linear_sde_step(T @ F @ T.mT, T @ L, torch.tensor(gap, dtype=D)).scale_tril
    Q = shift_covariance(n, gap)
    torch.testing.assert_close(S @ S.mT, T @ Q @ T.mT, rtol=1e-13, atol=1e-14 * float(Q.max()))
    wanted = torch.linalg.cholesky(shift_covariance(n, 1.0)).diagonal().log().sum() + n**2 / 2 * math.log(gap)
    torch.testing.assert_close(S.diagonal().log().sum(), wanted, rtol=1e-10, atol=1e-10)


def test_fewer_directions_than_coordinates():
    """Noise that never reaches a coordinate leaves it without any."""
    F = torch.tensor([[-1.0, 0.0], [0.0, -2.0]], dtype=D)
    S = linear_sde_step(F, torch.tensor([[1.0], [0.0]], dtype=D), torch.tensor([0.3, 700.0], dtype=D)).scale_tril
    assert (S[:, 1] == 0).all()
    torch.testing.assert_close(S[:, 0, 0] ** 2, (1 - torch.exp(-2 * torch.tensor([0.3, 700.0], dtype=D))) / 2)


def test_long_gaps_forget_and_do_not_overflow():
    F, L = random_system(4, 2)
    F = F - 2 * torch.eye(4, dtype=D)
    S = linear_sde_step(F, L, torch.tensor([1e3, 1e6], dtype=D)).scale_tril
    P = S @ S.mT
    residual = F @ P + P @ F.mT + L @ L.mT
    assert float(residual.abs().max()) < 1e-12 * float((F @ P).abs().max()) * 10


def test_bad_units_lose_nothing():
    """A companion matrix with entries from 1 to 1e7 (a short length-scale): compared in its natural units."""
    rate = math.sqrt(5) / 0.01
    F = torch.tensor([[0, 1, 0], [0, 0, 1], [-(rate**3), -3 * rate**2, -3 * rate]], dtype=D)
    L = torch.tensor([[0], [0], [math.sqrt(16 / 3 * rate**5)]], dtype=D)
    units = torch.tensor([1.0, rate, rate**2], dtype=D)
    natural, noise = F * units / units.unsqueeze(-1) / rate, L / units.unsqueeze(-1) / rate**0.5
    gap = torch.tensor([1e-5, 1e-2, 1.0], dtype=D)
    ours, wanted = linear_sde_step(F, L, gap), linear_sde_step(natural, noise, gap * rate)
    scaled = ours.matrix * units / units.unsqueeze(-1)
    torch.testing.assert_close(scaled, wanted.matrix, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.scale_tril / units.unsqueeze(-1), wanted.scale_tril, rtol=1e-10, atol=1e-14)


def test_batch_is_a_loop():
    F, L = random_system(3, 2, 4, 1)
    gap = torch.tensor([0.01, 0.5, 30.0], dtype=D)
    together = linear_sde_step(F, L, gap)
    assert together.matrix.shape == (4, 3, 3, 3)
    for b in range(4):
        for k in range(3):
            alone = linear_sde_step(F[b, 0], L[b, 0], gap[k])
            for part, wanted in zip(together, alone, strict=True):
                torch.testing.assert_close(part[b, k], wanted, rtol=1e-11, atol=1e-13)


def test_gap_of_zero_is_no_move():
    F, L = random_system(3, 2)
    step = linear_sde_step(F.requires_grad_(), L.requires_grad_(), torch.zeros(1, dtype=D))
    torch.testing.assert_close(step.matrix[0], torch.eye(3, dtype=D))
    assert (step.integral == 0).all() and (step.scale_tril == 0).all()
    (step.scale_tril @ step.scale_tril.mT).sum().backward()
    assert (F.grad == 0).all() and (L.grad == 0).all()


@pytest.mark.parametrize("gap", [0.1, 3.0])
def test_gradients(gap):
    F, L = random_system(2, 2)

    def law(F, L):
        step = linear_sde_step(F, L, torch.tensor([gap], dtype=D))
        return step.matrix, step.integral, step.scale_tril

    args = (F.requires_grad_(), L.requires_grad_())
    assert gradcheck(law, args)
    assert gradgradcheck(law, args, atol=1e-4)


def test_gradient_through_a_singular_root():
    F, _ = shift(2)

    def covariance(scale):
        L = torch.stack([torch.zeros_like(scale), scale]).unsqueeze(-1)
        S = linear_sde_step(F, L, torch.tensor(0.7, dtype=D)).scale_tril
        return S @ S.mT

    assert gradcheck(covariance, (torch.tensor(1.3, dtype=D, requires_grad=True),))


def test_float32_is_right_to_float32():
    F, L = random_system(3, 1)
    gap = torch.tensor([1e-4, 1.0, 50.0])
    ours, exact = linear_sde_step(F.float(), L.float(), gap), linear_sde_step(F, L, gap.double())
    for part, wanted in zip(ours, exact, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.double(), wanted, rtol=3e-5, atol=1e-5)


def test_stationary_root_solves_its_equation():
    A = torch.randn(3, 4, 4, dtype=D)
    A = 0.97 * A / torch.linalg.eigvals(A).abs().amax(-1)[:, None, None]
    S = torch.randn(3, 4, 2, dtype=D)
    root = stationary_root(A, S)
    P = root @ root.mT
    torch.testing.assert_close(P, A @ P @ A.mT + S @ S.mT, rtol=1e-11, atol=1e-11)
    assert (root.triu(1) == 0).all()


def test_stationary_root_near_a_unit_root_and_singular():
    near = stationary_root(torch.tensor([[1 - 1e-9]], dtype=D), torch.ones(1, 1, dtype=D))
    torch.testing.assert_close(near**2 * (1 - (1 - 1e-9) ** 2), torch.ones(1, 1, dtype=D), rtol=1e-6, atol=0)
    nilpotent = stationary_root(torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=D), torch.tensor([[1.0], [0.0]], dtype=D))
    torch.testing.assert_close(nilpotent, torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=D))


def test_gradient_of_the_stationary_root():
    A = torch.tensor([[0.5, 0.2], [-0.1, 0.7]], dtype=D, requires_grad=True)
    S = torch.randn(2, 2, dtype=D, requires_grad=True)
    assert gradcheck(stationary_root, (A, S))


def test_no_stationary_law_is_an_error():
    with pytest.raises(ValueError, match="there is no stationary law: .* modulus 1,"):
        stationary_root(torch.eye(2), torch.eye(2))
