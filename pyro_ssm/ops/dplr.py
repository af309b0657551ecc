"""Systems that are diagonal plus low rank (S4): the kernel by Cauchy sums, and the recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ssm.ops.dense_lti import krylov, power_of_two
from pyro_ssm.ops.diag_bank import COMPLEX, precision
from pyro_ssm.ops.dplr_step import LowRankStep, both, dplr_matrices, dplr_step
from pyro_ssm.ops.recompute import recomputed_scan
from pyro_ssm.ops.scan_arguments import Asked, check_arguments, in_float32

__all__ = ["cauchy", "dplr_kernel", "dplr_scan", "dplr_scan_reference", "readout_row"]


def cauchy(v: Tensor, nodes: Tensor, poles: Tensor) -> Tensor:
    """Cauchy sums; the matrix of ``(..., L, N)`` is made in pieces, and again in the backward pass.

    .. math:: k_l = \\sum_n \\frac{v_n}{g_l - \\lambda_n}

    Args:
        v: ``(..., N)`` complex.
        nodes: :math:`g`, ``(..., L)`` complex; leading dims broadcast.
        poles: :math:`\\lambda`, ``(..., N)`` complex.

    Returns:
        ``(..., L)`` complex.

    Raises:
        TypeError: numbers that are not complex.
        ValueError: sizes, leading dims or devices that do not fit.

    >>> import torch
    >>> from pyro_ssm.ops import cauchy
    >>> cauchy(torch.ones(2) + 0j, torch.tensor([1.0 + 0j]), torch.tensor([0.0 + 0j, -1.0])).real
    tensor([1.5000])
    """
    v_and_poles = {"v": Asked(v, "N", "complex"), "poles": Asked(poles, "N", "complex")}
    check_arguments("cauchy", **v_and_poles, nodes=Asked(nodes, "L", "complex"))
    plus = torch.ones_like(nodes[(0,) * (nodes.dim() - 1)])
    return _cauchy_rows(v.unsqueeze(-2), nodes.unsqueeze(-2), poles.unsqueeze(-2), plus).squeeze(-2)


def _cauchy_rows(v: Tensor, nodes: Tensor, poles: Tensor, plus: Tensor) -> Tensor:
    """Sums of ``v / (nodes - plus * poles)`` for several rows of v: ``(..., rows, L)``."""
    shape = torch.broadcast_shapes(v.shape[:-2], nodes.shape[:-2], poles.shape[:-2])

    def piece(state: Tensor, nodes: Tensor, plus: Tensor, v: Tensor, poles: Tensor) -> tuple[Tensor, Tensor]:
        inverse = (nodes - plus * poles).reciprocal()  # (..., l, N)
        return inverse @ v.mT, state

    tensors, times = [nodes.mT, plus.unsqueeze(-1), v, poles], [-2, -2, None, None]
    return recomputed_scan(piece, v.new_zeros(()), tensors, times, shape.numel() * v.shape[-1])[0].mT


def dplr_kernel(
    eigenvalues: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    step: Tensor,
    length: int,
    *,
    discrete: LowRankStep | None = None,
) -> Tensor:
    """The impulse response of the bilinear discretisation of S4's systems, by its generating function.

    .. math::
        \\hat K(z) = \\sum_{l<L} K_l z^l
        = \\frac{2}{1+z}\\, \\tilde C^* \\Big(\\tfrac2\\Delta \\tfrac{1-z}{1+z} - A\\Big)^{-1} B, \\qquad
        \\tilde C = C (I - \\bar A^L),

    at one half of the L-th roots of unity, since K is real; the inverse by Woodbury's identity is four kinds of Cauchy
    sums, and the kernel the inverse Fourier transform. The final factor in :math:`\\tilde C` is exact (dense real
    products), for any length.

    Args:
        eigenvalues: :math:`\\Lambda`, one of each pair, ``(..., D, N)`` complex.
        P: ``(..., D, N, r)``; B, C: ``(..., D, N)``.
        step: ``(..., D)``.
        length: how many taps, L.
        discrete: :func:`~pyro_ssm.ops.dplr_step.dplr_step` of these, where it is known already.

    Returns:
        ``(..., L, D)`` real: :math:`K_l = 2 \\operatorname{Re} C \\bar A^l \\bar B`.

    Raises:
        TypeError: numbers of another kind.
        ValueError: sizes, leading dims or devices that do not fit, or a length below 1.

    Source: A. Gu, K. Goel, C. Re (2022), Efficiently modeling long sequences with structured state spaces, section 3.3
    and appendix C.3.

    >>> import torch
    >>> from pyro_ssm.ops import dplr_kernel
    >>> one = torch.ones(1, 1, dtype=torch.complex64)
    >>> dplr_kernel(-one, 0 * one.unsqueeze(-1), one, one / 2, torch.ones(1), 2).squeeze(-1)
    tensor([0.6667, 0.2222])
    """
    check_system("dplr_kernel", eigenvalues, P, B, C, step=Asked(step, "D"))
    if length < 1:
        raise ValueError(f"dplr_kernel: `length` must be at least 1, got {length}")
    A_bar, _ = (discrete or dplr_step(eigenvalues, P, B, step)).dense()
    real, imaginary = _row_times_power(readout_row(C).to(A_bar.dtype), A_bar, length).chunk(2, -1)
    C_cut = both(C - torch.complex(real, -imaginary).to(C.dtype) / 2)  # (..., D, 2 N)
    poles, P, B = both(eigenvalues), both(P, -2), both(B)
    turns = torch.arange(length // 2 + 1, dtype=torch.float64, device=B.device) * (-2 * torch.pi / length)
    z = torch.polar(torch.ones_like(turns), turns)  # torch's inverse transform undoes sums with exp(-i)
    # Multiplied by 1 + z so that z = -1 is no exception: every sum is over v / (2 (1 - z) / step - poles (1 + z)).
    plus = (1 + z).to(B.dtype)
    nodes = (2 * (1 - z) / step.to(torch.float64).unsqueeze(-1)).to(B.dtype)  # (..., D, L // 2 + 1)
    rank = P.shape[-1]
    rows = torch.cat([C_cut.unsqueeze(-1), P.conj()], -1)  # (..., D, 2 N, 1 + r)
    columns = torch.cat([B.unsqueeze(-1), P], -1)
    products = (rows.unsqueeze(-1) * columns.unsqueeze(-2)).flatten(-2).mT  # (..., D, (1 + r)^2, 2 N)
    sums = _cauchy_rows(products, nodes.unsqueeze(-2), poles.unsqueeze(-2), plus)  # (..., D, (1 + r)^2, L)
    sums = sums.mT.unflatten(-1, (1 + rank, 1 + rank))  # (..., D, L, 1 + r, 1 + r)
    cb, cp, pb, pp = sums[..., :1, :1], sums[..., :1, 1:], sums[..., 1:, :1], sums[..., 1:, 1:]
    eye = torch.eye(rank, dtype=sums.dtype, device=sums.device)
    inner = torch.linalg.solve(eye + plus[..., None, None] * pp, pb)
    generating = 2 * (cb - plus[..., None, None] * (cp @ inner))[..., 0, 0]  # (..., D, L)
    return torch.fft.irfft(generating, n=length, dim=-1).mT


def check_system(
    name: str, eigenvalues: Tensor, P: Tensor, B: Tensor, C: Tensor, *, timeless: bool = False, **others: Asked
) -> None:
    """Raise unless the parts of systems that are diagonal plus low rank fit together, and with what is given beside.

    Raises:
        TypeError, ValueError: as :func:`~pyro_ssm.ops.scan_arguments.check_arguments`.

    >>> import torch
    >>> from pyro_ssm.ops.dplr import check_system
    >>> one = torch.ones(1, 1, dtype=torch.complex64)
    >>> check_system("scan", one, one.unsqueeze(-1), one, one)
    """
    asked = [Asked(x, "D N", "complex", timeless) for x in (eigenvalues, B, C)]
    check_arguments(
        name,
        **others,
        eigenvalues=asked[0],
        P=Asked(P, "D N r", "complex", timeless),
        B=asked[1],
        C=asked[2],
    )


def readout_row(C: Tensor) -> Tensor:
    """:math:`2 \\operatorname{Re} C h` as a row for the real and the imaginary parts of h: ``(..., 2 N)``.

    >>> import torch
    >>> from pyro_ssm.ops.dplr import readout_row
    >>> readout_row(torch.tensor([1 + 2j]))
    tensor([ 2., -4.])
    """
    return torch.cat([2 * C.real, -2 * C.imag], -1)


def _row_times_power(row: Tensor, matrix: Tensor, exponent: int) -> Tensor:
    """``row @ matrix^exponent`` by squaring."""
    size = power_of_two(exponent)
    leap = matrix
    for _ in range(size.bit_length() - 1):
        leap = leap @ leap
    whole, rest = divmod(exponent, size)
    row = row.unsqueeze(-2)
    for _ in range(whole):
        row = row @ leap
    if rest:
        row = krylov(matrix.mT, row.squeeze(-2), rest + 1)[0][..., -1:, :]
    return row.squeeze(-2)


def dplr_scan_reference(
    u: Tensor,
    step: Tensor,
    eigenvalues: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`dplr_scan` with dense matrices.

    >>> import torch
    >>> from pyro_ssm.ops import dplr_scan_reference
    >>> one = torch.ones(1, 1, dtype=torch.complex64)
    >>> u = torch.ones(1, 1)
    >>> dplr_scan_reference(u, u, -one, 0 * one.unsqueeze(-1), one, one / 2, 0 * one)[0]
    tensor([[0.6667]])
    """
    h, outputs = initial, []
    for t in range(u.shape[-2]):
        if reset is not None:
            h = torch.where(reset[..., t, None, None], torch.zeros_like(h), h)
        A_bar, B_bar = dplr_matrices(eigenvalues, P, B, step[..., t, :])
        moved = (A_bar.to(h.dtype) @ both(h).unsqueeze(-1)).squeeze(-1)
        h = (moved + B_bar.to(h.dtype) * u[..., t, :, None])[..., : h.shape[-1]]
        outputs.append(2 * (C * h).sum(-1).real)
    return torch.stack(outputs, -2), h


