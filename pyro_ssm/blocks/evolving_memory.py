"""An evolving block as the memory of a model: it crosses the gap before it is asked for a prediction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks.evolving import EvolvingBlock
from pyro_ssm.components import Memory

__all__ = ["EvolvingMemory"]


class EvolvingMemory(Memory):
    """What an evolving block knows of past observations, carried up to the time of the next one.

    .. math::
        m'_k = h_k^- = \\text{evolve}(h_{k-1}, \\Delta_k), \\qquad
        m_k = h_k = \\text{see}(h_k^-, [m_k \\odot y_k, m_k, u_k])

    The summary after the state is :math:`h_k^-`, which an emission reads to predict :math:`y_k`; the summary before it
    is :math:`h_{k-1}`. The states of the model are not seen. A missing observation is *skipped*.

    Args:
        block: an evolving block that begins with ``obs_dim`` values and their mask, of ``2 * obs_dim + input_dim``
            columns. It becomes part of this memory.
        input_dim: columns of ``inputs`` that the block sees when it sees the observation.

    Raises:
        TypeError: the block is none, or moves only when the next observation is known.
        ValueError: sizes that do not fit.

    >>> import torch
    >>> from pyro_ssm.blocks import GRUD, EvolvingMemory
    >>> memory = EvolvingMemory(GRUD(obs_dim=2, hidden_dim=8))
    >>> carry, before = memory.start((3,))
    >>> carry, predicted = memory.see_state(carry, torch.zeros(3, 1, 0), torch.ones(3, 1, 1), None)
    >>> predicted.shape
    torch.Size([3, 1, 8])
    """

    sees_observations = True

    def __init__(self, block: EvolvingBlock, input_dim: int = 0) -> None:
        super().__init__()
        if not isinstance(block, EvolvingBlock):
            raise TypeError(
                f"`block` must be an evolving block (blocks.ODERNN, blocks.GRUD ...), got {type(block).__name__}. "
                "blocks.BlockMemory takes any structured block"
            )
        if not block.foresees:
            raise TypeError(
                f"{type(block).__name__} moves only when the next observation is known, so it predicts nothing: use "
                "interpolation='rectilinear'"
            )
        self.input_dim = check_size("input_dim", input_dim, least=0)
        if block.obs_dim == 0 or block.in_features != 2 * block.obs_dim + input_dim:
            raise ValueError(
                f"`block` has obs_dim={block.obs_dim} and in_features={block.in_features}; a memory gives it values, "
                f"their mask and {input_dim} columns of inputs: wanted obs_dim > 0 and in_features = 2 * obs_dim + "
                f"{input_dim}"
            )
        self.block, self.features = block, block.out_features

    def start(self, shape: torch.Size | tuple[int, ...]) -> tuple[Any, Tensor]:
        held = self.block.start(shape)
        return (held, None), self.block.read(held)

    def see_state(self, carry: Any, state: Tensor, gap: Tensor, inputs: Tensor | None) -> tuple[Any, Tensor]:
        held = self.block.evolve(carry[0], gap)
        return (held, self.inputs_of(inputs, state)), self.block.read(held)

    def see_observation(self, carry: Any, values: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
        held, inputs = carry
        held = self.block.see(held, self.block.prepare(self.columns(values, mask, inputs)))
        return (held, None), self.block.read(held)

    def sequence(
        self,
        states: Tensor,
        values: Tensor | None,
        mask: Tensor | None,
        gap: Tensor,
        inputs: Tensor | None,
        carry: Any = None,
    ) -> tuple[Tensor, Tensor, Any]:
        if values is None or mask is None:
            raise ValueError("EvolvingMemory sees observations: `values` and `mask` are needed, got None")
        held = self.block.start(states.shape[:-2]) if carry is None else carry[0]
        columns = self.columns(values, mask, self.inputs_of(inputs, states))
        rows = [part.split(1, -2) for part in self.block.prepare(columns)]  # one split: see EvolvingBlock
        befores, afters = [], []
        for k in range(states.shape[-2]):
            now = slice(k, k + 1)
            befores.append(self.block.read(held))
            held = self.block.evolve(held, gap[..., now, :])
            afters.append(self.block.read(held))
            held = self.block.see(held, tuple(parts[k] for parts in rows))
        lead = torch.broadcast_shapes(*(x.shape for x in (*befores, *afters)))
        before, after = (torch.cat([x.expand(lead) for x in each], -2) for each in (befores, afters))
        return before, after, (held, None)

    def columns(self, values: Tensor, mask: Tensor, inputs: Tensor | None) -> Tensor:
        """What the block sees of observations, ``(..., time, 2 obs + input)``; sample dims may be absent."""
        there = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
        parts = [there, mask.to(values.dtype)] + ([] if inputs is None else [inputs])
        lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(lead + part.shape[-1:]) for part in parts], -1)

    def inputs_of(self, inputs: Tensor | None, state: Tensor) -> Tensor | None:
        """The inputs that the block sees, None where it sees none."""
        if not self.input_dim:
            return None
        if inputs is None or inputs.shape[-1] != self.input_dim:
            got = "None" if inputs is None else f"shape {tuple(inputs.shape)}"
            raise ValueError(
                f"EvolvingMemory was built with input_dim={self.input_dim}, got `inputs` {got}. Give the data its "
                f"inputs, (*batch, time, {self.input_dim}), or build the model with as many columns as they have"
            )
        return inputs.to(state.dtype).expand(state.shape[:-1] + inputs.shape[-1:])
