"""Square-root Kalman filtering, smoothing and path sampling: tensors in, tensors out.

Covariances travel as lower-triangular square roots, P = L L^T, which are combined by orthogonal transformations only:
no covariance is ever subtracted from another, so a float32 filter stays positive definite and precise (Bierman 1977,
"Factorization Methods for Discrete Sequential Estimation"; Kailath, Sayed and Hassibi 2000, "Linear Estimation",
ch. 12).

Shapes: means ``(..., n)``, square roots ``(..., n, n)``, all leading dims broadcast. What does not depend on the data
(the covariances of series that share parameters and lack no value) is computed once, not once a series.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.ops.linalg import solve_lower, tria
from pyro_ssm.ops.reading import may_read

__all__ = [
    "FilterSteps",
    "filter_loop",
    "hide_rows",
    "kalman_filter_reference",
    "predict",
    "update",
    "without_hidden_rows",
]

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

Law = tuple[Tensor, Tensor]  # mean and square root


class FilterSteps(NamedTuple):
    """What a filter leaves at each time; time is the dim before the event.

    >>> from pyro_ssm.ops.kalman import FilterSteps
    >>> FilterSteps._fields[0]
    'log_likelihood'
    """

    log_likelihood: Tensor  # (..., time)  log p(y_k | y_<k)
    filtered_mean: Tensor  # (..., time, n)  E[z_k | y_<=k]
    filtered_scale_tril: Tensor  # (..., time, n, n)
    predicted_mean: Tensor  # (..., time, n)  E[z_k | y_<k]
    predicted_scale_tril: Tensor  # (..., time, n, n)


def matvec(A: Tensor, x: Tensor) -> Tensor:
    return (A @ x.unsqueeze(-1)).squeeze(-1)


def matvec_over_time(A: Tensor, x: Tensor) -> Tensor:
    """``A`` ``(..., time or 1, p, n)`` times ``x`` ``(..., time, n)``; for matrices that all series share, a product a
    time instead of one a series and time.

    >>> import torch
    >>> from pyro_ssm.ops.kalman import matvec_over_time
    >>> matvec_over_time(torch.ones(1, 1, 2), torch.ones(3, 4, 2)).shape
    torch.Size([3, 4, 1])
    """
    shared = A.dim() <= x.dim() + 1 and A.shape[:-3].numel() == 1
    if not shared or x.dim() == 2 or A.shape[-3] not in (1, x.shape[-2]):
        return matvec(A, x)
    A = A.reshape(A.shape[-3:])
    if A.shape[0] == 1:
        return x @ A[0].mT
    rows = x.flatten(0, -3).transpose(0, 1) @ A.mT  # (time, series, p)
    return rows.transpose(0, 1).reshape(x.shape[:-1] + A.shape[-2:-1])


def _beside(*blocks: Tensor) -> Tensor:
    """[A B ...], leading dims broadcast."""
    lead = torch.broadcast_shapes(*(block.shape[:-2] for block in blocks))
    return torch.cat([block.expand(lead + block.shape[-2:]) for block in blocks], -1)


def _joint_root(A: Tensor, B: Tensor, L: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Square root of the law of (A x + B e, x), x ~ N(., L L^T): [[A L, B], [L, 0]] -> [[S, 0], [K, D]]."""
    p, n = A.shape[-2:]
    upper = _beside(A @ L, B)
    lower = _beside(L, L.new_zeros(n, B.shape[-1])).expand(upper.shape[:-2] + (n, upper.shape[-1]))
    root = tria(torch.cat([upper, lower], -2))
    return root[..., :p, :p], root[..., p:, :p], root[..., p:, p:]


