"""Banks of diagonal systems whose matrices do not depend on time: by recurrence, or by convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_ssm.ops.diag_bank import COMPLEX, DIAG_LTI, bank_is_compiled, diag_bank, precision
from pyro_ssm.ops.diagonal_scan import diagonal_scan, diagonal_scan_reference
from pyro_ssm.ops.gap_bank import GAP_BANK, METHODS, gap_bank
from pyro_ssm.ops.operator import Way, way_of
from pyro_ssm.ops.scan_arguments import Asked, check_arguments, in_float32
from pyro_ssm.ops.ssm_kernel import discretise_exactly, fft_conv, powers, readout

__all__ = ["diag_lti", "diag_lti_reference"]

_CONVOLUTION_FROM = 4  # steps; measured on CPU, forward and backward
_SMALLEST = 1e-6  # eigenvalue by which an input is divided


def diag_lti_reference(
    u: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    method: str = "zoh",
) -> tuple[Tensor, Tensor]:
    """:func:`diag_lti` as a plain loop.

    >>> import torch
    >>> from pyro_ssm.ops import diag_lti_reference
    >>> one = torch.ones(1, 1, dtype=torch.complex64)
    >>> diag_lti_reference(torch.ones(2, 1), torch.ones(2, 1), -one, one, one / 2)[0].squeeze(-1)
    tensor([0.6321, 0.8647])
    """
    step = step.expand(step.shape[:-2] + u.shape[-2:])
    lead = torch.broadcast_shapes(u.shape[:-2], step.shape[:-2])
    h = torch.zeros(lead + A.shape[-2:], dtype=A.dtype, device=u.device) if initial is None else initial
    B, C = (m.expand(u.shape[-2:-1] + m.shape[-2:]) for m in (B, C))
    return diagonal_scan_reference(u, step, A, B, 2 * C, h, reset, method)


@in_float32
def diag_lti(
    u: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    method: str = "zoh",
    mode: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A bank of systems :math:`\\dot h = A h + B u`, :math:`y = 2 \\operatorname{Re} C h`, discretised exactly by step.

    .. math::
        h_t = \\bar a(\\Delta_t A) \\odot h_{t-1} + w(\\Delta_t A) \\odot B u_t, \\qquad
        y_{td} = 2 \\operatorname{Re} \\sum_n C_{dn} h_{tdn}

    Args:
        u: ``(..., time, D)`` real.
        step: :math:`\\Delta`, ``(..., time, D)``, or ``(..., 1, D)``: the same at all times. 0 leaves a state as it is.
        A, B, C: one of each pair of conjugates ``(D, N)`` complex (or ``(..., 1, D, N)``).
        initial: ``(..., D, N)`` complex, zero by default.
        reset: bool ``(..., time)``; where True the state before the step counts as zero.
        method: ``"zoh"`` (the input holds over the step) or ``"bilinear"``.
        mode: ``"scan"`` (any step, linear memory by recomputation), ``"convolution"`` (one step for all times and no
            reset; by a kernel and the fast Fourier transform), or None: the compiled scan, and without it the
            convolution, where it is possible and not short.

    Returns:
        ``(y, final)``: ``(..., time, D)`` and ``(..., D, N)``. Derivatives of any order, forward mode and
        ``torch.func.vmap`` are exact. Halves are computed in float32, and so is what autocast would narrow.

    Raises:
        ValueError: sizes, leading dims or devices that do not fit, an unknown mode, or a convolution that is not
            possible.
        TypeError: numbers of another kind, or a mask that is not boolean.

    >>> import torch
    >>> from pyro_ssm.ops import diag_lti
    >>> one = torch.ones(1, 1, dtype=torch.complex64)
    >>> diag_lti(torch.ones(2, 1), torch.ones(1, 1), -one, one, one / 2)[0].squeeze(-1)
    tensor([0.6321, 0.8647])
    """
    check_arguments(
        "diag_lti",
        u=Asked(u, "time D"),
        step=Asked(step, "time|1 D|1"),
        A=Asked(A, "D N", "complex", timeless=True),
        B=Asked(B, "D|1 N|1", "complex", timeless=True),
        C=Asked(C, "D|1 N|1", "complex", timeless=True),
        initial=Asked(initial, "D|1 N|1", "complex"),
        reset=Asked(reset, "time", "bool"),
    )
    steps = u.shape[-2]
    if mode not in (None, "scan", "convolution"):
        raise ValueError(f"diag_lti: `mode` must be 'scan', 'convolution' or None, got {mode!r}")
    tensors = (u, step, A, B, C, initial)
    if step.shape[-2] == 1 and steps and mode != "convolution" and bank_is_compiled(DIAG_LTI, *tensors):
        return _bank(*tensors, reset, method)
    if mode is None and method in METHODS and steps and step.shape[-2] == steps and _gaps_are_compiled(*tensors):
        return _gaps(*tensors, reset, method)
    regular = step.shape[-2] == 1 and reset is None
    if mode == "convolution" and not regular:
        raise ValueError("diag_lti: a convolution needs one step for all times, and no reset; use mode='scan'")
    if regular and steps > 0 and (mode == "convolution" or (mode is None and steps >= _CONVOLUTION_FROM)):
        return _convolution(u, step, A, B, C, initial, method)
    h = torch.zeros(A.shape[-2:], dtype=A.dtype, device=u.device) if initial is None else initial
    B, C = (m if m.dim() > 2 else m.unsqueeze(0) for m in (B, C))
    return diagonal_scan(u, step.expand(step.shape[:-2] + u.shape[-2:]), A, B, 2 * C, h, reset, method)


