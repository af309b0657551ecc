"""The Kalman filter that everything uses: compiled where the library is there, fast torch otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops import (
    kalman_graph,  # noqa: F401  (registers the operator)
    kalman_series,
)
from pyro_ssm.ops.composite import composite_backward, transformed
from pyro_ssm.ops.kalman import FilterSteps, kalman_filter_reference
from pyro_ssm.ops.kalman_kernel import MEANS, ROOTS, TAPE, kalman_backward, kalman_forward
from pyro_ssm.ops.kalman_problem import EVENTS, OF_SERIES, Layout, Problem, problem
from pyro_ssm.ops.operator import Way, way_of

__all__ = ["kalman_filter", "kalman_log_likelihood"]

_REAL = (torch.float64, torch.float32)
_NAMES = ("y", "m", "L", "F", "b", "Q", "H", "d", "R")


def kalman_filter(
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
    """The Kalman filter: :func:`kalman_filter_reference`, fast.

    .. math::
        z_1 \\sim N(m, L L^T), \\qquad z_{k+1} = F_k z_k + b_k + Q_k e_k, \\qquad y_k = H_k z_k + d_k + R_k e'_k

    All arithmetic is float64, also for float32 arguments. The covariance recursion runs once for all series that
    share its parameters and their pattern of missing entries (ragged ends apart); in a time-invariant system without
    missing values it stops where it is within 1e-12 of its limit, relative to the deviations of the states.

    Gradients: by a hand-written backward pass for functions of the log-likelihoods and means (of all arguments; no
    inverse of Q, R or a covariance is taken, so each may be singular). Functions of the square roots, and second
    derivatives, go through the reference, with its cost. Under ``torch.func`` transforms and forward-mode
    differentiation the reference itself runs (and breaks the graph where it is compiled); under ``torch.compile`` every
    masked series has a covariance recursion of its own, and the square roots have no gradient.

    Args:
        y: ``(..., observed, obs)``; what stands at masked entries is never read.
        mask: bool, as ``y``.
        m: ``(..., n)``; L: ``(..., n, n)``.
        F: ``(..., time - 1, n, n)``; b: ``(..., time - 1, n)``; Q: ``(..., time - 1, n, n)``.
        H: ``(..., observed, obs, n)``; d: ``(..., observed, obs)``; R: ``(..., observed, obs, obs)``.
        num_times: of the state; by default that of ``y``.
        observed_index: the times at which ``y`` lives, ascending; all times by default.
        step_mask: bool ``(..., time)``, False on padding.

    Returns:
        As the reference: means with all leading dims, square roots with a size of 1 where series share them.

    Raises:
        torch.linalg.LinAlgError: the innovation covariance of a step is singular or not finite; names the step.

    Sources: Kalman (1960); de Jong (1989), "Smoothing and interpolation with the state-space model", and Koopman and
    Shephard (1992), "Exact score for time series models in state space form", for the gradient.

    >>> import torch
    >>> from pyro_ssm.ops import kalman_filter
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> y = torch.tensor([[1.0], [2.0]])
    >>> steps = kalman_filter(y, y == y, zero[0], one[0], one, zero, one, one, zero, one)
    >>> steps.filtered_mean.squeeze(-1)
    tensor([0.5000, 1.4000])
    """
    options = (mask, y.shape[-2] if num_times is None else num_times, observed_index, step_mask)
    return FilterSteps(*_run(MEANS | ROOTS, options, y, m, L, F, b, Q, H, d, R))


def kalman_log_likelihood(
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
) -> Tensor:
    """:math:`\\log p(y_k | y_{<k})` of :func:`kalman_filter` alone: nothing of the states is written.

    .. math:: \\log p(y_k | y_{<k}) = \\log N(y_k; H m_k + d, H P_k H^T + R R^T)

    Arguments, gradients and errors as :func:`kalman_filter`.

    Returns:
        ``(..., time)``.

    >>> import torch
    >>> from pyro_ssm.ops import kalman_log_likelihood
    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    >>> y = torch.tensor([[1.0], [2.0]])
    >>> kalman_log_likelihood(y, y == y, zero[0], one[0], one, zero, one, one, zero, one)
    tensor([-1.5155, -1.8271])
    """
    options = (mask, y.shape[-2] if num_times is None else num_times, observed_index, step_mask)
    return _run(0, options, y, m, L, F, b, Q, H, d, R)[0]


def _run(keep: int, options: tuple, *args: Tensor) -> tuple[Tensor, ...]:
    if torch.compiler.is_compiling() and way_of(*args) is Way.OPERATOR:
        found = _problem(options, args, look=False)
        tape = TAPE if torch.is_grad_enabled() else 0
        out = torch.ops.pyro_ssm.kalman_forward(*found.arguments, keep | tape)
        return _results(found, out, _dtype(args), keep)
    if torch.compiler.is_compiling() or not _plain(args):
        return tuple(_reference(options, keep)(*args))
    alone = kalman_series.series(args, *options)
    if alone is None:
        return _Filter.apply(keep, options, *args)
    if torch.is_grad_enabled() and any(x.requires_grad for x in args):
        return _Series.apply(keep, options, alone, *args)
    return tuple(kalman_series.forward(alone, args[0], keep)[0])


def _dtype(args: Sequence[Tensor]) -> torch.dtype:
    dtype = args[0].dtype
    for x in args[1:]:
        dtype = dtype if x.dtype == dtype else torch.promote_types(dtype, x.dtype)
    return dtype


def _plain(args: Sequence[Tensor]) -> bool:
    """Real tensors with memory, without tangents: not those of torch.func, forward mode or a tensor subclass."""
    for x in args:
        if x.dtype not in _REAL or transformed(x):
            return False
    return True


def _problem(options: tuple, args: Sequence[Tensor], look: bool = True) -> Problem:
    mask, num_times, observed_index, step_mask = options
    y, m, L, F, b, Q, H, d, R = args
    return problem(y, mask, m, L, F, b, Q, H, d, R, num_times, observed_index, step_mask, look=look)


def _reference(options: tuple, keep: int) -> Any:
    mask, num_times, observed_index, step_mask = options

    def reference(y: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        times = {"num_times": num_times, "observed_index": observed_index, "step_mask": step_mask}
        steps = kalman_filter_reference(y, mask, *rest, **times)
        return tuple(steps) if keep else (steps.log_likelihood,)

    return reference


def _results(found: Problem, out: Sequence[Tensor], dtype: torch.dtype, keep: int) -> tuple[Tensor, ...]:
    """In the caller's shapes and dtype, in the order of FilterSteps."""
    layout = found.layout
    terms = layout.from_series(out[0], 1).to(dtype)
    if not keep:
        return (terms,)
    filtered_mean, predicted_mean = (layout.from_series(x, 2).to(dtype) for x in out[1:3])
    filtered_root, predicted_root = (layout.from_group(x, 3).to(dtype) for x in out[3:5])
    if found.lengths is not None:
        filtered_root, predicted_root = _stand_still(filtered_root, predicted_root, found.lengths)
    return terms, filtered_mean, filtered_root, predicted_mean, predicted_root


