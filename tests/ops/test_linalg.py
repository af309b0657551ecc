import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.ops import tria
from pyro_ssm.ops.linalg import solve_lower, solve_lower_right


def wide(*shape):
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (3, 7), (4, 2), (2, 5, 3, 6), (0, 3, 4)])
def test_square_root_is_lower_triangular_with_nonnegative_diagonal(shape):
    A = wide(*shape)
    L = tria(A)
    assert L.shape == shape[:-2] + (shape[-2], shape[-2])
    torch.testing.assert_close(L @ L.mT, A @ A.mT, rtol=1e-13, atol=1e-13)
    assert (L.triu(1) == 0).all()
    assert (L.diagonal(dim1=-2, dim2=-1) >= 0).all()


def test_equals_cholesky_of_the_gram_matrix():
    A = wide(5, 4, 9)
    torch.testing.assert_close(tria(A), torch.linalg.cholesky(A @ A.mT), rtol=1e-12, atol=1e-12)


def test_small_rows_keep_their_digits_beside_large_ones():
    A = wide(3, 6)
    scales = torch.tensor([1e6, 1.0, 1e-6], dtype=torch.float64).unsqueeze(-1)
    exact = tria(scales * A)
    assert ((tria((scales * A).float()).double() - exact).abs() <= 5e-6 * exact.norm(dim=-1, keepdim=True)).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (3, 5), (2, 2, 4)])
def test_first_and_second_derivatives_at_full_rank(shape):
    A = wide(*shape).requires_grad_()
    assert gradcheck(tria, A)
    assert gradgradcheck(tria, A)


def deficient(kind):
    A = wide(4, 6)
    if kind == "zero row first":
        A[0] = 0
    elif kind == "zero row within":
        A[2] = 0
    elif kind == "zero row last":
        A[3] = 0
    elif kind == "equal rows":
        A[2] = A[0]
    elif kind == "too few columns":
        A = A[:, :2].clone()
    elif kind == "all zero":
        A = torch.zeros_like(A)
    return A


KINDS = ["zero row first", "zero row within", "zero row last", "equal rows", "too few columns", "all zero"]


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_through_the_gram_matrix_at_deficient_rank(kind):
    """f(L L^T) has the derivative 2 F A, whatever the rank."""
    A = deficient(kind).requires_grad_()
    weight = wide(4, 4)

    def f(A):
        L = tria(A)
        return ((L @ L.mT) * weight).sum() + (L @ L.mT).pow(2).sum()

    assert gradcheck(f, A)
    (grad,) = torch.autograd.grad(f(A), A)
    F = 0.5 * (weight + weight.T) + 2 * (A @ A.mT)
    torch.testing.assert_close(grad, 2 * F @ A, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_any_function_at_deficient_rank(kind):
    """A subgradient: along a scaling of A, under which L scales too, it is the derivative."""
    A, weight = deficient(kind).requires_grad_(), wide(4, 4)
    L = tria(A)
    (grad,) = torch.autograd.grad((L * weight).sum(), A)
    torch.testing.assert_close((grad * A).sum(), (L * weight).sum(), rtol=1e-9, atol=1e-9)


def test_pinned_coordinate_gets_the_derivative_of_the_regular_block():
    """A zero row leaves the derivative of the others what it is without that row."""
    A = wide(3, 5)
    weight = wide(3, 3)
    padded = torch.cat([A[:1], torch.zeros(1, 5, dtype=A.dtype), A[1:]]).requires_grad_()
    keep = torch.tensor([0, 2, 3])
    L = tria(padded)
    covariance = (L @ L.mT)[keep][:, keep]
    (grad,) = torch.autograd.grad((covariance * weight).sum(), padded)
    torch.testing.assert_close(grad[keep], (weight + weight.T) @ A, rtol=1e-10, atol=1e-10)


def test_solves():
    L, B = tria(wide(2, 3, 5)), wide(2, 4, 3)
    torch.testing.assert_close(solve_lower_right(B, L) @ L, B)
    torch.testing.assert_close((L @ solve_lower(L, B[:, 0]).unsqueeze(-1)).squeeze(-1), B[:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_right_solve_against_a_singular_root(kind):
    L = tria(deficient(kind))
    B = wide(2, 4) @ L
    torch.testing.assert_close(solve_lower_right(B, L) @ L, B, rtol=1e-9, atol=1e-9)