@in_float32
def dplr_scan(
    u: Tensor,
    step: Tensor,
    eigenvalues: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of S4's systems, discretised (bilinear) exactly by each step, at a cost of N a step.

    .. math::
        (I - \\tfrac{\\Delta_t}2 A) h_t = (I + \\tfrac{\\Delta_t}2 A) h_{t-1} + \\Delta_t B u_t, \\qquad
        A = \\operatorname{diag}(\\Lambda) - P P^*, \\qquad y_t = 2 \\operatorname{Re} C h_t

    Args:
        u: ``(..., time, D)``; step: ``(..., time, D)``.
        eigenvalues, B, C: ``(D, N)`` complex (or ``(..., 1, D, N)``), one of each pair; P: ``(D, N, r)`` (or with
            leading dims and a time axis of 1).
        initial: ``(..., D, N)`` complex.
        reset: bool ``(..., time)`` or None.

    Returns:
        ``(y, final)``: ``(..., time, D)``, ``(..., D, N)``; the states are computed again in the backward pass. All is
        done in float64 where one of them (but for the step) is double, else in float32, under autocast too.

    Raises:
        TypeError: numbers of another kind, or a mask that is not boolean.
        ValueError: sizes, leading dims or devices that do not fit.

    >>> import torch
    >>> from pyro_ssm.ops import dplr_scan
    >>> one = torch.ones(1, 1, dtype=torch.complex64)
    >>> u = torch.ones(1, 1)
    >>> dplr_scan(u, u, -one, 0 * one.unsqueeze(-1), one, one / 2, 0 * one)[0]
    tensor([[0.6667]])
    """
    check_system(
        "dplr_scan",
        eigenvalues,
        P,
        B,
        C,
        timeless=True,
        u=Asked(u, "time D"),
        step=Asked(step, "time D"),
        initial=Asked(initial, "D N", "complex"),
        reset=Asked(reset, "time", "bool"),
    )
    real = precision(u, eigenvalues, P, B, C, initial)
    u, step = u.to(real), step.to(real)
    eigenvalues, P, B, C, initial = (m.to(COMPLEX[real]) for m in (eigenvalues, P, B, C, initial))
    eigenvalues, B, C = (m if m.dim() > 2 else m.unsqueeze(0) for m in (eigenvalues, B, C))
    P = P if P.dim() > 3 else P.unsqueeze(0)
    shapes = [u.shape[:-2], step.shape[:-2], initial.shape[:-2], P.shape[:-4]]
    shapes += [m.shape[:-3] for m in (eigenvalues, B, C)] + ([] if reset is None else [reset.shape[:-1]])
    initial = initial.expand(torch.broadcast_shapes(*shapes) + initial.shape[-2:])
    if u.shape[-2] == 0:
        return u.new_zeros(initial.shape[:-2] + u.shape[-2:]), initial.clone()
    keep = u.new_ones(u.shape[-2]) if reset is None else (~reset).to(u.dtype)

    def chunk(
        h: Tensor, u: Tensor, step: Tensor, keep: Tensor, eigenvalues: Tensor, P: Tensor, B: Tensor, C: Tensor
    ) -> tuple[Tensor, Tensor]:
        half = step.unsqueeze(-1) / 2  # (..., time, D, 1)
        below = (1 - half * eigenvalues).reciprocal()
        spread = below.unsqueeze(-1) * P  # (I - step/2 diag)^-1 P
        # (I - step/2 (diag - P P*))^-1 x = d x - half d P (I + half P* d P)^-1 P* d x; both of a pair: 2 Re
        inner = 2 * (P.mH @ spread).real
        eye = torch.eye(P.shape[-1], dtype=u.dtype, device=u.device)
        gain = torch.linalg.inv(eye + half.unsqueeze(-1) * inner) * half.unsqueeze(-1)
        above, drive = 1 + half * eigenvalues, (2 * half * B) * u.unsqueeze(-1)
        rows = zip(
            *(m.unbind(-3) for m in (half, below, above, drive)),
            *(m.unbind(-4) for m in (spread, gain)),
            keep.unbind(-1),
            strict=True,
        )
        P_one, states = P.squeeze(-4), []
        for half_t, below_t, above_t, drive_t, spread_t, gain_t, keep_t in rows:
            h = h * keep_t[..., None, None]
            right = above_t * h - half_t * (P_one @ _real_inner(P_one, h).to(h.dtype)).squeeze(-1) + drive_t
            x = below_t * right
            h = x - (spread_t @ (gain_t @ _real_inner(P_one, x)).to(h.dtype)).squeeze(-1)
            states.append(h)
        return 2 * (C * torch.stack(states, -3)).sum(-1).real, h

    tensors, times = [u, step, keep, eigenvalues, P, B, C], [-2, -2, -1, None, None, None, None]
    return recomputed_scan(chunk, initial, tensors, times, initial.numel())


def _real_inner(P: Tensor, h: Tensor) -> Tensor:
    """:math:`P^* h` over both of each pair: ``(..., r, 1)`` real."""
    return 2 * (P.mH @ h.unsqueeze(-1)).real
