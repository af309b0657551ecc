"""A network of softplus layers on many rows, whose hidden units never leave the processor's cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyro_ssm.ops.composite import composite_backward
from pyro_ssm.ops.operator import Way, way_of
from pyro_ssm.ops.softplus import softplus, softplus_, through_softplus_

__all__ = ["softplus_network", "softplus_network_reference"]

_ROWS = 1024  # at once: large enough for matrix products, small enough for the cache
_LEAST = 4 * _ROWS  # rows from which it pays


def softplus_network_reference(x: Tensor, network: Sequence[Tensor]) -> Tensor:
    """:func:`softplus_network`, layer by layer.

    >>> import torch
    >>> from pyro_ssm.ops import softplus_network_reference
    >>> softplus_network_reference(torch.ones(5, 2), [torch.ones(1, 2), torch.ones(1)]).flatten()
    tensor([3., 3., 3., 3., 3.])
    """
    for weight, bias in zip(network[:-2:2], network[1:-2:2], strict=True):
        x = softplus(linear(x, weight, bias))
    return linear(x, *network[-2:])


def softplus_network(x: Tensor, network: Sequence[Tensor]) -> Tensor:
    """A feed-forward network of softplus layers,

    .. math:: a_0 = x, \\quad a_{i+1} = \\operatorname{softplus}(W_i a_i + b_i), \\quad y = W_n a_n + b_n.

    On a CPU many rows go through all layers some at a time, and nothing of the layers is kept: the backward pass
    computes it again, which costs less than the traffic with memory.

    Args:
        x: ``(..., in)``.
        network: weight ``(out, in)`` and bias ``(out,)`` of each layer.

    Returns:
        ``(..., out)``; differentiable any number of times (the second derivative goes layer by layer).

    >>> import torch
    >>> from pyro_ssm.ops import softplus_network
    >>> net = torch.zeros(3, 2), torch.zeros(3), torch.ones(1, 3), torch.zeros(1)
    >>> softplus_network(torch.ones(5, 2), net)[0]
    tensor([2.0794])
    """
    many = x.numel() >= _LEAST * max(1, x.shape[-1])
    if not many or not x.is_cpu or len(network) < 4 or torch.is_autocast_enabled("cpu"):
        return softplus_network_reference(x, network)
    way = way_of(x, *network)
    if way is Way.GRADIENT:
        return _SoftplusNetwork.apply(x, *network)
    return _in_pieces(x, network) if way is Way.KERNEL else softplus_network_reference(x, network)


def _in_pieces(x: Tensor, network: Sequence[Tensor]) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(len(rows), len(network[-1]))
    for piece, to in zip(rows.split(_ROWS), out.split(_ROWS), strict=True):
        torch.addmm(network[-1], _hidden(piece, network)[-1], network[-2].t(), out=to)
    return out.view(x.shape[:-1] + out.shape[-1:])


def _hidden(x: Tensor, network: Sequence[Tensor]) -> list[Tensor]:
    """The results of the softplus layers, after x itself."""
    found = [x]
    for weight, bias in zip(network[:-2:2], network[1:-2:2], strict=True):
        found.append(softplus_(torch.addmm(bias, found[-1], weight.t())))
    return found


class _SoftplusNetwork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *network: Tensor) -> Tensor:
        ctx.save_for_backward(x, *network)
        return _in_pieces(x, network)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *network = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            plain = lambda x, *network: softplus_network_reference(x, network)  # noqa: E731
            return composite_backward(plain, [x, *network], needed, [grad])
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        sums = [torch.zeros_like(part) if wanted else None for part, wanted in zip(network, needed[1:], strict=True)]
        back = torch.empty_like(rows) if needed[0] else None
        for k, (piece, down) in enumerate(zip(rows.split(_ROWS), grads.split(_ROWS), strict=True)):
            seen = _hidden(piece, network)
            for i in range(len(seen) - 1, -1, -1):
                to_weight, to_bias = sums[2 * i : 2 * i + 2]
                if to_weight is not None:
                    to_weight.addmm_(down.t(), seen[i])
                if to_bias is not None:
                    to_bias.add_(down.sum(0))
                if i:
                    down = through_softplus_(down @ network[2 * i], seen[i])
                elif back is not None:
                    torch.mm(down, network[0], out=back[k * _ROWS : k * _ROWS + len(piece)])
        return (None if back is None else back.view(x.shape), *sums)
