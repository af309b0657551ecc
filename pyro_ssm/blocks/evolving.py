"""Blocks whose state moves between observations, and jumps where one is made: encoders of irregular series."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.blocks.structured import StructuredBlock

__all__ = ["EvolvingBlock", "JumpBlock"]


class EvolvingBlock(StructuredBlock):
    """A recurrent network in continuous time: one step is a gap that is crossed, and then what is seen.

    .. math::
        h_k^- = \\text{evolve}(h_{k-1}, \\Delta_k), \\qquad h_k = \\text{see}(h_k^-, u_k), \\qquad y_k = h_k

    It has the calls of every :class:`~pyro_ssm.blocks.StructuredBlock`; ``dt`` is the true gap before each step, in the
    units in which the block was built (1 where it is not given), before the first step too. An
    :class:`~pyro_ssm.blocks.EvolvingMemory` calls the two halves apart, so that a model can predict an observation from
    :math:`h_k^-`.

    With ``obs_dim`` > 0 the first ``2 * obs_dim`` columns of u are values and their mask (1 observed, 0 missing), as
    the encoder of a guide and a memory give them; what stands in a missing value (NaN included) then changes nothing.
    Without it, every column counts.

    A subclass defines ``start``, ``evolve``, ``see`` and ``read``; ``prepare`` may compute for all steps at once what
    does not depend on the state. Tensors of a state, gaps and what is seen have a time axis of 1.

    >>> import torch
    >>> from pyro_ssm.blocks import ODERNN, EvolvingBlock
    >>> block = ODERNN(3, hidden_dim=8)
    >>> state = block.evolve(block.start((2,)), torch.full((2, 1, 1), 0.5))      # half a unit of time, nothing seen
    >>> isinstance(block, EvolvingBlock), block.read(state).shape
    (True, torch.Size([2, 1, 8]))
    """

    #: columns of values, and of their mask, with which u begins
    obs_dim: int = 0
    mixes_channels = True
    state_dims = 2  # a learnable first value may be drawn, which gives ``start(())`` leading dims
    #: whether the state moves before the next observation is known
    foresees: bool = True

    def evolve(self, state: Any, gap: Tensor) -> Any:
        """The state after a gap ``(..., 1, 1)`` in which nothing is seen."""
        raise NotImplementedError(f"{type(self).__name__} must define evolve(state, gap)")

    def see(self, state: Any, seen: tuple[Tensor, ...]) -> Any:
        """The state after an observation, which ``prepare`` has prepared."""
        raise NotImplementedError(f"{type(self).__name__} must define see(state, seen)")

    def read(self, state: Any) -> Tensor:
        """The features ``(..., 1, hidden)`` of a state."""
        raise NotImplementedError(f"{type(self).__name__} must define read(state)")

    def prepare(self, u: Tensor) -> tuple[Tensor, ...]:
        """What ``see`` needs of all steps ``(..., time, in)``; tensors with a time axis before their last dim."""
        return self.observed(u)

    def observed(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (0 where missing), their mask (0 or 1, in the dtype of u), and the other columns."""
        values, mask, rest = u.split([self.obs_dim, self.obs_dim, u.shape[-1] - 2 * self.obs_dim], -1)
        there = mask > 0.5
        return torch.where(there, values, torch.zeros((), dtype=u.dtype, device=u.device)), there.to(u.dtype), rest

    def _run(
        self, u: Tensor, state: Any, dt: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Any]:
        fresh = self.start(u.shape[:-2])
        state = fresh if state is None else state
        gap = u.new_ones(1, 1) if dt is None else None
        # one split: the gradient of each slice would fill a tensor of the whole length
        prepared, outputs = [part.split(1, -2) for part in self.prepare(u)], []
        for k in range(u.shape[-2]):
            now = slice(k, k + 1)
            if reset is not None:
                state = choose(reset[..., now].unsqueeze(-1), fresh, state)
            crossed = self.evolve(state, dt[..., now].unsqueeze(-1) if dt is not None else gap)
            after = self.see(crossed, tuple(rows[k] for rows in prepared))
            state = after if mask is None else choose(mask[..., now].unsqueeze(-1), after, state)
            outputs.append(self.read(state))
        if not outputs:
            return u.new_zeros(u.shape[:-1] + (self.out_features,)), state
        lead = torch.broadcast_shapes(*(y.shape for y in outputs))
        return torch.cat([y.expand(lead) for y in outputs], -2), state


class JumpBlock(EvolvingBlock):
    """An evolving block whose state is one tensor ``(..., 1, hidden)`` with a learnable first value."""

    hidden_dim: int
    first: Tensor

    def start(self, shape: torch.Size | tuple[int, ...]) -> Any:
        return first_state(self.first, tuple(shape))

    def read(self, state: Any) -> Tensor:
        return state

    def where_any(self, mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
        """The new state where any value was observed; everywhere for a block that knows of no mask."""
        return new if self.obs_dim == 0 else torch.where(mask.bool().any(-1, keepdim=True), new, old)


def choose(condition: Tensor, one: Any, other: Any) -> Any:
    """``one`` where True, ``other`` elsewhere, leaf by leaf; leaves ``(..., 1, n)``, condition ``(..., 1, 1)``."""
    if isinstance(one, Tensor):
        return torch.where(condition, one, other)
    return tuple(choose(condition, a, b) for a, b in zip(one, other, strict=True))


def first_state(first: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A first value ``(hidden,)``, or drawn ``(*draws, *plates, 1, hidden)``, for leading dims ``shape``."""
    lead = torch.broadcast_shapes(first.shape[:-1], (*shape, 1))
    return first.expand(lead + first.shape[-1:])
