"""Blocks that multiply: H3, and the liquid S4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._sequence import wide
from pyro_ssm.blocks.linear import Linear
from pyro_ssm.blocks.s4d import S4D
from pyro_ssm.blocks.structured import StructuredBlock, gap_of
from pyro_ssm.ops import causal_conv1d, discretise, linear_scan
from pyro_ssm.ops.recompute import recomputed_scan

__all__ = ["H3", "LiquidS4"]


class H3(StructuredBlock):
    """The hungry hungry hippo: a shift and a diagonal state space between products, as in linear attention.

    .. math::
        (q, k, v) = W u, \\qquad
        y = W_o \\Big(q \\odot \\text{SSM}_{\\text{diag}}\\big(\\text{SSM}_{\\text{shift}}(k) \\otimes v\\big)\\Big)

    in heads of ``head_size`` channels, whose products are outer ones; the shift is a short causal convolution. Gaps
    reach the diagonal part (:class:`S4D`); the shift counts steps.

    Args:
        features: channels, a multiple of ``head_size``.
        state_size: N of the diagonal part, even.
        shift_size: steps that the shift sees.
        head_size: channels a head; the diagonal part has ``features * head_size`` channels.
        step_range: first steps lie between these.

    State: ``(last keys (..., shift_size - 1, features), state of the diagonal part)``. Randomness: first values.

    Source: D. Y. Fu, T. Dao, K. K. Saab, A. W. Thomas, A. Rudra, C. Re (2023), Hungry hungry hippos, section 3.

    >>> import torch
    >>> from pyro_ssm.blocks import H3
    >>> H3(4, state_size=8)(torch.zeros(2, 5, 4))[0].shape
    torch.Size([2, 5, 4])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"shift": 2}
    mixes_channels = True

    def __init__(
        self,
        features: int,
        state_size: int = 64,
        shift_size: int = 4,
        head_size: int = 1,
        step_range: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__()
        self.in_features = self.out_features = self.features = check_size("features", features)
        self.shift_size, self.head_size = check_size("shift_size", shift_size), check_size("head_size", head_size)
        if features % head_size:
            raise ValueError(f"`head_size` must divide features={features}, got {head_size}")
        self.enter = Linear(features, 3 * features)
        self.shift = nn.Parameter(torch.randn(features, shift_size) / shift_size**0.5)
        self.diagonal = S4D(features * head_size, state_size, "legs", step_range=step_range)
        self.leave = Linear(features, features)

    def start(self, shape: torch.Size | tuple[int, ...]) -> tuple[Tensor, Tensor]:
        keys = self.shift.new_zeros((*shape, self.shift_size - 1, self.features))
        return keys, self.diagonal.start(shape)

    def _run(
        self, u: Tensor, state: Any, dt: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Any]:
        before, inner = (None, None) if state is None else state
        q, k, v = (x.unflatten(-1, (-1, self.head_size)) for x in self.enter(u).chunk(3, -1))  # (..., heads, size)
        k, keys = causal_conv1d(k.flatten(-2), self.shift, initial=before, mask=mask, reset=reset)
        product = k.unflatten(-1, (-1, self.head_size)).unsqueeze(-1) * v.unsqueeze(-2)
        kept, inner = self.diagonal(product.flatten(-3), inner, dt, mask, reset)
        kept = kept.unflatten(-1, product.shape[-3:])
        return self.leave((q.unsqueeze(-2) @ kept).flatten(-3)), (keys, inner)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self.features}, head_size={self.head_size}"


class LiquidS4(S4D):
    """A liquid time-constant state space: the input also moves the state matrix.

    .. math::
        h_t = (\\bar a_t + \\bar b_t u_t) \\odot h_{t-1} + \\bar b_t u_t, \\qquad
        y_t = 2 \\operatorname{Re} C h_t + D u_t,

    with :math:`\\bar a, \\bar b` those of :class:`S4D` for :math:`B`. It is computed as the recurrence that it is (all
    orders of the input's correlations; the paper's kernel sums the first few). Large inputs can make it unstable:
    normalise what goes in.

    Args:
        features: channels.
        state_size: N, even.
        method: ``"zoh"`` or ``"bilinear"``.
        step_range: first steps lie between these.

    State: ``(..., features, N / 2)`` complex, computed again in the backward pass.

    Source: R. Hasani, M. Lechner, T.-H. Wang, M. Chahine, A. Amini, D. Rus (2023), Liquid structural state-space
    models, section 3.

    >>> import torch
    >>> from pyro_ssm.blocks import LiquidS4
    >>> LiquidS4(3, state_size=8)(torch.zeros(2, 5, 3))[0].shape
    torch.Size([2, 5, 3])
    """

    def __init__(
        self,
        features: int,
        state_size: int = 64,
        method: str = "bilinear",
        step_range: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__(features, state_size, "legs", method, step_range)

    def _run(
        self, u: Tensor, state: Any, dt: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Any]:
        gap = gap_of(u, dt, mask)
        y, state = self._system(wide(u), None if gap is None else wide(gap), state, reset)
        return self._with_direct(y, u), state

    def _system(
        self, u: Tensor, gap: Tensor | None, state: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        A, B, C = self._matrices()
        A, B, C = (m if m.dim() > 2 else m.unsqueeze(0) for m in (A, B, C))
        step = self._step(gap)
        step = step.expand(step.shape[:-2] + u.shape[-2:])
        shapes = [u.shape[:-2], step.shape[:-2], A.shape[:-3], C.shape[:-3]]
        shapes += ([] if state is None else [state.shape[:-2]]) + ([] if reset is None else [reset.shape[:-1]])
        lead = torch.broadcast_shapes(*shapes)
        first = self.start(lead) if state is None else state.expand(lead + state.shape[-2:])
        if u.shape[-2] == 0:
            return u.new_zeros(lead + u.shape[-2:]), first
        keep = u.new_ones(u.shape[-2]) if reset is None else (~reset).to(u.dtype)

        def chunk(
            h: Tensor, u: Tensor, step: Tensor, keep: Tensor, A: Tensor, B: Tensor, C: Tensor
        ) -> tuple[Tensor, Tensor]:
            delta = step.unsqueeze(-1)
            a, w = discretise(delta * A, delta, self.method)
            b = w * B * u.unsqueeze(-1)
            a = (a + b) * keep[..., None, None]
            h_all = linear_scan(a.flatten(-2), b.flatten(-2), h.flatten(-2)).unflatten(-1, h.shape[-2:])
            return 2 * (C * h_all).sum(-1).real, h_all[..., -1, :, :]

        tensors, times = [u, step, keep, A, B, C], [-2, -2, -1, None, None, None]
        return recomputed_scan(chunk, first, tensors, times, first.numel())
