"""An Euler path with a network as drift: a sequential draw with weight gradients deferred to single GEMMs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyro_ssm.ops.block_diagonal import block_rows
from pyro_ssm.ops.composite import composite_backward
from pyro_ssm.ops.softplus import softplus_, through_softplus_

__all__ = ["CoordinateScale", "EulerPathDraw", "euler_network_path", "euler_network_path_reference"]


class CoordinateScale(NamedTuple):
    """The scale of each coordinate's noise, a small network of that coordinate,

    .. math:: g_i(z_i) = \\text{floor} + r(v_i^T \\operatorname{softplus}(w_i z_i + b_i) + c_i),

    where r is a softplus, or ``span`` times a sigmoid.

    >>> from pyro_ssm.ops import CoordinateScale
    >>> CoordinateScale._fields
    ('slope', 'shift', 'weight', 'bias', 'floor', 'span')
    """

    slope: Tensor  # (state, hidden)
    shift: Tensor  # (state, hidden)
    weight: Tensor  # (state, hidden)
    bias: Tensor  # (state,)
    floor: float
    span: float | None

    def at(self, state: Tensor) -> Tensor:
        """:math:`g`, ``(..., state)``."""
        hidden = torch.nn.functional.softplus(torch.addcmul(self.shift, state.unsqueeze(-1), self.slope))
        raw = torch.linalg.vecdot(hidden, self.weight) + self.bias
        if self.span is None:
            return self.floor + torch.nn.functional.softplus(raw)
        return self.floor + self.span * torch.sigmoid(raw)


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
        hidden[0].copy_(parts.given.expand(shape[:-1] + (widths[0],)).reshape(rows, steps, -1).transpose(0, 1))
        states, locs, scales = (torch.empty_like(epsilon) for _ in range(3))
        root, field = gap.sqrt(), _Field(parts.diffusion, how, steps, rows)
        state = parts.start.expand(shape[:-2] + (n,)).reshape(rows, n)
        for k in range(steps):
            softplus_(hidden[0][k].addmm_(state, first.t()))
            for i, (weight, bias) in enumerate(zip(rest[:-2:2], rest[1:-2:2], strict=True)):
                softplus_(torch.addmm(bias, hidden[i][k], weight.t(), out=hidden[i + 1][k]))
            drift = torch.addmm(rest[-1], hidden[-1][k], rest[-2].t())
            torch.addcmul(state, drift, gap[k], out=locs[k])
            torch.mul(field.scale(state, k), root[k], out=scales[k])
            state = torch.addcmul(locs[k], scales[k], epsilon[k], out=states[k])
        ctx.save_for_backward(*tensors, epsilon, gap, states, scales, *hidden, *field.saved())
        ctx.sizes = depth, how, len(tensors), len(hidden)
        return tuple(part.transpose(0, 1).reshape(shape) for part in (states, locs, scales))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        depth, how, count, num_hidden = ctx.sizes
        saved = ctx.saved_tensors
        tensors, parts = saved[:count], _Layers.of(depth, saved[:count])
        if torch.is_grad_enabled():
            return (None, None, *composite_backward(_plain(depth, how), tensors, ctx.needs_input_grad[2:], grads))
        epsilon, gap, states, scales = saved[count : count + 4]
        hidden = saved[count + 4 : count + 4 + num_hidden]
        shape, (first, *rest) = parts.noise.shape, parts.network
        steps, rows, n = epsilon.shape
        grad_states, grad_locs, grad_scales = (_time_major(grad, shape[:-2]) for grad in grads)
        start = parts.start.expand(shape[:-2] + (n,)).reshape(1, rows, n)
        before = torch.cat([start, states[:-1]])
        field = _Field(parts.diffusion, how, steps, rows, saved[count + 4 + num_hidden :])
        field.start_sums()
        root = gap.sqrt()
        grad_hidden = [torch.empty_like(h) for h in hidden]
        grad_drift, grad_noise = torch.empty_like(epsilon), torch.empty_like(epsilon)
        grad_state = grad_states[-1]
        for k in range(steps - 1, -1, -1):
            torch.mul(grad_state, scales[k], out=grad_noise[k])
            grad_g = torch.addcmul(grad_scales[k], grad_state, epsilon[k]).mul_(root[k])
            grad_state = grad_state + grad_locs[k]
            torch.mul(grad_state, gap[k], out=grad_drift[k])
            torch.mm(grad_drift[k], rest[-2], out=grad_hidden[-1][k])
            for i in range(len(hidden) - 1, 0, -1):
                torch.mm(through_softplus_(grad_hidden[i][k], hidden[i][k]), rest[2 * i - 2], out=grad_hidden[i - 1][k])
            through_softplus_(grad_hidden[0][k], hidden[0][k])
            grad_state = torch.addmm(grad_state, grad_hidden[0][k], first)
            field.pull(grad_state, grad_g, before[k], k)
            if k:
                grad_state = grad_state.add_(grad_states[k - 1])
        pulled = [*grad_hidden, grad_drift]
        grad_given = pulled[0].transpose(0, 1).reshape(shape[:-1] + (-1,)).sum_to_size(parts.given.shape)
        weights = [_product(pulled[0], before)]
        for i in range(1, len(pulled)):
            weights += [_product(pulled[i], hidden[i - 1]), pulled[i].sum((0, 1))]
        return (
            None,
            None,
            grad_noise.transpose(0, 1).reshape(shape),
            grad_state.reshape(shape[:-2] + (n,)).sum_to_size(parts.start.shape),
            grad_given,
            None,
            *weights,
            *field.gradients(),
        )


def _plain(depth: int, how: tuple[float, float | None]) -> Any:
    def run(*tensors: Tensor) -> EulerPathDraw:
        parts = _Layers.of(depth, tensors)
        scale: Tensor | CoordinateScale = parts.diffusion[0]
        if len(parts.diffusion) > 1:
            slope, shift, weight, bias = parts.diffusion
            scale = CoordinateScale(slope, shift, weight, bias, *how)
        return euler_network_path_reference(*parts[:4], parts.network, scale)

    return run


class _Field:
    """The scales along a path, what they leave behind, and their gradient."""

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        how: tuple[float, float | None],
        steps: int,
        rows: int,
        saved: Sequence[Tensor] = (),
    ) -> None:
        self.constant = len(tensors) == 1
        self.tensors, (self.floor, self.span) = tensors, how
        if self.constant:
            return
        slope, shift, weight, self.bias = tensors
        # networks side by side as products with block-diagonal matrices
        self.spread, self.shift, self.gather = block_rows(slope), shift.flatten(), block_rows(weight)
        if saved:
            self.hidden, self.raw = saved
        else:
            self.hidden = slope.new_empty(steps, rows, slope.numel())
            self.raw = slope.new_empty(steps, rows, len(slope))

    def scale(self, state: Tensor, k: int) -> Tensor:
        """g at the step ``k``."""
        if self.constant:
            return self.tensors[0].expand(state.shape)
        hidden = softplus_(torch.addmm(self.shift, state, self.spread, out=self.hidden[k]))
        raw = torch.addmm(self.bias, hidden, self.gather.t(), out=self.raw[k])
        if self.span is None:
            return torch.nn.functional.softplus(raw).add_(self.floor)
        return torch.sigmoid(raw).mul_(self.span).add_(self.floor)

    def saved(self) -> tuple[Tensor, ...]:
        return () if self.constant else (self.hidden, self.raw)

    def pull(self, grad_state: Tensor, grad: Tensor, state: Tensor, k: int) -> None:
        """Add to the gradient of the state what comes through g, and gather what the parameters get."""
        if self.constant:
            self.sums[0].add_(grad.sum(0))
            return
        hidden, slope = self.hidden[k], torch.sigmoid(self.raw[k])
        grad = grad.mul_(slope if self.span is None else slope.mul_(1 - slope).mul_(self.span))
        self.sums[3].add_(grad.sum(0))
        self.sums[2].addmm_(grad.t(), hidden)
        grad_hidden = through_softplus_(grad @ self.gather, hidden)
        self.sums[0].addmm_(state.t(), grad_hidden)
        self.sums[1].add_(grad_hidden.sum(0))
        grad_state.addmm_(grad_hidden, self.spread.t())

    def start_sums(self) -> None:
        """Zeros for what :meth:`pull` gathers."""
        if self.constant:
            self.sums = [self.tensors[0].new_zeros(self.tensors[0].shape)]
        else:
            self.sums = [torch.zeros_like(x) for x in (self.spread, self.shift, self.gather, self.bias)]

    def gradients(self) -> tuple[Tensor, ...]:
        """Of the tensors of the diffusion."""
        if self.constant:
            return tuple(self.sums)
        slope, shift, weight, bias = self.sums
        shape = self.tensors[0].shape
        return _diagonal(slope, shape), shift.reshape(shape), _diagonal(weight, shape), bias


def _diagonal(blocks: Tensor, shape: torch.Size) -> Tensor:
    """The diagonal blocks of ``(n, n * hidden)``, as rows."""
    return blocks.reshape(shape[:1] + shape).diagonal(dim1=0, dim2=1).t()


def _time_major(x: Tensor, lead: torch.Size) -> Tensor:
    """``(*batch, time, width)`` to ``(time, rows, width)``."""
    return x.expand(lead + x.shape[-2:]).reshape((-1,) + x.shape[-2:]).transpose(0, 1).contiguous()


def _product(grad: Tensor, x: Tensor) -> Tensor:
    return grad.flatten(0, 1).t() @ x.flatten(0, 1)
