"""S4: state spaces that are diagonal plus low rank; LSSL: dense ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyro_ssm.blocks._sequence import complex_dtype, wide
from pyro_ssm.blocks.structured import BANK_DIMS, Bank, complex_of
from pyro_ssm.ops import NormalPlusLowRank, dense_lti, dplr_lti, dplr_scan, hippo
from pyro_ssm.ops.recompute import recomputed_scan

__all__ = ["LSSL", "S4"]

_KERNEL_FROM = 8  # steps
_SLOWEST_DECAY = 1e-4  # where the normal part has no decay of its own, its logarithm needs one


class S4(Bank):
    """A bank of state spaces :math:`A = \\Lambda - P P^*`, begun as a HiPPO matrix.

    .. math::
        \\dot h = (\\operatorname{diag}(\\Lambda) - P P^*) h + B u, \\quad y = 2 \\operatorname{Re} C h + D u,

    by the bilinear discretisation with :math:`\\Delta_t = e^{\\text{log\\_step}} dt_t`, exactly at each step. Always
    stable: the real parts of :math:`\\Lambda` are negative. A regular sequence, with resets or without, runs
    :func:`~pyro_ssm.ops.dplr_lti`, at a cost of N a step; irregular gaps run the recurrence step by step, which is much
    slower (:class:`S4D` has no such cost).

    Args:
        features: channels.
        state_size: N, even.
        measure: ``"legs"``, ``"legt"``, ``"lagt"`` or ``"fourier"`` (see :func:`~pyro_ssm.ops.hippo`).
        step_range: first steps lie between these.

    State: ``(..., features, N / 2)`` complex. Randomness: first values, from torch's generator. Without the compiled
    operators, or on another device, a regular sequence is a convolution with the kernel of
    :func:`~pyro_ssm.ops.dplr_kernel`, which takes dense products of ``N x N`` matrices a channel.

    Source: A. Gu, K. Goel, C. Re (2022), Efficiently modeling long sequences with structured state spaces; K. Goel, A.
    Gu, C. Donahue, C. Re (2022), It's raw! (the sign of :math:`P P^*`).

    >>> import torch
    >>> from pyro_ssm.blocks import S4
    >>> S4(3, state_size=8)(torch.zeros(2, 5, 3))[1].shape
    torch.Size([2, 3, 4])
    """

    event_dims: ClassVar[Mapping[str, int]] = {
        **BANK_DIMS,
        "log_decay": 2,
        "frequency": 2,
        "P_real": 3,
        "P_imag": 3,
        "B_real": 2,
        "B_imag": 2,
        "C_real": 2,
        "C_imag": 2,
    }
    slow_parameters = ("log_step", "log_decay", "frequency", "P_real", "P_imag", "B_real", "B_imag")

    def __init__(
        self,
        features: int,
        state_size: int = 64,
        measure: str = "legs",
        step_range: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__(features, state_size, step_range)
        form, dtype = NormalPlusLowRank.of(measure, state_size), torch.get_default_dtype()
        self.measure = measure

        def parameter(x: Tensor) -> nn.Parameter:
            return nn.Parameter(x.to(dtype).expand((features, *x.shape)).clone())

        self.log_decay = parameter((-form.eigenvalues.real).clamp(min=_SLOWEST_DECAY).log())
        self.frequency = parameter(form.eigenvalues.imag)
        self.P_real, self.P_imag = parameter(form.P.real), parameter(form.P.imag)
        self.B_real, self.B_imag = parameter(form.B.real), parameter(form.B.imag)
        C = torch.randn(2, features, state_size // 2) * 0.5**0.5
        self.C_real, self.C_imag = nn.Parameter(C[0].to(dtype)), nn.Parameter(C[1].to(dtype))

    def start(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        return torch.zeros(
            (*shape, self.features, self.state_size // 2),
            dtype=complex_dtype(self.log_step.dtype),
            device=self.log_step.device,
        )

    def _system(
        self, u: Tensor, gap: Tensor | None, state: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        eigenvalues = complex_of(-self.log_decay.exp(), self.frequency)
        P, B = complex_of(self.P_real, self.P_imag), complex_of(self.B_real, self.B_imag)
        C, step = complex_of(self.C_real, self.C_imag), self._step(gap)
        if gap is None:
            eigenvalues, B, C = (m if m.dim() == 2 else m.squeeze(-3) for m in (eigenvalues, B, C))
            P = P if P.dim() == 3 else P.squeeze(-4)
            return dplr_lti(u, step.squeeze(-2), eigenvalues, P, B, C, state, reset)
        state = self.start(()) if state is None else state
        return dplr_scan(u, step.expand(step.shape[:-2] + u.shape[-2:]), eigenvalues, P, B, C, state, reset)


class LSSL(Bank):
    """A bank of state spaces that share one dense matrix, begun as a HiPPO matrix; steps are the channels' own.

    .. math::
        \\dot h = A h + B u, \\qquad y = C h + D u, \\qquad
        h_t = (I - \\tfrac{\\Delta_t}{2} A)^{-1} \\big((I + \\tfrac{\\Delta_t}2 A) h_{t-1} + \\Delta_t B u_t\\big),

    with :math:`\\Delta_t = e^{\\text{log\\_step}} dt_t`. A regular sequence runs in blocks of matrix powers, irregular
    gaps and resets by one linear solve a step. Stability is that of the learned :math:`A`: it is not promised.

    Args:
        features: channels.
        state_size: N.
        measure: ``"legs"``, ``"legt"``, ``"lagt"`` or ``"fourier"`` (see :func:`~pyro_ssm.ops.hippo`).
        step_range: first steps lie between these.

    State: ``(..., features, N)`` real. The dense baseline against which S4 and S4D are judged: it costs
    :math:`N^2` a step.

    Source: A. Gu, I. Johnson, K. Goel, K. Saab, T. Dao, A. Rudra, C. Re (2021), Combining recurrent, convolutional, and
    continuous-time models with linear state-space layers, section 3.

    >>> import torch
    >>> from pyro_ssm.blocks import LSSL
    >>> LSSL(3, state_size=8)(torch.zeros(2, 5, 3))[1].shape
    torch.Size([2, 3, 8])
    """

    event_dims: ClassVar[Mapping[str, int]] = {**BANK_DIMS, "A": 2, "B": 1, "C": 2}
    slow_parameters = ("log_step", "A", "B")

    def __init__(
        self,
        features: int,
        state_size: int = 32,
        measure: str = "legs",
        step_range: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__(features, state_size, step_range, even=False)
        self.measure = measure
        A, B = (m.to(torch.get_default_dtype()) for m in hippo(measure, state_size))
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.C = nn.Parameter(torch.randn(features, state_size) / state_size**0.5)

    def start(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        return wide(self.log_step.new_zeros((*shape, self.features, self.state_size)))

    def _system(
        self, u: Tensor, gap: Tensor | None, state: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        A, B, C = (wide(m) for m in (self.A, self.B, self.C))
        A, B, C = (m if m.dim() == d else m.squeeze(-d - 1) for m, d in ((A, 2), (B, 1), (C, 2)))
        step = self._step(gap)
        eye = torch.eye(self.state_size, dtype=u.dtype, device=u.device)
        if gap is None and reset is None and u.shape[-2] >= _KERNEL_FROM:
            half = step.squeeze(-2)[..., None, None] / 2  # (..., D, 1, 1)
            A, B = A.unsqueeze(-3), B.unsqueeze(-2).unsqueeze(-1)
            right = torch.cat([eye + half * A, (2 * half * B).expand(half.shape[:-2] + B.shape[-2:])], -1)
            solved = torch.linalg.solve(eye - half * A, right)
            return dense_lti(u, solved[..., :-1], solved[..., -1], C, state)
        step = step.expand(step.shape[:-2] + u.shape[-2:])
        shapes = [u.shape[:-2], step.shape[:-2], A.shape[:-2], B.shape[:-1], C.shape[:-2]]
        shapes += ([] if state is None else [state.shape[:-2]]) + ([] if reset is None else [reset.shape[:-1]])
        lead = torch.broadcast_shapes(*shapes)
        first = self.start(lead) if state is None else state.expand(lead + state.shape[-2:])
        if u.shape[-2] == 0:
            return u.new_zeros(lead + u.shape[-2:]), first.clone()
        keep = u.new_ones(u.shape[-2]) if reset is None else (~reset).to(u.dtype)

        def chunk(
            h: Tensor, u: Tensor, step: Tensor, keep: Tensor, A: Tensor, B: Tensor, C: Tensor
        ) -> tuple[Tensor, Tensor]:
            outputs = []
            A, B = A.unsqueeze(-3), B.unsqueeze(-2)
            for u_t, step_t, keep_t in zip(u.unbind(-2), step.unbind(-2), keep.unbind(-1), strict=True):
                half = step_t.unsqueeze(-1) / 2  # (..., D, 1)
                h = h * keep_t[..., None, None]
                right = h + half * (A @ h.unsqueeze(-1)).squeeze(-1) + 2 * half * B * u_t.unsqueeze(-1)
                h = torch.linalg.solve(eye - half.unsqueeze(-1) * A, right.unsqueeze(-1)).squeeze(-1)
                outputs.append((C * h).sum(-1))
            return torch.stack(outputs, -2), h

        tensors, times = [u, step, keep, A, B, C], [-2, -2, -1, None, None, None]
        return recomputed_scan(chunk, first, tensors, times, first.numel())
