"""Kalman filtering, smoothing and path sampling in logarithmic time: the same laws as the loops of ``ops.kalman``.

Each step is an element of an associative product, and all laws are its prefixes: :math:`O(\\log T)` batched operations
instead of :math:`O(T)` small ones, for several times the arithmetic and memory. That pays on a GPU for long series, and
on a CPU against a loop in Python while the state and the batch are small, but not against a compiled loop.
Square roots throughout (Särkkä and García-Fernández 2021, "Temporal parallelization of Bayesian smoothers";
Yaghoobi, Corenflos, Hassan and Särkkä 2022, "Parallel square-root statistical linear regression for inference in
nonlinear state space models").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_ssm.ops.associative_scan import Elements, affine_scan, associative_scan
from pyro_ssm.ops.kalman import HALF_LOG_2PI, FilterSteps, _beside, _joint_root, hide_rows, matvec, predict, update
from pyro_ssm.ops.kalman_backward import Conditionals
from pyro_ssm.ops.linalg import solve_lower, solve_lower_right, tria, vanishing_pivots

__all__ = [
    "SingularStep",
    "affine_laws",
    "backward_sample_parallel",
    "kalman_filter_parallel",
    "kalman_smoother_parallel",
]


class SingularStep(ValueError):
    """An observation has no noise that is new at its step, so a step alone is no element of the scan.

    >>> from pyro_ssm.ops.kalman_parallel import SingularStep
    >>> issubclass(SingularStep, ValueError)
    True
    """


def kalman_filter_parallel(
    y: Tensor,
    mask: Tensor,
    m: Tensor,
    L: Tensor,
    F: Tensor,
    b: Tensor,
    Q: Tensor,
    H: Tensor,
    d: Tensor,
    R: Tensor,
    *,
    num_times: int | None = None,
    observed_index: Sequence[int] | None = None,
    step_mask: Tensor | None = None,
) -> FilterSteps:
    """:func:`~pyro_ssm.ops.kalman.kalman_filter_reference` by an associative scan over time.

    .. math:: p(z_k \\mid y_k, z_{k-1}) = N(A_k z_{k-1} + b_k, U_k U_k^T), \\qquad
        p(y_k \\mid z_{k-1}) \\propto \\exp(\\eta_k^T z_{k-1} - \\tfrac12 |Z_k^T z_{k-1}|^2)

    Arguments, results and gradients as there. The noise of one observation and one move together, :math:`H Q Q^T H^T +
    R R^T`, must not be singular (in the loop it is enough that the predicted covariance of the observation is not).

    Raises:
        SingularStep: that sum is singular.

    >>> import torch
    >>> from pyro_ssm.ops import kalman_filter_parallel
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> y = torch.tensor([[1.0], [2.0]])
    >>> steps = kalman_filter_parallel(y, y == y, zero[0], one[0], one, zero, one, one, zero, one)
    >>> steps.filtered_mean.squeeze(-1)
    tensor([0.5000, 1.4000])
    """
    num_times = y.shape[-2] if num_times is None else num_times
    y, H, d, R = hide_rows(mask, y, H, d, R)
    if observed_index is not None:
        at = torch.as_tensor(list(observed_index), device=y.device)
        y, H, d, R, mask = _on_all_times(at, num_times, y, H, d, R, mask)
    F, b, Q = _skip_padding(step_mask, *(_all(part, num_times - 1, event) for part, event in ((F, 2), (b, 1), (Q, 2))))
    H, d, R = (_all(part, num_times, event) for part, event in ((H, 2), (d, 1), (R, 2)))
    first = update(m, L, y[..., 0, :] - matvec(H[..., 0, :, :], m) - d[..., 0, :], H[..., 0, :, :], R[..., 0, :, :])
    later = [part.narrow(-event - 1, 1, num_times - 1) for part, event in ((y, 1), (H, 2), (d, 1), (R, 2))]
    elements = _elements(first[0], first[1], F, b, Q, *later)
    _, means, roots, _, _ = associative_scan(_combine, elements, (2, 1, 2, 1, 2))
    ahead = predict(means[..., :-1, :], roots[..., :-1, :, :], F, b, Q)
    means_ahead, roots_ahead = _after(m, ahead[0], 1), _after(L, ahead[1], 2)
    v = y - matvec(H, means_ahead) - d
    S = tria(_beside(H @ roots_ahead, R))
    terms = -0.5 * solve_lower(S, v).square() - S.diagonal(dim1=-2, dim2=-1).log() - HALF_LOG_2PI
    return FilterSteps(torch.where(mask, terms, terms.new_zeros(())).sum(-1), means, roots, means_ahead, roots_ahead)


def _all(part: Tensor, num: int, event: int) -> Tensor:
    """A time size of 1 stands for all ``num`` times."""
    shape = list(part.shape)
    if shape[-event - 1] == 1 or num == 0:
        part, shape[-event - 1] = part.narrow(-event - 1, 0, min(1, num)), num
    return part.expand(shape)


def _on_all_times(at: Tensor, num_times: int, *parts: Tensor) -> tuple[Tensor, ...]:
    """Observations at some times, and at the others hidden ones."""
    y, H, d, R, mask = parts
    num, p = len(at), y.shape[-1]
    eye = torch.eye(p, dtype=R.dtype, device=R.device)
    filled = []
    for part, event, filler in ((y, 1, 0), (H, 2, 0), (d, 1, 0), (R, 2, eye), (mask, 1, False)):
        part = _all(part, num, event)
        base = torch.zeros(part.shape[: -event - 1] + (num_times,) + part.shape[-event:], dtype=part.dtype).to(
            at.device
        )
        if isinstance(filler, Tensor):
            base = base + filler
        filled.append(base.index_copy(-event - 1, at, part))
    return tuple(filled)


def _skip_padding(step_mask: Tensor | None, F: Tensor, b: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if step_mask is None:
        return F, b, Q
    real, zero = step_mask[..., 1:], F.new_zeros(())
    eye = torch.eye(F.shape[-1], dtype=F.dtype, device=F.device)
    matrix = real[..., None, None]
    return torch.where(matrix, F, eye), torch.where(real[..., None], b, zero), torch.where(matrix, Q, zero)


def _after(first: Tensor, rest: Tensor, event: int) -> Tensor:
    """``first`` and ``rest`` along the time dim of ``rest``."""
    first = first.unsqueeze(-event - 1)
    lead = torch.broadcast_shapes(first.shape[: -event - 1], rest.shape[: -event - 1])
    return torch.cat([part.expand(lead + part.shape[-event - 1 :]) for part in (first, rest)], -event - 1)


def _elements(
    m: Tensor, L: Tensor, F: Tensor, b: Tensor, Q: Tensor, y: Tensor, H: Tensor, d: Tensor, R: Tensor
) -> Elements:
    """The elements (A, b, U, eta, Z); the first one is the filtered law (m, L) of the first state."""
    n = F.shape[-1]
    S, K, U = _joint_root(H, R, Q)
    if bool(vanishing_pivots(S).any()):
        raise SingularStep(
            "the parallel filter needs H Q Q^T H^T + R R^T to be regular, and it is singular at some step: what is "
            'seen has no noise of its own and none from the move before. Use method="sequential"'
        )
    gain, HF = solve_lower_right(K, S), H @ F
    white = torch.linalg.solve_triangular(S, HF.expand(S.shape[:-2] + HF.shape[-2:]), upper=False)
    v = y - matvec(H, b) - d
    A = F - gain @ HF
    offset = b + matvec(gain, v)
    Z = tria(white.mT)
    eta = matvec(white.mT, solve_lower(S, v))
    means = _after(m, offset, 1)
    shared = torch.broadcast_shapes(*(part.shape[:-3] for part in (A, U, Z)), L.shape[:-2])
    zero = F.new_zeros(n, n).expand(shared + (n, n))
    A, U, Z = (part.expand(shared + part.shape[-3:]) for part in (A, U, Z))
    eta = eta.expand(means.shape[:-2] + eta.shape[-2:])
    return _after(zero, A, 2), means, _after(L, U, 2), _after(zero[..., 0], eta, 1), _after(zero, Z, 2)


def _combine(one: Elements, two: Elements) -> Elements:
    """The element of two stretches of time, the earlier first."""
    A1, b1, U1, eta1, Z1 = one
    A2, b2, U2, eta2, Z2 = two
    n = A1.shape[-1]
    eye = torch.eye(n, dtype=A1.dtype, device=A1.device)
    X, Y, Z = _joint_root(U1.mT, eye, Z2)  # [[U1^T Z2, I], [Z2, 0]] -> [[X, 0], [Y, Z]]
    W = torch.linalg.solve_triangular(X, U1.mT.expand(X.shape), upper=False)  # X^{-1} U1^T
    kept = eye - W.mT @ Y.mT  # (I + C1 J2)^{-1}
    A = A2 @ kept @ A1
    b = matvec(A2, matvec(kept, b1 + matvec(U1, matvec(U1.mT, eta2)))) + b2
    U = tria(_beside(A2 @ W.mT, U2))
    eta = matvec(A1.mT, matvec(kept.mT, eta2 - matvec(Z2, matvec(Z2.mT, b1)))) + eta1
    return A, b, U, eta, tria(_beside(A1.mT @ Z, Z1))


def affine_laws(
    A: Tensor, b: Tensor, U: Tensor, m: Tensor, L: Tensor, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Means and square roots along x' = A x + b + U e, all times at once; the parallel form of a loop of ``predict``.

    .. math:: m_{k+1} = A_k m_k + b_k, \\qquad L_{k+1} L_{k+1}^T = A_k L_k L_k^T A_k^T + U_k U_k^T

    Args:
        A, U: ``(..., time - 1, n, n)``; b: ``(..., time - 1, n)``.
        m, L: the law at the first time (``reverse``: at the last, and the moves lead back).

    Returns:
        ``(..., time, n)`` and ``(..., time, n, n)``.

    >>> import torch
    >>> from pyro_ssm.ops.kalman_parallel import affine_laws
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> affine_laws(one, zero, 4 * one, zero[0], 3 * one[0])[1].squeeze()
    tensor([3., 5.])
    """
    roots, means = torch.broadcast_shapes(A.shape[:-3], U.shape[:-3], L.shape[:-2]), b.shape[:-2]
    means = torch.broadcast_shapes(roots, means, m.shape[:-1])
    steps, n = A.shape[-3], A.shape[-1]
    A, U, L = (part.expand(roots + part.shape[-event:]) for part, event in ((A, 3), (U, 3), (L, 2)))
    b, m = b.expand(means + (steps, n)), m.expand(means + (n,))
    first = [torch.zeros_like(L).unsqueeze(-3), m.unsqueeze(-2), L.unsqueeze(-3)]
    elements = [
        torch.cat([part, start] if reverse else [start, part], dim)
        for start, part, dim in zip(first, (A, b, U), (-3, -2, -3), strict=True)
    ]

    def combine(earlier: Elements, later: Elements) -> Elements:
        (A1, b1, U1), (A2, b2, U2) = (later, earlier) if reverse else (earlier, later)
        return A2 @ A1, matvec(A2, b1) + b2, tria(_beside(A2 @ U1, U2))

    _, m, L = associative_scan(combine, elements, (2, 1, 2), reverse=reverse)
    return m, L


