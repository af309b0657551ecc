"""Entropy-regularised optimal transport from a weighted cloud to an evenly weighted one, differentiable."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["transport_plan", "transport_plan_reference"]

_CHECK = 5  # iterations between looks at the error: a look waits for the device


def transport_plan(
    cost: Tensor,
    log_weights: Tensor,
    tolerance: float = 1e-4,
    max_iterations: int = 1000,
    num_iterations: int | None = None,
) -> Tensor:
    """The logarithm of the plan that moves weights W to equal weights at least cost, smoothed by its entropy.

    .. math::
        P = \\arg\\min_P \\sum_{ik} P_{ik} C_{ik} + \\sum_{ik} P_{ik} \\log P_{ik}, \\qquad
        \\sum_i P_{ik} = W_k, \\quad \\sum_k P_{ik} = \\tfrac1N; \\qquad
        \\log P_{ik} = f_i + g_k - C_{ik}

    Sinkhorn's iteration in the log domain, on costs that grow to their full size in doublings. The weights (columns)
    are met to rounding, whatever the tolerance; the rows are met to ``tolerance / N``.

    Args:
        cost: ``(*batch, N, N)``, in units of the regularisation: row i the new particle, column k the old one.
        log_weights: ``(*batch, N)``, of total 1; may be -inf.
        tolerance: largest relative error of a row.
        max_iterations: after which it stops in any case.
        num_iterations: exactly so many, doublings among them, and no look at the error.

    Returns:
        ``(*batch, N, N)``.

    Gradients: of the plan at its fixed point, by the implicit function theorem: one linear system of size N, whose
    error is of the order of ``tolerance``, and no memory of the iterations. Differentiable twice.

    Source: M. Cuturi (2013), "Sinkhorn distances"; A. Corenflos, J. Thornton, G. Deligiannidis, A. Doucet (2021),
    "Differentiable particle filtering via entropy-regularized optimal transport", ICML, algorithm 2.

    >>> import torch
    >>> from pyro_ssm.ops.sinkhorn import transport_plan
    >>> x = torch.tensor([0.0, 1.0, 3.0])
    >>> plan = transport_plan((x[:, None] - x).square(), torch.tensor([0.5, 0.25, 0.25]).log(), 1e-6).exp()
    >>> plan.sum(0), (3 * plan.sum(1)).round(decimals=4)
    (tensor([0.5000, 0.2500, 0.2500]), tensor([1., 1., 1.]))
    """
    rows = _Rows.apply(cost, log_weights, tolerance, max_iterations, num_iterations)
    return rows.unsqueeze(-1) + _columns(rows, cost, log_weights).unsqueeze(-2) - cost


def transport_plan_reference(cost: Tensor, log_weights: Tensor, num_iterations: int = 1000) -> Tensor:
    """The same plan after a number of plain iterations, differentiable through all of them.

    >>> import torch
    >>> from pyro_ssm.ops.sinkhorn import transport_plan_reference
    >>> transport_plan_reference(torch.zeros(2, 2), torch.tensor([0.5, 0.5]).log(), 1).exp()
    tensor([[0.2500, 0.2500],
            [0.2500, 0.2500]])
    """
    rows = torch.zeros_like(log_weights)
    for _ in range(num_iterations):
        rows = _next(rows, cost, log_weights)
    return rows.unsqueeze(-1) + _columns(rows, cost, log_weights).unsqueeze(-2) - cost


def _columns(rows: Tensor, cost: Tensor, log_weights: Tensor) -> Tensor:
    """g, so that the columns are met."""
    return log_weights - (rows.unsqueeze(-1) - cost).logsumexp(-2)


def _next(rows: Tensor, cost: Tensor, log_weights: Tensor) -> Tensor:
    """f, so that the rows are met after the columns were."""
    columns = _columns(rows, cost, log_weights)
    return -math.log(rows.shape[-1]) - (columns.unsqueeze(-2) - cost).logsumexp(-1)


def _blind(cost: Tensor, log_weights: Tensor, num_iterations: int) -> Tensor:
    """f after iterations on costs of at most 1, then of twice that, and so on to their full size."""
    largest = cost.amax((-2, -1)).clamp(min=1)
    unit = torch.where(largest.isfinite(), largest, torch.ones_like(largest))
    rows = torch.zeros_like(log_weights)
    for _ in range(num_iterations):
        rows = _next(rows, cost / unit[..., None, None], log_weights)
        smaller = (unit / 2).clamp(min=1)
        rows, unit = rows * (unit / smaller).unsqueeze(-1), smaller
    return rows


class _Rows(Function):
    """The fixed point f = next(f), up to a constant, which the plan does not see."""

    @staticmethod
    def forward(
        ctx: Any,
        cost: Tensor,
        log_weights: Tensor,
        tolerance: float,
        max_iterations: int,
        num_iterations: int | None,
    ) -> Tensor:
        if num_iterations is not None:
            rows = _blind(cost, log_weights, num_iterations)
            ctx.save_for_backward(cost, log_weights, rows)
            return rows
        rows = torch.zeros_like(log_weights)
        largest = float(cost.detach().amax()) if cost.numel() else 0.0
        doublings = math.ceil(math.log2(largest)) if 1 < largest < math.inf else 0
        for power in range(doublings, 0, -1):
            rows = 2 * _next(rows, cost * 0.5**power, log_weights)
        for iteration in range(max_iterations):
            last, rows = rows, _next(rows, cost, log_weights)
            # row i of the plan of `last` sums to exp(last - rows) / N
            if iteration % _CHECK == 0 and not bool(torch.expm1(last - rows).abs().amax() > tolerance):
                break
        ctx.save_for_backward(cost, log_weights, rows)
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """df = (I - J)^-1 (partial next), J = A B^T with A, B stochastic: solve for the adjoint, then its partials.

        The gradient is orthogonal to 1, the direction that f is free in, and so is the adjoint. Plain operations of
        saved tensors, `rows` among them as the function that it is: differentiable again.
        """
        cost, log_weights, rows = ctx.saved_tensors
        num = rows.shape[-1]
        columns = _columns(rows, cost, log_weights)
        by_row = (columns.unsqueeze(-2) - cost).softmax(-1)  # A
        by_column = (rows.unsqueeze(-1) - cost).softmax(-2)  # B
        system = torch.eye(num, dtype=cost.dtype, device=cost.device) - by_column @ by_row.mT + 1.0 / num
        centred = gradient - gradient.mean(-1, keepdim=True)
        adjoint = torch.linalg.solve(system, centred.unsqueeze(-1)).squeeze(-1)
        by_cost = adjoint.unsqueeze(-1) * by_row
        of_columns = -by_cost.sum(-2)
        return by_cost + by_column * of_columns.unsqueeze(-2), of_columns, None, None, None
