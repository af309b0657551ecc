"""Diagonal state spaces: S4D, and DSS."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_choice, check_size
from pyro_ssm.blocks._sequence import complex_dtype, wide
from pyro_ssm.blocks.structured import BANK_DIMS, Bank, check_method, complex_of
from pyro_ssm.ops import NormalPlusLowRank, diag_lti

__all__ = ["DSS", "S4D", "diagonal_initial"]


def diagonal_initial(init: str, state_size: int) -> tuple[Tensor, Tensor]:
    """First eigenvalues and input weights of a diagonal system, one of each pair: ``(N / 2,)`` complex128.

    "lin": :math:`-\\tfrac12 + i \\pi n`; "inv": :math:`-\\tfrac12 + i \\tfrac N\\pi (\\tfrac{N}{2n+1} - 1)`; "legs":
    the normal part of HiPPO-LegS.

    Source: A. Gu, A. Gupta, K. Goel, C. Re (2022), On the parameterization and initialization of diagonal state space
    models, section 4.

    >>> from pyro_ssm.blocks import diagonal_initial
    >>> diagonal_initial("lin", 4)[0].imag
    tensor([0.0000, 3.1416], dtype=torch.float64)
    """
    check_choice("init", init, ("inv", "legs", "lin"))
    if init == "legs":
        form = NormalPlusLowRank.of("legs", state_size)
        return form.eigenvalues, form.B
    n = torch.arange(state_size // 2, dtype=torch.float64)
    turns = math.pi * n if init == "lin" else state_size / math.pi * (state_size / (2 * n + 1) - 1)
    return torch.complex(torch.full_like(turns, -0.5), turns), torch.ones_like(n).to(torch.complex128)


class S4D(Bank):
    """A bank of diagonal state spaces, each channel by itself.

    .. math::
        \\dot h = \\operatorname{diag}(\\lambda) h + u, \\quad y = 2 \\operatorname{Re} C h + D u, \\qquad
        \\lambda = -e^{\\text{log\\_decay}} + i\\, \\text{frequency},

    discretised with :math:`\\Delta_t = e^{\\text{log\\_step}} dt_t`, exactly at each step. Always stable. A regular
    sequence is one convolution; irregular gaps and resets run the recurrence, and both are the same map. A step of S4D
    mixes no channels: :class:`ResidualStack` does.

    Args:
        features: channels.
        state_size: N, even; N / 2 complex states a channel.
        init: ``"lin"``, ``"inv"`` or ``"legs"`` (see :func:`diagonal_initial`).
        method: ``"zoh"`` (the input holds over the gap before each step) or ``"bilinear"``.
        step_range: first steps lie between these.

    State: ``(..., features, N / 2)`` complex. Randomness: first values, from torch's generator.

    Source: as :func:`diagonal_initial`.

    >>> import torch
    >>> from pyro_ssm.blocks import S4D
    >>> S4D(3, state_size=8)(torch.zeros(2, 5, 3))[1].shape
    torch.Size([2, 3, 4])
    """

    event_dims: ClassVar[Mapping[str, int]] = {
        **BANK_DIMS,
        "log_decay": 2,
        "frequency": 2,
        "C_real": 2,
        "C_imag": 2,
    }
    slow_parameters = ("log_step", "log_decay", "frequency")

    def __init__(
        self,
        features: int,
        state_size: int = 64,
        init: str = "lin",
        method: str = "zoh",
        step_range: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__(features, state_size, step_range)
        self.init, self.method = init, check_method(method)
        eigenvalues, B = diagonal_initial(init, state_size)
        shape, dtype = (features, state_size // 2), torch.get_default_dtype()
        self.log_decay = nn.Parameter((-eigenvalues.real).log().to(dtype).expand(shape).clone())
        self.frequency = nn.Parameter(eigenvalues.imag.to(dtype).expand(shape).clone())
        C = B * torch.randn(shape, dtype=torch.complex64).to(torch.complex128)
        self.C_real, self.C_imag = nn.Parameter(C.real.to(dtype)), nn.Parameter(C.imag.to(dtype))

    def start(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        return torch.zeros(
            (*shape, self.features, self.state_size // 2),
            dtype=complex_dtype(self.log_step.dtype),
            device=self.log_step.device,
        )

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        A = complex_of(-self.log_decay.exp(), self.frequency)
        return A, torch.ones_like(A), complex_of(self.C_real, self.C_imag)

    def _system(
        self, u: Tensor, gap: Tensor | None, state: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        A, B, C = self._matrices()
        return diag_lti(u, self._step(gap), A, B, C, initial=state, reset=reset, method=self.method)


class DSS(S4D):
    """The diagonal state spaces of DSS, whose kernel's rows are normalised.

    .. math::
        K_l = 2 \\operatorname{Re} \\sum_n w_n
        \\frac{e^{\\lambda_n \\Delta l}}{\\sum_{r < R} e^{\\lambda_n \\Delta r}} \\frac{1}{\\lambda_n}
        \\qquad \\text{(softmax)}, \\qquad
        K_l = 2 \\operatorname{Re} \\sum_n w_n \\frac{e^{\\lambda_n \\Delta} - 1}{\\lambda_n} e^{\\lambda_n \\Delta l}
        \\qquad \\text{(exp)}.

    The second is S4D with zero-order hold. The first divides by a sum over a horizon R, which is a property of the
    block here (the paper takes the length of each sequence): so the block keeps a recurrence, and pieces are the whole.

    Args:
        features: channels.
        state_size: N, even.
        normalisation: ``"softmax"`` or ``"exp"``.
        horizon: R, for "softmax".
        step_range: first steps lie between these.

    State: ``(..., features, N / 2)`` complex; otherwise as :class:`S4D`, first eigenvalues those of HiPPO-LegS.

    Source: A. Gupta, A. Gu, J. Berant (2022), Diagonal state spaces are as effective as structured state spaces,
    proposition 1.

    >>> import torch
    >>> from pyro_ssm.blocks import DSS
    >>> DSS(3, state_size=8)(torch.zeros(2, 5, 3))[0].shape
    torch.Size([2, 5, 3])
    """

    def __init__(
        self,
        features: int,
        state_size: int = 64,
        normalisation: str = "softmax",
        horizon: int = 1024,
        step_range: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__(features, state_size, "legs", "zoh", step_range)
        self.normalisation = check_choice("normalisation", normalisation, ("exp", "softmax"))
        self.horizon = check_size("horizon", horizon)

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        A, B, C = super()._matrices()
        if self.normalisation == "exp":
            return A, B, C
        step = wide(self.log_step).exp().unsqueeze(-1)
        # 1 / sum_r e^{x r} = (e^x - 1) / (e^{x R} - 1); the first factor is that of the zero-order hold
        return A, B, C / torch.expm1(A * step * self.horizon)
