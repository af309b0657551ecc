"""Selective state spaces: Mamba (S6) and Mamba-2 (SSD)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks.linear import Linear
from pyro_ssm.blocks.norm import Norm
from pyro_ssm.blocks.structured import StructuredBlock, log_steps
from pyro_ssm.ops import causal_conv1d, selective_scan, ssd

__all__ = ["Mamba", "Mamba2"]


class _Convolving(StructuredBlock):
    """A block that begins with a short causal convolution; its state is (last inputs, states)."""

    mixes_channels = True

    def _declare(self, features: int, state_size: int, expand: int, conv_size: int) -> int:
        self.in_features = self.out_features = self.features = check_size("features", features)
        self.state_size = check_size("state_size", state_size)
        self.conv_size = check_size("conv_size", conv_size)
        self.width = check_size("expand", expand) * features
        return self.width

    def _declare_conv(self, channels: int) -> None:
        bound = self.conv_size**-0.5
        self.conv_weight = nn.Parameter(torch.empty(channels, self.conv_size).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def start(self, shape: torch.Size | tuple[int, ...]) -> tuple[Tensor, Tensor]:
        lead = tuple(shape)
        inputs = self.conv_bias.new_zeros((*lead, self.conv_size - 1, self.conv_bias.shape[-1]))
        return inputs, self.conv_bias.new_zeros(lead + self._state_shape())

    def _state_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of what enters: what is convolved, and the rest."""
        raise NotImplementedError

    def _scan(self, x: Tensor, *rest: Tensor, gap: Tensor | None, **steps: Any) -> tuple[Tensor, Tensor]:
        """What follows the convolution: its output and its state."""
        raise NotImplementedError

    def _run(
        self, u: Tensor, state: Any, dt: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Any]:
        before, inner = (None, None) if state is None else state
        x, *rest = self._split(self.enter(u))
        x, inputs = causal_conv1d(x, self.conv_weight, self.conv_bias, initial=before, mask=mask, reset=reset)
        y, inner = self._scan(F.silu(x), *rest, gap=dt, mask=mask, reset=reset, initial=inner)
        return self.leave(y), (inputs, inner)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self.features}, state_size={self.state_size}, conv_size={self.conv_size}"


