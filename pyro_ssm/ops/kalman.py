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
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.ops.linalg import solve_lower, solve_lower_right, tria

__all__ = [
    "Conditionals",
    "FilterSteps",
    "backward_conditionals",
    "backward_sample_reference",
    "forward_conditionals",
    "hide_rows",
    "kalman_filter_reference",
    "kalman_smoother_reference",
    "predict",
    "update",
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


class Conditionals(NamedTuple):
    """The laws :math:`p(z_k | z_{k+1}, y_{\\le k}) = N(G z_{k+1} + c, D D^T)`, T - 1 of them.

    >>> from pyro_ssm.ops.kalman import Conditionals
    >>> Conditionals._fields
    ('gain', 'offset', 'scale_tril')
    """

    gain: Tensor  # (..., time - 1, n, n)
    offset: Tensor  # (..., time - 1, n)
    scale_tril: Tensor  # (..., time - 1, n, n)


def matvec(A: Tensor, x: Tensor) -> Tensor:
    return (A @ x.unsqueeze(-1)).squeeze(-1)


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
    if bool(mask.all()):
        return y, H, d, R
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
    at = range(num_times) if observed_index is None else observed_index
    y, H, d, R = hide_rows(mask, y, H, d, R)
    num_seen = len(at)
    seen = dict(zip(at, _time_slices(num_seen, (y, 1), (H, 2), (d, 1), (R, 2)), strict=True))
    moves = _time_slices(num_times - 1, (F, 2), (b, 1), (Q, 2))
    moved, told = _choices(step_mask, num_times), dict(zip(at, _choices(mask.any(-1), num_seen), strict=True))
    predicted, filtered, innovations = [], [], []
    for k in range(num_times):
        if k > 0:
            m, L = _choose(moved[k], predict(m, L, *moves[k - 1]), (m, L))
        predicted.append((m, L))
        if k in seen:
            y_k, H_k, d_k, R_k = seen[k]
            m_k, L_k, e, s = update(m, L, y_k - matvec(H_k, m) - d_k, H_k, R_k)
            m, L = _choose(told[k], (m_k, L_k), (m, L))  # where nothing is seen the law stays, to the last bit
            innovations.append((e, s))
        filtered.append((m, L))
    e, s = (_stack_time([pair[i] for pair in innovations], 1) for i in (0, 1))
    terms = -0.5 * e.square() - s.log() - HALF_LOG_2PI
    terms = torch.where(mask, terms, torch.zeros((), dtype=terms.dtype, device=terms.device)).sum(-1)
    if observed_index is not None:
        where = torch.as_tensor(list(at), device=terms.device)
        terms = terms.new_zeros(terms.shape[:-1] + (num_times,)).index_copy(-1, where, terms)
    means, roots = ([_stack_time([law[i] for law in laws], i + 1) for laws in (filtered, predicted)] for i in (0, 1))
    return FilterSteps(terms, means[0], roots[0], means[1], roots[1])


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


def backward_conditionals(
    steps: FilterSteps, F: Tensor, b: Tensor, Q: Tensor, step_mask: Tensor | None = None
) -> Conditionals:
    """The laws of each state given the next one and the data up to it, all times at once.

    .. math::
        \\begin{pmatrix} F L & Q \\\\ L & 0 \\end{pmatrix} \\to \\begin{pmatrix} S & 0 \\\\ K & D \\end{pmatrix},
        \\qquad G = K S^{-1}, \\quad c = m - G (F m + b)

    A padded step is a copy of the step before, so there G = I, c = 0, D = 0.

    >>> import torch
    >>> from pyro_ssm.ops.kalman import FilterSteps, backward_conditionals
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> law = FilterSteps(zero, zero.expand(2, 1), one.expand(2, 1, 1), zero, one)
    >>> backward_conditionals(law, one, zero, one).gain
    tensor([[[0.5000]]])
    """
    m, L = steps.filtered_mean[..., :-1, :], steps.filtered_scale_tril[..., :-1, :, :]
    S, K, D = _joint_root(F, Q, L)
    G = solve_lower_right(K, S)
    c = m - matvec(G, matvec(F, m) + b)
    if step_mask is not None:
        real = step_mask[..., 1:]
        zero = torch.zeros((), dtype=m.dtype, device=m.device)
        c, D = torch.where(real[..., None], c, zero), torch.where(real[..., None, None], D, zero)
        G = torch.where(real[..., None, None], G, torch.eye(m.shape[-1], dtype=m.dtype, device=m.device))
    return Conditionals(G, c, D)


def kalman_smoother_reference(steps: FilterSteps, conditionals: Conditionals) -> tuple[Tensor, Tensor]:
    """Means and square roots of :math:`p(z_k | y_{1:T})`, a loop back over time (Rauch, Tung and Striebel 1965).

    .. math::
        \\hat m_k = G \\hat m_{k+1} + c, \\qquad
        \\hat L_k \\hat L_k^T = D D^T + G \\hat L_{k+1} \\hat L_{k+1}^T G^T

    Returns:
        ``(..., time, n)`` and ``(..., time, n, n)``.

    >>> import torch
    >>> from pyro_ssm.ops.kalman import Conditionals, FilterSteps, kalman_smoother_reference
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> law = FilterSteps(zero, torch.tensor([[0.0], [2.0]]), one.expand(2, 1, 1), zero, one)
    >>> kalman_smoother_reference(law, Conditionals(0.5 * one, zero, one))[0].squeeze(-1)
    tensor([1., 2.])
    """
    m, L = steps.filtered_mean[..., -1, :], steps.filtered_scale_tril[..., -1, :, :]
    laws = [(m, L)]
    G, c, D = conditionals
    for now in reversed(_time_slices(G.shape[-3], (G, 2), (c, 1), (D, 2))):
        m, L = predict(m, L, *now)
        laws.append((m, L))
    return _stack_time([m for m, _ in laws[::-1]], 1), _stack_time([L for _, L in laws[::-1]], 2)


def forward_conditionals(mean: Tensor, scale_tril: Tensor, conditionals: Conditionals) -> Conditionals:
    """The laws :math:`p(z_{k+1} | z_k, y_{1:T}) = N(G z_k + c, D D^T)` of each state given the one before and all data.

    .. math::
        \\begin{pmatrix} G' \\hat L_{k+1} & D' \\\\ \\hat L_{k+1} & 0 \\end{pmatrix}
        \\to \\begin{pmatrix} S & 0 \\\\ K & D \\end{pmatrix}, \\qquad G = K S^{-1}, \\quad
        c = \\hat m_{k+1} - G (G' \\hat m_{k+1} + c')

    with the backward laws :math:`(G', c', D')` turned round by Bayes' rule, all times at once. A padded step is a copy
    of the step before, so there G = I, c = 0, D = 0.

    Args:
        mean: smoothed means ``(..., time, n)`` (:func:`kalman_smoother_reference`).
        scale_tril: their square roots ``(..., time, n, n)``.
        conditionals: the backward laws.

    >>> import torch
    >>> from pyro_ssm.ops.kalman import Conditionals, forward_conditionals
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> backwards = Conditionals(0.5 * one, zero, 0.75**0.5 * one)
    >>> forward_conditionals(torch.zeros(2, 1), one.expand(2, 1, 1), backwards).gain
    tensor([[[0.5000]]])
    """
    # the backward law is a motion from k + 1 to k, and the smoothed law of k + 1 where it starts
    steps = FilterSteps(mean, mean.roll(-1, -2), scale_tril.roll(-1, -3), mean, scale_tril)
    return backward_conditionals(steps, *conditionals)


def backward_sample_reference(conditionals: Conditionals, last: Tensor, noise: Tensor) -> Tensor:
    """Paths drawn backwards from the last state (Fruhwirth-Schnatter 1994; Carter and Kohn 1994).

    .. math:: z_k = G z_{k+1} + c + D \\epsilon_k

    Differentiable in everything (a reparametrised draw).

    Args:
        last: draws of the last state ``(..., n)``.
        noise: standard normal ``(..., time - 1, n)``.

    Returns:
        ``(..., time, n)``.

    >>> import torch
    >>> from pyro_ssm.ops.kalman import Conditionals, backward_sample_reference
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> backward_sample_reference(Conditionals(0.5 * one, zero, one), torch.tensor([2.0]), torch.ones(1, 1)).squeeze(-1)
    tensor([2., 2.])
    """
    fresh = conditionals.offset + matvec(conditionals.scale_tril, noise)
    path = [last]
    for G, c in reversed(_time_slices(fresh.shape[-2], (conditionals.gain, 2), (fresh, 1))):
        path.append(matvec(G, path[-1]) + c)
    return _stack_time(path[::-1], 1)
