"""The selective scan in plain torch, to any order of derivative: where no library is, or a transform looks in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_ssm.ops.composite import transformed
from pyro_ssm.ops.diagonal_scan import diagonal_scan
from pyro_ssm.ops.discretise import discretise
from pyro_ssm.ops.linear_scan import linear_scan

__all__ = ["RULES", "selective_composite"]

#: methods of :func:`~pyro_ssm.ops.discretise.discretise`, in the order of csrc/selective_scan.h
RULES = ("euler", "zoh", "bilinear")

_CHUNK = {"cpu": 16}  # steps, measured; elsewhere:
_LONG_CHUNK = 64
_LOOPED_LANES = 2**13  # states a step from which, without a graph, a loop whose states stay in the cache is faster


def selective_composite(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    gap: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    initial: Tensor | None,
    softplus: bool,
    groups: int,
    rule: int = 0,
) -> tuple[Tensor, Tensor]:
    """What :func:`~pyro_ssm.ops.selective_scan` and :func:`~pyro_ssm.ops.ssd` share; leading dims broadcast.

    Args:
        u: ``(..., time, channels)``.
        dt: ``(..., time, heads)``; heads divide channels.
        A: ``(..., heads, N)``, or ``(..., heads, 1)``: one decay for all states of a channel.
        B, C: ``(..., time, groups * N)``; groups divide heads.
        D, bias: ``(..., heads)`` or None.
        z: ``(..., time, channels)`` or None.
        gap, mask, reset: ``(..., time)`` or None.
        initial: ``(..., channels, N)`` or None.
        softplus: whether the step is the softplus of ``dt + bias``.
        groups: of heads that share B and C.
        rule: which of :data:`RULES` discretises; with several channels a head, or groups, the first alone.

    Returns:
        The outputs ``(..., time, channels)`` and the final state ``(..., channels, N)``.

    >>> import torch
    >>> from pyro_ssm.ops.selective_torch import selective_composite
    >>> u = torch.ones(2, 1)
    >>> selective_composite(u, u, -u[:1], u, u, None, None, None, None, None, None, None, False, 1)[1]
    tensor([[1.3679]])
    """
    channels, heads, n = u.shape[-1], dt.shape[-1], B.shape[-1] // groups
    here = None if mask is None else mask.unsqueeze(-1)
    u, dt, B, C = (_clean(x, here) for x in (u, dt, B, C))
    gap = None if gap is None else _clean(gap.unsqueeze(-1), here)
    dt = dt if bias is None else dt + bias.unsqueeze(-2)
    dt = F.softplus(dt) if softplus else dt
    dt = _clean(dt if gap is None else dt * gap, here)
    if channels == heads and groups == 1:
        first = u.new_zeros(channels, n) if initial is None else initial
        rates = (A if A.dim() == 2 else A.unsqueeze(-3)).expand(A.shape[:-2] + (1,) * (A.dim() > 2) + (channels, n))
        if _by_loop(first, u, dt, rates, B, C, reset):
            y, final = _loop(u, dt, A, B, C, reset, first, rule)
        else:
            y, final = diagonal_scan(u, dt, rates, B.unsqueeze(-2), C.unsqueeze(-2), first, reset, RULES[rule])
    else:
        of_heads = (heads, channels // heads)
        y, final = _by_chunks(
            u.unflatten(-1, of_heads),
            dt,
            A.squeeze(-1),
            B.unflatten(-1, (groups, n)),
            C.unflatten(-1, (groups, n)),
            reset,
            None if initial is None else initial.unflatten(-2, of_heads),
        )
        y, final = y.flatten(-2), final.flatten(-3, -2)
    if D is not None:
        y = y + u * D.repeat_interleave(channels // heads, -1).unsqueeze(-2)
    if z is not None:
        y = y * F.silu(_clean(z, here))
    return _clean(y, here), final


def _clean(x: Tensor, here: Tensor | None) -> Tensor:
    return x if here is None else x.where(here, torch.zeros((), dtype=x.dtype, device=x.device))


def _by_loop(*tensors: Tensor | None) -> bool:
    """Whether a loop is faster, given the state first: on a CPU, many states a step, and nobody looks in."""
    first, u, *rest = tensors
    given = [x for x in (first, u, *rest) if x is not None]
    if first is None or u is None or u.device.type != "cpu" or u.shape[-2] == 0 or torch.compiler.is_compiling():
        return False
    batch = max(x.shape[:-2].numel() for x in given)
    if batch * first.shape[-2:].numel() < _LOOPED_LANES or any(transformed(x) for x in given):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in given))


def _loop(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reset: Tensor | None, h: Tensor, rule: int
) -> tuple[Tensor, Tensor]:
    """The recurrence as it stands, without a graph."""
    drive, outputs = dt * u if rule == 0 else u, []
    for t in range(u.shape[-2]):
        if reset is not None:
            h = h.masked_fill(reset[..., t, None, None], 0.0)
        step = dt[..., t, :, None]
        if rule == 0:
            h = torch.addcmul(torch.mul(step, A).exp_() * h, drive[..., t, :, None], B[..., t, None, :])
        else:
            decay, weight = discretise(step * A, step, RULES[rule])
            h = torch.addcmul(decay * h, weight * drive[..., t, :, None], B[..., t, None, :])
        outputs.append((h @ C[..., t, :, None]).squeeze(-1))
    y = torch.stack(outputs, -2)
    return y, h.expand(y.shape[:-2] + h.shape[-2:]).clone()


def _by_chunks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reset: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Within a chunk a masked matrix product (attention with decays); states pass from chunk to chunk.

    ``x (..., time, heads, P)``, ``dt (..., time, heads)``, ``A (..., heads)``, ``B, C (..., time, groups, N)``.
    """
    shapes = [x.shape[:-3], dt.shape[:-2], A.shape[:-1], B.shape[:-3], C.shape[:-3]]
    shapes += ([] if reset is None else [reset.shape[:-1]]) + ([] if initial is None else [initial.shape[:-3]])
    lead = torch.broadcast_shapes(*shapes)
    steps, heads, width = x.shape[-3:]
    size = min(_CHUNK.get(x.device.type, _LONG_CHUNK), max(steps, 1))
    extra = -steps % size
    B, C = (m.repeat_interleave(heads // m.shape[-2], -2) for m in (B, C))
    decay = (dt * A.unsqueeze(-2)).clamp(max=0.0)  # log of the decay of each step
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
    return y, after[..., -1, :, :, :]
