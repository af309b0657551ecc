"""Systems with one dense matrix: by blocks of powers, linear in time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_ssm.ops.scan_arguments import Asked, check_arguments, in_float32
from pyro_ssm.ops.ssm_kernel import fft_conv

__all__ = ["dense_lti", "dense_lti_reference", "krylov", "power_of_two"]


def power_of_two(length: int) -> int:
    """The least power of two whose square is at least ``length``.

    >>> from pyro_ssm.ops.dense_lti import power_of_two
    >>> power_of_two(17)
    8
    """
    size = 1
    while size * size < length:
        size *= 2
    return size


def krylov(A: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """:math:`b, A b, A^2 b, \\dots` by doubling: ``(..., count, N)``, and :math:`A^{2^k}` with :math:`2^k \\ge` count.

    >>> import torch
    >>> from pyro_ssm.ops.dense_lti import krylov
    >>> krylov(torch.full((1, 1), 2.0), torch.ones(1), 3)[0].squeeze(-1)
    tensor([1., 2., 4.])
    """
    lead = torch.broadcast_shapes(A.shape[:-2], b.shape[:-1])
    vectors, power = b.expand(lead + b.shape[-1:]).unsqueeze(-2), A
    while vectors.shape[-2] < count:
        vectors, power = torch.cat([vectors, vectors @ power.mT], -2), power @ power
    return vectors[..., :count, :], power


def dense_lti_reference(
    u: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`dense_lti` as a plain loop.

    >>> import torch
    >>> from pyro_ssm.ops import dense_lti_reference
    >>> one = torch.ones(1, 1)
    >>> dense_lti_reference(torch.ones(2, 1), one.unsqueeze(0) / 2, one, one)[0].squeeze(-1)
    tensor([1.0000, 1.5000])
    """
    h = torch.zeros(u.shape[:-2] + B.shape[-2:], dtype=B.dtype, device=B.device) if initial is None else initial
    outputs = []
    for u_t in u.unbind(-2):
        h = (A @ h.unsqueeze(-1)).squeeze(-1) + B * u_t.unsqueeze(-1)
        outputs.append((C * h).sum(-1).real)
    return torch.stack(outputs, -2), h


@in_float32
def dense_lti(
    u: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None = None, *, kernel: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A bank of discrete systems with dense matrices, over a whole sequence.

    .. math:: h_t = A h_{t-1} + B u_t, \\qquad y_t = \\operatorname{Re} C h_t

    Blocks of about :math:`\\sqrt T` steps: what enters within a block by convolution with :math:`C A^r B`, what
    came before by :math:`C A^{r+1} H`.

    Args:
        u: ``(..., time, D)`` real.
        A: ``(..., D, N, N)``; B, C: ``(..., D, N)``.
        initial: ``(..., D, N)``, zero by default.
        kernel: ``(..., time, D)``, the impulse response :math:`\\operatorname{Re} C A^l B` where it is known already;
            outputs are then its convolution, and only states are computed here.

    Returns:
        ``(y, final)``: ``(..., time, D)``, ``(..., D, N)``. Halves are computed in float32, under autocast too.

    Raises:
        TypeError: numbers of another kind.
        ValueError: sizes, leading dims or devices that do not fit.

    >>> import torch
    >>> from pyro_ssm.ops import dense_lti
    >>> one = torch.ones(1, 1)
    >>> dense_lti(torch.ones(2, 1), one.unsqueeze(0) / 2, one, one)[0].squeeze(-1)
    tensor([1.0000, 1.5000])
    """
    check_arguments(
        "dense_lti",
        u=Asked(u, "time D"),
        A=Asked(A, "D N N", "number"),
        B=Asked(B, "D N", "number"),
        C=Asked(C, "D N", "number"),
        initial=Asked(initial, "D N", "number"),
        kernel=Asked(kernel, "time D"),
    )
    steps, size = u.shape[-2], power_of_two(u.shape[-2])
    lead = torch.broadcast_shapes(
        u.shape[:-2], A.shape[:-3], B.shape[:-2], () if initial is None else initial.shape[:-2]
    )
    h = torch.zeros((), dtype=B.dtype, device=B.device) if initial is None else initial
    h = h.expand(lead + B.shape[-2:])
    if steps == 0:
        return u.new_zeros(lead + u.shape[-2:]), h.clone()
    drives, leap = krylov(A, B, size)  # A^r B and A^size
    blocks, rest = divmod(steps, size)
    given = u[..., : blocks * size, :].mT.unflatten(-1, (blocks, size))  # (..., D, blocks, size)
    entered = given.to(B.dtype) @ drives.flip(-2)  # (..., D, blocks, N)
    starts = []
    for block in entered.unbind(-2):
        starts.append(h)
        h = (leap @ h.unsqueeze(-1)).squeeze(-1) + block
    final = h
    if rest:
        starts.append(h)
        last = (u[..., steps - rest :, :].mT.unsqueeze(-2).to(B.dtype) @ drives[..., :rest, :].flip(-2)).squeeze(-2)
        final = (torch.linalg.matrix_power(A, rest) @ h.unsqueeze(-1)).squeeze(-1) + last
    if kernel is None:
        rows, _ = krylov(A.mT, C, size + 1)  # C A^r
        within = (rows[..., :size, :] * B.unsqueeze(-2)).sum(-1).real  # (..., D, size)
        padded = F.pad(u, (0, 0, 0, len(starts) * size - steps)).unflatten(-2, (-1, size))
        y = fft_conv(padded, within.mT.unsqueeze(-3)).flatten(-3, -2)[..., :steps, :]
        carried = torch.stack(starts, -2) @ rows[..., 1:, :].mT  # (..., D, blocks, size)
        return y + carried.real.flatten(-2).mT[..., :steps, :], final
    y = fft_conv(u, kernel)
    if initial is not None:
        own, wanted = initial.expand(lead + B.shape[-2:]), steps
        rows, _ = krylov(A.mT, C, size + 1)
        leaps, _ = krylov(leap, own, -(-wanted // size))  # A^(q size) h, (..., D, blocks, N)
        y = y + (leaps @ rows[..., 1:, :].mT).real.flatten(-2).mT[..., :steps, :]
    return y, final
