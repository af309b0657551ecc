"""Structured blocks over ragged batches, from the past, from the future, or both: encoders of guides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_ssm.blocks._checks import check_choice, check_size
from pyro_ssm.blocks.recurrent import reversal, take, valid_steps
from pyro_ssm.blocks.stack import ResidualStack
from pyro_ssm.blocks.structured import StructuredBlock

__all__ = ["Bidirectional"]


class Bidirectional(PyroModule):
    """One structured block that reads a sequence from its past, and one that reads it from its future.

    .. math::
        \\overrightarrow{h}_{1:n} = \\text{past}(x_{1:n}), \\qquad
        \\overleftarrow{h}_{n:1} = \\text{future}(x_{n:1}) \\text{ within each series' own length } n

    It has the calls of :class:`RecurrentEncoder`: what stands in padding (NaN included) changes no output and no
    gradient, and outputs there are 0. The future direction sees the gap *after* each step, 1 after the last.

    Args:
        past: a block, or None.
        future: another of the same sizes, or None; one of the two is there.

    Raises:
        ValueError: neither is there, or their sizes differ.

    >>> import torch
    >>> from pyro_ssm.blocks import Bidirectional, S5
    >>> encoder = Bidirectional.of(S5, in_features=3, hidden_dim=8)
    >>> past, future = encoder(torch.zeros(2, 5, 3), torch.tensor([5, 2]))
    >>> past.shape, bool((future[1, 2:] == 0).all())
    (torch.Size([2, 5, 8]), True)
    """

    def __init__(self, past: StructuredBlock | None, future: StructuredBlock | None) -> None:
        super().__init__()
        given = [block for block in (past, future) if block is not None]
        sizes = {(block.in_features, block.out_features) for block in given}
        if len(sizes) != 1:
            raise ValueError(f"`past` and `future` must be blocks of the same sizes, one of them at least; got {sizes}")
        if past is not None and past is future:
            raise ValueError("`past` and `future` must be two blocks; got the same one twice")
        ((self.in_features, self.hidden_dim),) = sizes
        self.direction = "both" if len(given) == 2 else "future" if past is None else "past"
        self.past, self.future = past, future

    @classmethod
    def of(
        cls,
        block: Callable[[int], StructuredBlock],
        in_features: int,
        hidden_dim: int,
        direction: str = "both",
        num_layers: int = 1,
        dropout: float = 0.0,
    ) -> Bidirectional:
        """Residual stacks of ``num_layers`` blocks, each ``block(hidden_dim)``, one stack a direction.

        Args:
            block: a block class, or a function of the number of features.
            in_features: features of a step.
            hidden_dim: features of each output.
            direction: ``"past"``, ``"future"`` or ``"both"``.
            num_layers: of each stack.
            dropout: after each block, while training.
        """
        check_choice("direction", direction, ("past", "future", "both"))
        check_size("num_layers", num_layers)

        def stack(name: str) -> StructuredBlock | None:
            if direction not in (name, "both"):
                return None
            return ResidualStack([block(hidden_dim) for _ in range(num_layers)], in_features, dropout=dropout)

        return cls(stack("past"), stack("future"))

    def forward(
        self, features: Tensor, lengths: Tensor | None = None, dt: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The outputs of both directions, None for one that is not there.

        Args:
            features: ``(*batch, time, in)``.
            lengths: ``(*batch,)`` integers, or a bool step mask ``(*batch, time)`` whose steps stand before padding.
            dt: ``(..., time)`` the gap before each step, None where all are 1.

        Returns:
            ``(past, future)``, each ``(*batch, time, hidden)``, 0 in padding.
        """
        if features.dim() < 2 or features.shape[-1] != self.in_features:
            raise ValueError(
                f"Bidirectional has in_features={self.in_features}, got `features` of shape {tuple(features.shape)}"
            )
        batch, steps = features.shape[:-2], features.shape[-2]
        mask = None if lengths is None else valid_steps(lengths, batch, steps)
        past = None if self.past is None else self.past(features, dt=dt, mask=mask)[0]
        if self.future is None:
            return past, None
        # The gap before the step k + 1 is, read backwards, the gap before the step k.
        after = None if dt is None else torch.cat([dt[..., 1:], torch.ones_like(dt[..., :1])], -1)
        if mask is None:
            y = self.future(features.flip(-2), dt=None if after is None else after.flip(-1))[0]
            return past, y.flip(-2)
        valid = mask.reshape(-1, steps, 1)
        order = reversal(valid)
        if after is not None:
            last = mask & ~torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], -1)
            after = torch.where(last, torch.ones_like(after), after).expand(mask.shape)
            after = take(after.reshape(-1, steps, 1), order).reshape(mask.shape)
        turned = take(features.reshape(-1, steps, features.shape[-1]), order).reshape(features.shape)
        y = self.future(turned, dt=after, mask=mask)[0]
        return past, take(y.reshape(-1, steps, y.shape[-1]), order).reshape(y.shape)
