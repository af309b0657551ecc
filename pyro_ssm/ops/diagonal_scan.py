"""Banks of diagonal systems, one input and one output a channel: what ``selective_scan`` and ``diag_lti`` share."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ssm.ops.discretise import discretise
from pyro_ssm.ops.linear_scan import linear_scan
from pyro_ssm.ops.recompute import recomputed_scan

__all__ = ["check_steps", "diagonal_scan", "diagonal_scan_reference"]


def diagonal_scan_reference(
    u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, reset: Tensor | None, method: str
) -> tuple[Tensor, Tensor]:
    """:func:`diagonal_scan` as a plain loop; B and C with a time dim of the length of u.

    >>> import torch
    >>> from pyro_ssm.ops.diagonal_scan import diagonal_scan_reference
    >>> one = torch.ones(2, 1, 1)
    >>> diagonal_scan_reference(one[..., 0], one[..., 0], -one[0], one, one, torch.zeros(1, 1), None, "euler")[1]
    tensor([[1.3679]])
    """
    h, outputs = initial, []
    for t in range(u.shape[-2]):
        delta = step[..., t, :, None]
        if reset is not None:
            h = torch.where(reset[..., t, None, None], torch.zeros_like(h), h)
        a, w = discretise(delta * (A if A.dim() == 2 else A[..., 0, :, :]), delta, method)
        h = a * h + w * B[..., t, :, :] * u[..., t, :, None]
        outputs.append((C[..., t, :, :] * h).sum(-1).real)
    return torch.stack(outputs, -2), h


def diagonal_scan(
    u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, reset: Tensor | None, method: str
) -> tuple[Tensor, Tensor]:
    """Each channel d drives its own N states, which are read out by their sum.

    .. math::
        h_{t} = \\bar a(\\Delta_{t} A) \\odot h_{t-1} + w(\\Delta_t A) \\odot B_t u_{t}, \\qquad
        y_{td} = \\operatorname{Re} \\sum_n C_{tdn} h_{tdn}

    Memory in the backward pass: the states between chunks; what is inside is computed again.

    Args:
        u: ``(..., time, D)``.
        step: :math:`\\Delta`, ``(..., time, D)``.
        A: ``(D, N)``, or ``(..., 1, D, N)`` with leading dims; real or complex.
        B, C: ``(..., time or 1, D or 1, N)``.
        initial: ``(..., D, N)`` of the dtype of the states.
        reset: bool ``(..., time)`` or None.
        method: of :func:`~pyro_ssm.ops.discretise.discretise`.

    Returns:
        ``(y, final)``: ``(..., time, D)`` real, ``(..., D, N)``.

    >>> import torch
    >>> from pyro_ssm.ops.diagonal_scan import diagonal_scan
    >>> one = torch.ones(2, 1, 1)
    >>> diagonal_scan(one[..., 0], one[..., 0], -one[0], one, one, torch.zeros(1, 1), None, "euler")[1]
    tensor([[1.3679]])
    """
    shapes = [u.shape[:-2], step.shape[:-2], A.shape[:-3], B.shape[:-3], C.shape[:-3], initial.shape[:-2]]
    shapes += [] if reset is None else [reset.shape[:-1]]
    lead, steps = torch.broadcast_shapes(*shapes), u.shape[-2]
    initial = initial.expand(lead + initial.shape[-2:])
    if steps == 0:
        return u.new_zeros(lead + u.shape[-2:]), initial.clone()
    if A.dim() == 2:
        A = A.unsqueeze(0)
    keep = u.new_ones(steps) if reset is None else (~reset).to(u.dtype)
    tensors = [u, step, B, C, A, keep]
    times = [-2, -2, -3 if B.shape[-3] == steps else None, -3 if C.shape[-3] == steps else None, None, -1]
    has_reset = reset is not None

    def chunk(
        state: Tensor, u: Tensor, step: Tensor, B: Tensor, C: Tensor, A: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor]:
        delta = step.unsqueeze(-1)
        a, w = discretise(delta * A, delta, method)
        if has_reset:
            a = a * keep[..., None, None]
        b = (w * u.unsqueeze(-1)) * B
        h = linear_scan(a.flatten(-2), b.flatten(-2), state.flatten(-2)).unflatten(-1, state.shape[-2:])
        # one C for all channels is a matrix product
        y = (h @ C.mT).squeeze(-1) if C.shape[-2] == 1 else (h * C).sum(-1)
        return y.real if y.is_complex() else y, h[..., -1, :, :]

    return recomputed_scan(chunk, initial, tensors, times, initial.numel())


def check_steps(name: str, u: Tensor, **of_steps: Tensor | None) -> None:
    """Raise unless each mask is boolean and has ``(..., time)`` as ``u`` ``(..., time, features)`` has."""
    for argument, given in of_steps.items():
        if given is None:
            continue
        if argument in ("mask", "reset") and given.dtype != torch.bool:
            raise TypeError(f"{name}: `{argument}` must be boolean, got {given.dtype}")
        if given.dim() < 1 or given.shape[-1] != u.shape[-2]:
            raise ValueError(
                f"{name}: `{argument}` must be (..., time) with {u.shape[-2]} step(s), got shape {tuple(given.shape)}"
            )
