"""Convolution kernels of diagonal systems, and causal convolution by the fast Fourier transform."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_ssm.ops.discretise import discretise
from pyro_ssm.ops.scan_arguments import Asked, check_arguments, in_float32

__all__ = ["fft_conv", "powers", "ssm_kernel", "ssm_kernel_reference"]


def ssm_kernel_reference(A: Tensor, B: Tensor, C: Tensor, step: Tensor, length: int, *, method: str = "zoh") -> Tensor:
    """:func:`ssm_kernel` by running the recurrence on an impulse.

    >>> import torch
    >>> from pyro_ssm.ops import ssm_kernel_reference
    >>> one = torch.ones(1, 1, dtype=torch.complex64)
    >>> ssm_kernel_reference(-one, one, one / 2, torch.ones(1), 2).squeeze(-1)
    tensor([0.6321, 0.2325])
    """
    a, w = discretise(A * step.unsqueeze(-1), step.unsqueeze(-1), method)
    h, taps = w * B, []
    for _ in range(length):
        taps.append(2 * (C * h).sum(-1).real)
        h = a * h
    return torch.stack(taps, -2)


def ssm_kernel(A: Tensor, B: Tensor, C: Tensor, step: Tensor, length: int, *, method: str = "zoh") -> Tensor:
    """The impulse response of a bank of diagonal systems whose eigenvalues come in conjugate pairs.

    .. math:: K_l = 2 \\operatorname{Re} \\sum_n C_n\\, \\bar a_n^{\\,l}\\, w_n B_n

    A product of two Vandermonde matrices of about :math:`\\sqrt L` rows, whose entries are computed in double precision
    (a phase of many turns is lost in float32): no tensor of :math:`N L` elements.

    Args:
        A, B, C: one of each pair, ``(..., D, N)`` complex.
        step: :math:`\\Delta`, ``(..., D)``.
        length: how many taps.
        method: ``"zoh"``, ``"bilinear"`` or ``"euler"``.

    Returns:
        ``(..., length, D)`` real.

    Raises:
        TypeError: numbers of another kind.
        ValueError: sizes, leading dims or devices that do not fit, a negative length, or an unknown method.

    Source: A. Gu, A. Gupta, K. Goel, C. Re (2022), On the parameterization and initialization of diagonal state space
    models, section 3.2.

    >>> import torch
    >>> from pyro_ssm.ops import ssm_kernel
    >>> one = torch.ones(1, 1, dtype=torch.complex64)
    >>> ssm_kernel(-one, one, one / 2, torch.ones(1), 2).squeeze(-1)
    tensor([0.6321, 0.2325])
    """
    asked = {key: Asked(x, "D N", "complex") for key, x in (("A", A), ("B", B), ("C", C))}
    check_arguments("ssm_kernel", **asked, step=Asked(step, "D"))
    if length < 0:
        raise ValueError(f"ssm_kernel: `length` must not be negative, got {length}")
    a, w = discretise_exactly(A, step.unsqueeze(-1), method)
    fine, coarse, _ = powers(a, length, A.dtype)
    return readout(C * w.to(A.dtype) * B, fine, coarse, length)


def discretise_exactly(A: Tensor, step: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """:func:`~pyro_ssm.ops.discretise` of :math:`\\Delta A` in double precision.

    >>> import torch
    >>> from pyro_ssm.ops.ssm_kernel import discretise_exactly
    >>> discretise_exactly(torch.tensor([-1j]), torch.tensor([1.0]), "zoh")[0].dtype
    torch.complex128
    """
    step = step.to(torch.float64)
    return discretise(A.to(torch.complex128) * step, step, method)


def powers(a: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """:math:`a^r` for r < R and :math:`a^{qR}` for q < Q, with :math:`Q R \\ge` ``length``: ``(..., D, N, R)`` and
    ``(..., D, Q, N)``, and R; computed in double precision.

    >>> import torch
    >>> from pyro_ssm.ops.ssm_kernel import powers
    >>> fine, coarse, size = powers(torch.full((1, 1), 2.0 + 0j), 4, torch.complex64)
    >>> fine.real.flatten(), coarse.real.flatten(), size
    (tensor([1., 2.]), tensor([1., 4.]), 2)
    """
    size = max(1, math.isqrt(max(length, 1) - 1) + 1)
    log_a = a.to(torch.complex128).log()
    exact = torch.arange(size, dtype=torch.float64, device=a.device)
    blocks = torch.arange(-(-length // size), dtype=torch.float64, device=a.device) * size
    fine = torch.exp(log_a.unsqueeze(-1) * exact)
    coarse = torch.exp(log_a.unsqueeze(-2) * blocks.unsqueeze(-1))
    return fine.to(dtype), coarse.to(dtype), size


def readout(c: Tensor, fine: Tensor, coarse: Tensor, length: int) -> Tensor:
    """:math:`2 \\operatorname{Re} \\sum_n c_n a_n^l` for l < ``length``: ``(..., D, N)`` to ``(..., length, D)``."""
    taps = ((c.unsqueeze(-2) * coarse) @ fine).real.flatten(-2)[..., :length]
    return 2 * taps.mT


@in_float32
def fft_conv(u: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution along time.

    .. math:: y_{td} = \\sum_{l=0}^{t} K_{ld}\\, u_{t-l,d}

    Args:
        u: ``(..., time, D)`` real.
        kernel: ``(..., taps, D)``; taps beyond the number of steps do not matter.

    Returns:
        ``(..., time, D)``. Half precision is computed in float32.

    Raises:
        TypeError: numbers that are not real.
        ValueError: sizes, leading dims or devices that do not fit.

    >>> import torch
    >>> from pyro_ssm.ops import fft_conv
    >>> fft_conv(torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([[1.0], [0.5]])).squeeze(-1).round(decimals=5)
    tensor([1.0000, 0.5000, 2.0000])
    """
    check_arguments("fft_conv", u=Asked(u, "time D"), kernel=Asked(kernel, "taps D"))
    steps = u.shape[-2]
    kernel = kernel[..., :steps, :]
    if steps == 0 or u.numel() == 0:
        return u * kernel.sum(-2, keepdim=True)
    size = 1 << (steps + kernel.shape[-2] - 2).bit_length()  # a power of two that holds the whole product
    transformed = torch.fft.rfft(u, n=size, dim=-2) * torch.fft.rfft(kernel, n=size, dim=-2)
    return torch.fft.irfft(transformed, n=size, dim=-2)[..., :steps, :]
