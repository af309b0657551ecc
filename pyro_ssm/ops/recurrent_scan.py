"""Recurrent cells over whole sequences on the CPU: the loop without a graph, weight gradients deferred to one GEMM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyro_ssm.ops.composite import composite_backward

__all__ = ["elman_scan", "elman_scan_reference", "gru_scan", "gru_scan_reference"]


def gru_scan_reference(x: Tensor, initial: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """:func:`gru_scan` as a plain loop.

    >>> import torch
    >>> from pyro_ssm.ops import gru_scan_reference
    >>> gru_scan_reference(torch.zeros(1, 3, 6), torch.ones(1, 2), torch.zeros(6, 2), torch.zeros(6))[0, :, 0]
    tensor([0.5000, 0.2500, 0.1250])
    """
    state, states = initial, []
    for step in x.unbind(-2):
        given, held = step.chunk(3, -1), linear(state, weight, bias).chunk(3, -1)
        reset, update = torch.sigmoid(given[0] + held[0]), torch.sigmoid(given[1] + held[1])
        proposed = torch.tanh(given[2] + reset * held[2])
        state = (1 - update) * proposed + update * state
        states.append(state)
    return torch.stack(states, -2)


def gru_scan(x: Tensor, initial: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A gated recurrent unit over a sequence whose input products are given.

    .. math::
        r_k &= \\sigma(x^r_k + W^r h_{k-1} + b^r), \\qquad u_k = \\sigma(x^u_k + W^u h_{k-1} + b^u), \\\\
        n_k &= \\tanh(x^n_k + r_k \\odot (W^n h_{k-1} + b^n)), \\qquad h_k = (1 - u_k) \\odot n_k + u_k \\odot h_{k-1}

    The cell is that of ``torch.nn.GRU`` (gates in its order). Only what is truly sequential stays in the loop; the
    gradient of the weight is one matrix product over all steps, where a loop under autograd makes one for each step.

    Args:
        x: products of the inputs, bias included, ``(batch, time, 3 * hidden)``.
        initial: :math:`h_0`, ``(batch, hidden)``.
        weight: :math:`W`, ``(3 * hidden, hidden)``.
        bias: :math:`b`, ``(3 * hidden,)``.

    Returns:
        All states ``(batch, time, hidden)``; differentiable in every argument, twice too (by the plain loop).

    Source: K. Cho et al. (2014), Learning phrase representations using RNN encoder-decoder, section 2.3.

    >>> import torch
    >>> from pyro_ssm.ops import gru_scan
    >>> gru_scan(torch.zeros(1, 3, 6), torch.ones(1, 2), torch.zeros(6, 2), torch.zeros(6))[0, :, 0]
    tensor([0.5000, 0.2500, 0.1250])
    """
    if x.numel() == 0:
        return gru_scan_reference(x, initial, weight, bias)
    return _GRUScan.apply(x, initial, weight, bias)


def elman_scan_reference(x: Tensor, initial: Tensor, weight: Tensor, bias: Tensor, rectify: bool = False) -> Tensor:
    """:func:`elman_scan` as a plain loop.

    >>> import torch
    >>> from pyro_ssm.ops import elman_scan_reference
    >>> elman_scan_reference(torch.ones(1, 3, 1), torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1), True)[0, :, 0]
    tensor([1., 2., 3.])
    """
    activation = torch.relu if rectify else torch.tanh
    state, states = initial, []
    for step in x.unbind(-2):
        state = activation(step + linear(state, weight, bias))
        states.append(state)
    return torch.stack(states, -2)


def elman_scan(x: Tensor, initial: Tensor, weight: Tensor, bias: Tensor, rectify: bool = False) -> Tensor:
    """A simple recurrent network over a sequence whose input products are given.

    .. math:: h_k = \\phi(x_k + W h_{k-1} + b)

    Args:
        x: products of the inputs, bias included, ``(batch, time, hidden)``.
        initial: :math:`h_0`, ``(batch, hidden)``.
        weight: :math:`W`, ``(hidden, hidden)``.
        bias: :math:`b`, ``(hidden,)``.
        rectify: :math:`\\phi` is the rectifier rather than the hyperbolic tangent.

    Returns:
        All states ``(batch, time, hidden)``; differentiable in every argument, twice too (by the plain loop).

    Source: J. L. Elman (1990), Finding structure in time.

    >>> import torch
    >>> from pyro_ssm.ops import elman_scan
    >>> elman_scan(torch.ones(1, 3, 1), torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1), True)[0, :, 0]
    tensor([1., 2., 3.])
    """
    if x.numel() == 0:
        return elman_scan_reference(x, initial, weight, bias, rectify)
    return _ElmanScan.apply(x, initial, weight, bias, rectify)