def predict(m: Tensor, L: Tensor, F: Tensor, b: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """The law of x' = F x + b + Q e for x ~ N(m, L L^T).

    .. math:: m' = F m + b, \\qquad L' L'^T = F L L^T F^T + Q Q^T

    >>> import torch
    >>> from pyro_ssm.ops.kalman import predict
    >>> one = torch.ones(1, 1)
    >>> predict(torch.ones(1), 3 * one, one, torch.ones(1), 4 * one)
    (tensor([2.]), tensor([[5.]]))
    """
    return matvec(F, m) + b, tria(_beside(F @ L, Q))


def update(m: Tensor, L: Tensor, v: Tensor, H: Tensor, R: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The law of x ~ N(m, L L^T) given an innovation v = y - H m - d of y = H x + d + R e.

    .. math::
        \\begin{pmatrix} H L & R \\\\ L & 0 \\end{pmatrix} \\to \\begin{pmatrix} S & 0 \\\\ K & L' \\end{pmatrix},
        \\qquad e = S^{-1} v, \\quad m' = m + K e

    Returns:
        ``m'``, ``L'``, the whitened innovation ``e`` ``(..., obs)`` and the diagonal of S ``(..., obs)``, with
        :math:`\\log p(y) = -\\sum_i (e_i^2 / 2 + \\log S_{ii} + \\tfrac12 \\log 2 \\pi)`.

    >>> import torch
    >>> from pyro_ssm.ops.kalman import update
    >>> one = torch.ones(1, 1)
    >>> m, L, e, s = update(torch.zeros(1), 3 * one, torch.full((1,), 10.0), one, 4 * one)
    >>> m, e, s
    (tensor([3.6000]), tensor([2.]), tensor([5.]))
    """
    S, K, L = _joint_root(H, R, L)
    e = solve_lower(S, v)
    return m + matvec(K, e), L, e, S.diagonal(dim1=-2, dim2=-1)


def hide_rows(mask: Tensor, y: Tensor, H: Tensor, d: Tensor, R: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An observation y = H x + d + R e without its missing entries: the exact marginal of the others.

    A missing row sees nothing: its row of H and its offset become 0, and its noise an independent standard normal with
    value 0, whose constant the caller leaves out. The other rows keep their joint noise law,
    :math:`(R R^T)_{oo}`, also when it is correlated.

    Args:
        mask: bool ``(..., obs)``, True where observed.
        y, d: ``(..., obs)``.
        H: ``(..., obs, n)``.
        R: ``(..., obs, obs)``.

    >>> import torch
    >>> from pyro_ssm.ops.kalman import hide_rows
    >>> R = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    >>> hide_rows(torch.tensor([False, True]), torch.ones(2), torch.ones(2, 1), torch.ones(2), R)[3].abs()
    tensor([[1., 0.],
            [0., 5.]])
    """
    if may_read() and bool(mask.all()):
        return y, H, d, R
    return without_hidden_rows(mask, y, H, d, R)


def without_hidden_rows(
    mask: Tensor, y: Tensor, H: Tensor, d: Tensor, R: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`hide_rows` without a look at the mask, which costs a wait for a GPU.

    >>> import torch
    >>> from pyro_ssm.ops.kalman import without_hidden_rows
    >>> without_hidden_rows(torch.tensor([False]), torch.ones(1), torch.ones(1, 1), torch.ones(1), 2 * torch.ones(1, 1))
    (tensor([0.]), tensor([[0.]]), tensor([0.]), tensor([[1.]]))
    """
    seen = mask.unsqueeze(-1)
    zero = torch.zeros((), dtype=R.dtype, device=R.device)
    fill = torch.diag_embed((~mask).to(R.dtype))
    return (
        torch.where(mask, y, zero),
        torch.where(seen, H, zero),
        torch.where(mask, d, zero),
        tria(_beside(torch.where(seen, R, zero), fill)),
    )


def _time_slices(num: int, *parts: tuple[Tensor, int]) -> list[tuple[Tensor, ...]]:
    """The ``num`` slices of each tensor along time, the dim before its event; a time size of 1 stands for all."""
    slices = [tensor.unbind(-event - 1) for tensor, event in parts]
    return list(zip(*(s * num if len(s) == 1 else s for s in slices), strict=True))


def kalman_filter_reference(
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
    """The Kalman filter in square-root form, a loop over time.

    .. math::
        z_1 \\sim N(m, L L^T), \\qquad z_{k+1} = F_k z_k + b_k + Q_k e_k, \\qquad y_k = H_k z_k + d_k + R_k e'_k

    A masked entry adds exactly 0 to ``log_likelihood`` and changes nothing else; a step that ``step_mask`` switches
    off (padding) adds 0 and carries the law of the state unchanged. All matrices broadcast over leading dims, and a
    time size of 1 stands for all times.

    Gradients: through every argument but the masks; second order included where the square roots are regular.

    Args:
        y: ``(..., observed, obs)``; what stands at masked entries is never read.
        mask: bool, as ``y``.
        m: ``(..., n)``; L: ``(..., n, n)``.
        F: ``(..., time - 1, n, n)``; b: ``(..., time - 1, n)``; Q: ``(..., time - 1, n, n)``.
        H: ``(..., observed, obs, n)``; d: ``(..., observed, obs)``; R: ``(..., observed, obs, obs)``.
        num_times: of the state; by default that of ``y``.
        observed_index: the times at which ``y`` lives, ascending; all times by default.
        step_mask: bool ``(..., time)``, False on padding.

    >>> import torch
    >>> from pyro_ssm.ops import kalman_filter_reference
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> y = torch.tensor([[1.0], [2.0]])
    >>> steps = kalman_filter_reference(y, y == y, zero[0], one[0], one, zero, one, one, zero, one)
    >>> steps.filtered_mean.squeeze(-1)
    tensor([0.5000, 1.4000])
    """
    num_times = y.shape[-2] if num_times is None else num_times
    num_seen = num_times if observed_index is None else len(observed_index)
    looks = _time_slices(num_seen, *zip(hide_rows(mask, y, H, d, R), (1, 2, 1, 2), strict=True))
    moves = _time_slices(num_times - 1, (F, 2), (b, 1), (Q, 2))
    return filter_loop(
        mask,
        m,
        L,
        lambda k, m, L: moves[k],
        lambda j, m, L: looks[j],
        num_times=num_times,
        observed_index=observed_index,
        step_mask=step_mask,
    )


def filter_loop(
    mask: Tensor,
    m: Tensor,
    L: Tensor,
    move: Callable[[int, Tensor, Tensor], tuple[Tensor, ...]],
    look: Callable[[int, Tensor, Tensor], tuple[Tensor, ...]],
    *,
    num_times: int,
    observed_index: Sequence[int] | None = None,
    step_mask: Tensor | None = None,
) -> FilterSteps:
    """The loop of every Gaussian filter, with affine laws that may be found on the way.

    Masked entries and padded steps as in :func:`kalman_filter_reference`, which is the case of laws that are known
    beforehand.

    Args:
        mask: bool ``(..., observed, obs)``.
        m: ``(..., n)``; L: ``(..., n, n)``.
        move: ``(k, m, L) -> (F, b, Q)`` of the move from time k, where the state has the law m, L, to k + 1.
        look: ``(j, m, L) -> (y, H, d, R)`` of the j-th observation, its missing rows hidden (:func:`hide_rows`).
        num_times: of the state.
        observed_index: the times of the observations, ascending; all times by default.
        step_mask: bool ``(..., time)``, False on padding.

    >>> import torch
    >>> from pyro_ssm.ops.kalman import filter_loop
    >>> one, zero, y = torch.ones(1, 1), torch.zeros(1), torch.tensor([[1.0], [2.0]])
    >>> steps = filter_loop(
    ...     y == y, zero, one, lambda k, m, L: (one, zero, one), lambda j, m, L: (y[j], one, zero, one), num_times=2)
    >>> steps.filtered_mean.squeeze(-1)
    tensor([0.5000, 1.4000])
    """
    at = range(num_times) if observed_index is None else observed_index
    seen = {k: j for j, k in enumerate(at)}
    moved, told = _choices(step_mask, num_times), _choices(mask.any(-1), len(at))
    predicted, filtered, innovations = [], [], []
    for k in range(num_times):
        if k > 0:
            m, L = _choose(moved[k], predict(m, L, *move(k - 1, m, L)), (m, L))
        predicted.append((m, L))
        if k in seen:
            y, H, d, R = look(seen[k], m, L)
            m_k, L_k, e, s = update(m, L, y - matvec(H, m) - d, H, R)
            m, L = _choose(told[seen[k]], (m_k, L_k), (m, L))  # where nothing is seen the law stays, to the last bit
            innovations.append((e, s))
        filtered.append((m, L))
    terms = innovation_terms(innovations, mask, num_times, observed_index)
    means, roots = ([_stack_time([law[i] for law in laws], i + 1) for laws in (filtered, predicted)] for i in (0, 1))
    return FilterSteps(terms, means[0], roots[0], means[1], roots[1])


def innovation_terms(
    innovations: Sequence[Law], mask: Tensor, num_times: int, observed_index: Sequence[int] | None
) -> Tensor:
    """log p(y_k | y_<k), ``(..., time)``, from the whitened innovations and diagonals of :func:`update`."""
    e, s = (_stack_time([pair[i] for pair in innovations], 1) for i in (0, 1))
    terms = -0.5 * e.square() - s.log() - HALF_LOG_2PI
    terms = torch.where(mask, terms, torch.zeros((), dtype=terms.dtype, device=terms.device)).sum(-1)
    if observed_index is None:
        return terms
    where = torch.as_tensor(list(observed_index), device=terms.device)
    return terms.new_zeros(terms.shape[:-1] + (num_times,)).index_copy(-1, where, terms)


def _choices(condition: Tensor | None, num: int) -> Sequence[Tensor | None]:
    """One condition a time, None where it holds for every series."""
    if condition is None:
        return [None] * num
    always = condition.reshape(-1, num).all(0).tolist()
    return [None if all_true else now for all_true, now in zip(always, condition.unbind(-1), strict=True)]


def _choose(condition: Tensor | None, new: Law, old: Law) -> Law:
    if condition is None:
        return new
    return (
        torch.where(condition[..., None], new[0], old[0]),
        torch.where(condition[..., None, None], new[1], old[1]),
    )


def _stack_time(tensors: Sequence[Tensor], event: int) -> Tensor:
    """Stack along a new time dim before the event, leading dims broadcast."""
    lead = torch.broadcast_shapes(*(tensor.shape[:-event] for tensor in tensors))
    return torch.stack([tensor.expand(lead + tensor.shape[-event:]) for tensor in tensors], -event - 1)
