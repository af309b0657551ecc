"""Banks of systems that are diagonal plus low rank and do not change in time: by recurrence, or by convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ssm.ops.dense_lti import dense_lti
from pyro_ssm.ops.diag_bank import COMPLEX, bank_is_compiled, precision
from pyro_ssm.ops.dplr import check_system, dplr_kernel, dplr_scan, readout_row
from pyro_ssm.ops.dplr_step import dplr_step
from pyro_ssm.ops.low_rank_bank import LOW_RANK_BANK, MAX_RANK, low_rank_bank
from pyro_ssm.ops.scan_arguments import Asked, in_float32

__all__ = ["dplr_lti"]

_KERNEL_FROM = 8  # steps


@in_float32
def dplr_lti(
    u: Tensor,
    step: Tensor,
    eigenvalues: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    mode: str | None = None,
) -> tuple[Tensor, Tensor]:
    """S4's systems with one step for all times, over a whole sequence: the map of :func:`~pyro_ssm.ops.dplr_scan`.

    .. math::
        h_t = a \\odot h_{t-1} + b\\, u_t - W \\operatorname{Re} Q^\\top h_{t-1}, \\qquad
        y_t = 2 \\operatorname{Re} C h_t

    The discretisation is diagonal plus low rank as the system itself (:func:`~pyro_ssm.ops.dplr_step.dplr_step`, in
    double precision), so that a step costs N and no matrix of N by N is made where the compiled scan runs. It keeps the
    states before every 32 steps for its backward pass: no tensor of time times states.

    Args:
        u: ``(..., time, D)`` real.
        step: ``(..., D)``.
        eigenvalues, B, C: one of each pair of conjugates, ``(..., D, N)`` complex; P: ``(..., D, N, r)``.
        initial: ``(..., D, N)`` complex, zero by default.
        reset: bool ``(..., time)``; where True the state before the step counts as zero.
        mode: ``"bank"`` (the compiled scan, of ranks 1 and 2), ``"convolution"`` (with the kernel of
            :func:`~pyro_ssm.ops.dplr_kernel`; no reset), ``"scan"`` (:func:`~pyro_ssm.ops.dplr_scan`), or None: the
            first that is possible, and a convolution only of 8 steps or more.

    Returns:
        ``(y, final)``: ``(..., time, D)``, ``(..., D, N)``. All is done in float64 where one of them (but for the step)
        is double, else in float32, under autocast too.

    Raises:
        ValueError: an unknown mode, one that is not possible, or sizes, leading dims or devices that do not fit.
        TypeError: numbers of another kind, or a mask that is not boolean.

    Source: A. Gu, K. Goel, C. Re (2022), Efficiently modeling long sequences with structured state spaces, appendix
    C.2 (the recurrence).

    >>> import torch
    >>> from pyro_ssm.ops import dplr_lti
    >>> one = torch.ones(1, 1, dtype=torch.complex64)
    >>> dplr_lti(torch.ones(1, 1), torch.ones(1), -one, 0 * one.unsqueeze(-1), one, one / 2)[0]
    tensor([[0.6667]])
    """
    check_system(
        "dplr_lti",
        eigenvalues,
        P,
        B,
        C,
        u=Asked(u, "time D"),
        step=Asked(step, "D"),
        initial=Asked(initial, "D N", "complex"),
        reset=Asked(reset, "time", "bool"),
    )
    if mode not in (None, "bank", "convolution", "scan"):
        raise ValueError(f"dplr_lti: `mode` must be 'bank', 'convolution', 'scan' or None, got {mode!r}")
    if mode == "convolution" and reset is not None:
        raise ValueError("dplr_lti: a convolution knows no reset; use mode='scan'")
    real, steps = precision(u, eigenvalues, P, B, C, initial), u.shape[-2]
    u, step = u.to(real), step.to(real)
    eigenvalues, P, B, C = (m.to(COMPLEX[real]) for m in (eigenvalues, P, B, C))
    initial = None if initial is None else initial.to(COMPLEX[real])
    tensors = (u, step, eigenvalues, P, B, C, initial)
    compiled = 0 < P.shape[-1] <= MAX_RANK and bank_is_compiled(LOW_RANK_BANK, *tensors)
    if mode == "bank" and not compiled:
        raise ValueError(
            f"dplr_lti: mode='bank' needs the compiled library, tensors on a CPU, no torch.func and r <= {MAX_RANK}"
        )
    if compiled and steps and mode in (None, "bank"):
        a, b, W, Q = dplr_step(eigenvalues, P, B, step).to(COMPLEX[real])
        return low_rank_bank(u, a, b, 2 * C, W, Q, initial, reset)
    if mode == "convolution" or (mode is None and reset is None and steps >= _KERNEL_FROM):
        return _convolution(u, step, eigenvalues, P, B, C, initial)
    eigenvalues, B, C = (m if m.dim() == 2 else m.unsqueeze(-3) for m in (eigenvalues, B, C))
    P = P if P.dim() == 3 else P.unsqueeze(-4)
    first = eigenvalues.new_zeros(eigenvalues.shape[-2:]) if initial is None else initial
    steps_of_all = step.unsqueeze(-2).expand(*step.shape[:-1], steps, step.shape[-1])
    return dplr_scan(u, steps_of_all, eigenvalues, P, B, C, first, reset)


def _convolution(
    u: Tensor, step: Tensor, eigenvalues: Tensor, P: Tensor, B: Tensor, C: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    discrete = dplr_step(eigenvalues, P, B, step)
    kernel = dplr_kernel(eigenvalues, P, B, C, step, u.shape[-2], discrete=discrete)
    A, b = (m.to(u.dtype) for m in discrete.dense())
    first = None if initial is None else torch.cat([initial.real, initial.imag], -1)
    y, final = dense_lti(u, A, b, readout_row(C), first, kernel=kernel)
    return y, torch.complex(*final.chunk(2, -1))
