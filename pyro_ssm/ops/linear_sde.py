"""Linear stochastic differential equations over gaps of any length, exactly: tensors in, tensors out.

.. math:: dz = (F z + v)\\, dt + L\\, dW, \\qquad
    z(\\Delta) = \\Phi z(0) + \\Gamma v + S \\varepsilon, \\qquad
    \\Phi = e^{F \\Delta}, \\quad \\Gamma = \\int_0^\\Delta e^{F s} ds, \\quad
    S S^T = \\int_0^\\Delta e^{F s} L L^T e^{F^T s} ds

The covariance is never formed. On a short step h its integrand is expanded in powers of time and these in shifted
Legendre polynomials, which are orthonormal on the step: the coefficients, side by side, *are* a square root, exact to
rounding row by row however short the step and however few columns L has (an integrated Wiener process with noise in
its last coordinate alone has entries from :math:`h^{n - 1/2}` to :math:`h^{1/2}`, and each keeps all its digits; no
jitter is added). Longer gaps double the step, :math:`S_{2h} = (\\Phi_h S_h \\;\\; S_h)`, brought to triangular form by
an orthogonal transformation (the scaling and squaring of Van Loan 1978 in square-root form): nothing overflows for
gaps that are long beside the fastest decay, as the block exponential does.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.ops.linalg import tria

__all__ = ["LinearStep", "linear_sde_step", "linear_sde_step_reference", "stationary_root"]

_TERMS = 16  # of the power series: 0.5 ** 17 / 17! is far below rounding
_MOST_DOUBLINGS = 64


class LinearStep(NamedTuple):
    """The law over a gap: :math:`z' = \\Phi z + \\Gamma v + S \\varepsilon`.

    >>> from pyro_ssm.ops.linear_sde import LinearStep
    >>> LinearStep._fields
    ('matrix', 'integral', 'scale_tril')
    """

    matrix: Tensor  # (..., n, n)  Phi
    integral: Tensor  # (..., n, n)  Gamma
    scale_tril: Tensor  # (..., n, n)  S, lower triangular


def linear_sde_step_reference(F: Tensor, L: Tensor, gap: Tensor) -> LinearStep:
    """The same by the block exponentials of Van Loan (1978), "Computing integrals involving the matrix exponential".

    .. math::
        \\exp\\begin{pmatrix} F & L L^T \\\\ 0 & -F^T \\end{pmatrix} \\Delta =
        \\begin{pmatrix} \\Phi & G \\\\ 0 & \\Phi^{-T} \\end{pmatrix}, \\qquad S S^T = G\\, \\Phi^T

    Right where the gap is neither long beside the fastest decay (:math:`e^{-F \\Delta}` overflows) nor so short that
    the covariance is singular to rounding. Arguments as :func:`linear_sde_step`.

    >>> import torch
    >>> from pyro_ssm.ops import linear_sde_step_reference
    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> linear_sde_step_reference(-one, one, one[0, 0]).matrix
    tensor([[0.3679]], dtype=torch.float64)
    """
    n = F.shape[-1]
    F, noise = torch.broadcast_tensors(F, L @ L.mT)
    zero, eye = torch.zeros_like(F), torch.eye(n, dtype=F.dtype, device=F.device).expand(F.shape)
    gap = gap[..., None, None]
    both = torch.cat([torch.cat([F, noise], -1), torch.cat([zero, -F.mT], -1)], -2)
    forced = torch.cat([torch.cat([F, eye], -1), torch.cat([zero, zero], -1)], -2)
    moved, driven = torch.matrix_exp(both * gap), torch.matrix_exp(forced * gap)
    matrix = driven[..., :n, :n]
    return LinearStep(matrix, driven[..., :n, n:], torch.linalg.cholesky(moved[..., :n, n:] @ matrix.mT))


def linear_sde_step(F: Tensor, L: Tensor, gap: Tensor) -> LinearStep:
    """The exact law of a linear stochastic differential equation over a gap (see the head of this module).

    Right for every gap from 0 on: for covariances that are singular, or nearly so, since none is formed. The relative
    error is of the order of rounding times ``norm(F) gap`` (the number of turns or decays in the gap), for ``F`` in
    units that balance it, which are found and used inside.

    Gradients: with respect to ``F`` and ``L`` to second order where ``S`` is regular; where it is singular (a gap of
    0, too little noise), those of everything that depends on S through :math:`S S^T` are right and finite.

    Args:
        F: ``(..., n, n)`` drift, in 1 / time.
        L: ``(..., n, m)`` diffusion, in state / sqrt(time), any m.
        gap: ``(...)``, not negative; all leading dims broadcast.

    Returns:
        Each ``(..., n, n)``; differentiable with respect to ``F`` and ``L``.

    Sources: Van Loan (1978), "Computing integrals involving the matrix exponential", IEEE Trans. Autom. Control 23;
    the polynomial square root is the closed-form Cholesky factor of the Hilbert matrix.

    >>> import torch
    >>> from pyro_ssm.ops import linear_sde_step
    >>> F, L = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0], [1.0]])  # integrated Wiener process
    >>> S = linear_sde_step(F, L, torch.tensor(6.0)).scale_tril
    >>> S @ S.mT  # gap ** 3 / 3, gap ** 2 / 2, gap
    tensor([[72.0000, 18.0000],
            [18.0000,  6.0000]])
    """
    lead = torch.broadcast_shapes(F.shape[:-2], L.shape[:-2], gap.shape)
    F, L = F.expand(lead + F.shape[-2:]), L.expand(lead + L.shape[-2:])
    doublings = _doublings(F, gap)
    if int(doublings.max()) > 0:
        units = _balance(F)
        F, L = F * units / units.unsqueeze(-1), L / units.unsqueeze(-1)
        doublings = _doublings(F, gap)
    else:
        units = torch.ones(F.shape[-1], dtype=F.dtype, device=F.device)
    matrix, integral, scale_tril = _short_step(F, L, gap * torch.exp2(-doublings))
    for done in range(int(doublings.max())):
        going = (doublings > done)[..., None, None]
        half = torch.where(going, matrix, torch.zeros((), dtype=F.dtype, device=F.device))
        scale_tril = tria(torch.cat([half @ scale_tril, scale_tril], -1))
        integral = integral + half @ integral
        matrix = torch.where(going, half @ half, matrix)
    to, back = units.unsqueeze(-1), 1 / units
    return LinearStep(to * matrix * back, to * integral * back, to * scale_tril)


def stationary_root(A: Tensor, S: Tensor) -> Tensor:
    """The square root of the stationary covariance of :math:`z' = A z + S \\varepsilon`.

    .. math:: P = A P A^T + S S^T = \\sum_j A^j S S^T A^{jT}

    By doubling (Smith 1968) in square-root form: P is never formed, so that a singular one is right too.

    Gradients as :func:`linear_sde_step`.

    Args:
        A: ``(..., n, n)`` with all eigenvalues inside the unit circle.
        S: ``(..., n, m)``.

    Returns:
        ``(..., n, n)`` lower triangular.

    Raises:
        ValueError: an eigenvalue lies on or outside the unit circle.

    Source: Smith (1968), "Matrix equation XA + BX = C", SIAM J. Appl. Math. 16.

    >>> import torch
    >>> from pyro_ssm.ops import stationary_root
    >>> stationary_root(torch.tensor([[0.6]]), torch.tensor([[0.8]]))
    tensor([[1.]])
    """
    radius = torch.linalg.eigvals(A.detach()).abs().max()
    if not bool(radius < 1):
        raise ValueError(
            f"there is no stationary law: the largest eigenvalue of the step has modulus {float(radius):.6g}, and less "
            "than 1 is needed. Use a diffuse or a normal start, or parameters that decay"
        )
    lead = torch.broadcast_shapes(A.shape[:-2], S.shape[:-2])
    A, root = A.expand(lead + A.shape[-2:]), tria(S.expand(lead + S.shape[-2:]))
    tolerance = torch.finfo(A.dtype).eps ** 2
    for _ in range(_MOST_DOUBLINGS):
        more = A @ root
        root = tria(torch.cat([more, root], -1))
        if bool((more.detach().square().sum(-1) <= tolerance * root.detach().square().sum(-1)).all()):
            break
        A = A @ A
    return root


def _doublings(F: Tensor, gap: Tensor) -> Tensor:
    """How often each gap is halved until ``norm(F) h <= 1/2``; as a float, ``(...)``."""
    norm = F.detach().abs().sum(-1).amax(-1)
    return torch.log2((2 * norm * gap).clamp(min=1.0)).ceil()


def _balance(F: Tensor) -> Tensor:
    """Units of the coordinates (powers of two, so that nothing is rounded) in which F has like rows and columns.

    Osborne (1960), "On pre-conditioning of matrices", on the largest modulus over leading dims.
    """
    n = F.shape[-1]
    size = F.detach().abs().reshape(-1, n, n).amax(0).to("cpu", torch.float64)
    size.fill_diagonal_(0)
    exponent = torch.zeros(n, dtype=torch.float64)
    for _ in range(8):
        moved = False
        for i in range(n):
            scaled_row = float((size[i] * torch.exp2(exponent - exponent[i])).sum())
            scaled_column = float((size[:, i] * torch.exp2(exponent[i] - exponent)).sum())
            if scaled_row > 0 and scaled_column > 0:
                step = round(0.5 * math.log2(scaled_row / scaled_column))
                exponent[i] += step
                moved = moved or step != 0
        if not moved:
            break
    return torch.exp2(exponent).to(F)


def _short_step(F: Tensor, L: Tensor, h: Tensor) -> LinearStep:
    """The law over a step with ``norm(F) h <= 1/2``, by the power series.

    With :math:`X_j = F^j L h^j / j!`, the integrand at :math:`s = h x` is :math:`\\sum_j X_j x^j`, and
    :math:`x^j = \\sum_k C_{jk} p_k(x)` in orthonormal polynomials on [0, 1]: column block k of the square root is
    :math:`\\sqrt h \\sum_j X_j C_{jk}`.
    """
    n = F.shape[-1]
    terms = max(_TERMS, n + _TERMS // 2)
    step = F * h[..., None, None]
    eye = torch.eye(n, dtype=F.dtype, device=F.device)
    power, driven = eye.expand(step.shape), L
    matrix, integral, blocks = power, power, [driven]
    for j in range(1, terms + 1):
        power, driven = step @ power / j, step @ driven / j
        matrix, integral = matrix + power, integral + power / (j + 1)
        blocks.append(driven)
    weights = _monomials_in_legendre(terms + 1).to(F)
    stacked = torch.stack(blocks, -3)  # (..., powers, n, m)
    columns = torch.einsum("...jnm,jk->...knm", stacked, weights)
    columns = columns[..., : _needed(columns.detach()), :, :]
    root = columns.transpose(-3, -2).flatten(-2) * h.sqrt()[..., None, None]
    return LinearStep(matrix, integral * h[..., None, None], tria(root))


def _needed(columns: Tensor) -> int:
    """How many leading blocks ``(..., k, n, m)`` carry anything above rounding in the covariance, row by row."""
    square = columns.square().sum(-1)
    row = square.sum(-2, keepdim=True)
    counts = (square > torch.finfo(columns.dtype).eps ** 2 * row).any(-1).reshape(-1, columns.shape[-3]).any(0)
    return int(counts.nonzero().max()) + 1 if bool(counts.any()) else 1


@lru_cache
def _monomials_in_legendre(n: int) -> Tensor:
    """:math:`C_{jk} = \\int_0^1 x^j p_k(x) dx`, the Cholesky factor of the Hilbert matrix, float64 ``(n, n)``."""
    f = math.factorial
    rows = [
        [math.sqrt(2 * k + 1) * f(j) ** 2 / (f(j - k) * f(j + k + 1)) if k <= j else 0.0 for k in range(n)]
        for j in range(n)
    ]
    return torch.tensor(rows, dtype=torch.float64)