class Mamba(_Convolving):
    """The Mamba block: a gate, a short convolution, and a selective scan (S6).

    .. math::
        (x, z) = W_{in} u, \\quad \\tilde x = \\operatorname{silu}(\\text{conv}(x)), \\quad
        (\\Delta, B, C) = W_x \\tilde x, \\quad
        y = W_{out} \\big(\\text{selective\\_scan}(\\tilde x, \\Delta, A, B, C, D) \\odot \\operatorname{silu}(z)\\big)

    Time gaps: the step is :math:`dt_t \\operatorname{softplus}(\\cdot)`, a step that the input chooses, multiplied by
    the true gap. The state's decay is then that of the gap; the convolution counts steps, not time, and what the input
    chooses is not told the gap (give it as a feature where it should know).

    Args:
        features: channels.
        state_size: N, states a channel of the inner width.
        expand: the inner width is this many times ``features``.
        conv_size: steps that the convolution sees.
        step_rank: rank of the map to the steps; default ``ceil(features / 16)``.
        step_range: first steps lie between these.

    State: ``(last inputs (..., conv_size - 1, width), states (..., width, N))``. Stable:
    :math:`A = -e^{\\text{log\\_A}}`. Randomness: first values, from torch's generator.

    Source: A. Gu, T. Dao (2023), Mamba: linear-time sequence modeling with selective state spaces, section 3.4.

    >>> import torch
    >>> from pyro_ssm.blocks import Mamba
    >>> Mamba(3, state_size=4)(torch.zeros(2, 5, 3))[1][1].shape
    torch.Size([2, 6, 4])
    """

    event_dims: ClassVar[Mapping[str, int]] = {
        "conv_weight": 2,
        "conv_bias": 1,
        "log_A": 2,
        "step_bias": 1,
        "direct": 1,
    }
    slow_parameters = ("log_A", "step_bias")

    def __init__(
        self,
        features: int,
        state_size: int = 16,
        expand: int = 2,
        conv_size: int = 4,
        step_rank: int | None = None,
        step_range: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__()
        width = self._declare(features, state_size, expand, conv_size)
        self.step_rank = math.ceil(features / 16) if step_rank is None else check_size("step_rank", step_rank)
        self.enter = Linear(features, 2 * width, bias=False)
        self._declare_conv(width)
        self.select = Linear(width, self.step_rank + 2 * state_size, bias=False)
        self.to_step = Linear(self.step_rank, width, bias=False)
        self.step_bias = nn.Parameter(_inverse_softplus(log_steps(width, step_range).exp()))
        self.log_A = nn.Parameter(torch.arange(1.0, state_size + 1).log().expand(width, state_size).clone())
        self.direct = nn.Parameter(torch.ones(width))
        self.leave = Linear(width, features, bias=False)

    def _state_shape(self) -> tuple[int, ...]:
        return self.width, self.state_size

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(2, -1)

    def _scan(self, x: Tensor, *rest: Tensor, gap: Tensor | None, **steps: Any) -> tuple[Tensor, Tensor]:
        (z,) = rest
        low, B, C = self.select(x).split([self.step_rank, self.state_size, self.state_size], -1)
        step, A = self.to_step(low), -self.log_A.exp()
        return selective_scan(x, step, A, B, C, self.direct, z, dt_bias=self.step_bias, softplus=True, gap=gap, **steps)


class Mamba2(_Convolving):
    """The Mamba-2 block: one decay a head, so that chunks are matrix products (SSD).

    .. math::
        (z, x, B, C, \\Delta) &= W_{in} u, \\qquad
        (\\tilde x, \\tilde B, \\tilde C) = \\operatorname{silu}(\\text{conv}(x, B, C)), \\\\
        y &= W_{out} \\operatorname{norm}\\big(
        \\text{ssd}(\\tilde x, \\Delta, A, \\tilde B, \\tilde C, D) \\odot \\operatorname{silu}(z)\\big)

    Time gaps as in :class:`Mamba`: the step that the input chooses is multiplied by the true gap.

    Args:
        features: channels.
        state_size: N.
        expand: the inner width is this many times ``features``.
        head_size: P; the inner width is a multiple of it. Default: the largest divisor of the width up to 64.
        groups: heads of one group share B and C.
        conv_size: steps that the convolution sees.
        step_range: first steps lie between these.

    State: ``(last inputs (..., conv_size - 1, width + 2 groups N), states (..., heads, P, N))``. Stable. Randomness:
    first values, from torch's generator.

    Source: T. Dao, A. Gu (2024), Transformers are SSMs, section 7.

    >>> import torch
    >>> from pyro_ssm.blocks import Mamba2
    >>> Mamba2(4, state_size=8, head_size=4)(torch.zeros(2, 5, 4))[1][1].shape
    torch.Size([2, 2, 4, 8])
    """

    event_dims: ClassVar[Mapping[str, int]] = {
        "conv_weight": 2,
        "conv_bias": 1,
        "log_A": 1,
        "step_bias": 1,
        "direct": 1,
    }
    slow_parameters = ("log_A", "step_bias")

    def __init__(
        self,
        features: int,
        state_size: int = 64,
        expand: int = 2,
        head_size: int | None = None,
        groups: int = 1,
        conv_size: int = 4,
        step_range: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__()
        width = self._declare(features, state_size, expand, conv_size)
        self.head_size = max(p for p in range(1, 65) if width % p == 0) if head_size is None else head_size
        if width % check_size("head_size", self.head_size):
            raise ValueError(f"`head_size` must divide the inner width {width}, got {head_size}")
        self.heads, self.groups = width // self.head_size, check_size("groups", groups)
        if self.heads % groups:
            raise ValueError(f"`groups` must divide the number of heads {self.heads}, got {groups}")
        shared = 2 * groups * state_size
        self.enter = Linear(features, 2 * width + shared + self.heads, bias=False)
        self._declare_conv(width + shared)
        self.step_bias = nn.Parameter(_inverse_softplus(log_steps(self.heads, step_range).exp()))
        self.log_A = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.direct = nn.Parameter(torch.ones(self.heads))
        self.norm = Norm(width, "rms")
        self.leave = Linear(width, features, bias=False)

    def _state_shape(self) -> tuple[int, ...]:
        return self.heads, self.head_size, self.state_size

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        z, x, step = x.split([self.width, self.conv_bias.shape[-1], self.heads], -1)
        return x, z, step

    def _scan(self, x: Tensor, *rest: Tensor, gap: Tensor | None, **steps: Any) -> tuple[Tensor, Tensor]:
        z, step = rest
        shared = self.groups * self.state_size
        x, B, C = x.split([self.width, shared, shared], -1)
        step = F.softplus(step + self.step_bias)
        y, state = ssd(
            x.unflatten(-1, (self.heads, self.head_size)),
            step if gap is None else step * gap.unsqueeze(-1),
            -self.log_A.exp(),
            B.unflatten(-1, (self.groups, self.state_size)),
            C.unflatten(-1, (self.groups, self.state_size)),
            self.direct,
            **steps,
        )
        return self.norm(y.flatten(-2) * F.silu(z)), state


def _inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))
