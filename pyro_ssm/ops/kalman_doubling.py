"""The covariance recursion of a time-invariant system, all times at once.

A move over ``k`` steps takes one predicted covariance to another,

.. math:: P^-_{t + k} = A (I + P^-_t J)^{-1} P^-_t A^T + C

and moves compose: that over ``2 k`` steps is one solve away. So the covariances of ``k`` times, moved together, give
those of ``2 k``, in log2(T) rounds. (Anderson 1978, "Second-order convergent algorithms for the steady-state Riccati
equation".) It works with covariances, and steps aside where the data says so much more than the noise that square roots
are called for.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["predicted_covariances"]

SHARP = 1e4  # information of an observation, in units of what is known before, from which on square roots are taken
SETTLED = 1e-12  # as in csrc/covariance.h
LOOK = 8  # steps between two covariances that are compared


def predicted_covariances(L: Tensor, F: Tensor, Q: Tensor, H: Tensor, R: Tensor, times: int) -> Tensor | None:
    """P- ``(groups, steps, n, n)`` up to the time from which it stands still; None where rounding might tell.

    Args:
        L: ``(groups, n, n)``, and so are F and Q; H: ``(groups, p, n)``; R: ``(groups, p, p)``.
        times: how many at most.

    >>> import torch
    >>> from pyro_ssm.ops.kalman_doubling import predicted_covariances
    >>> one = torch.ones(1, 1, 1, dtype=torch.float64)
    >>> predicted_covariances(one, one, one, one, one, 3).flatten()
    tensor([1.0000, 1.5000, 1.6000], dtype=torch.float64)
    """
    root, failed = torch.linalg.cholesky_ex(R @ R.mT)
    if bool(failed.any()):
        return None
    Z = torch.linalg.solve_triangular(root, H, upper=False)
    A, C, J = F, Q @ Q.mT, Z.mT @ Z
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    P = (L @ L.mT).unsqueeze(1)
    while P.shape[1] < times:
        known = P[:, : times - P.shape[1]]
        A_t, C_t, J_t = (x.unsqueeze(1) for x in (A, C, J))
        moved = A_t @ torch.linalg.solve_ex(eye + known @ J_t, known)[0] @ A_t.mT + C_t
        P = torch.cat([P, _symmetric(moved)], 1)
        end = _stands_still(P)
        if end is not None:
            P = P[:, : end + 1]
            break
        both = torch.linalg.solve_ex(eye + C @ J, torch.cat([A, C @ A.mT], -1))[0]
        X, Y = both.split(A.shape[-1], -1)
        A, C, J = A @ X, _symmetric(C + A @ Y), _symmetric(J + A.mT @ J @ X)
    information = (Z.unsqueeze(1) @ P @ Z.mT.unsqueeze(1)).diagonal(dim1=-2, dim2=-1).amax()
    return P if bool(information < SHARP) else None  # not a number: None


def _symmetric(x: Tensor) -> Tensor:
    return 0.5 * (x + x.mT)


def _stands_still(P: Tensor) -> int | None:
    """The first time at which every group is within SETTLED of its limit, in units of its deviations."""
    if P.shape[1] < 2 * LOOK:
        return None
    scale = P.diagonal(dim1=-2, dim2=-1).sqrt()[:, 1:]
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    change = (P[:, 1:] - P[:, :-1]).abs() / scale.unsqueeze(-1) / scale.unsqueeze(-2)
    change = change.flatten(2).amax((0, 2))
    now, before = change[LOOK:], change[:-LOOK]
    ratio = now / before
    close = (now == 0) | ((ratio < 1) & (LOOK * now / (1 - ratio) <= SETTLED))
    first = int(close.to(torch.uint8).argmax())
    return first + LOOK + 1 if bool(close[first]) else None
