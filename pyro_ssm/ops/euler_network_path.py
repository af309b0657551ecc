"""An Euler path with a network as drift: a sequential draw with weight gradients deferred to single GEMMs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyro_ssm.ops.composite import composite_backward
from pyro_ssm.ops.coordinate_scale import CoordinateScale, ScaleAlongPath
from pyro_ssm.ops.softplus import softplus_, through_softplus_

__all__ = ["EulerPathDraw", "euler_network_path", "euler_network_path_reference"]


class EulerPathDraw(NamedTuple):
    """What :func:`euler_network_path` returns, each ``(*shape, steps, state)``.

    >>> from pyro_ssm.ops import EulerPathDraw
    >>> EulerPathDraw._fields
    ('states', 'locs', 'scales')
    """

    states: Tensor
    locs: Tensor
    scales: Tensor


def euler_network_path_reference(
    noise: Tensor,
    start: Tensor,
    given: Tensor,
    gaps: Tensor,
    network: Sequence[Tensor],
    diffusion: Tensor | CoordinateScale,
) -> EulerPathDraw:
    """:func:`euler_network_path` as a plain loop.

    >>> import torch
    >>> from pyro_ssm.ops import euler_network_path_reference
    >>> e, h = torch.zeros(5, 1), torch.zeros(5, 3)
    >>> net = torch.zeros(3, 1), torch.zeros(1, 3), torch.ones(1)
    >>> euler_network_path_reference(e, torch.zeros(1), h, torch.ones(5), net, torch.ones(1)).states[:, 0]
    tensor([1., 2., 3., 4., 5.])
    """
    first, *rest = network
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    state = start
    for k, epsilon in enumerate(noise.unbind(-2)):
        gap = gaps[..., k, None]
        hidden = torch.nn.functional.softplus(linear(state, first) + given[..., k, :])
        for weight, bias in zip(rest[:-2:2], rest[1:-2:2], strict=True):
            hidden = torch.nn.functional.softplus(linear(hidden, weight, bias))
        g = diffusion.at(state) if isinstance(diffusion, CoordinateScale) else diffusion
        loc, scale = state + linear(hidden, *rest[-2:]) * gap, (g * gap.sqrt()).expand(epsilon.shape)
        state = loc + scale * epsilon
        steps.append((state, loc.expand(epsilon.shape), scale))
    return EulerPathDraw(*(torch.stack(part, -2) for part in zip(*steps, strict=True)))


def euler_network_path(
    noise: Tensor,
    start: Tensor,
    given: Tensor,
    gaps: Tensor,
    network: Sequence[Tensor],
    diffusion: Tensor | CoordinateScale,
) -> EulerPathDraw:
    """Draw a path of a stochastic differential equation by Euler's steps, its drift a network of softplus layers.

    .. math::
        a_1 = \\phi(W z_{k-1} + h_k), \\quad a_{i+1} = \\phi(W_i a_i + b_i), \\quad
        z_k = z_{k-1} + (W_n a_n + b_n) \\Delta_k + g(z_{k-1}) \\sqrt{\\Delta_k}\\, \\epsilon_k

    Only what waits for the state before is in the loop; the gradient of each weight is one matrix product over all
    steps.

    Args:
        noise: :math:`\\epsilon`, ``(*shape, steps, state)``.
        start: :math:`z_0`, ``(*shape, state)``.
        given: h, what the first layer sees beside the state, ``(*batch, steps, hidden)``, broadcast over leading dims.
        gaps: :math:`\\Delta`, ``(steps,)`` or ``(*batch, steps)``; no gradient.
        network: W ``(hidden, state)``, then weight and bias of each further layer; the last gives ``state`` numbers.
        diffusion: the scales ``(state,)``, or a :class:`CoordinateScale`; positive.

    Returns:
        :class:`EulerPathDraw`; differentiable in every tensor but ``gaps``, twice too (the second derivative runs the
        plain loop). Memory grows with steps times hidden units.

    >>> import torch
    >>> from pyro_ssm.ops import euler_network_path
    >>> e, h = torch.zeros(7, 5, 1), torch.zeros(5, 3)
    >>> net = torch.zeros(3, 1), torch.zeros(1, 3), torch.ones(1)
    >>> euler_network_path(e, torch.zeros(7, 1), h, torch.ones(5), net, torch.ones(1)).states[0, :, 0]
    tensor([1., 2., 3., 4., 5.])
    """
    if noise.numel() == 0:
        return euler_network_path_reference(noise, start, given, gaps, network, diffusion)
    coordinate = isinstance(diffusion, CoordinateScale)
    scale = tuple(diffusion[:4]) if coordinate else (diffusion,)
    how = (diffusion.floor, diffusion.span) if coordinate else (0.0, None)
    tensors = (noise, start, given, gaps, *network, *scale)
    return EulerPathDraw(*_EulerNetworkPath.apply(len(network), how, *tensors))


class _Layers(NamedTuple):
    """The tensors of one call, named."""

    noise: Tensor
    start: Tensor
    given: Tensor
    gaps: Tensor
    network: tuple[Tensor, ...]
    diffusion: tuple[Tensor, ...]

    @classmethod
    def of(cls, depth: int, tensors: Sequence[Tensor]) -> _Layers:
        noise, start, given, gaps = tensors[:4]
        return cls(noise, start, given, gaps, tuple(tensors[4 : 4 + depth]), tuple(tensors[4 + depth :]))


class _EulerNetworkPath(torch.autograd.Function):
    """Time-major buffers; the loop runs without a graph, its backward is written by hand."""

    @staticmethod
    def forward(ctx: Any, depth: int, how: tuple[float, float | None], *tensors: Tensor) -> tuple[Tensor, ...]:
        parts = _Layers.of(depth, tensors)
        shape, (first, *rest) = parts.noise.shape, parts.network
        rows, steps, n = shape[:-2].numel(), shape[-2], shape[-1]
        epsilon = _time_major(parts.noise, shape[:-2])
        gaps = parts.gaps.to(epsilon).unsqueeze(-1)
        gap = _time_major(gaps, shape[:-2]) if gaps.dim() > 2 else gaps.unsqueeze(-1)  # (steps, rows or 1, 1)
        widths = [first.shape[0], *(weight.shape[0] for weight in rest[:-2:2])]
        hidden = [epsilon.new_empty(steps, rows, width) for width in widths]
        given = parts.given.expand(shape[:-1] + (widths[0],)).movedim(-2, 0)
        states, locs, scales, above = (torch.empty_like(epsilon) for _ in range(4))
        root, field = gap.sqrt(), ScaleAlongPath(parts.diffusion, how)
        state = parts.start.expand(shape[:-2] + (n,)).reshape(rows, n)
        for k in range(steps):
            hidden[0][k].view(given.shape[1:]).copy_(given[k])
            softplus_(hidden[0][k].addmm_(state, first.t()))
            for i, (weight, bias) in enumerate(zip(rest[:-2:2], rest[1:-2:2], strict=True)):
                softplus_(torch.addmm(bias, hidden[i][k], weight.t(), out=hidden[i + 1][k]))
            drift = torch.addmm(rest[-1], hidden[-1][k], rest[-2].t())
            torch.addcmul(state, drift, gap[k], out=locs[k])
            torch.mul(above[k].copy_(field.above(state)) + field.floor, root[k], out=scales[k])
            state = torch.addcmul(locs[k], scales[k], epsilon[k], out=states[k])
        ctx.save_for_backward(*tensors, epsilon, gap, states, scales, above, *hidden)
        ctx.sizes = depth, how, len(tensors)
        return tuple(part.transpose(0, 1).reshape(shape) for part in (states, locs, scales))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        depth, how, count = ctx.sizes
        saved = ctx.saved_tensors
        tensors, parts = saved[:count], _Layers.of(depth, saved[:count])
        if torch.is_grad_enabled():
            return (None, None, *composite_backward(_plain(depth, how), tensors, ctx.needs_input_grad[2:], grads))
        epsilon, gap, states, scales, above = saved[count : count + 5]
        hidden = saved[count + 5 :]
        shape, (first, *rest) = parts.noise.shape, parts.network
        steps, rows, n = epsilon.shape
        grad_states, grad_locs, grad_scales = (_time_major(grad, shape[:-2]) for grad in grads)
        start = parts.start.expand(shape[:-2] + (n,)).reshape(1, rows, n)
        before = torch.cat([start, states[:-1]])
        field = ScaleAlongPath(parts.diffusion, how)
        field.start_sums()
        root = gap.sqrt()
        grad_given, grad_noise = torch.empty_like(hidden[0]), torch.empty_like(epsilon)
        grad_state = grad_states[-1]
        weights = _WeightGradients(parts.network)
        span = max(
            1, _ROWS // rows
        )  # steps whose weight gradients are one product: large enough, and still in the cache
        for end in range(steps, 0, -span):
            begin = max(0, end - span)
            grad_drift = epsilon.new_empty(end - begin, rows, n)
            pulled = [grad_given[begin:end], *(torch.empty_like(h[begin:end]) for h in hidden[1:])]
            for k in range(end - 1, begin - 1, -1):
                j = k - begin
                torch.mul(grad_state, scales[k], out=grad_noise[k])
                grad_g = torch.addcmul(grad_scales[k], grad_state, epsilon[k]).mul_(root[k])
                grad_state = grad_state + grad_locs[k]
                torch.mul(grad_state, gap[k], out=grad_drift[j])
                torch.mm(grad_drift[j], rest[-2], out=pulled[-1][j])
                for i in range(len(hidden) - 1, 0, -1):
                    torch.mm(through_softplus_(pulled[i][j], hidden[i][k]), rest[2 * i - 2], out=pulled[i - 1][j])
                through_softplus_(pulled[0][j], hidden[0][k])
                grad_state = torch.addmm(grad_state, pulled[0][j], first)
                field.pull(grad_state, grad_g, before[k], above[k])
                if k:
                    grad_state = grad_state.add_(grad_states[k - 1])
            seen = [before[begin:end], *(h[begin:end] for h in hidden)]
            weights.add([*pulled, grad_drift], seen)
        lead = shape[:-2]
        return (
            None,
            None,
            grad_noise.transpose(0, 1).reshape(shape),
            grad_state.reshape(lead + (n,)).sum_to_size(parts.start.shape),
            grad_given.view((steps, *lead, -1)).movedim(0, -2).sum_to_size(parts.given.shape),
            None,
            *weights.sums,
            *field.gradients(),
        )


_ROWS = 1024


class _WeightGradients:
    """Sums over steps of what the weights and biases of a network get."""

    def __init__(self, network: Sequence[Tensor]) -> None:
        self.sums = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in network]

    def add(self, grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """What some steps ``(steps, rows, width)`` add: gradients of each layer's result before its softplus, and what
        the layer saw.
        """
        for i, (grad, seen) in enumerate(zip(grads, inputs, strict=True)):
            grad = grad.flatten(0, 1)
            self.sums[max(0, 2 * i - 1)].addmm_(grad.t(), seen.flatten(0, 1))
            if i:  # the first layer's bias is in what was given
                self.sums[2 * i].add_(grad.sum(0))


def _plain(depth: int, how: tuple[float, float | None]) -> Any:
    def run(*tensors: Tensor) -> EulerPathDraw:
        parts = _Layers.of(depth, tensors)
        scale: Tensor | CoordinateScale = parts.diffusion[0]
        if len(parts.diffusion) > 1:
            slope, shift, weight, bias = parts.diffusion
            scale = CoordinateScale(slope, shift, weight, bias, *how)
        return euler_network_path_reference(*parts[:4], parts.network, scale)

    return run


def _time_major(x: Tensor, lead: torch.Size) -> Tensor:
    """``(*batch, time, width)`` to ``(time, rows, width)``."""
    return x.expand(lead + x.shape[-2:]).reshape((-1,) + x.shape[-2:]).transpose(0, 1).contiguous()