class _GRUScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, initial: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given = x.transpose(0, 1).contiguous()
        num_times, rows, width = given.shape
        size = width // 3
        held, gates = torch.empty_like(given), given.new_empty(num_times, rows, 2 * size)
        proposed, states = given.new_empty(num_times, rows, size), given.new_empty(num_times, rows, size)
        state, weight_t = initial, weight.t()
        for k in range(num_times):
            torch.addmm(bias, state, weight_t, out=held[k])
            gate = torch.add(given[k, :, : 2 * size], held[k, :, : 2 * size], out=gates[k]).sigmoid_()
            new = torch.addcmul(given[k, :, 2 * size :], gate[:, :size], held[k, :, 2 * size :], out=proposed[k])
            state = torch.lerp(new.tanh_(), state, gate[:, size:], out=states[k])
        ctx.save_for_backward(x, initial, weight, bias, held, gates, proposed, states)
        return states.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, initial, weight, bias, held, gates, proposed, states = ctx.saved_tensors
        if torch.is_grad_enabled():
            return composite_backward(gru_scan_reference, (x, initial, weight, bias), ctx.needs_input_grad, grads)
        num_times, rows, size = states.shape
        before = torch.cat([initial.unsqueeze(0), states[:-1]])
        reset, update = gates[..., :size], gates[..., size:]
        # the factors of each gate's gradient, for all steps at once
        to_new = (1 - update) * (1 - proposed.square())
        to_update = (before - proposed) * update * (1 - update)
        to_reset = held[..., 2 * size :] * reset * (1 - reset)
        grad_given, grad_held = torch.empty_like(held), torch.empty_like(held)
        outer = grads[0].transpose(0, 1)
        grad_state = outer[-1]
        for k in range(num_times - 1, -1, -1):
            grad_r, grad_u, grad_n = grad_given[k].chunk(3, -1)
            torch.mul(grad_state, to_new[k], out=grad_n)
            torch.mul(grad_state, to_update[k], out=grad_u)
            torch.mul(grad_n, to_reset[k], out=grad_r)
            grad_held[k, :, : 2 * size] = grad_given[k, :, : 2 * size]
            torch.mul(grad_n, reset[k], out=grad_held[k, :, 2 * size :])
            direct = grad_state * update[k] if k == 0 else torch.addcmul(outer[k - 1], grad_state, update[k])
            grad_state = torch.addmm(direct, grad_held[k], weight)
        flat = grad_held.flatten(0, 1)
        return grad_given.transpose(0, 1), grad_state, flat.t() @ before.flatten(0, 1), flat.sum(0)


class _ElmanScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, initial: Tensor, weight: Tensor, bias: Tensor, rectify: bool) -> Tensor:
        states = x.transpose(0, 1) + bias  # a fresh, time-major buffer: inputs turn into states in place
        state, weight_t = initial, weight.t()
        for k in range(states.shape[0]):
            state = states[k].addmm_(state, weight_t)
            state = state.relu_() if rectify else state.tanh_()
        ctx.save_for_backward(x, initial, weight, bias, states)
        ctx.rectify = rectify
        return states.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, initial, weight, bias, states = ctx.saved_tensors
        if torch.is_grad_enabled():
            args = (x, initial, weight, bias, ctx.rectify)
            return composite_backward(elman_scan_reference, args, ctx.needs_input_grad, grads)
        slope = (states > 0).to(states.dtype) if ctx.rectify else 1 - states.square()
        outer = grads[0].transpose(0, 1)
        grad_pre = torch.empty_like(states)
        grad_state = outer[-1]
        for k in range(states.shape[0] - 1, 0, -1):
            torch.mul(grad_state, slope[k], out=grad_pre[k])
            grad_state = torch.addmm(outer[k - 1], grad_pre[k], weight)
        torch.mul(grad_state, slope[0], out=grad_pre[0])
        before = torch.cat([initial.unsqueeze(0), states[:-1]])
        flat = grad_pre.flatten(0, 1)
        return grad_pre.transpose(0, 1), grad_pre[0] @ weight, flat.t() @ before.flatten(0, 1), flat.sum(0), None
