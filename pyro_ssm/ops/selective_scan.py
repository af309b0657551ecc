"""The selective scan of Mamba (S6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_ssm.ops.discretise import discretise
from pyro_ssm.ops.scan_arguments import Asked, check_arguments, check_together, untimed
from pyro_ssm.ops.selective_kernel import SELECTIVE_SCAN, rule_of

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
    method: str = "euler",
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
        step = dt[..., t, :, None]
        a, w = discretise(step * A, step, method)
        new = a * h + w * u[..., t, :, None] * B[..., t, None, :]
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
    method: str = "euler",
) -> tuple[Tensor, Tensor]:
    """A diagonal state space whose step, input and output maps depend on the input.

    .. math::
        \\Delta_t &= \\text{gap}_t \\operatorname{softplus}(dt_t + \\text{bias}), \\qquad
        h_t = a(\\Delta_t A) \\odot h_{t-1} + \\Delta_t u_t\\, w(\\Delta_t A) \\odot B_t, \\\\
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
        method: how a step of :math:`\\dot h = A h + B u` is made of :math:`x = \\Delta A`. ``"euler"``, Mamba's:
            :math:`a = e^x, w = 1`. ``"zoh"``, the input holds over the step: :math:`a = e^x, w = (e^x - 1) / x`.
            ``"bilinear"``: :math:`a = (1 + x/2) / (1 - x/2), w = 1 / (1 - x/2)`.

    Returns:
        ``(y, final)``: ``(..., time, D)`` and the final state ``(..., D, N)``, both differentiable. Leading dims
        broadcast.

    On a CPU one compiled kernel does it all: no tensor of ``time * D * N`` exists; for the backward pass the state
    before every 16th step is kept, and the others are computed again. Where the library is not there, torch does it
    in chunks, to the same effect (on a GPU also for the methods other than ``"euler"``, which have no kernel there).
    Second derivatives (``create_graph``), forward mode and the transforms of
    ``torch.func`` go through torch and are exact. float16 and bfloat16 are computed in float32 (``y`` comes back in the
    dtype of ``u``, the state in float32). Results do not depend on the number of threads.

    Raises:
        ValueError: sizes, leading dims or devices that do not fit, or an unknown method.
        TypeError: numbers of another kind or of two precisions, or a mask that is not boolean.

    Source: A. Gu, T. Dao (2023), Mamba, section 3 and algorithm 2.

    >>> import torch
    >>> from pyro_ssm.ops import selective_scan
    >>> u = torch.ones(2, 1)
    >>> selective_scan(u, u, -u[:1], u, u)[0].squeeze(-1)
    tensor([1.0000, 1.3679])
    """
    rule = rule_of(method)
    given = (u, dt, A, B, C, D, z, dt_bias, gap, mask, reset, initial, softplus, 1, rule)
    known = SELECTIVE_SCAN.recall(given)
    if known is not None:
        return known
    _check(*given[:12])
    A = untimed("selective_scan", "A", A, 2)
    D = None if D is None else untimed("selective_scan", "D", D, 1)
    dt_bias = None if dt_bias is None else untimed("selective_scan", "dt_bias", dt_bias, 1)
    arguments = (u, dt, A, B, C, D, z, dt_bias, gap, mask, reset, initial, softplus, 1, rule)
    y, final = SELECTIVE_SCAN.run(*arguments)
    SELECTIVE_SCAN.remember(given, arguments, y, final)
    return y, final


def _check(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    gap: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    initial: Tensor | None,
) -> None:
    name = "selective_scan"
    check_arguments(
        name,
        u=Asked(u, "time D"),
        dt=Asked(dt, "time D"),
        A=Asked(A, "D N", timeless=True),
        B=Asked(B, "time N"),
        C=Asked(C, "time N"),
        D=Asked(D, "D", timeless=True),
        z=Asked(z, "time D"),
        dt_bias=Asked(dt_bias, "D", timeless=True),
        gap=Asked(gap, "time"),
        mask=Asked(mask, "time", "bool"),
        reset=Asked(reset, "time", "bool"),
        initial=Asked(initial, "D N"),
    )
    check_together(name, u=u, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, gap=gap, initial=initial)
