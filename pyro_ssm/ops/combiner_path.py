"""A whole path of a structured guide in one op: a sequential draw with weight gradients deferred to single GEMMs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

from pyro_ssm.ops.composite import composite_backward

__all__ = ["combiner_path", "combiner_path_reference"]


def combiner_path_reference(
    noise: Tensor,
    features: Tensor,
    first_state: Tensor,
    combiner_weight: Tensor,
    combiner_bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """:func:`combiner_path` as a plain loop.

    >>> import torch
    >>> from pyro_ssm.ops import combiner_path_reference
    >>> e, h = torch.zeros(5, 2), torch.zeros(5, 3)
    >>> w, b, u, v = torch.zeros(3, 2), torch.zeros(3), torch.zeros(4, 3), torch.ones(4)
    >>> combiner_path_reference(e, h, torch.zeros(2), w, b, u, v)[0][:, 0]
    tensor([1., 1., 1., 1., 1.])
    """
    state = first_state.expand(noise.shape[:-2] + first_state.shape)
    states, scales = [], []
    for epsilon, feature in zip(noise.unbind(-2), features.unbind(-2), strict=True):
        combined = 0.5 * (torch.tanh(linear(state, combiner_weight, combiner_bias)) + feature)
        loc, raw = linear(combined, head_weight, head_bias).chunk(2, -1)
        scale = softplus(raw) + floor
        state = loc + scale * epsilon
        states.append(state)
        scales.append(scale)
    return torch.stack(states, -2), torch.stack(scales, -2)


def combiner_path(
    noise: Tensor,
    features: Tensor,
    first_state: Tensor,
    combiner_weight: Tensor,
    combiner_bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Draw a path step by step from standard normal noise, each step seeing features and the state before.

    .. math::
        c_k = \\tfrac12 (\\tanh(W z_{k-1} + b) + e_k), \\quad (\\mu_k, \\rho_k) = U c_k + u, \\quad
        s_k = \\operatorname{softplus}(\\rho_k) + f, \\quad z_k = \\mu_k + s_k \\epsilon_k

    The features' part of the head is one matrix product over all steps, and so is each weight's gradient; only what is
    truly sequential stays in the loop.

    Args:
        noise: :math:`\\epsilon`, ``(*shape, time, state)``.
        features: :math:`e`, ``(*batch, time, hidden)``, broadcast over leading sample dims.
        first_state: :math:`z_0`, ``(state,)``.
        combiner_weight: :math:`W`, ``(hidden, state)``; ``combiner_bias`` :math:`b`, ``(hidden,)``.
        head_weight: :math:`U`, ``(2 * state, hidden)``; ``head_bias`` :math:`u`, ``(2 * state,)``.
        floor: :math:`f`, added to every scale.

    Returns:
        The path and its scales, each ``(*shape, time, state)``; differentiable in every tensor argument, twice too (the
        second derivative runs the plain loop).

    >>> import torch
    >>> from pyro_ssm.ops import combiner_path
    >>> e, h = torch.zeros(7, 5, 2), torch.zeros(5, 3)
    >>> z, s = combiner_path(e, h, torch.zeros(2), torch.zeros(3, 2), torch.zeros(3), torch.zeros(4, 3), torch.zeros(4))
    >>> z.shape, round(float(s[0, 0, 0]), 4)
    (torch.Size([7, 5, 2]), 0.6931)
    """
    args = (noise, features, first_state, combiner_weight, combiner_bias, head_weight, head_bias)
    if noise.numel() == 0:
        return combiner_path_reference(*args, floor)
    return _CombinerPath.apply(*args, floor)


class _CombinerPath(torch.autograd.Function):
    """Time-major buffers; the loop runs without a graph, its backward is written by hand."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        noise, features, first_state, weight, bias, head_weight, head_bias, floor = args
        lead, num_times, state_dim = noise.shape[:-2], noise.shape[-2], noise.shape[-1]
        rows = noise.shape[:-2].numel()
        half_head = 0.5 * head_weight
        # (time, rows, .): the part of the head that does not wait for the state before
        given = linear(features, half_head, head_bias).expand(lead + (num_times, 2 * state_dim))
        out = given.reshape(rows, num_times, 2 * state_dim).transpose(0, 1).contiguous()
        epsilon = noise.reshape(rows, num_times, state_dim).transpose(0, 1).contiguous()
        states, scales = torch.empty_like(epsilon), torch.empty_like(epsilon)
        hidden = epsilon.new_empty(num_times, rows, weight.shape[0])
        state, weight_t, half_head_t = first_state.expand(rows, state_dim), weight.t(), half_head.t()
        for k in range(num_times):
            torch.addmm(bias, state, weight_t, out=hidden[k]).tanh_()
            out[k].addmm_(hidden[k], half_head_t)
            loc, raw = out[k].chunk(2, -1)
            torch.add(softplus(raw), floor, out=scales[k])
            state = torch.addcmul(loc, scales[k], epsilon[k], out=states[k])
        ctx.save_for_backward(*args[:-1], epsilon, out, scales, hidden, states)
        ctx.floor = floor
        shape = noise.shape
        return states.transpose(0, 1).reshape(shape), scales.transpose(0, 1).reshape(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return composite_backward(combiner_path_reference, (*saved[:7], ctx.floor), ctx.needs_input_grad, grads)
        noise, features, first_state, weight, _, head_weight, _ = saved[:7]
        epsilon, out, scales, hidden, states = saved[7:]
        num_times, rows, state_dim = epsilon.shape
        grad_states, grad_scales = (g.reshape(rows, num_times, state_dim).transpose(0, 1) for g in grads)
        half_head = 0.5 * head_weight
        slope = torch.sigmoid(out[..., state_dim:])  # softplus'
        curve = 1 - hidden.square()  # tanh'
        grad_out, grad_pre = torch.empty_like(out), torch.empty_like(hidden)
        grad_state = grad_states[-1]
        for k in range(num_times - 1, -1, -1):
            grad_loc, grad_raw = grad_out[k].chunk(2, -1)
            grad_loc.copy_(grad_state)
            torch.addcmul(grad_scales[k], grad_state, epsilon[k], out=grad_raw).mul_(slope[k])
            torch.mm(grad_out[k], half_head, out=grad_pre[k]).mul_(curve[k])
            if k:
                grad_state = torch.addmm(grad_states[k - 1], grad_pre[k], weight)
        before = torch.cat([first_state.expand(1, rows, state_dim), states[:-1]])
        flat_out, flat_pre = grad_out.flatten(0, 1), grad_pre.flatten(0, 1)
        grad_given = (
            grad_out.transpose(0, 1)
            .reshape(noise.shape[:-1] + (2 * state_dim,))
            .sum_to_size(features.shape[:-1] + (2 * state_dim,))
        )
        from_features = 0.5 * grad_given.flatten(0, -2).t() @ features.flatten(0, -2)
        return (
            (grad_out[..., :state_dim] * scales).transpose(0, 1).reshape(noise.shape)
            if ctx.needs_input_grad[0]
            else None,
            grad_given @ half_head,
            (grad_pre[0] @ weight).sum(0),
            flat_pre.t() @ before.flatten(0, 1),
            flat_pre.sum(0),
            0.5 * flat_out.t() @ hidden.flatten(0, 1) + from_features,
            flat_out.sum(0),
            None,
        )
