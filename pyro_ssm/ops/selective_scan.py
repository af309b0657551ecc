"""The selective scan of Mamba (S6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_ssm.ops.diagonal_scan import check_steps, diagonal_scan

__all__ = ["selective_scan", "selective_scan_reference"]


def selective_scan_reference(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    softplus: bool = False,
    gap: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`selective_scan` as a plain loop.

    >>> import torch
    >>> from pyro_ssm.ops import selective_scan_reference
    >>> u = torch.ones(2, 1)
    >>> selective_scan_reference(u, u, -u[:1], u, u)[0].squeeze(-1)
    tensor([1.0000, 1.3679])
    """
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if softplus else dt
    dt = dt if gap is None else dt * gap.unsqueeze(-1)
    h = u.new_zeros(u.shape[:-2] + A.shape[-2:]) if initial is None else initial
    A = A if A.dim() == 2 else A[..., 0, :, :]
    outputs = []
    for t in range(u.shape[-2]):
        if reset is not None:
            h = torch.where(reset[..., t, None, None], 0.0, h)
        a = torch.exp(dt[..., t, :, None] * A)
        new = a * h + (dt[..., t, :] * u[..., t, :]).unsqueeze(-1) * B[..., t, None, :]
        y = (new * C[..., t, None, :]).sum(-1)
        y = y if D is None else y + u[..., t, :] * D.reshape(D.shape[-1])
        y = y if z is None else y * F.silu(z[..., t, :])
        if mask is not None:
            new = torch.where(mask[..., t, None, None], new, h)
            y = torch.where(mask[..., t, None], y, 0.0)
        h = new
        outputs.append(y)
    return torch.stack(outputs, -2), h


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    softplus: bool = False,
    gap: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A diagonal state space whose step, input and output maps depend on the input.

    .. math::
        \\Delta_t &= \\text{gap}_t \\operatorname{softplus}(dt_t + \\text{bias}), \\qquad
        h_t = e^{\\Delta_t A} \\odot h_{t-1} + \\Delta_t u_t B_t, \\\\
        y_t &= (C_t h_t + D u_t) \\odot \\operatorname{silu}(z_t)

    Args:
        u: ``(..., time, D)``.
        dt: the step before its bias and softplus, ``(..., time, D)``.
        A: ``(D, N)``, negative for stability; with leading dims ``(..., 1, D, N)``.
        B, C: ``(..., time, N)``.
        D: the direct way ``(D,)`` (or ``(..., 1, D)``), or None.
        z: the gate ``(..., time, D)``, or None.
        dt_bias: ``(D,)``, or None.
        softplus: whether the step is the softplus of ``dt + dt_bias``.
        gap: ``(..., time)`` true time since the step before, a factor of the step (1 by default).
        mask: bool ``(..., time)``; a step that is False is skipped: the state stands exactly still, the output is 0,
            and what its arguments hold (NaN included) changes nothing.
        reset: bool ``(..., time)``; where True the state before the step counts as zero (a packed sequence begins).
        initial: the state before the first step ``(..., D, N)``, zero by default.

    Returns:
        ``(y, final)``: ``(..., time, D)`` and the final state ``(..., D, N)``, both differentiable. Leading dims
        broadcast. No tensor of ``time * D * N`` is kept for the backward pass, which computes the states of each chunk
        again.

    Raises:
        ValueError: a shape that does not fit.
        TypeError: a mask that is not boolean.

    Source: A. Gu, T. Dao (2023), Mamba, section 3 and algorithm 2.

    >>> import torch
    >>> from pyro_ssm.ops import selective_scan
    >>> u = torch.ones(2, 1)
    >>> selective_scan(u, u, -u[:1], u, u)[0].squeeze(-1)
    tensor([1.0000, 1.3679])
    """
    _check(u, dt, A, B, C)
    check_steps("selective_scan", u, gap=gap, mask=mask, reset=reset)
    if mask is not None:
        here = mask.unsqueeze(-1)
        u, dt, B, C = (x.where(here, torch.zeros((), dtype=x.dtype, device=x.device)) for x in (u, dt, B, C))
        z = None if z is None else z.where(here, torch.zeros((), dtype=z.dtype, device=z.device))
        gap = None if gap is None else gap.where(mask, torch.zeros((), dtype=gap.dtype, device=gap.device))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if softplus else dt
    dt = dt if gap is None else dt * gap.unsqueeze(-1)
    if mask is not None:
        dt = dt.where(here, torch.zeros((), dtype=dt.dtype, device=dt.device))
    h = torch.zeros(A.shape[-2:], dtype=u.dtype, device=u.device) if initial is None else initial
    y, final = diagonal_scan(u, dt, A, B.unsqueeze(-2), C.unsqueeze(-2), h, reset, "euler")
    y = y if D is None else y + u * D
    y = y if z is None else y * F.silu(z)
    return (y if mask is None else y.where(here, torch.zeros((), dtype=y.dtype, device=y.device))), final


def _check(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    if u.dim() < 2:
        raise ValueError(f"selective_scan: `u` must be (..., time, D), got shape {tuple(u.shape)}")
    steps, width = u.shape[-2:]
    if dt.shape[-2:] != (steps, width):
        raise ValueError(f"selective_scan: `dt` must be (..., {steps}, {width}) as `u`, got shape {tuple(dt.shape)}")
    if A.dim() < 2 or A.shape[-2] != width:
        raise ValueError(f"selective_scan: `A` must be ({width}, N), got shape {tuple(A.shape)}")
    for name, x in (("B", B), ("C", C)):
        if x.shape[-2:] != (steps, A.shape[-1]):
            wanted = f"(..., {steps}, {A.shape[-1]})"
            raise ValueError(f"selective_scan: `{name}` must be {wanted}, got shape {tuple(x.shape)}")
    for name, x in (("dt", dt), ("A", A), ("B", B), ("C", C)):
        if x.dtype != u.dtype:
            raise TypeError(f"selective_scan: `{name}` is {x.dtype} and `u` is {u.dtype}; give them one dtype")
