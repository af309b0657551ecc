"""``torch.ops.pyro_ssm.causal_conv1d``: the kernels of ``csrc/causal_conv1d.h``, and the convolution in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.batched_operator import Argument, BatchedOperator

__all__ = ["CAUSAL_CONV1D", "MAX_TAPS", "convolve_composite"]

MAX_TAPS = 64  # of csrc/convolve.h


def convolve_composite(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, mask: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`~pyro_ssm.ops.causal_conv1d` in plain torch, differentiable to any order.

    Args:
        x: ``(..., time, D)``.
        weight: ``(..., D, K)``.
        bias: ``(..., D)`` or None.
        initial: ``(..., K - 1, D)`` or None.
        mask, reset: ``(..., time)`` or None.

    >>> import torch
    >>> from pyro_ssm.ops.convolve_kernel import convolve_composite
    >>> x, weight = torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0, 1.0]])
    >>> convolve_composite(x, weight, None, None, None, None)[0].squeeze(-1)
    tensor([ 1., 12.])
    """
    width, steps = weight.shape[-1], x.shape[-2]
    weight = weight if weight.dim() == 2 else weight.unsqueeze(-3)
    bias = bias if bias is None or bias.dim() == 1 else bias.unsqueeze(-2)
    shapes = [x.shape[:-2], weight.shape[:-3], *([] if bias is None else [bias.shape[:-2]])]
    shapes += [m.shape[:-1] for m in (mask, reset) if m is not None]
    shapes += [] if initial is None else [initial.shape[:-2]]
    lead = torch.broadcast_shapes(*shapes)
    x = x.expand(lead + x.shape[-2:])
    if initial is None:
        initial = x.new_zeros(lead + (width - 1, x.shape[-1]))
    if mask is not None:
        return _skipping(
            x, weight, bias, initial.expand(lead + initial.shape[-2:]), mask.expand(lead + (steps,)), reset
        )
    padded = torch.cat([initial.expand(lead + initial.shape[-2:]), x], -2)
    seen = None
    if reset is not None:  # how many resets there were up to each input
        seen = torch.cat([reset.new_zeros(reset.shape[:-1] + (width - 1,)), reset], -1).cumsum(-1).unsqueeze(-1)
    return _convolve(padded, weight, bias, seen), _final(padded, seen, width, steps)


def _convolve(padded: Tensor, weight: Tensor, bias: Tensor | None, seen: Tensor | None) -> Tensor:
    width = weight.shape[-1]
    steps = padded.shape[-2] - width + 1
    y: Any = 0.0 if bias is None else bias
    for k in range(width):
        term = padded.narrow(-2, k, steps)
        if seen is not None:
            same = seen.narrow(-2, k, steps) == seen.narrow(-2, width - 1, steps)
            term = term.where(same, torch.zeros((), dtype=term.dtype, device=term.device))
        y = y + term * weight[..., k]
    return y


def _final(padded: Tensor, seen: Tensor | None, width: int, steps: int) -> Tensor:
    last = padded.narrow(-2, steps, width - 1)
    if seen is None or width == 1:
        return last
    kept = seen.narrow(-2, steps, width - 1) == seen[..., -1:, :]
    return last.where(kept, torch.zeros((), dtype=last.dtype, device=last.device))


def _skipping(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor, mask: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Steps that count are moved to the end, convolved there, and moved back."""
    steps, width = x.shape[-2], weight.shape[-1]
    order = torch.argsort(mask.to(torch.int8), dim=-1, stable=True)  # those that are skipped, then those that count
    skipped = (~mask).sum(-1, keepdim=True).unsqueeze(-1)  # (..., 1, 1)
    moved = x.gather(-2, order.unsqueeze(-1).expand(x.shape))
    # the inputs before the first stand directly before the first step that counts
    place = torch.arange(width - 1 + steps, device=x.device).unsqueeze(-1) - skipped  # (..., K - 1 + time, 1)
    before = (
        initial.gather(-2, place.clamp(0, max(width - 2, 0)).expand(place.shape[:-1] + x.shape[-1:]))
        if (width > 1)
        else moved
    )
    padded = torch.cat([initial, moved], -2)
    padded = torch.where(place < width - 1, before, padded)
    padded = padded.where(place >= 0, torch.zeros((), dtype=x.dtype, device=x.device))
    seen = None
    if reset is not None:  # a reset counts from its step on, also where that step is skipped
        resets = reset.expand(mask.shape).cumsum(-1)
        total = resets[..., -1:]
        seen = torch.cat([resets.new_zeros(mask.shape[:-1] + (width - 1,)), resets.gather(-1, order)], -1)
        seen = torch.where(place.squeeze(-1) < width - 1, 0, seen).unsqueeze(-1)
    y = _convolve(padded, weight, bias, seen)
    final = padded.narrow(-2, steps, width - 1)
    if seen is not None:
        kept = seen.narrow(-2, steps, width - 1) == total.unsqueeze(-1)
        final = final.where(kept, torch.zeros((), dtype=x.dtype, device=x.device))
    back = torch.argsort(order, dim=-1).unsqueeze(-1)
    y = y.gather(-2, back.expand(y.shape))
    return y.where(mask.unsqueeze(-1), torch.zeros((), dtype=y.dtype, device=y.device)), final


def _sizes(x: Tensor, weight: Tensor, *rest: Any) -> tuple[int, ...]:
    return (*x.shape, weight.shape[2])


def _shapes(x: Tensor, weight: Tensor, *rest: Any) -> tuple[tuple[int, ...], ...]:
    batch, times, width = x.shape
    return (batch, times, width), (batch, weight.shape[2] - 1, width), (0,)


CAUSAL_CONV1D = BatchedOperator(
    "causal_conv1d",
    [
        Argument("x", 2, timed=True),
        Argument("weight", 2, solid=2),
        Argument("bias", 1, optional=True),
        Argument("initial", 2, solid=2, optional=True),
        Argument("mask", 1, differentiable=False, optional=True),
        Argument("reset", 1, differentiable=False, optional=True),
    ],
    "",
    convolve_composite,
    _sizes,
    _shapes,
    ("pyro_ssm_convolve_forward", "pyro_ssm_convolve_backward"),
)
