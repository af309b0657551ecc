"""Forward filtering, backward smoothing, best paths and path sampling on finite states: tensors in, tensors out.

Everything runs on logarithms that are normalised at each step, so that float32 neither under- nor overflows, and -inf
(an event that cannot happen) is exact. Shapes: weights ``(..., K)``, matrices ``(..., time, K, K)`` from row to column,
all leading dims broadcast; a time size of 1 stands for all steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.ops.composite import composite_backward

__all__ = [
    "FiniteSteps",
    "backward_kernels",
    "best_path",
    "finite_filter",
    "finite_filter_reference",
    "finite_smoother",
    "log_identity",
    "log_sum",
    "sample_path",
]

Reduce = Callable[[Tensor, int], Tensor]


class FiniteSteps(NamedTuple):
    """What a filter over finite states leaves at each time.

    >>> from pyro_ssm.ops.finite import FiniteSteps
    >>> FiniteSteps._fields
    ('log_likelihood', 'log_filtered')
    """

    log_likelihood: Tensor  # (..., time)  log p(y_k | y_<k)
    log_filtered: Tensor  # (..., time, K)  log P(z_k | y_<=k)


def log_identity(size: int, like: Tensor) -> Tensor:
    """The logarithm of the identity matrix: the transition that stays.

    >>> import torch
    >>> from pyro_ssm.ops.finite import log_identity
    >>> log_identity(2, torch.zeros(()))
    tensor([[0., -inf],
            [-inf, 0.]])
    """
    off = torch.full((size, size), -torch.inf, dtype=like.dtype, device=like.device)
    return off.fill_diagonal_(0.0)


def log_sum(x: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """logsumexp whose gradient is 0, not NaN, where every term is -inf.

    >>> import torch
    >>> from pyro_ssm.ops.finite import log_sum
    >>> log_sum(torch.full((2, 3), -torch.inf), -1)
    tensor([-inf, -inf])
    """
    none = (x.detach() == -torch.inf).all(dim, keepdim=True)
    total = torch.where(none, torch.zeros((), dtype=x.dtype, device=x.device), x).logsumexp(dim, keepdim=True)
    total = torch.where(none, torch.full((), -torch.inf, dtype=x.dtype, device=x.device), total)
    if keepdim:
        return total
    return total.squeeze(dim)


def finite_filter_reference(log_initial: Tensor, log_matrix: Tensor, log_emission: Tensor) -> FiniteSteps:
    """The recursion of :func:`finite_filter` as a plain loop.

    >>> import torch
    >>> from pyro_ssm.ops.finite import finite_filter_reference
    >>> stay = torch.tensor([[[0.0, -torch.inf], [-torch.inf, 0.0]]])
    >>> steps = finite_filter_reference(torch.tensor([0.5, 0.5]).log(), stay, torch.tensor([[0.0, 0.0], [0.0, -2.0]]))
    >>> steps.log_filtered[-1].exp()
    tensor([0.8808, 0.1192])
    """
    num = log_emission.shape[-2]
    matrices = log_matrix.unbind(-3) * (num - 1 if log_matrix.shape[-3] == 1 else 1)
    terms, filtered, f = [], [], log_initial
    for k, seen in enumerate(log_emission.unbind(-2)):
        predicted = log_initial if k == 0 else log_sum(f.unsqueeze(-1) + matrices[k - 1], -2)
        f, term = _normalise(predicted + seen)
        terms.append(term)
        filtered.append(f)
    shape = torch.broadcast_shapes(*(f.shape for f in filtered))
    return FiniteSteps(
        torch.stack([term.expand(shape[:-1]) for term in terms], -1),
        torch.stack([f.expand(shape) for f in filtered], -2),
    )


def finite_filter(
    log_initial: Tensor, log_matrix: Tensor, log_emission: Tensor, *, parallel: bool | None = None
) -> FiniteSteps:
    """The forward recursion of a hidden Markov model.

    .. math::
        a_k(j) = \\log \\sum_i e^{f_{k-1}(i) + A_k(i, j)} + \\ell_k(j), \\qquad
        c_k = \\log \\sum_j e^{a_k(j)}, \\qquad f_k = a_k - c_k

    The parallel form cuts time into about :math:`\\sqrt T` blocks, multiplies the matrices of all blocks side by side
    (K times the arithmetic, about :math:`3 \\sqrt T` steps instead of T), passes the filter over the blocks, and then
    runs all blocks side by side.

    Gradients: a hand-derived backward pass, which for the total log-likelihood is the smoother
    (:math:`\\partial \\log Z / \\partial \\ell_k(j) = P(z_k = j \\mid y)`); no graph over time is kept. Second
    derivatives go through the reference.

    Args:
        log_initial: ``(..., K)``.
        log_matrix: ``(..., time - 1 or 1, K, K)``.
        log_emission: ``(..., time, K)``; 0 where nothing is seen.
        parallel: which form; None chooses by size and device.

    Source: Baum, Petrie, Soules and Weiss (1970); Rabiner (1989), "A tutorial on hidden Markov models", section III.

    >>> import torch
    >>> from pyro_ssm.ops.finite import finite_filter
    >>> steps = finite_filter(torch.zeros(1), torch.zeros(1, 1, 1), torch.tensor([[-1.0], [-2.0]]))
    >>> steps.log_likelihood
    tensor([-1., -2.])
    """
    lead = torch.broadcast_shapes(log_initial.shape[:-1], log_matrix.shape[:-3], log_emission.shape[:-2])
    args = (
        log_initial.expand(lead + log_initial.shape[-1:]),
        log_matrix.expand(lead + log_matrix.shape[-3:]),
        log_emission.expand(lead + log_emission.shape[-2:]),
    )
    if parallel is None:
        parallel = _parallel_pays(args[2])
    return FiniteSteps(*_Filter.apply(*args, parallel))


def _parallel_pays(log_emission: Tensor) -> bool:
    num, K = log_emission.shape[-2:]
    lanes = log_emission[..., 0, 0].numel()
    if num < 64:
        return False
    return lanes * K**3 <= 4096 if log_emission.device.type == "cpu" else lanes * K**3 * math.sqrt(num) <= 1e8


def _normalise(a: Tensor) -> tuple[Tensor, Tensor]:
    """a less its logsumexp, and the logsumexp; what is impossible altogether stays -inf, without a NaN."""
    total = log_sum(a, -1)
    return a - _finite(total).unsqueeze(-1), total


def _finite(x: Tensor) -> Tensor:
    return torch.where(x == -torch.inf, torch.zeros((), dtype=x.dtype, device=x.device), x)


class _Filter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, log_initial: Tensor, log_matrix: Tensor, log_emission: Tensor, parallel: bool
    ) -> tuple[Tensor, Tensor]:
        terms, filtered = _messages(log_initial, log_matrix, log_emission, torch.logsumexp, parallel)
        ctx.save_for_backward(log_initial, log_matrix, log_emission, filtered)
        ctx.parallel = parallel
        return terms, filtered

    @staticmethod
    def backward(ctx: Any, g_terms: Tensor, g_filtered: Tensor) -> tuple[Tensor | None, ...]:
        log_initial, log_matrix, log_emission, filtered = ctx.saved_tensors
        if torch.is_grad_enabled():
            args = (log_initial, log_matrix, log_emission)
            return composite_backward(
                finite_filter_reference, args, ctx.needs_input_grad[:3], (g_terms, g_filtered)
            ) + (None,)
        # x_k, the adjoint of a_k, obeys x_k = W_{k+1} x_{k+1} + e_k with the kernels W of the smoother, since the
        # entries of x_{k+1} sum to g_{k+1}: for equal g_k it is the smoother itself.
        later = torch.cat([g_terms[..., 1:], torch.zeros_like(g_terms[..., :1])], -1)
        excess = g_terms - later - g_filtered.sum(-1)
        force = g_filtered + filtered.exp() * excess.unsqueeze(-1)
        kernels = backward_kernels(filtered, log_matrix)
        x = _reverse(kernels, force, ctx.parallel)
        g_matrix = None
        if ctx.needs_input_grad[1]:
            g_matrix = kernels * x[..., 1:, None, :]
            if log_matrix.shape[-3] == 1:
                g_matrix = g_matrix.sum(-3, keepdim=True)
        return x[..., 0, :], g_matrix, x, None


def _messages(
    log_initial: Tensor, log_matrix: Tensor, log_emission: Tensor, reduce: Reduce, parallel: bool
) -> tuple[Tensor, Tensor]:
    """Normalised forward messages in the semiring of ``reduce`` (logsumexp, or amax for best paths)."""

    def normalised(a: Tensor) -> tuple[Tensor, Tensor]:
        total = reduce(a, -1)
        return a - _finite(total).unsqueeze(-1), total

    num, K = log_emission.shape[-2:]
    lead = log_emission.shape[:-2]
    f, term = normalised(log_initial + log_emission[..., 0, :])
    if num == 1:
        return term.unsqueeze(-1), f.unsqueeze(-2)
    if not parallel:
        same = log_matrix.shape[-3] == 1
        terms, filtered = [term], [f]
        for k in range(1, num):
            a = reduce(f.unsqueeze(-1) + log_matrix[..., 0 if same else k - 1, :, :], -2) + log_emission[..., k, :]
            f, term = normalised(a)
            terms.append(term)
            filtered.append(f)
        return torch.stack(terms, -1), torch.stack(filtered, -2)

    moves = num - 1
    length = max(1, round(math.sqrt(moves / 2)))
    blocks = -(-moves // length)
    steps = log_matrix + log_emission[..., 1:, None, :]  # what one step does to a message
    spare = log_identity(K, steps).expand(lead + (blocks * length - moves, K, K))
    steps = torch.cat([steps, spare], -3).unflatten(-3, (blocks, length))
    whole = steps[..., 0, :, :]
    for k in range(1, length):
        whole = reduce(whole.unsqueeze(-1) + steps[..., k, :, :].unsqueeze(-3), -2)
        whole = whole - _finite(whole.amax((-1, -2), keepdim=True))
    starts = [f]
    for b in range(blocks - 1):
        starts.append(normalised(reduce(starts[-1].unsqueeze(-1) + whole[..., b, :, :], -2))[0])
    g = torch.stack(starts, -2)
    terms, filtered = [], []
    for k in range(length):
        g, c = normalised(reduce(g.unsqueeze(-1) + steps[..., k, :, :], -2))
        terms.append(c)
        filtered.append(g)
    later_terms = torch.stack(terms, -1).flatten(-2)[..., :moves]
    later = torch.stack(filtered, -2).flatten(-3, -2)[..., :moves, :]
    return torch.cat([term.unsqueeze(-1), later_terms], -1), torch.cat([f.unsqueeze(-2), later], -2)


def backward_kernels(log_filtered: Tensor, log_matrix: Tensor) -> Tensor:
    """The laws of each state given the next one and the data up to it, all times at once.

    .. math:: W_k(i, j) = P(z_k = i \\mid z_{k+1} = j, y_{\\le k}) \\propto e^{f_k(i) + A_k(i, j)}

    Returns:
        ``(..., time - 1, K, K)``, columns sum to 1 (to 0 where the next state cannot happen).

    >>> import torch
    >>> from pyro_ssm.ops.finite import backward_kernels
    >>> backward_kernels(torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log(), torch.zeros(1, 2, 2))
    tensor([[[0.2500, 0.2500],
             [0.7500, 0.7500]]])
    """
    joint = log_filtered[..., :-1, :].unsqueeze(-1) + log_matrix
    return (joint - _finite(log_sum(joint, -2, keepdim=True))).exp()


def finite_smoother(log_filtered: Tensor, kernels: Tensor, *, parallel: bool | None = None) -> Tensor:
    """Marginal probabilities given all data, backwards over time.

    .. math:: \\gamma_T = e^{f_T}, \\qquad \\gamma_k(i) = \\sum_j W_k(i, j)\\, \\gamma_{k+1}(j)

    Args:
        log_filtered: ``(..., time, K)``.
        kernels: of :func:`backward_kernels`; times :math:`\\gamma_{k+1}(j)` they are the pairwise probabilities.
        parallel: as for :func:`finite_filter`.

    Returns:
        ``(..., time, K)``; differentiable.

    Source: Kitagawa (1987), "Non-Gaussian state-space modeling of nonstationary time series".

    >>> import torch
    >>> from pyro_ssm.ops.finite import finite_smoother
    >>> finite_smoother(torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log(), torch.eye(2).unsqueeze(0))
    tensor([[0.2500, 0.7500],
            [0.2500, 0.7500]])
    """
    force = torch.cat([torch.zeros_like(log_filtered[..., :-1, :]), log_filtered[..., -1:, :].exp()], -2)
    return _reverse(kernels, force, _parallel_pays(log_filtered) if parallel is None else parallel)


def _reverse(kernels: Tensor, force: Tensor, parallel: bool) -> Tensor:
    """x_T = e_T, x_k = W_k x_{k+1} + e_k."""
    num, K = force.shape[-2:]
    x = force[..., -1, :]
    if num == 1:
        return force
    if not parallel:
        path = [x]
        for k in range(num - 2, -1, -1):
            x = (kernels[..., k, :, :] @ x.unsqueeze(-1)).squeeze(-1) + force[..., k, :]
            path.append(x)
        return torch.stack(path[::-1], -2)
    moves = num - 1
    length = max(1, round(math.sqrt(moves / 2)))
    blocks = -(-moves // length)
    lead, spare = force.shape[:-2], blocks * length - moves
    still = torch.eye(K, dtype=kernels.dtype, device=kernels.device).expand(lead + (spare, K, K))
    W = torch.cat([kernels, still], -3).unflatten(-3, (blocks, length))
    e = torch.cat([force[..., :-1, :], force.new_zeros(lead + (spare, K))], -2).unflatten(-2, (blocks, length))
    whole, shift = W[..., -1, :, :], e[..., -1, :]
    for k in range(length - 2, -1, -1):
        shift = (W[..., k, :, :] @ shift.unsqueeze(-1)).squeeze(-1) + e[..., k, :]
        whole = W[..., k, :, :] @ whole
    after = [x]  # the value after each block, last block first
    for b in range(blocks - 1, 0, -1):
        after.append((whole[..., b, :, :] @ after[-1].unsqueeze(-1)).squeeze(-1) + shift[..., b, :])
    y = torch.stack(after[::-1], -2)
    path = []
    for k in range(length - 1, -1, -1):
        y = (W[..., k, :, :] @ y.unsqueeze(-1)).squeeze(-1) + e[..., k, :]
        path.append(y)
    return torch.cat([torch.stack(path[::-1], -2).flatten(-3, -2)[..., :moves, :], x.unsqueeze(-2)], -2)


def best_path(
    log_initial: Tensor, log_matrix: Tensor, log_emission: Tensor, *, parallel: bool | None = None
) -> tuple[Tensor, Tensor]:
    """The most probable path (Viterbi 1967), and its log-probability together with the data.

    Args:
        log_initial, log_matrix, log_emission: as for :func:`finite_filter`.
        parallel: as for :func:`finite_filter`.

    Returns:
        Indices ``(..., time)`` and ``(...)``. No gradient goes through the path.

    >>> import torch
    >>> from pyro_ssm.ops.finite import best_path
    >>> best_path(torch.zeros(2), torch.zeros(1, 2, 2), torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    (tensor([1, 0]), tensor(3.))
    """
    lead = torch.broadcast_shapes(log_initial.shape[:-1], log_matrix.shape[:-3], log_emission.shape[:-2])
    log_initial = log_initial.expand(lead + log_initial.shape[-1:])
    log_matrix = log_matrix.expand(lead + log_matrix.shape[-3:])
    log_emission = log_emission.expand(lead + log_emission.shape[-2:])
    if parallel is None:
        parallel = _parallel_pays(log_emission)
    with torch.no_grad():
        terms, f = _messages(log_initial, log_matrix, log_emission, torch.amax, parallel)
        before = (f[..., :-1, :].unsqueeze(-1) + log_matrix).argmax(-2)  # the best state before each
        now = f[..., -1, :].argmax(-1, keepdim=True)
        path = [now]
        for k in range(f.shape[-2] - 2, -1, -1):
            now = before[..., k, :].gather(-1, now)
            path.append(now)
    return torch.cat(path[::-1], -1), terms.sum(-1)


def sample_path(log_filtered: Tensor, kernels: Tensor, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
    """Paths given all data, drawn backwards from the last state.

    .. math:: z_T \\sim e^{f_T}, \\qquad z_k \\sim W_k(\\cdot, z_{k+1})

    Each draw is an exponential race, :math:`\\operatorname{argmax}_i W(i) / E_i`, in which what has probability 0 never
    wins.

    Returns:
        Indices ``(*sample_shape, ..., time)``; noise from torch's generator; not differentiable.

    Source: Scott (2002), "Bayesian methods for hidden Markov models", section 2.3.

    >>> import torch
    >>> from pyro_ssm.ops.finite import sample_path
    >>> sample_path(torch.tensor([[0.5, 0.5], [0.0, 1.0]]).log(), torch.eye(2).unsqueeze(0), (3,))
    tensor([[1, 1],
            [1, 1],
            [1, 1]])
    """
    sample_shape = torch.Size(sample_shape)
    with torch.no_grad():
        race = torch.empty(sample_shape + log_filtered.shape, dtype=log_filtered.dtype, device=log_filtered.device)
        race.exponential_()
        now = (log_filtered[..., -1, :].exp() / race[..., -1, :]).argmax(-1)
        path = [now]
        rows = kernels.mT  # (..., time - 1, next, state)
        for k in range(log_filtered.shape[-2] - 2, -1, -1):
            weights = rows[..., k, :, :].expand(sample_shape + rows.shape[:-3] + rows.shape[-2:])
            chosen = now[..., None, None].expand(now.shape + (1, rows.shape[-1]))
            now = (weights.gather(-2, chosen).squeeze(-2) / race[..., k, :]).argmax(-1)
            path.append(now)
    return torch.stack(path[::-1], -1)
