"""HiPPO: state matrices that remember a function's past in an orthogonal basis, and their normal-plus-low-rank form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["NormalPlusLowRank", "hippo", "hippo_low_rank"]

MEASURES = ("legs", "legt", "lagt", "fourier")


def hippo(measure: str, size: int) -> tuple[Tensor, Tensor]:
    """The matrices of :math:`\\dot c = A c + B f`, whose state holds the coefficients of f's past.

    ========= ======================================== ====================================================
    measure   past, weighted by                        impulse response / basis
    ========= ======================================== ====================================================
    legs      :math:`e^{-s}` (scaled Legendre)         :math:`\\sqrt{2n+1}\\, e^{-s} P_n(2 e^{-s} - 1)`
    legt      the last unit of time                    :math:`\\sqrt{2n+1}\\, P_n(1 - 2 s)`
    lagt      Laguerre functions                       :math:`e^{-s/2} L_n(s)`
    fourier   the last unit of time                    :math:`1, \\sqrt2 \\cos 2\\pi n s, \\sqrt2 \\sin 2\\pi n s`
    ========= ======================================== ====================================================

    ``s`` is the time that has passed. In "legt" and "fourier" the value that leaves the window is estimated from the
    state, so the basis is exact for functions that the basis spans. "fourier" keeps its states in the order
    :math:`1, 0, \\cos, \\sin, \\cos, \\sin, \\dots`; its second state is always 0.

    Args:
        measure: one of the four.
        size: how many states, N.

    Returns:
        ``A`` ``(N, N)`` and ``B`` ``(N,)`` in float64, for column vectors.

    Raises:
        ValueError: an unknown measure, or a size below 1 (for "fourier", an odd one).

    Source: A. Gu, T. Dao, S. Ermon, A. Rudra, C. Re (2020), HiPPO, theorems 1 to 7; A. Gu, I. Johnson, A. Timalsina,
    A. Rudra, C. Re (2022), How to train your HiPPO, section 3.

    >>> from pyro_ssm.ops.hippo import hippo
    >>> hippo("lagt", 2)[0]
    tensor([[-0.5000, -0.0000],
            [-1.0000, -0.5000]], dtype=torch.float64)
    """
    if measure not in MEASURES:
        raise ValueError(f"`measure` must be one of {', '.join(map(repr, MEASURES))}, got {measure!r}")
    if size < 1 or (measure == "fourier" and size % 2):
        raise ValueError(f"`size` must be at least 1, and even for 'fourier'; got {size}")
    n = torch.arange(size, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    if measure == "legs":
        return -(torch.outer(root, root).tril(-1) + torch.diag(n + 1)), root
    if measure == "legt":
        sign = 1 - 2 * ((n.unsqueeze(-1) - n) % 2)
        product = torch.outer(root, root)
        return -(product.tril() + (product * sign).triu(1)), root
    if measure == "lagt":
        ones = torch.ones(size, size, dtype=torch.float64)
        return -(ones.tril(-1) + 0.5 * torch.eye(size, dtype=torch.float64)), torch.ones_like(n)
    B = torch.zeros_like(n)
    B[0], B[2::2] = 1.0, 2**0.5
    turn = torch.zeros(size - 1, dtype=torch.float64)
    turn[2::2] = 2 * torch.pi * torch.arange(1, size // 2, dtype=torch.float64)
    return torch.diag(turn, -1) - torch.diag(turn, 1) - torch.outer(B, B), B


def hippo_low_rank(measure: str, size: int) -> Tensor:
    """:math:`P` ``(N, r)`` such that :math:`A + P P^T` is skew-symmetric plus a multiple of the identity: normal.

    >>> from pyro_ssm.ops.hippo import hippo_low_rank
    >>> hippo_low_rank("legt", 4).shape
    torch.Size([4, 2])
    """
    _, B = hippo(measure, size)
    if measure == "fourier":
        return B.unsqueeze(-1)
    if measure == "lagt":
        return torch.full((size, 1), 0.5**0.5, dtype=torch.float64)
    if measure == "legs":
        return (B / 2**0.5).unsqueeze(-1)
    even = torch.arange(size) % 2 == 0
    return torch.stack([B * even, B * ~even], -1)


class NormalPlusLowRank(NamedTuple):
    """:math:`A = V (\\Lambda - P P^*) V^*` with unitary V: one of each pair of conjugate eigenvalues.

    The eigenvalues of the normal part come in conjugate pairs (N is even), and so do the rows of :math:`V^* x` for real
    x: half of them say all.

    >>> from pyro_ssm.ops.hippo import NormalPlusLowRank
    >>> form = NormalPlusLowRank.of("legs", 8)
    >>> form.eigenvalues.shape, bool((form.eigenvalues.real + 0.5).abs().max() < 1e-12)
    (torch.Size([4]), True)
    """

    eigenvalues: Tensor  # (N / 2,) complex, imaginary part >= 0, increasing
    P: Tensor  # (N / 2, r) complex
    B: Tensor  # (N / 2,) complex
    V: Tensor  # (N, N / 2) complex: x = 2 Re(V h)

    @classmethod
    def of(cls, measure: str, size: int) -> NormalPlusLowRank:
        """The form of a HiPPO matrix; ``size`` is even.

        Source: A. Gu, K. Goel, C. Re (2022), Efficiently modeling long sequences with structured state spaces, theorem
        1 and appendix C.
        """
        if size < 2 or size % 2:
            raise ValueError(f"`size` must be even and at least 2, got {size}")
        A, B = hippo(measure, size)
        P = hippo_low_rank(measure, size)
        normal = A + P @ P.mT
        shift = normal.diagonal().mean()
        skew = normal - shift * torch.eye(size, dtype=torch.float64)
        turns, V = torch.linalg.eigh(-1j * skew.to(torch.complex128))
        scale = float(turns.abs().max()) + 1e-300
        above, level = turns > 1e-9 * scale, turns.abs() <= 1e-9 * scale
        V_half = torch.cat([_paired(V[:, level]), V[:, above]], -1)
        half_turns = torch.cat([turns.new_zeros(int(level.sum()) // 2), turns[above]])
        V_adjoint = V_half.mH
        eigenvalues = torch.complex(shift.expand_as(half_turns).clone(), half_turns)
        return cls(eigenvalues, V_adjoint @ P.to(V.dtype), V_adjoint @ B.to(V.dtype), V_half)


def _paired(V: Tensor) -> Tensor:
    """A basis of a real subspace given by complex columns, as pairs :math:`(r_1 + i r_2) / \\sqrt 2`."""
    if V.shape[-1] == 0:
        return V
    projector = (V @ V.mH).real
    _, vectors = torch.linalg.eigh(projector)
    real = vectors[:, -V.shape[-1] :]
    return torch.complex(real[:, 0::2], real[:, 1::2]) / 2**0.5
