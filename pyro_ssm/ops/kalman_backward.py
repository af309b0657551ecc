"""Square-root Kalman smoothing and path sampling: backwards over what a filter left, tensors in, tensors out.

See the head of :mod:`pyro_ssm.ops.kalman` for the form and the shapes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.ops.kalman import (
    FilterSteps,
    _beside,
    _joint_root,
    _stack_time,
    _time_slices,
    matvec,
    matvec_over_time,
    predict,
)
from pyro_ssm.ops.linalg import solve_lower_right, tria, vanishing_pivots

__all__ = [
    "Conditionals",
    "backward_conditionals_reference",
    "backward_sample_reference",
    "complete",
    "conditional",
    "forward_conditionals",
    "kalman_smoother_reference",
]


class Conditionals(NamedTuple):
    """The laws :math:`p(z_k | z_{k+1}, y_{\\le k}) = N(G z_{k+1} + c, D D^T)`, T - 1 of them.

    >>> from pyro_ssm.ops.kalman_backward import Conditionals
    >>> Conditionals._fields
    ('gain', 'offset', 'scale_tril')
    """

    gain: Tensor  # (..., time - 1, n, n)
    offset: Tensor  # (..., time - 1, n)
    scale_tril: Tensor  # (..., time - 1, n, n)


def backward_conditionals_reference(
    steps: FilterSteps, F: Tensor, b: Tensor, Q: Tensor, step_mask: Tensor | None = None
) -> Conditionals:
    """The laws of each state given the next one and the data up to it, all times at once.

    .. math::
        \\begin{pmatrix} F L & Q \\\\ L & 0 \\end{pmatrix} \\to \\begin{pmatrix} S & 0 \\\\ K & D \\end{pmatrix},
        \\qquad G = K S^{-1}, \\quad c = m - G (F m + b)

    A padded step is a copy of the step before, so there G = I, c = 0, D = 0.

    >>> import torch
    >>> from pyro_ssm.ops.kalman import FilterSteps
    >>> from pyro_ssm.ops.kalman_backward import backward_conditionals_reference
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> law = FilterSteps(zero, zero.expand(2, 1), one.expand(2, 1, 1), zero, one)
    >>> backward_conditionals_reference(law, one, zero, one).gain
    tensor([[[0.5000]]])
    """
    L = steps.filtered_scale_tril[..., :-1, :, :]
    return complete(*conditional(*_joint_root(F, Q, L)), steps, F, b, step_mask)


def complete(G: Tensor, D: Tensor, steps: FilterSteps, F: Tensor, b: Tensor, step_mask: Tensor | None) -> Conditionals:
    """The laws with gain G and root D: their offset, :math:`c = m - G (F m + b)`, and padding.

    >>> from pyro_ssm.ops.kalman_backward import complete
    >>> complete.__name__
    'complete'
    """
    m = steps.filtered_mean[..., :-1, :]
    c = m - matvec_over_time(G, matvec_over_time(F, m) + b)
    if step_mask is not None:
        real = step_mask[..., 1:]
        zero = torch.zeros((), dtype=m.dtype, device=m.device)
        c, D = torch.where(real[..., None], c, zero), torch.where(real[..., None, None], D, zero)
        G = torch.where(real[..., None, None], G, torch.eye(m.shape[-1], dtype=m.dtype, device=m.device))
    return Conditionals(G, c, D)


def conditional(S: Tensor, K: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and square root of x given y, for the root [[S, 0], [K, D]] of the law of (y, x).

    .. math:: G = K S^{+}, \\qquad D' D'^T = D D^T + K (I - S^{+} S) K^T

    The last term is 0 unless S is singular: then columns of K may carry what y does not tell.

    >>> import torch
    >>> from pyro_ssm.ops.kalman_backward import conditional
    >>> one = torch.ones(1, 1)
    >>> conditional(0 * one, 3 * one, 0 * one)  # y is a constant
    (tensor([[0.]]), tensor([[3.]]))
    """
    G = solve_lower_right(K, S)
    if bool(vanishing_pivots(S).any()):
        D = tria(_beside(D, K - G @ S))
    return G, D


def kalman_smoother_reference(steps: FilterSteps, conditionals: Conditionals) -> tuple[Tensor, Tensor]:
    """Means and square roots of :math:`p(z_k | y_{1:T})`, a loop back over time (Rauch, Tung and Striebel 1965).

    .. math::
        \\hat m_k = G \\hat m_{k+1} + c, \\qquad
        \\hat L_k \\hat L_k^T = D D^T + G \\hat L_{k+1} \\hat L_{k+1}^T G^T

    Returns:
        ``(..., time, n)`` and ``(..., time, n, n)``.

    >>> import torch
    >>> from pyro_ssm.ops.kalman import FilterSteps
    >>> from pyro_ssm.ops.kalman_backward import Conditionals, kalman_smoother_reference
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
    >>> from pyro_ssm.ops.kalman_backward import Conditionals, forward_conditionals
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> backwards = Conditionals(0.5 * one, zero, 0.75**0.5 * one)
    >>> forward_conditionals(torch.zeros(2, 1), one.expand(2, 1, 1), backwards).gain
    tensor([[[0.5000]]])
    """
    # the backward law is a motion from k + 1 to k, and the smoothed law of k + 1 where it starts
    steps = FilterSteps(mean, mean.roll(-1, -2), scale_tril.roll(-1, -3), mean, scale_tril)
    return backward_conditionals_reference(steps, *conditionals)


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
    >>> from pyro_ssm.ops.kalman_backward import Conditionals, backward_sample_reference
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> backward_sample_reference(Conditionals(0.5 * one, zero, one), torch.tensor([2.0]), torch.ones(1, 1)).squeeze(-1)
    tensor([2., 2.])
    """
    fresh = conditionals.offset + matvec(conditionals.scale_tril, noise)
    path = [last]
    for G, c in reversed(_time_slices(fresh.shape[-2], (conditionals.gain, 2), (fresh, 1))):
        path.append(matvec(G, path[-1]) + c)
    return _stack_time(path[::-1], 1)
