"""State-space duality: the selective scan with one decay a head, by matrix products within chunks (Mamba-2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_ssm.ops.diagonal_scan import check_steps
from pyro_ssm.ops.linear_scan import linear_scan

__all__ = ["ssd", "ssd_reference"]

_CHUNK = {"cpu": 16}  # steps, measured; elsewhere:
_LONG_CHUNK = 64


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

    Within a chunk the map is a masked matrix product (attention with decays); states are passed from chunk to chunk.
    Memory is linear in time, and derivatives of any order are exact.

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
        ValueError: a shape that does not fit.
        TypeError: a mask that is not boolean.

    Source: T. Dao, A. Gu (2024), Transformers are SSMs, section 6 and listing 1.

    >>> import torch
    >>> from pyro_ssm.ops import ssd
    >>> x = torch.ones(2, 1, 1)
    >>> ssd(x, x[..., 0], torch.tensor([-1.0]), x, x)[0].flatten()
    tensor([1.0000, 1.3679])
    """
    _check(x, dt, B, C)
    check_steps("ssd", dt, mask=mask, reset=reset)
    if mask is not None:
        here = mask[..., None, None]
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        x, dt, B, C = x.where(here, zero), dt.where(here[..., 0], zero), B.where(here, zero), C.where(here, zero)
    lead = torch.broadcast_shapes(
        x.shape[:-3],
        dt.shape[:-2],
        A.shape[:-2],
        B.shape[:-3],
        C.shape[:-3],
        *([] if reset is None else [reset.shape[:-1]]),
        *([] if initial is None else [initial.shape[:-3]]),
    )
    steps, heads, width = x.shape[-3:]
    size = min(_CHUNK.get(x.device.type, _LONG_CHUNK), max(steps, 1))
    extra = -steps % size
    direct = None if D is None else x * D.unsqueeze(-1)
    B, C = (m.repeat_interleave(heads // m.shape[-2], -2) for m in (B, C))
    decay = (dt * A).clamp(max=0.0)  # log of the decay of each step
    v = x * dt.unsqueeze(-1)
    # a padded step has decay 1 and input 0: it changes nothing
    v, B, C = (F.pad(m, (0, 0, 0, 0, 0, extra)).unflatten(-3, (-1, size)).transpose(-3, -2) for m in (v, B, C))
    decay = F.pad(decay, (0, 0, 0, extra)).unflatten(-2, (-1, size)).transpose(-2, -1)  # (..., chunks, heads, size)
    passed = decay.cumsum(-1)
    begun = torch.zeros(steps, dtype=torch.bool, device=x.device) if reset is None else reset
    begun = F.pad(begun, (0, extra)).unflatten(-1, (-1, size)).cumsum(-1).unsqueeze(-2)  # resets so far in the chunk
    causal = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    joined = causal & (begun.unsqueeze(-1) == begun.unsqueeze(-2))
    between = passed.unsqueeze(-1) - passed.unsqueeze(-2)
    weight = between.masked_fill(~joined, float("-inf")).clamp(max=0.0).exp()
    y = ((C @ B.mT) * weight) @ v
    reached = weight[..., -1, :]  # what each step has left at the chunk's end
    states = (v * reached.unsqueeze(-1)).mT @ B  # (..., chunks, heads, P, N)
    whole = passed[..., -1].exp() * (begun[..., -1] == 0)  # (..., chunks, heads)
    first = states.new_zeros(lead + states.shape[-3:]) if initial is None else initial.expand(lead + states.shape[-3:])
    if steps == 0:
        return x.new_zeros(lead + (0, heads, width)), first.clone()
    rate = whole[..., None, None].expand(whole.shape + states.shape[-2:])
    after = linear_scan(rate.flatten(-3), states.flatten(-3), first.flatten(-3)).unflatten(-1, states.shape[-3:])
    before = torch.cat([first.unsqueeze(-4), after[..., :-1, :, :, :]], -4)
    y = y + (passed.exp() * (begun == 0)).unsqueeze(-1) * (C @ before.mT)
    y = y.transpose(-3, -2).flatten(-4, -3)[..., :steps, :, :]
    return (y if direct is None else y + direct), after[..., -1, :, :, :]


def _check(x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> None:
    if x.dim() < 3:
        raise ValueError(f"ssd: `x` must be (..., time, heads, P), got shape {tuple(x.shape)}")
    steps, heads = x.shape[-3:-1]
    if dt.shape[-2:] != (steps, heads):
        raise ValueError(f"ssd: `dt` must be (..., {steps}, {heads}), got shape {tuple(dt.shape)}")
    for name, m in (("B", B), ("C", C)):
        if m.dim() < 3 or m.shape[-3] != steps or heads % m.shape[-2] or m.shape[-1] != B.shape[-1]:
            raise ValueError(
                f"ssd: `{name}` must be (..., {steps}, groups, N) with groups that divide {heads} heads, "
                f"got shape {tuple(m.shape)}"
            )
