"""One step of systems that are diagonal plus low rank (S4): dense, and diagonal plus low rank again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LowRankStep", "both", "dplr_matrices", "dplr_step"]


def both(x: Tensor, dim: int = -1) -> Tensor:
    """Both of each pair of conjugates, from one.

    >>> import torch
    >>> from pyro_ssm.ops.dplr_step import both
    >>> both(torch.tensor([1j])).imag
    tensor([ 1., -1.])
    """
    return torch.cat([x, x.conj()], dim)


def dplr_matrices(eigenvalues: Tensor, P: Tensor, B: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The bilinear discretisation of the whole system, dense.

    .. math:: A = \\operatorname{diag}(\\Lambda) - P P^*, \\quad
        \\bar A = (I - \\tfrac\\Delta2 A)^{-1} (I + \\tfrac\\Delta2 A), \\quad
        \\bar B = (I - \\tfrac\\Delta2 A)^{-1} \\Delta B

    over both eigenvalues of each pair: ``(..., D, 2 N, 2 N)`` and ``(..., D, 2 N)`` complex128.

    >>> import torch
    >>> from pyro_ssm.ops.dplr_step import dplr_matrices
    >>> one = torch.ones(1, 1, dtype=torch.complex64)
    >>> dplr_matrices(-one, 0 * one.unsqueeze(-1), one, torch.ones(1))[0].real.diagonal(dim1=-2, dim2=-1)
    tensor([[0.3333, 0.3333]], dtype=torch.float64)
    """
    eigenvalues, P, B = (both(m.to(torch.complex128), dim) for m, dim in ((eigenvalues, -1), (P, -2), (B, -1)))
    A = torch.diag_embed(eigenvalues) - P @ P.mH
    half = step.to(torch.float64)[..., None, None] / 2
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    solved = torch.linalg.solve(eye - half * A, torch.cat([eye + half * A, (2 * half) * B.unsqueeze(-1)], -1))
    return solved[..., :-1], solved[..., -1]


class LowRankStep(NamedTuple):
    """One step, for one of each pair of conjugates: what is coupled is a real number for each column of P.

    .. math:: h_t = a \\odot h_{t-1} + b\\, u_t - \\sum_j W_j \\operatorname{Re} Q_j^\\top h_{t-1}

    >>> from pyro_ssm.ops.dplr_step import LowRankStep
    >>> LowRankStep._fields
    ('a', 'b', 'W', 'Q')
    """

    a: Tensor  # (..., D, N)
    b: Tensor
    W: Tensor  # (..., D, r, N)
    Q: Tensor

    def to(self, dtype: torch.dtype) -> LowRankStep:
        """In another (complex) dtype."""
        return LowRankStep(*(m.to(dtype) for m in self))

    def dense(self) -> tuple[Tensor, Tensor]:
        """Real matrices ``(..., D, 2 N, 2 N)`` and ``(..., D, 2 N)`` of the real and the imaginary parts."""
        a, b, W, Q = self
        turn = torch.cat([torch.diag_embed(a), torch.diag_embed(1j * a)], -1)  # a times real part, times imaginary part
        A = turn - W.mT @ torch.cat([Q.real, -Q.imag], -1).to(W.dtype)
        return torch.cat([A.real, A.imag], -2), torch.cat([b.real, b.imag], -1)


def dplr_step(eigenvalues: Tensor, P: Tensor, B: Tensor, step: Tensor) -> LowRankStep:
    """The bilinear discretisation of :func:`dplr_matrices` at a cost of N: it is diagonal plus low rank as well.

    .. math::
        d = (1 - \\tfrac\\Delta2 \\Lambda)^{-1}, \\quad S = d P, \\quad
        G = \\tfrac\\Delta2 (I + \\tfrac\\Delta2 \\, 2 \\operatorname{Re} P^* S)^{-1}, \\quad
        a = 2 d - 1, \\quad W = S G, \\quad Q = 4 d \\bar P, \\quad
        b = \\Delta d B - W\\, 2 \\operatorname{Re} P^* \\Delta d B

    by Woodbury's identity, from :math:`\\bar A = 2 (I - \\tfrac\\Delta2 A)^{-1} - I`.

    Args:
        eigenvalues, B: one of each pair of conjugates, ``(..., D, N)`` complex; P: ``(..., D, N, r)``.
        step: :math:`\\Delta`, ``(..., D)``.

    Returns:
        Complex128.

    >>> import torch
    >>> from pyro_ssm.ops.dplr_step import dplr_step
    >>> one = torch.ones(1, 1, dtype=torch.complex64)
    >>> dplr_step(-one, 0 * one.unsqueeze(-1), one, torch.ones(1)).a.real
    tensor([[0.3333]], dtype=torch.float64)
    """
    eigenvalues, P, B = (m.to(torch.complex128) for m in (eigenvalues, P.mT, B))  # P (..., D, r, N)
    half = step.to(torch.float64).unsqueeze(-1) / 2  # (..., D, 1)
    d = (1 - half * eigenvalues).reciprocal()
    S, driven = d.unsqueeze(-2) * P, 2 * half * d * B
    eye = torch.eye(P.shape[-2], dtype=half.dtype, device=half.device)
    inner = 2 * (P.conj() @ S.mT).real
    gain = torch.linalg.inv(eye + half.unsqueeze(-1) * inner) * half.unsqueeze(-1)
    W = gain.mT.to(S.dtype) @ S
    seen = 2 * (P.conj() @ driven.unsqueeze(-1)).real  # (..., D, r, 1)
    return LowRankStep(2 * d - 1, driven - (W * seen).sum(-2), W, 4 * d.unsqueeze(-2) * P.conj())
