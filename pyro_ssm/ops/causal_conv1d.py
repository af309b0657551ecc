"""A short causal convolution, each channel by itself, that goes on from where it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.diagonal_scan import check_steps

__all__ = ["causal_conv1d", "causal_conv1d_reference"]


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`causal_conv1d` as a plain loop over a window.

    >>> import torch
    >>> from pyro_ssm.ops import causal_conv1d_reference
    >>> causal_conv1d_reference(torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0, 1.0]]))[0].squeeze(-1)
    tensor([ 1., 12.])
    """
    width = weight.shape[-1]
    taps = weight.mT.reshape(width, -1)  # the last one is for the present step
    past = x.new_zeros(x.shape[:-2] + (width - 1, x.shape[-1])) if initial is None else initial
    outputs = []
    for t in range(x.shape[-2]):
        if reset is not None:
            past = torch.where(reset[..., t, None, None], 0.0, past)
        window = torch.cat([past, x[..., t : t + 1, :]], -2)
        y, new = (window * taps).sum(-2), window[..., 1:, :]
        y = y if bias is None else y + bias
        if mask is not None:
            new = torch.where(mask[..., t, None, None], new, past)
            y = torch.where(mask[..., t, None], y, 0.0)
        past = new
        outputs.append(y)
    return torch.stack(outputs, -2), past


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A depthwise convolution with the last K inputs.

    .. math:: y_{td} = \\beta_d + \\sum_{k=0}^{K-1} w_{d,K-1-k}\\, x_{t-k,d}

    Args:
        x: ``(..., time, D)``.
        weight: ``(D, K)`` (or ``(..., 1, D, K)``), the present step's last.
        bias: ``(D,)`` (or ``(..., 1, D)``), or None.
        initial: the K - 1 inputs before the first ``(..., K - 1, D)``, zero by default.
        mask: bool ``(..., time)``; a step that is False is not there: the window passes over it, its output is 0.
        reset: bool ``(..., time)``; where True what came before counts as zero.

    Returns:
        ``(y, final)``: ``(..., time, D)`` and the last K - 1 inputs ``(..., K - 1, D)``, to go on from. Derivatives of
        any order, forward mode and ``torch.func.vmap`` are exact.

    Raises:
        ValueError: a shape that does not fit.
        TypeError: a mask that is not boolean.

    >>> import torch
    >>> from pyro_ssm.ops import causal_conv1d
    >>> causal_conv1d(torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0, 1.0]]))[0].squeeze(-1)
    tensor([ 1., 12.])
    """
    if x.dim() < 2 or weight.dim() < 2 or weight.shape[-2] != x.shape[-1]:
        raise ValueError(
            "causal_conv1d: `x` must be (..., time, D) and `weight` (D, K), "
            f"got shapes {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    check_steps("causal_conv1d", x, mask=mask, reset=reset)
    width, steps = weight.shape[-1], x.shape[-2]
    shapes = [x.shape[:-2], weight.shape[:-3]]
    shapes += [m.shape[:-1] for m in (mask, reset) if m is not None]
    shapes += [] if initial is None else [initial.shape[:-2]]
    lead = torch.broadcast_shapes(*shapes)
    x = x.expand(lead + x.shape[-2:])
    if initial is None:
        initial = x.new_zeros(lead + (width - 1, x.shape[-1]))
    elif initial.shape[-2:] != (width - 1, x.shape[-1]):
        raise ValueError(
            f"causal_conv1d: `initial` must be (..., {width - 1}, {x.shape[-1]}), got shape {tuple(initial.shape)}"
        )
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
