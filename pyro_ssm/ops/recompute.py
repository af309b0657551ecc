"""Scans in chunks whose inside is computed again in the backward pass: memory linear in the boundary states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["chunk_size", "recomputed_scan"]

#: ``(state, *tensors) -> (outputs (..., time, features), state)`` for the steps of one chunk
Chunk = Callable[..., tuple[Tensor, Tensor]]

_CHUNK_ELEMENTS = 2**18  # of the largest tensor inside a chunk: about the second-level cache
_SHORTEST_CHUNK = 16
_KEPT_ELEMENTS = 2**14  # up to here states are kept: to compute them again costs more than they take


def chunk_size(steps: int, lanes: int) -> int:
    """How many steps a chunk has whose states have ``lanes`` elements a step.

    >>> from pyro_ssm.ops.recompute import chunk_size
    >>> chunk_size(4096, 2**13)
    32
    """
    return max(1, min(steps, max(_SHORTEST_CHUNK, _CHUNK_ELEMENTS // max(lanes, 1))))


def recomputed_scan(
    chunk: Chunk, initial: Tensor, tensors: Sequence[Tensor], times: Sequence[int | None], lanes: int
) -> tuple[Tensor, Tensor]:
    """Run ``chunk`` over pieces; only the states between the pieces are kept for the backward pass.

    The backward pass runs each piece again, from the last to the first. Differentiated twice (``create_graph``), it
    treats the whole as one piece, so that second derivatives are exact; where forward-mode derivatives are asked for,
    the plain form runs. Randomness and side effects have no place in ``chunk``.

    Args:
        chunk: the recurrence over some steps.
        initial: the state before the first step, of the shape of all states.
        tensors: arguments of ``chunk``.
        times: for each of them, which (negative) dim is time; None for one that all steps share.
        lanes: elements of the largest tensor inside ``chunk``, for one step; it decides how long pieces are.

    Returns:
        Outputs ``(..., time, features)`` and the final state.

    >>> import torch
    >>> from pyro_ssm.ops.recompute import recomputed_scan
    >>> def total(state, x):
    ...     sums = state.unsqueeze(-2) + x.cumsum(-2)
    ...     return sums, sums[..., -1, :]
    >>> recomputed_scan(total, torch.zeros(1), [torch.ones(4, 1)], [-2], 1)[0].squeeze(-1)
    tensor([1., 2., 3., 4.])
    """
    every = [initial, *tensors]
    steps = next(x.shape[dim] for x, dim in zip(tensors, times, strict=True) if dim is not None)
    if steps * lanes <= _KEPT_ELEMENTS:
        return chunk(initial, *tensors)
    size = chunk_size(steps, lanes)
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in every)
    if any(forward_ad.unpack_dual(x).tangent is not None for x in every):
        return chunk(initial, *tensors)
    if not wants_grad:
        outputs, final, _ = _run(chunk, tuple(times), size, initial, tensors)
        return outputs, final
    found: tuple[Tensor, ...] = _Recomputed.apply(chunk, tuple(times), size, *every)
    return found[0], found[1]


def _pieces(tensors: Sequence[Tensor], times: Sequence[int | None], start: int, size: int) -> list[Tensor]:
    return [
        x if dim is None else x.narrow(dim, start, min(size, x.shape[dim] - start))
        for x, dim in zip(tensors, times, strict=True)
    ]


def _starts(tensors: Sequence[Tensor], times: Sequence[int | None], size: int) -> range:
    steps = next(x.shape[dim] for x, dim in zip(tensors, times, strict=True) if dim is not None)
    return range(0, steps, size)


def _run(
    chunk: Chunk, times: Sequence[int | None], size: int, initial: Tensor, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    state, outputs, boundaries = initial, [], []
    for start in _starts(tensors, times, size):
        boundaries.append(state)
        found, state = chunk(state, *_pieces(tensors, times, start, size))
        outputs.append(found)
    return torch.cat(outputs, -2), state.clone(), torch.stack(boundaries)


class _Recomputed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        chunk: Chunk, times: Sequence[int | None], size: int, initial: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _run(chunk, times, size, initial, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.chunk, ctx.times, ctx.size, *tensors = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(output[2], *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        boundaries, initial, *tensors = ctx.saved_tensors
        needed, size, times = ctx.needs_input_grad[4:], ctx.size, ctx.times
        states = boundaries.unbind(0)
        if torch.is_grad_enabled():  # the boundary states are no function of the inputs in this graph
            size, states = max(size * len(states), 1), (initial,)
        grad_state = grads[1]
        sums: list[Any] = [None] * len(tensors)
        parts: list[list[Tensor]] = [[] for _ in tensors]
        for k, start in reversed(list(enumerate(_starts(tensors, times, size)))):
            pieces = _pieces(tensors, times, start, size)
            chosen = [i for i, wanted in enumerate(needed) if wanted]

            def run(state: Tensor, *given: Tensor, pieces: Any = pieces, chosen: Any = chosen) -> Any:
                args = list(pieces)
                for i, x in zip(chosen, given, strict=True):
                    args[i] = x
                return ctx.chunk(state, *args)

            again: Any = torch.func.vjp(run, states[k], *(pieces[i] for i in chosen))
            outputs, pull = again
            grad_outputs = grads[0].narrow(-2, start, outputs[0].shape[-2])
            grad_state, *found = pull((grad_outputs, grad_state))
            for i, grad in zip(chosen, found, strict=True):
                if times[i] is None:
                    sums[i] = grad if sums[i] is None else sums[i] + grad
                else:
                    parts[i].append(grad)
        for i, pieces_of in enumerate(parts):
            if pieces_of:
                sums[i] = torch.cat(pieces_of[::-1], times[i])
        return None, None, None, grad_state, *sums
