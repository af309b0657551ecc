"""Triangular square roots: the linear algebra under the Gaussian filters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.composite import transformed

__all__ = ["solve_lower", "solve_lower_right", "tria"]


def tria(A: Tensor) -> Tensor:
    """The lower-triangular square root of a Gram matrix, without forming it.

    .. math:: L L^T = A A^T, \\qquad L \\text{ lower triangular}, \\quad L_{ii} \\ge 0

    Computed as the transposed R factor of :math:`A^T`, whose error is relative to each row of A, so that a precise
    coordinate beside a vague one keeps its digits. Columns side by side add up: ``tria(cat([A, B], -1))`` is a square
    root of :math:`A A^T + B B^T`.

    Gradients: first and second order where A has full row rank. Where it has not (zero rows, too few columns), the
    gradient of everything that depends on L through :math:`L L^T` is right and finite; a function of L that does not,
    such as a zero :math:`L_{ii} = |A_i|` itself, gets a subgradient. Under ``torch.func`` transforms and forward-mode
    differentiation the derivatives are torch's own, for full row rank only.

    Args:
        A: ``(..., n, m)``, any m.

    Returns:
        ``(..., n, n)``.

    >>> import torch
    >>> from pyro_ssm.ops import tria
    >>> tria(torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]])).abs()
    tensor([[5., 0.],
            [0., 2.]])
    """
    rows, columns = A.shape[-2:]
    if columns < rows:
        A = torch.nn.functional.pad(A, (0, rows - columns))
    if transformed(A):
        return _lower_q(A, mode="reduced")[0]
    if torch.is_grad_enabled() and A.requires_grad:
        return _LowerQ.apply(A)[0]
    return _lower_q(A, mode="r")[0]


def _lower_q(A: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """A = L Q^T with L_ii >= 0 and orthonormal columns of Q (empty for mode "r")."""
    Q, R = torch.linalg.qr(A.mT, mode=mode)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    sign = torch.where(diagonal < 0, -torch.ones_like(diagonal), torch.ones_like(diagonal))
    L = R.mT * sign.unsqueeze(-2)
    return L, Q if mode == "r" else Q * sign.unsqueeze(-2)


class _LowerQ(torch.autograd.Function):
    """A = L Q^T with a backward that stays finite where L is singular.

    With M = L^{-1} dA Q:  dL = L (tril(M) + striu(M)^T)  and
    dQ^T = (striu(M) - striu(M)^T) Q^T + L^{-1} dA (I - Q Q^T).
    The adjoint splits into ``G Q^T``, which needs no inverse and is all there is for a function of L L^T (for which
    L^T G is symmetric), and a rest behind L^{-T}, whose rows at a vanishing pivot are dropped. The backward is written
    in the outputs, hence differentiable in its turn.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor) -> tuple[Tensor, Tensor]:
        L, Q = _lower_q(A, mode="reduced")
        ctx.save_for_backward(L, Q)
        ctx.set_materialize_grads(False)
        return L, Q

    @staticmethod
    def backward(ctx: Any, G: Tensor | None, G_Q: Tensor | None) -> Tensor | None:
        L, Q = ctx.saved_tensors
        grad = None
        if G is not None:
            W = L.mT @ G
            grad = (G + _solve_where_regular(L, (W.mT - W).triu(1))) @ Q.mT
        if G_Q is not None:
            H = G_Q.mT
            W = H @ Q
            through_Q = _solve_where_regular(L, H + ((W - W.mT).triu(1) - W) @ Q.mT)
            grad = through_Q if grad is None else grad + through_Q
        return grad


def vanishing_pivots(L: Tensor) -> Tensor:
    """Where the diagonal of a lower-triangular L is zero to rounding, relative to its row; ``(..., n)`` bool."""
    tolerance = torch.finfo(L.dtype).eps * L.shape[-1] * torch.linalg.vector_norm(L.detach(), dim=-1)
    return L.detach().diagonal(dim1=-2, dim2=-1).abs() <= tolerance


def _solve_where_regular(L: Tensor, B: Tensor) -> Tensor:
    """L^T X = B, with X_i = 0 at vanishing pivots (whose columns of L are replaced by those of the identity)."""
    singular = vanishing_pivots(L)
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    regular = torch.where(singular.unsqueeze(-2), eye, L)
    B = torch.where(singular.unsqueeze(-1), torch.zeros((), dtype=B.dtype, device=B.device), B)
    return torch.linalg.solve_triangular(regular.mT, B, upper=True)


def solve_lower(L: Tensor, b: Tensor) -> Tensor:
    """:math:`L^{-1} b` for vectors ``b`` ``(..., n)`` and a lower-triangular ``L`` ``(..., n, n)``, both broadcast.

    >>> import torch
    >>> from pyro_ssm.ops.linalg import solve_lower
    >>> solve_lower(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([2.0, 3.0]))
    tensor([1., 2.])
    """
    return torch.linalg.solve_triangular(L, b.unsqueeze(-1), upper=False).squeeze(-1)


def solve_lower_right(B: Tensor, L: Tensor) -> Tensor:
    """:math:`B L^{+}` for a lower-triangular ``L``: a triangular solve, or the pseudo-inverse where a pivot vanishes.

    Right for a singular L whenever the rows of B lie in the row space of L. Not differentiable in the direction of a
    change of rank.

    Args:
        B: ``(..., m, n)``.
        L: ``(..., n, n)``.

    >>> import torch
    >>> from pyro_ssm.ops.linalg import solve_lower_right
    >>> L = torch.tensor([[2.0, 0.0], [4.0, 0.0]])  # singular
    >>> G = solve_lower_right(torch.tensor([[6.0, 0.0]]), L)
    >>> torch.allclose(G @ L, torch.tensor([[6.0, 0.0]]))
    True
    """
    if not bool(vanishing_pivots(L).any()):
        return torch.linalg.solve_triangular(L, B, upper=False, left=False)
    size = torch.linalg.vector_norm(L.detach(), dim=-1, keepdim=True)  # rows of unequal units must not look like a rank
    size = torch.where(size > 0, size, torch.ones_like(size))
    return (B @ torch.linalg.pinv(L / size)) / size.mT
