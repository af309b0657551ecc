"""The operator ``torch.ops.pyro_ssm.kalman_forward`` and its derivative: for compiled graphs and for direct callers.

:func:`pyro_ssm.ops.kalman_filter` has its own, cheaper way when it runs eagerly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.composite import composite_backward
from pyro_ssm.ops.kalman import kalman_filter_reference
from pyro_ssm.ops.kalman_kernel import TAPE, empty_results, kalman_backward, kalman_forward
from pyro_ssm.ops.operator import define

__all__ = ["derivative", "setup"]

_FLOATS = (0, 5, 6, 7, 8, 9, 10, 11, 12)  # y, m, L, F, b, Q, H, d, R among the arguments


def setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    """Keep what :func:`derivative` needs.

    >>> from pyro_ssm.ops.kalman_graph import setup
    >>> setup.__name__
    'setup'
    """
    *arguments, ctx.times, ctx.keep = inputs
    ctx.there = [x is not None for x in arguments]
    ctx.save_for_backward(*(x for x in arguments if x is not None), output[5])
    ctx.set_materialize_grads(False)


def derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the log-likelihoods and means; second derivatives by the reference.

    Raises:
        RuntimeError: the square roots have a gradient, which the operator does not have.

    >>> from pyro_ssm.ops.kalman_graph import derivative
    >>> derivative.__name__
    'derivative'
    """
    *saved, tape = ctx.saved_tensors
    kept = iter(saved)
    arguments = [next(kept) if there else None for there in ctx.there]
    terms, filtered, predicted, *roots, _ = grads
    if any(g is not None for g in roots):
        raise RuntimeError(
            "kalman_filter: under torch.compile the square roots have no gradient; differentiate log_likelihood and "
            "means only, or call it outside of torch.compile"
        )
    needed = [ctx.needs_input_grad[i] for i in _FLOATS]
    out: list[Tensor | None] = [None] * (len(arguments) + 2)
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        floats = [arguments[i] for i in _FLOATS]
        found: Sequence[Tensor | None] = composite_backward(
            _reference(arguments, ctx.times), floats, needed, (terms, filtered, predicted)
        )
    else:
        if tape.numel() == 0:
            tape = torch.ops.pyro_ssm.kalman_forward(*arguments, ctx.times, TAPE)[5]
        found = torch.ops.pyro_ssm.kalman_backward(*arguments, ctx.times, tape, terms, filtered, predicted, needed)
    for i, want, grad in zip(_FLOATS, needed, found, strict=True):
        out[i] = grad if want else None
    return tuple(out)


def _reference(arguments: Sequence[Any], times: int) -> Any:
    mask, move, lengths, at = arguments[1:5]
    y = arguments[0]
    seen = torch.ones_like(y, dtype=torch.bool) if mask is None else mask.unsqueeze(1).expand(y.shape)
    step = None if move is None else move.unsqueeze(1)
    index = None if at is None else at.tolist()
    if lengths is not None:
        alive = torch.arange(times, device=y.device) < lengths.unsqueeze(-1)
        step = alive if step is None else step & alive
        seen = seen & (alive if index is None else alive[..., index]).unsqueeze(-1)

    def reference(y: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        m, L, F, b, Q, H, d, R = rest
        L, F, Q, H, R = (x.unsqueeze(1) for x in (L, F, Q, H, R))
        steps = kalman_filter_reference(
            y, seen, m, L, F, b, Q, H, d, R, num_times=times, observed_index=index, step_mask=step
        )
        means = (x.expand(y.shape[:2] + x.shape[-2:]) for x in (steps.filtered_mean, steps.predicted_mean))
        return steps.log_likelihood.expand(y.shape[:2] + (times,)), *means

    return reference


def _fake_forward(*args: Any) -> tuple[Tensor, ...]:
    return empty_results(args[0], args[5], args[13], args[14])


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    y, wanted = args[0], args[-1]
    inputs = (args[i] for i in _FLOATS)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) if want else y.new_empty(0)
                 for x, want in zip(inputs, wanted, strict=True))  # fmt: skip


_PROBLEM = (
    "Tensor y, Tensor? mask, Tensor? move, Tensor? lengths, Tensor? at, Tensor m, Tensor L, Tensor F, Tensor b, "
    "Tensor Q, Tensor H, Tensor d, Tensor R, int times"
)
_GRADS = "Tensor? grad_log_likelihood, Tensor? grad_filtered_mean, Tensor? grad_predicted_mean"
define(
    "kalman_forward",
    f"{_PROBLEM}, int keep",
    f"({', '.join(['Tensor'] * 6)})",
    kalman_forward,
    _fake_forward,
    setup=setup,
    backward=derivative,
)
define(
    "kalman_backward",
    f"{_PROBLEM}, Tensor tape, {_GRADS}, bool[] wanted",
    f"({', '.join(['Tensor'] * 9)})",
    kalman_backward,
    _fake_backward,
)