def _bank(
    u: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    method: str,
) -> tuple[Tensor, Tensor]:
    """One step for all times: what is discretised has no time, and the compiled scan makes no tensor of all states."""
    A, B, C = (m if m.dim() == 2 else m.squeeze(-3) for m in (A, B, C))
    a, w = discretise_exactly(A, step.squeeze(-2).unsqueeze(-1), method)
    dtype = COMPLEX[precision(u, A)]
    return diag_bank(u, a.to(dtype), w.to(dtype) * B, 2 * C, initial, reset)


def _gaps_are_compiled(u: Tensor, step: Tensor, A: Tensor, *rest: Tensor | None) -> bool:
    if not bank_is_compiled(GAP_BANK, u, step, A, *rest) or way_of(u, step, A, *rest) is Way.OPERATOR:
        return False
    return bool((A.abs() > _SMALLEST).all())  # a graph cannot ask


def _gaps(
    u: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    method: str,
) -> tuple[Tensor, Tensor]:
    """A step for each time: the compiled scan discretises where it stands."""
    A, B, C = (m if m.dim() == 2 else m.squeeze(-3) for m in (A, B, C))
    A = A.to(COMPLEX[precision(u, A)])
    return gap_bank(u, step.to(u.dtype), A, B / A, 2 * C, initial, reset, method)


def _convolution(
    u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, method: str
) -> tuple[Tensor, Tensor]:
    A, B, C = (m if m.dim() == 2 else m.squeeze(-3) for m in (A, B, C))
    delta = step.squeeze(-2).unsqueeze(-1)
    a, w = discretise_exactly(A, delta, method)
    steps, drive = u.shape[-2], w.to(A.dtype) * B
    fine, coarse, size = powers(a, steps, A.dtype)
    y = fft_conv(u, readout(C * drive, fine, coarse, steps))
    # the final state: within blocks that end with the last step, then over blocks
    blocks = coarse.shape[-2]
    cut = F.pad(u, (0, 0, blocks * size - steps, 0)).mT.unflatten(-1, (blocks, size))
    within = cut.to(fine.dtype) @ fine.flip(-1).mT  # (..., D, blocks, N)
    final = drive * (within * coarse.flip(-2)).sum(-2)
    if initial is not None:
        y = y + readout(C * a.to(A.dtype) * initial, fine, coarse, steps)
        final = final + (a.log() * steps).exp().to(A.dtype) * initial
    return y, final
