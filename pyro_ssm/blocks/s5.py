"""Diagonal systems of many inputs and outputs, by one scan: S5, and the linear recurrent unit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._sequence import complex_dtype, wide
from pyro_ssm.blocks.linear import linear
from pyro_ssm.blocks.structured import StructuredBlock, check_method, complex_of, log_steps
from pyro_ssm.ops import NormalPlusLowRank, discretise, linear_scan

__all__ = ["LRU", "S5"]

_MIXED_DIMS: Mapping[str, int] = {"B_real": 2, "B_imag": 2, "C_real": 2, "C_imag": 2, "direct": 1}


class _Mixed(StructuredBlock):
    """:math:`h_t = a_t h_{t-1} + w_t B u_t`, :math:`y_t = r \\operatorname{Re} C h_t + D u_t`; all channels share h."""

    num_states: int
    read = 2.0  # one of each pair of conjugates stands for both

    def _factors(self, gap: Tensor | None) -> tuple[Tensor, Tensor]:
        """:math:`a` and :math:`w`, ``(..., time or 1, states)``."""
        raise NotImplementedError

    def start(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        dtype = complex_dtype(self.direct.dtype)
        return torch.zeros((*shape, self.num_states), dtype=dtype, device=self.direct.device)

    def _run(
        self, u: Tensor, state: Any, dt: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Any]:
        given, dtype = u, torch.promote_types(u.dtype, self.direct.dtype)
        u, dt = wide(u), None if dt is None else wide(dt)
        a, w = self._factors(dt)
        if mask is not None:  # the state stands still, and the input is 0 there
            a = a.where(mask.unsqueeze(-1), torch.ones((), dtype=a.dtype, device=a.device))
        B, C = complex_of(self.B_real, self.B_imag), complex_of(self.C_real, -self.C_imag)
        if dt is None:
            B = (w if w.dim() > 2 else w.squeeze(0)).unsqueeze(-1) * B
        # a complex number is two real rows of B and two real columns of C
        rows = torch.view_as_real(B).mT.flatten(-3, -2)
        driven = torch.view_as_complex(linear(u, rows).unflatten(-1, (-1, 2)))
        h = linear_scan(a, driven if dt is None else w * driven, state, reset=reset)
        y = self.read * linear(torch.view_as_real(h).flatten(-2), torch.view_as_real(C).flatten(-2))
        y = (y + given * self.direct).to(dtype)
        if h.shape[-2] == 0:
            return y, self.start(h.shape[:-2]) if state is None else state
        return y, h[..., -1, :]


class S5(_Mixed):
    """One diagonal state space of all channels together.

    .. math::
        \\dot h = \\operatorname{diag}(\\lambda) h + B u, \\qquad y = 2 \\operatorname{Re} C h + D u,

    with :math:`\\lambda = -e^{\\text{log\\_decay}} + i\\,\\text{frequency}`, discretised with
    :math:`\\Delta_t = e^{\\text{log\\_step}} dt_t` (one step a state), exactly at each step: irregular gaps cost
    nothing more. Always stable.

    Args:
        features: channels.
        state_size: P, even and a multiple of ``2 * num_blocks``; P / 2 complex states.
        num_blocks: the first matrix has that many blocks of HiPPO-LegS's normal part.
        method: ``"zoh"`` or ``"bilinear"``.
        step_range: first steps lie between these.

    State: ``(..., P / 2)`` complex. Randomness: first values, from torch's generator.

    Source: J. T. H. Smith, A. Warrington, S. W. Linderman (2023), Simplified state space layers for sequence modeling.

    >>> import torch
    >>> from pyro_ssm.blocks import S5
    >>> S5(3, state_size=8)(torch.zeros(2, 5, 3), dt=torch.rand(2, 5))[1].shape
    torch.Size([2, 4])
    """

    event_dims: ClassVar[Mapping[str, int]] = {**_MIXED_DIMS, "log_decay": 1, "frequency": 1, "log_step": 1}
    slow_parameters = ("log_step", "log_decay", "frequency", "B_real", "B_imag")

    def __init__(
        self,
        features: int,
        state_size: int = 64,
        num_blocks: int = 1,
        method: str = "zoh",
        step_range: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__()
        self.in_features = self.out_features = self.features = check_size("features", features)
        self.state_size = check_size("state_size", state_size, least=2)
        if state_size % (2 * check_size("num_blocks", num_blocks)):
            raise ValueError(f"`state_size` must be a multiple of 2 * num_blocks={2 * num_blocks}, got {state_size}")
        self.num_states, self.method = state_size // 2, check_method(method)
        size, dtype = state_size // num_blocks, torch.get_default_dtype()
        form = NormalPlusLowRank.of("legs", size)
        self.log_decay = nn.Parameter((-form.eigenvalues.real).log().repeat(num_blocks).to(dtype))
        self.frequency = nn.Parameter(form.eigenvalues.imag.repeat(num_blocks).to(dtype))
        self.log_step = nn.Parameter(log_steps(self.num_states, step_range))
        # random real matrices, seen in the basis in which the first matrix is diagonal
        B = torch.randn(num_blocks, size, features, dtype=torch.float64) / features**0.5
        C = torch.randn(num_blocks, features, size, dtype=torch.float64) / state_size**0.5
        B_seen = (form.V.mH @ B.to(form.V.dtype)).flatten(0, 1)
        C_seen = (C.to(form.V.dtype) @ form.V).movedim(0, 1).flatten(1)
        self.B_real, self.B_imag = nn.Parameter(B_seen.real.to(dtype)), nn.Parameter(B_seen.imag.to(dtype))
        self.C_real, self.C_imag = nn.Parameter(C_seen.real.to(dtype)), nn.Parameter(C_seen.imag.to(dtype))
        self.direct = nn.Parameter(torch.randn(features))

    def _factors(self, gap: Tensor | None) -> tuple[Tensor, Tensor]:
        step = wide(self.log_step).exp()
        step = step if step.dim() > 1 else step.unsqueeze(0)
        step = step if gap is None else step * gap.unsqueeze(-1)
        eigenvalues = complex_of(-self.log_decay.exp(), self.frequency)
        if self.method == "zoh":  # no eigenvalue is 0, so that a step of 0 is no exception
            grown = torch.expm1(eigenvalues * step)
            return grown + 1, grown * eigenvalues.reciprocal()
        return discretise(eigenvalues * step, step, self.method)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self.features}, state_size={self.state_size}, method={self.method!r}"


class LRU(_Mixed):
    """The linear recurrent unit: a stable diagonal recurrence whose states keep unit size.

    .. math::
        h_t = \\lambda^{dt_t} h_{t-1} + \\sqrt{1 - |\\lambda|^{2 dt_t}}\\, B u_t, \\quad
        y_t = \\operatorname{Re} C h_t + D u_t, \\quad
        \\lambda = \\exp(-e^{\\nu} + i e^{\\theta})

    The input's factor is that of the paper at :math:`dt = 1`; at other gaps it keeps the states of white input at unit
    variance, as an Ornstein-Uhlenbeck process does. Always stable.

    Args:
        features: channels.
        state_size: complex states.
        radius: first :math:`|\\lambda|` lie in this ring.
        largest_phase: first phases lie between 0 and this.

    State: ``(..., state_size)`` complex. Randomness: first values, from torch's generator.

    Source: A. Orvieto, S. L. Smith, A. Gu, A. Fernando, C. Gulcehre, R. Pascanu, S. De (2023), Resurrecting recurrent
    neural networks for long sequences, section 3.

    >>> import torch
    >>> from pyro_ssm.blocks import LRU
    >>> LRU(3, state_size=8)(torch.zeros(2, 5, 3))[1].shape
    torch.Size([2, 8])
    """

    event_dims: ClassVar[Mapping[str, int]] = {**_MIXED_DIMS, "nu": 1, "theta": 1}
    slow_parameters = ("nu", "theta", "B_real", "B_imag")
    read = 1.0

    def __init__(
        self,
        features: int,
        state_size: int = 64,
        radius: tuple[float, float] = (0.9, 0.999),
        largest_phase: float = 2 * math.pi,
    ) -> None:
        super().__init__()
        self.in_features = self.out_features = self.features = check_size("features", features)
        self.state_size = self.num_states = check_size("state_size", state_size)
        low, high = radius
        if not 0 <= low < high < 1:
            raise ValueError(f"`radius` must be 0 <= low < high < 1 (a stable recurrence), got {radius}")
        size = torch.empty(state_size).uniform_(low**2, high**2).sqrt()  # uniform on the ring
        self.nu = nn.Parameter((-size.log()).log())
        self.theta = nn.Parameter(torch.empty(state_size).uniform_(1e-4, 1).mul(largest_phase).log())
        B, C = torch.randn(2, state_size, features), torch.randn(2, features, state_size)
        self.B_real, self.B_imag = (nn.Parameter(m / (2 * features) ** 0.5) for m in B)
        self.C_real, self.C_imag = (nn.Parameter(m / state_size**0.5) for m in C)
        self.direct = nn.Parameter(torch.randn(features))

    def _factors(self, gap: Tensor | None) -> tuple[Tensor, Tensor]:
        decay, turn = wide(self.nu).exp(), wide(self.theta).exp()
        decay, turn = (x if x.dim() > 1 else x.unsqueeze(0) for x in (decay, turn))
        if gap is not None:
            decay, turn = decay * gap.unsqueeze(-1), turn * gap.unsqueeze(-1)
        still = decay == 0  # the square root has no derivative where a step is skipped
        left = -torch.expm1(-2 * torch.where(still, torch.ones_like(decay), decay))
        return complex_of(-decay, turn).exp(), torch.where(still, torch.zeros_like(left), left.sqrt())

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self.features}, state_size={self.state_size}"
