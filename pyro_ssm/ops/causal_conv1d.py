"""A short causal convolution, each channel by itself, that goes on from where it was."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ssm.ops.convolve_kernel import CAUSAL_CONV1D, MAX_TAPS, convolve_composite
from pyro_ssm.ops.scan_arguments import Asked, check_arguments, check_together, untimed

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
        ``(y, final)``: ``(..., time, D)`` and the last K - 1 inputs ``(..., K - 1, D)``, to go on from.
        Compiled on a CPU; derivatives of any order, forward mode and ``torch.func.vmap`` are exact (through torch).

    Raises:
        ValueError: sizes, leading dims or devices that do not fit.
        TypeError: numbers of another kind or of two precisions, or a mask that is not boolean.

    >>> import torch
    >>> from pyro_ssm.ops import causal_conv1d
    >>> causal_conv1d(torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0, 1.0]]))[0].squeeze(-1)
    tensor([ 1., 12.])
    """
    given = (x, weight, bias, initial, mask, reset)
    known = CAUSAL_CONV1D.recall(given)
    if known is not None:
        return known
    name = "causal_conv1d"
    check_arguments(
        name,
        x=Asked(x, "time D"),
        weight=Asked(weight, "D K", timeless=True),
        bias=Asked(bias, "D", timeless=True),
        initial=Asked(initial, "K-1 D"),
        mask=Asked(mask, "time", "bool"),
        reset=Asked(reset, "time", "bool"),
    )
    taps = weight.shape[-1]
    if initial is not None and initial.shape[-2] != taps - 1:
        raise ValueError(f"{name}: `initial` must be (..., {taps - 1}, D), K - 1 inputs, got {tuple(initial.shape)}")
    check_together(name, x=x, weight=weight, bias=bias, initial=initial)
    weight = untimed(name, "weight", weight, 2)
    bias = None if bias is None else untimed(name, "bias", bias, 1)
    arguments = (x, weight, bias, initial, mask, reset)
    if taps > MAX_TAPS:
        return convolve_composite(*arguments)
    y, final = CAUSAL_CONV1D.run(*arguments)
    CAUSAL_CONV1D.remember(given, arguments, y, final)
    return y, final
