"""State-space duality (Mamba-2): the selective scan with one decay a head."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ssm.ops.scan_arguments import Asked, check_arguments, check_together, untimed
from pyro_ssm.ops.selective_kernel import SELECTIVE_SCAN

__all__ = ["ssd", "ssd_reference"]


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`ssd` as a plain loop.

    >>> import torch
    >>> from pyro_ssm.ops import ssd_reference
    >>> x = torch.ones(2, 1, 1)
    >>> ssd_reference(x, x[..., 0], torch.tensor([-1.0]), x, x)[0].flatten()
    tensor([1.0000, 1.3679])
    """
    heads = x.shape[-2]
    B, C = (m.repeat_interleave(heads // m.shape[-2], -2) for m in (B, C))
    h = x.new_zeros(x.shape[:-3] + (heads, x.shape[-1], B.shape[-1])) if initial is None else initial
    outputs = []
    for t in range(x.shape[-3]):
        if reset is not None:
            h = torch.where(reset[..., t, None, None, None], 0.0, h)
        delta, x_t = dt[..., t, :, None, None], x[..., t, :, :]
        new = torch.exp(delta * A.reshape(heads, 1, 1)) * h + delta * x_t.unsqueeze(-1) * B[..., t, :, None, :]
        y = (new * C[..., t, :, None, :]).sum(-1)
        y = y if D is None else y + x_t * D.reshape(heads, 1)
        if mask is not None:
            new = torch.where(mask[..., t, None, None, None], new, h)
            y = torch.where(mask[..., t, None, None], y, 0.0)
        h = new
        outputs.append(y)
    return torch.stack(outputs, -3), h


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A selective state space whose decay is one number a head and step.

    .. math::
        h_t = e^{\\Delta_t A} h_{t-1} + \\Delta_t x_t B_t^T, \\qquad y_t = h_t C_t + D x_t

    It is :func:`~pyro_ssm.ops.selective_scan` with one decay for all states of a head, and goes the same ways: on a CPU
    a compiled recurrence, which there is several times faster than products; in torch a masked matrix product within
    chunks (attention with decays), states passing from chunk to chunk. Memory is linear in time, derivatives of any
    order are exact, and halves are computed in float32.

    Args:
        x: ``(..., time, heads, P)``.
        dt: :math:`\\Delta`, not negative, ``(..., time, heads)``.
        A: not positive, ``(heads,)`` (or ``(..., 1, heads)``).
        B, C: ``(..., time, groups, N)``; groups divide heads.
        D: the direct way ``(heads,)`` (or ``(..., 1, heads)``), or None.
        mask: bool ``(..., time)``; a step that is False is skipped: the state stands exactly still, the output is 0.
        reset: bool ``(..., time)``; where True the state before the step counts as zero.
        initial: ``(..., heads, P, N)``, zero by default.

    Returns:
        ``(y, final)``: ``(..., time, heads, P)``, ``(..., heads, P, N)``.

    Raises:
        ValueError: sizes, leading dims or devices that do not fit.
        TypeError: numbers of another kind or of two precisions, or a mask that is not boolean.

    Source: T. Dao, A. Gu (2024), Transformers are SSMs, section 6 and listing 1.

    >>> import torch
    >>> from pyro_ssm.ops import ssd
    >>> x = torch.ones(2, 1, 1)
    >>> ssd(x, x[..., 0], torch.tensor([-1.0]), x, x)[0].flatten()
    tensor([1.0000, 1.3679])
    """
    given = (x, dt, A, B, C, D, mask, reset, initial, False, None, 0)
    known = SELECTIVE_SCAN.recall(given)
    if known is not None:
        return known
    _check(*given[:9])
    A = untimed("ssd", "A", A, 1)
    D = None if D is None else untimed("ssd", "D", D, 1)
    groups, heads = B.shape[-2], x.shape[-2:]
    first = None if initial is None else initial.flatten(-3, -2)
    u, rates, B, C = x.flatten(-2), A.unsqueeze(-1), B.flatten(-2), C.flatten(-2)
    arguments = (u, dt, rates, B, C, D, None, None, None, mask, reset, first, False, groups, 0)
    y, final = SELECTIVE_SCAN.run(*arguments)
    y, final = y.unflatten(-1, heads), final.unflatten(-2, heads)
    SELECTIVE_SCAN.remember(given, arguments, y, final)
    return y, final


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    initial: Tensor | None,
) -> None:
    check_arguments(
        "ssd",
        x=Asked(x, "time heads P"),
        dt=Asked(dt, "time heads"),
        A=Asked(A, "heads", timeless=True),
        B=Asked(B, "time groups N"),
        C=Asked(C, "time groups N"),
        D=Asked(D, "heads", timeless=True),
        mask=Asked(mask, "time", "bool"),
        reset=Asked(reset, "time", "bool"),
        initial=Asked(initial, "heads P N"),
    )
    heads, groups = x.shape[-2], B.shape[-2]
    if groups == 0 or heads % groups:
        raise ValueError(f"ssd: `B` and `C` have {groups} groups, which must divide the {heads} heads")
    check_together("ssd", x=x, dt=dt, A=A, B=B, C=C, D=D, initial=initial)
