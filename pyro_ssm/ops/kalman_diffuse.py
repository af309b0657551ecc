"""The exact initial phase of a Kalman filter whose start is diffuse, in square-root form: tensors in, tensors out.

While something is still unknown, the state is :math:`x = m + A P \\delta + L \\varepsilon` with :math:`\\delta \\sim
N(0, \\kappa I)`, :math:`\\kappa \\to \\infty`, and :math:`\\varepsilon \\sim N(0, I)`: A tells what each diffuse
direction does to the state, and the projector P keeps the directions that no observation has determined yet. An
observation first determines as many of them as it can (a pivoted Gram-Schmidt of H A P), and what is left of it is an
ordinary Kalman update. No large number stands for infinity, and nothing is inverted but what is determined, so noise
may be singular. The phase ends when P vanishes (Koopman 1997, "Exact initial Kalman filtering and smoothing for
nonstationary time series models"; Durbin and Koopman 2012, "Time Series Analysis by State Space Methods", ch. 5; the
split of a diffuse vector is de Jong's 1991, "The diffuse Kalman filter").

Call these functions in float64: which rows are dependent is decided to about 1e-12 of their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.ops.kalman import (
    HALF_LOG_2PI,
    _beside,
    _choices,
    _choose,
    _stack_time,
    _time_slices,
    hide_rows,
    matvec,
    predict,
)
from pyro_ssm.ops.kalman_backward import Conditionals, conditional
from pyro_ssm.ops.linalg import solve_lower, tria

__all__ = [
    "DiffuseLaw",
    "DiffuseSteps",
    "diffuse_conditionals",
    "diffuse_phase",
    "diffuse_predict",
    "diffuse_start",
    "diffuse_update",
]


class DiffuseLaw(NamedTuple):
    """The law of :math:`m + A P \\delta + L \\varepsilon`; leading dims broadcast.

    >>> from pyro_ssm.ops.kalman_diffuse import DiffuseLaw
    >>> DiffuseLaw._fields
    ('mean', 'scale_tril', 'reach', 'left')
    """

    mean: Tensor  # (..., n)
    scale_tril: Tensor  # (..., n, n)  L
    reach: Tensor  # (..., n, q)  A
    left: Tensor  # (..., q, q)  P, a projector

    @property
    def diffuse(self) -> Tensor:
        """:math:`D = A P` ``(..., n, q)``: the part of the covariance that is infinite is :math:`\\kappa D D^T`."""
        return self.reach @ self.left

    @property
    def is_proper(self) -> Tensor:
        """Whether nothing diffuse is left in the state, to rounding; bool ``(...)``."""
        left = torch.linalg.vector_norm(self.diffuse.detach(), dim=-1)
        return (left <= _tolerance(left) * torch.linalg.vector_norm(self.reach.detach(), dim=-1)).all(-1)


class DiffuseSteps(NamedTuple):
    """What :func:`diffuse_phase` leaves at its first times; the time axis stands before the event.

    >>> from pyro_ssm.ops.kalman_diffuse import DiffuseSteps
    >>> DiffuseSteps._fields
    ('log_likelihood', 'filtered', 'predicted')
    """

    log_likelihood: Tensor  # (..., phase)
    filtered: DiffuseLaw
    predicted: DiffuseLaw


def _tolerance(like: Tensor) -> float:
    """Below this part of its size a combination of rows is rounding error."""
    return torch.finfo(like.dtype).eps ** 0.75


def diffuse_start(m: Tensor, L: Tensor, D: Tensor) -> DiffuseLaw:
    """The law of the first state, :math:`m + D \\delta + L \\varepsilon`.

    >>> import torch
    >>> from pyro_ssm.ops.kalman_diffuse import diffuse_start
    >>> diffuse_start(torch.zeros(1), torch.zeros(1, 1), torch.ones(1, 1)).left
    tensor([[1.]])
    """
    q = D.shape[-1]
    return DiffuseLaw(m, L, D, torch.eye(q, dtype=D.dtype, device=D.device).expand(D.shape[:-2] + (q, q)))


def diffuse_predict(law: DiffuseLaw, F: Tensor, b: Tensor, Q: Tensor) -> DiffuseLaw:
    """The law of x' = F x + b + Q e.

    >>> import torch
    >>> from pyro_ssm.ops.kalman_diffuse import diffuse_predict, diffuse_start
    >>> law, one = diffuse_start(torch.zeros(1), torch.zeros(1, 1), torch.ones(1, 1)), torch.ones(1, 1)
    >>> diffuse_predict(law, 2 * one, torch.zeros(1), one).diffuse
    tensor([[2.]])
    """
    m, L = predict(law.mean, law.scale_tril, F, b, Q)
    return DiffuseLaw(m, L, F @ law.reach, law.left)


class _Determined(NamedTuple):
    """The diffuse directions that the rows of y = H x + ... determine.

    With C a change of the rows of y, row i of :math:`C^{-1} y` is :math:`u_i^T \\delta` and noise where ``pivot``, and
    free of delta elsewhere.
    """

    rows: Tensor  # (..., p, q)  orthonormal rows u_i at pivots, 0 elsewhere
    pivot: Tensor  # bool (..., p)
    change: Tensor  # (..., p, p)  C
    left: Tensor  # (..., q, q)  the projector on what is not determined


def _determine(law: DiffuseLaw, H: Tensor) -> _Determined:
    """Gram-Schmidt over the rows of H A P, at each turn the row that is largest relative to its rounding error."""
    HA, left = H @ law.reach, law.left
    p, q = HA.shape[-2:]
    size = H.detach().abs() @ torch.linalg.vector_norm(law.reach.detach(), dim=-1, keepdim=True)  # (..., p, 1)
    noise = _tolerance(HA) * size.squeeze(-1)
    lead = torch.broadcast_shapes(HA.shape[:-2], left.shape[:-2])
    rows, pivot = HA.new_zeros(lead + (p, q)), torch.zeros(lead + (p,), dtype=torch.bool, device=HA.device)
    count = torch.zeros(lead, dtype=torch.long, device=HA.device)
    zero, first = HA.new_zeros(()), torch.eye(q, dtype=HA.dtype, device=HA.device)[0]
    for _ in range(min(p, q)):
        h = HA @ left
        ratio = torch.linalg.vector_norm(h.detach(), dim=-1) / noise.clamp(min=torch.finfo(noise.dtype).tiny)
        best, where = torch.where(pivot, zero, ratio).max(-1)
        found = (best > 1).unsqueeze(-1)
        if not bool(found.any()):
            break
        chosen = torch.nn.functional.one_hot(where, p).bool() & found
        u = (chosen.unsqueeze(-1) * h).sum(-2)
        for _ in range(2):  # the second time takes away what rounding left of the earlier directions
            u = torch.where(found, matvec(left, u), first)
            u = u / torch.linalg.vector_norm(u, dim=-1, keepdim=True)
        u = torch.where(found, u, zero)
        rows = rows + chosen.unsqueeze(-1) * u.unsqueeze(-2)
        left = left - u.unsqueeze(-1) * u.unsqueeze(-2)
        pivot, count = pivot | chosen, count + found.squeeze(-1)
    rank = law.left.detach().diagonal(dim1=-2, dim2=-1).sum(-1).round() - count
    left = torch.where((rank > 0)[..., None, None], left, zero)  # exactly nothing, where all is determined
    change = torch.where(pivot.unsqueeze(-2), HA @ rows.mT, torch.eye(p, dtype=HA.dtype, device=HA.device))
    return _Determined(rows, pivot, change, left)


class _Split(NamedTuple):
    """The joint law of an observation and the state, the diffuse part taken out; see :func:`diffuse_update`."""

    found: _Determined
    gain: Tensor  # (..., n, p)  of the rows that are pivots
    S: Tensor  # (..., p, p)
    K: Tensor  # (..., n, p)
    L: Tensor  # (..., n, n)


def _solve(A: Tensor, B: Tensor) -> Tensor:
    """:math:`A^{-1} B`; torch would take B for a batch of vectors where it has fewer dims than A."""
    lead = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    return torch.linalg.solve(A, B.expand(lead + B.shape[-2:]))


def _split(law: DiffuseLaw, H: Tensor, R: Tensor) -> _Split:
    found = _determine(law, H)
    p, n = H.shape[-2:]
    gain = law.reach @ found.rows.mT
    noise = _solve(found.change, _beside(H @ law.scale_tril, R))
    state = _beside(law.scale_tril, R.new_zeros(n, p)) - gain @ noise
    fill = torch.diag_embed(found.pivot.to(R.dtype))
    rest = torch.where(found.pivot.unsqueeze(-1), R.new_zeros(()), noise)
    upper, lower = _beside(rest, fill), _beside(state, R.new_zeros(n, p))
    lead = torch.broadcast_shapes(upper.shape[:-2], lower.shape[:-2])
    both = torch.cat([part.expand(lead + part.shape[-2:]) for part in (upper, lower)], -2)
    root = tria(both)
    return _Split(found, gain, root[..., :p, :p], root[..., p:, :p], root[..., p:, p:])


def diffuse_update(law: DiffuseLaw, y: Tensor, H: Tensor, d: Tensor, R: Tensor) -> tuple[DiffuseLaw, Tensor]:
    """The law of x given y = H x + d + R e, and the terms of the diffuse log-likelihood.

    With C a change of rows such that :math:`C^{-1} H A P` has orthonormal rows :math:`U` at the pivots and 0
    elsewhere, and :math:`w = C^{-1} (y - H m - d)`, the pivots give :math:`x \\mathrel{+}= A U^T (w - \\text{noise})`,
    the other rows are an ordinary update, and

    .. math:: \\lim_{\\kappa \\to \\infty} \\log p(y) + \\tfrac{r}{2} \\log \\kappa =
        -\\log |\\det C| - \\tfrac{r}{2} \\log 2 \\pi + \\log N(w_\\text{other}; 0, S S^T)

    with r pivots.

    Args:
        law: of x.
        y, d: ``(..., p)``.
        H: ``(..., p, n)``; R: ``(..., p, p)``. A missing row has been hidden (:func:`~pyro_ssm.ops.kalman.hide_rows`).

    Returns:
        The law, and terms ``(..., p)`` that sum to the above; the constant of a hidden row is still to be left out.

    >>> import torch
    >>> from pyro_ssm.ops.kalman_diffuse import diffuse_start, diffuse_update
    >>> one, zero = torch.ones(1, 1), torch.zeros(1)
    >>> law, terms = diffuse_update(diffuse_start(zero, 0 * one, one), torch.tensor([3.0]), 2 * one, zero, 4 * one)
    >>> law.mean, law.scale_tril, law.diffuse
    (tensor([1.5000]), tensor([[2.]]), tensor([[0.]]))
    """
    found, gain, S, K, L = _split(law, H, R)
    v = y - matvec(H, law.mean) - d
    w = _solve(found.change, v.unsqueeze(-1)).squeeze(-1)
    e = solve_lower(S, torch.where(found.pivot, w.new_zeros(()), w))
    mean = law.mean + matvec(gain, w) + matvec(K, e)
    terms = -0.5 * e.square() - S.diagonal(dim1=-2, dim2=-1).log() - HALF_LOG_2PI
    volume = torch.linalg.slogdet(found.change)[1]
    terms = terms - (volume / found.pivot.sum(-1).clamp(min=1)).unsqueeze(-1) * found.pivot  # 0 where none is found
    return DiffuseLaw(mean, L, law.reach, found.left), terms


def diffuse_phase(
    y: Tensor,
    mask: Tensor,
    m: Tensor,
    L: Tensor,
    D: Tensor,
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
) -> DiffuseSteps:
    """The first steps of a Kalman filter with a diffuse start, up to the first at which every series is proper.

    .. math:: z_1 = m + D \\delta + L \\varepsilon, \\qquad \\delta \\sim N(0, \\kappa I), \\quad \\kappa \\to \\infty

    Everything else as :func:`~pyro_ssm.ops.kalman.kalman_filter_reference`. Where the data never determines all
    directions, the phase is the whole series.

    Args:
        D: ``(..., n, q)``; the others as there.

    Returns:
        The steps of the phase; the law at its last one is proper (``left`` gives 0) or it is the last of all.

    >>> import torch
    >>> from pyro_ssm.ops.kalman_diffuse import diffuse_phase
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> y = torch.tensor([[float("nan")], [2.0], [3.0]])
    >>> steps = diffuse_phase(y, ~y.isnan(), zero[0], 0 * one[0], one[0], one, zero, one, one, zero, one)
    >>> steps.filtered.mean.squeeze(-1), steps.filtered.diffuse.flatten()
    (tensor([0., 2.]), tensor([1., 0.]))
    """
    num_times = y.shape[-2] if num_times is None else num_times
    at = range(num_times) if observed_index is None else observed_index
    y, H, d, R = hide_rows(mask, y, H, d, R)
    seen = dict(zip(at, _time_slices(len(at), (y, 1), (H, 2), (d, 1), (R, 2), (mask, 1)), strict=True))
    moves = _time_slices(num_times - 1, (F, 2), (b, 1), (Q, 2))
    moved, told = _choices(step_mask, num_times), dict(zip(at, _choices(mask.any(-1), len(at)), strict=True))
    law = diffuse_start(m, L, D)
    terms, filtered, predicted = [], [], []
    for k in range(num_times):
        if k > 0:
            law = _choose_law(moved[k], diffuse_predict(law, *moves[k - 1]), law)
        predicted.append(law)
        term = law.mean.new_zeros(())
        if k in seen:
            *observation, observed = seen[k]
            new, parts = diffuse_update(law, *observation)
            law = _choose_law(told[k], new, law)
            term = torch.where(observed, parts, parts.new_zeros(())).sum(-1)
        terms.append(term)
        filtered.append(law)
        if bool(law.is_proper.all()):
            break
    return DiffuseSteps(torch.stack(torch.broadcast_tensors(*terms), -1), _stack_laws(filtered), _stack_laws(predicted))


def _choose_law(condition: Tensor | None, new: DiffuseLaw, old: DiffuseLaw) -> DiffuseLaw:
    reach, left = _choose_matrix(condition, new.reach, old.reach), _choose_matrix(condition, new.left, old.left)
    return DiffuseLaw(*_choose(condition, (new.mean, new.scale_tril), (old.mean, old.scale_tril)), reach, left)


def _choose_matrix(condition: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if condition is None else torch.where(condition[..., None, None], new, old)


def _stack_laws(laws: Sequence[DiffuseLaw]) -> DiffuseLaw:
    return DiffuseLaw(*(_stack_time([law[i] for law in laws], event) for i, event in enumerate((1, 2, 2, 2))))


def diffuse_conditionals(
    filtered: DiffuseLaw, F: Tensor, b: Tensor, Q: Tensor, step_mask: Tensor | None = None
) -> tuple[Conditionals, Tensor]:
    """The laws :math:`p(z_k | z_{k+1}, y_{\\le k})` at steps where z_k may still be diffuse, all at once.

    The next state is an observation of the last one: it determines the directions that F does not lose.

    Args:
        filtered: laws with a time axis ``(..., steps)`` before the event.
        F, b, Q: the moves from these steps on.
        step_mask: bool ``(..., steps)``: whether the *next* step is real.

    Returns:
        The conditionals, and bool ``(..., steps)``: False where a direction is left, so that the law is improper.

    >>> import torch
    >>> from pyro_ssm.ops.kalman_diffuse import DiffuseLaw, diffuse_conditionals, diffuse_start
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> law = diffuse_start(zero, 0 * one, one)  # nothing is known but the next state
    >>> conditionals, proper = diffuse_conditionals(law, 2 * one, zero, 3 * one)
    >>> conditionals.gain.item(), conditionals.scale_tril.item(), proper.item()
    (0.5, 1.5, True)
    """
    found, gain, S, K, D = _split(filtered, F, Q)
    other, D = conditional(S, K, D)
    G = gain + torch.where(found.pivot.unsqueeze(-2), gain.new_zeros(()), other)
    G = _solve(found.change.mT, G.mT).mT
    m = filtered.mean
    c = m - matvec(G, matvec(F, m) + b)
    proper = DiffuseLaw(m, D, filtered.reach, found.left).is_proper
    if step_mask is not None:
        zero, eye = m.new_zeros(()), torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
        c, D = torch.where(step_mask[..., None], c, zero), torch.where(step_mask[..., None, None], D, zero)
        G, proper = torch.where(step_mask[..., None, None], G, eye), proper | ~step_mask
    return Conditionals(G, c, D), proper