def _stand_still(filtered: Tensor, predicted: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Shared square roots, for each series with its last one repeated after its end."""
    times = torch.arange(filtered.shape[-3], device=filtered.device)
    lead = torch.broadcast_shapes(filtered.shape[:-3], lengths.shape)
    shape = lead + filtered.shape[-3:]
    index = torch.minimum(times, lengths.unsqueeze(-1) - 1).expand(lead + times.shape)[..., None, None].expand(shape)
    filtered = torch.gather(filtered.expand(shape), -3, index)
    alive = (times < lengths.unsqueeze(-1))[..., None, None]
    return filtered, torch.where(alive, predicted.expand(shape), filtered)


class _Filter(torch.autograd.Function):
    # the functions behind torch.ops.pyro_ssm: the dispatcher costs as much as a short series
    @staticmethod
    def forward(ctx: Any, keep: int, options: tuple, *args: Tensor) -> tuple[Tensor, ...]:
        found = _problem(options, args)
        needed = any(ctx.needs_input_grad)
        out = kalman_forward(*(*found.arguments, keep | (TAPE if needed else 0)))
        if needed:
            inner = [x for x in found.arguments if isinstance(x, Tensor)]
            ctx.there = [isinstance(x, Tensor) for x in found.arguments[:-1]]
            ctx.save_for_backward(*args, out[5], *inner)
            ctx.keep, ctx.options, ctx.layout, ctx.times = keep, options, found.layout, found.arguments[-1]
            ctx.set_materialize_grads(False)
        return _results(found, out, _dtype(args), keep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        args, tape, inner = saved[:9], saved[9], iter(saved[10:])
        terms, filtered_mean, filtered_root, predicted_mean, predicted_root = (*grads, None, None, None, None)[:5]
        if torch.is_grad_enabled() or filtered_root is not None or predicted_root is not None:
            reference = _reference(ctx.options, ctx.keep)
            return (None, None, *composite_backward(reference, args, ctx.needs_input_grad[2:], grads))
        layout: Layout = ctx.layout
        arguments = [next(inner) if there else None for there in ctx.there] + [ctx.times]
        outer = [
            None if g is None else layout.of_series(g.to(torch.float64), event, whole=True)
            for g, event in ((terms, 1), (filtered_mean, 2), (predicted_mean, 2))
        ]
        wanted = list(ctx.needs_input_grad[2:])
        found = kalman_backward(*(*arguments, tape, *outer, wanted))
        return (
            None,
            None,
            *(
                layout.gradient(grad, like, EVENTS[name], name in OF_SERIES) if want else None
                for name, grad, like, want in zip(_NAMES, found, args, wanted, strict=True)
            ),
        )


class _Series(torch.autograd.Function):
    """The same for one series that the library can read as it is (:mod:`pyro_ssm.ops.kalman_series`)."""

    @staticmethod
    def forward(ctx: Any, keep: int, options: tuple, alone: kalman_series.Series, *args: Tensor) -> tuple[Tensor, ...]:
        out, tape = kalman_series.forward(alone, args[0], keep | TAPE)
        ctx.save_for_backward(*args, tape)
        ctx.keep, ctx.options = keep, options
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *args, tape = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        terms, filtered_mean, filtered_root, predicted_mean, predicted_root = (*grads, None, None, None, None)[:5]
        alone = kalman_series.series(args, *ctx.options)  # again: hooks may have moved what was saved
        if alone is None or torch.is_grad_enabled() or filtered_root is not None or predicted_root is not None:
            reference = _reference(ctx.options, ctx.keep)
            return (None, None, None, *composite_backward(reference, args, wanted, grads))
        means = (terms, filtered_mean, predicted_mean)
        return (None, None, None, *kalman_series.backward(alone, args, tape, means, wanted))
