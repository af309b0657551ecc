"""Linear oscillatory state spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_choice, check_size
from pyro_ssm.blocks.linear import linear
from pyro_ssm.blocks.structured import StructuredBlock, gap_of
from pyro_ssm.ops import scan2x2

__all__ = ["LinOSS"]


class LinOSS(StructuredBlock):
    """Forced harmonic oscillators, discretised so that they neither blow up nor lose their energy by accident.

    .. math::
        \\ddot x = -A x + B u, \\qquad y = C x + D u, \\qquad A = \\max(\\text{stiffness}, 0)

    With :math:`v = \\dot x` and :math:`\\Delta_t = \\sigma(\\text{raw\\_step}) dt_t`,

    .. math::
        v_t = v_{t-1} + \\Delta_t (-A x_{s} + B u_t), \\qquad x_t = x_{t-1} + \\Delta_t v_t,

    where "im" (implicit) takes :math:`s = t`: it dissipates and is stable for every step, irregular ones too; "imex"
    (implicit-explicit) takes :math:`s = t - 1`: it is symplectic, and stable as long as :math:`\\Delta_t^2 A \\le 4`,
    which the first values keep for gaps up to 2. An oscillator whose stiffness has come to 0 is a free particle: it
    does not blow up by itself, and integrates its input twice.

    Args:
        features: channels.
        state_size: oscillators.
        method: ``"im"`` or ``"imex"``.

    State: ``(..., state_size, 2)`` real, v and x. Randomness: first values, from torch's generator.

    Source: T. K. Rusch, D. Rus (2025), Oscillatory state-space models, sections 2 and 3.

    >>> import torch
    >>> from pyro_ssm.blocks import LinOSS
    >>> LinOSS(3, state_size=8)(torch.zeros(2, 5, 3))[1].shape
    torch.Size([2, 8, 2])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"stiffness": 1, "raw_step": 1, "B": 2, "C": 2, "direct": 1}
    slow_parameters = ("stiffness", "raw_step", "B")

    def __init__(self, features: int, state_size: int = 64, method: str = "im") -> None:
        super().__init__()
        self.in_features = self.out_features = self.features = check_size("features", features)
        self.state_size = check_size("state_size", state_size)
        self.method = check_choice("method", method, ("im", "imex"))
        self.stiffness, self.raw_step = nn.Parameter(torch.rand(state_size)), nn.Parameter(torch.randn(state_size))
        self.B = nn.Parameter(torch.randn(state_size, features) / features**0.5)
        self.C = nn.Parameter(torch.randn(features, state_size) / state_size**0.5)
        self.direct = nn.Parameter(torch.randn(features))

    def start(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        return self.direct.new_zeros((*shape, self.state_size, 2))

    def _run(
        self, u: Tensor, state: Any, dt: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Any]:
        gap = gap_of(u, dt, mask)
        step = self.raw_step.sigmoid()
        step = step if step.dim() > 1 else step.unsqueeze(0)
        step = step if gap is None else step * gap.unsqueeze(-1)
        matrix, drive = self._move(self.stiffness.relu(), step, linear(u, self.B))
        h = scan2x2(matrix, drive, state, reset=reset)
        y = linear(h[..., 1], self.C) + u * self.direct
        if h.shape[-3] == 0:
            return y, self.start(h.shape[:-3]) if state is None else state
        return y, h[..., -1, :, :]

    def _move(self, A: Tensor, step: Tensor, force: Tensor) -> tuple[Tensor, Tensor]:
        """:math:`M` ``(..., time, states, 2, 2)`` and :math:`f` ``(..., time, states, 2)``."""
        push = step * force
        if self.method == "imex":
            one = torch.ones_like(step * A)
            rows = [one, -step * A * one, step * one, 1 - step.square() * A]
            return torch.stack(rows, -1).unflatten(-1, (2, 2)), torch.stack([push, step * push], -1)
        shrink = 1 / (1 + step.square() * A)
        rows = [shrink, -step * A * shrink, step * shrink, shrink]
        return torch.stack(rows, -1).unflatten(-1, (2, 2)), torch.stack([shrink * push, shrink * step * push], -1)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self.features}, state_size={self.state_size}, method={self.method!r}"
