"""Kalman smoothing and path sampling that everything uses: compiled where the library is there, else the references."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops import kalman_smoother_kernel as kernel
from pyro_ssm.ops.associative_scan import affine_scan
from pyro_ssm.ops.composite import composite_backward
from pyro_ssm.ops.kalman import FilterSteps, _beside, _joint_root, _stack_time, matvec_over_time
from pyro_ssm.ops.kalman_backward import (
    Conditionals,
    backward_conditionals_reference,
    backward_sample_reference,
    complete,
    conditional,
    kalman_smoother_reference,
)
from pyro_ssm.ops.linalg import tria

__all__ = ["backward_conditionals", "backward_sample", "kalman_smoother"]


def backward_conditionals(
    steps: FilterSteps, F: Tensor, b: Tensor, Q: Tensor, step_mask: Tensor | None = None
) -> Conditionals:
    """:func:`backward_conditionals_reference`, fast: the laws of each state given the next one and the data up to it.

    .. math::
        \\begin{pmatrix} F L & Q \\\\ L & 0 \\end{pmatrix} \\to \\begin{pmatrix} S & 0 \\\\ K & D \\end{pmatrix},
        \\qquad G = K S^{-1}, \\quad c = m - G (F m + b)

    A step that repeats the one before (a constant F and Q, and a filter that has settled) is copied. Arithmetic of G
    and D is float64. Where some S is singular, and on other devices than the CPU, the reference runs. Gradients are
    the reference's, of any order.

    >>> import torch
    >>> from pyro_ssm.ops import backward_conditionals
    >>> from pyro_ssm.ops.kalman import FilterSteps
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> law = FilterSteps(zero, zero.expand(2, 1), one.expand(2, 1, 1), zero, one)
    >>> backward_conditionals(law, one, zero, one).gain
    tensor([[[0.5000]]])
    """
    L = steps.filtered_scale_tril[..., :-1, :, :]
    if not L.shape[-3] or Q.shape[-1] != Q.shape[-2] or not kernel.applies(F, Q, L):
        return backward_conditionals_reference(steps, F, b, Q, step_mask)
    G, D = _Laws.apply(F, Q, L)
    return complete(G, D, steps, F, b, step_mask)


def kalman_smoother(steps: FilterSteps, conditionals: Conditionals) -> tuple[Tensor, Tensor]:
    """:func:`kalman_smoother_reference`, fast: means and square roots of :math:`p(z_k | y_{1:T})`.

    .. math::
        \\hat m_k = G \\hat m_{k+1} + c, \\qquad
        \\hat L_k \\hat L_k^T = D D^T + G \\hat L_{k+1} \\hat L_{k+1}^T G^T

    Arithmetic is float64. The square roots are computed once for all series that share the laws. Gradients of the means
    are those of a recurrence forwards in time, as fast; those of the square roots are the reference's, with its cost.
    Both to any order. On other devices than the CPU the reference runs.

    Returns:
        ``(..., time, n)`` and ``(..., time, n, n)``.

    Source: Rauch, Tung and Striebel (1965), "Maximum likelihood estimates of linear dynamic systems".

    >>> import torch
    >>> from pyro_ssm.ops import kalman_smoother
    >>> from pyro_ssm.ops.kalman import FilterSteps
    >>> from pyro_ssm.ops.kalman_backward import Conditionals
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> law = FilterSteps(zero, torch.tensor([[0.0], [2.0]]), one.expand(2, 1, 1), zero, one)
    >>> kalman_smoother(law, Conditionals(0.5 * one, zero, one))[0].squeeze(-1)
    tensor([1., 2.])
    """
    G, c, D = conditionals
    m, L = steps.filtered_mean[..., -1, :], steps.filtered_scale_tril[..., -1, :, :]
    if not G.shape[-3] or not kernel.applies(G, c, D, m, L):
        return kalman_smoother_reference(steps, conditionals)
    return _Recurrence.apply(G, c, m), _Roots.apply(G, D, L)


def backward_sample(conditionals: Conditionals, last: Tensor, noise: Tensor) -> Tensor:
    """:func:`backward_sample_reference`, fast: paths drawn backwards from the last state.

    .. math:: z_k = G z_{k+1} + c + D \\epsilon_k

    Differentiable in everything, to any order, by a recurrence of the same cost.

    Args:
        last: draws of the last state ``(..., n)``.
        noise: standard normal ``(..., time - 1, n)``.

    Returns:
        ``(..., time, n)``.

    >>> import torch
    >>> from pyro_ssm.ops import backward_sample
    >>> from pyro_ssm.ops.kalman_backward import Conditionals
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> backward_sample(Conditionals(0.5 * one, zero, one), torch.tensor([2.0]), torch.ones(1, 1)).squeeze(-1)
    tensor([2., 2.])
    """
    G, c, D = conditionals
    if not G.shape[-3] or not kernel.applies(G, c, D, last, noise):
        return backward_sample_reference(conditionals, last, noise)
    return _Recurrence.apply(G, c + matvec_over_time(D, noise), last)


def _dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _laws(F: Tensor, Q: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    return conditional(*_joint_root(F, Q, L))


class _Laws(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, F: Tensor, Q: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(F, Q, L)
        ctx.set_materialize_grads(False)
        G, D = kernel.conditionals(F, Q, L) or _laws(F, Q, L)
        dtype = _dtype(F, Q, L)
        return G.to(dtype), D.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return composite_backward(_laws, ctx.saved_tensors, ctx.needs_input_grad, grads)


def _roots(G: Tensor, D: Tensor, L: Tensor) -> Tensor:
    roots = [L]
    for k in reversed(range(G.shape[-3])):
        roots.append(tria(_beside(G[..., k, :, :] @ roots[-1], D[..., k, :, :])))
    return _stack_time(roots[::-1], 2)


class _Roots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, G: Tensor, D: Tensor, L: Tensor) -> Tensor:
        ctx.save_for_backward(G, D, L)
        return kernel.roots(G, D, L).to(_dtype(G, D, L))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return composite_backward(_roots, ctx.saved_tensors, ctx.needs_input_grad, (grad,))


class _Recurrence(torch.autograd.Function):
    """x_k = G_k x_{k+1} + c_k; the adjoints l_k = g_k + G_{k-1}^T l_{k-1} run the other way by the same code."""

    @staticmethod
    def forward(ctx: Any, G: Tensor, c: Tensor, last: Tensor) -> Tensor:
        x = kernel.recurrence(G, c, last).to(_dtype(G, c, last))
        ctx.save_for_backward(G, x)
        ctx.shapes = c.shape, last.shape
        ctx.dtypes = c.dtype, last.dtype
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        G, x = ctx.saved_tensors
        if kernel.applies(G, grad):
            turned = _Recurrence.apply(G.flip(-3).mT, grad.flip(-2)[..., :-1, :], grad[..., 0, :])
        else:  # a transform of the backward pass
            turned = affine_scan(G.flip(-3).mT, grad.flip(-2)[..., :-1, :], grad[..., 0, :], reverse=True)
        adjoint = turned.flip(-2)
        moved, last = adjoint[..., :-1, :], adjoint[..., -1, :]
        of_gain = (moved.unsqueeze(-1) * x[..., 1:, :].unsqueeze(-2)).sum_to_size(G.shape).to(G.dtype)
        shapes, dtypes = ctx.shapes, ctx.dtypes
        return of_gain, moved.sum_to_size(shapes[0]).to(dtypes[0]), last.sum_to_size(shapes[1]).to(dtypes[1])
