"""Structured blocks upon each other, and in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_choice, check_size
from pyro_ssm.blocks.linear import Linear
from pyro_ssm.blocks.norm import Norm
from pyro_ssm.blocks.structured import StructuredBlock

__all__ = ["ResidualStack"]


class ResidualStack(StructuredBlock):
    """Blocks upon each other, each with its norm, its mixing of channels, its dropout, and a way around it.

    .. math::
        x_0 = W_{in} u, \\qquad
        x_i = x_{i-1} + \\text{dropout}\\big(\\text{mix}_i(\\text{block}_i(\\text{norm}_i(x_{i-1})))\\big), \\qquad
        y = W_{out} \\operatorname{norm}(x_n)

    mix "glu" is :math:`(W g) \\odot \\sigma(V g)` of :math:`g = \\operatorname{gelu}(\\cdot)`; "linear" is
    :math:`W g`; "none" leaves the block as it is. Banks (S4, S4D, DSS, LSSL) mix no channels themselves and want "glu";
    Mamba, Mamba2 and H3 mix inside and want "none", which is what "auto" chooses.

    Args:
        blocks: structured blocks of one number of features.
        in_features: of the sequence that comes in; default that of the blocks, without :math:`W_{in}`.
        out_features: of the result; default that of the blocks, without :math:`W_{out}`.
        mixing: ``"auto"``, ``"glu"``, ``"linear"`` or ``"none"``.
        norm: ``"layer"``, ``"rms"`` or ``"none"``.
        dropout: while training; random from torch's generator, so that steps and sequence agree in evaluation mode.

    State: the tuple of the blocks' states.

    >>> import torch
    >>> from pyro_ssm.blocks import Mamba, ResidualStack
    >>> stack = ResidualStack([Mamba(8), Mamba(8)], in_features=2, out_features=3)
    >>> stack(torch.zeros(4, 5, 2))[0].shape
    torch.Size([4, 5, 3])
    """

    mixes_channels = True

    def __init__(
        self,
        blocks: Sequence[StructuredBlock],
        in_features: int | None = None,
        out_features: int | None = None,
        *,
        mixing: str = "auto",
        norm: str = "layer",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        blocks = list(blocks)
        if not blocks or not all(isinstance(block, StructuredBlock) for block in blocks):
            kinds = [type(block).__name__ for block in blocks]
            raise TypeError(f"`blocks` must be a sequence of structured blocks, got {kinds}")
        sizes = {size for block in blocks for size in (block.in_features, block.out_features)}
        if len(sizes) > 1:
            raise ValueError(f"`blocks` must have one number of features, got {sorted(sizes)}")
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {dropout}")
        size = sizes.pop()
        check_choice("mixing", mixing, ("auto", "glu", "linear", "none"))
        check_choice("norm", norm, ("layer", "none", "rms"))
        self.in_features = size if in_features is None else check_size("in_features", in_features)
        self.out_features = size if out_features is None else check_size("out_features", out_features)
        self.features, self.dropout = size, dropout
        self.mixings = tuple(_mixing(block) if mixing == "auto" else mixing for block in blocks)
        self.enter = None if in_features is None else Linear(in_features, size)
        self.leave = None if out_features is None else Linear(size, out_features)
        modules: Any = PyroModule[nn.ModuleList]  # mypy does not know this class factory
        self.blocks = modules(blocks)
        self.norms = modules([] if norm == "none" else [Norm(size, norm) for _ in range(len(blocks) + 1)])
        self.mixes = modules(
            [Linear(size, 2 * size if kind == "glu" else size) for kind in self.mixings if kind != "none"]
        )

    def start(self, shape: torch.Size | tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(block.start(shape) for block in self.blocks)

    def _run(
        self, u: Tensor, state: Any, dt: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Any]:
        states = [None] * len(self.blocks) if state is None else state
        x = u if self.enter is None else self.enter(u)
        norms, mixes, after = list(self.norms), iter(self.mixes), []
        for i, (block, kind, before) in enumerate(zip(self.blocks, self.mixings, states, strict=True)):
            y, new = block(norms[i](x) if norms else x, before, dt, mask, reset)
            after.append(new)
            if kind != "none":
                y = next(mixes)(F.gelu(y))
                y = F.glu(y, -1) if kind == "glu" else y
            x = x + F.dropout(y, self.dropout, self.training)
        x = norms[-1](x) if norms else x
        return (x if self.leave is None else self.leave(x)), tuple(after)


def _mixing(block: StructuredBlock) -> str:
    return "none" if block.mixes_channels else "glu"