def kalman_smoother_parallel(steps: FilterSteps, conditionals: Conditionals) -> tuple[Tensor, Tensor]:
    """:func:`~pyro_ssm.ops.kalman.kalman_smoother_reference` by an associative scan over time.

    .. math:: z_k = G_k z_{k+1} + c_k + D_k \\varepsilon_k

    >>> import torch
    >>> from pyro_ssm.ops import kalman_smoother_parallel
    >>> from pyro_ssm.ops.kalman import FilterSteps
    >>> from pyro_ssm.ops.kalman_backward import Conditionals
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> law = FilterSteps(zero, torch.tensor([[0.0], [2.0]]), one.expand(2, 1, 1), zero, one)
    >>> kalman_smoother_parallel(law, Conditionals(0.5 * one, zero, one))[0].squeeze(-1)
    tensor([1., 2.])
    """
    m, L = steps.filtered_mean[..., -1, :], steps.filtered_scale_tril[..., -1, :, :]
    return affine_laws(*conditionals, m, L, reverse=True)


def backward_sample_parallel(conditionals: Conditionals, last: Tensor, noise: Tensor) -> Tensor:
    """:func:`~pyro_ssm.ops.kalman.backward_sample_reference` by an associative scan over time.

    >>> import torch
    >>> from pyro_ssm.ops import backward_sample_parallel
    >>> from pyro_ssm.ops.kalman_backward import Conditionals
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> backward_sample_parallel(Conditionals(0.5 * one, zero, one), torch.tensor([2.0]), torch.ones(1, 1)).squeeze(-1)
    tensor([2., 2.])
    """
    fresh = conditionals.offset + matvec(conditionals.scale_tril, noise)
    return affine_scan(conditionals.gain, fresh, last, reverse=True, parallel=True)
