"""A structured block as the memory of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks.structured import StructuredBlock
from pyro_ssm.components import Memory

__all__ = ["BlockMemory"]


class BlockMemory(Memory):
    """A structured block over states, or over states and observations.

    Over states (``obs_dim=0``; what :class:`pyro_ssm.emissions.Structured` brings) the block sees
    :math:`[z_t, u_t]`: the summary after the state is :math:`m'_t = \\text{block}(z_{1:t})_t`, and the summary before
    the next step is the same, :math:`m_t = m'_t`; before the first step it is 0.

    Over observations too (deterministic memory for transitions, as a recurrent network is in a VRNN) the block sees
    :math:`[m_t \\odot y_t, m_t, z_t, u_t]` when the observation is seen, and both summaries of a step are the block's
    output after the step before. A missing entry enters as 0 beside its mask: it is *skipped*, not marginalised.

    Gaps are the block's ``dt``, so that time between observations counts.

    Args:
        block: its ``in_features`` is ``state_dim + input_dim``, or ``2 * obs_dim + state_dim + input_dim``. It becomes
            part of this memory.
        state_dim: of the states that it sees; 0 for a memory of observations only.
        obs_dim: of the observations that it sees; 0 for a memory of states only.
        input_dim: columns of ``inputs`` that it sees.
        use_gaps: whether the block is told the gaps; False counts steps (and lets a regular sequence convolve).

    Raises:
        ValueError: the block has another number of features, or sees nothing.

    >>> import torch
    >>> from pyro_ssm.blocks import BlockMemory, S5
    >>> memory = BlockMemory(S5(2, state_size=8), state_dim=2)
    >>> carry, summary = memory.start((3,))
    >>> memory.see_state(carry, torch.ones(3, 1, 2), torch.ones(3, 1, 1), None)[1].shape
    torch.Size([3, 1, 2])
    """

    def __init__(
        self, block: StructuredBlock, state_dim: int = 0, obs_dim: int = 0, input_dim: int = 0, *, use_gaps: bool = True
    ) -> None:
        super().__init__()
        if not isinstance(block, StructuredBlock):
            raise TypeError(
                f"`block` must be a structured block (blocks.S4D, blocks.Mamba ...), got {type(block).__name__}"
            )
        self.state_dim = check_size("state_dim", state_dim, least=0)
        self.obs_dim = check_size("obs_dim", obs_dim, least=0)
        self.input_dim = check_size("input_dim", input_dim, least=0)
        if not state_dim and not obs_dim:
            raise ValueError("a memory must see something: give `state_dim`, `obs_dim`, or both")
        seen = 2 * obs_dim + state_dim + input_dim
        if block.in_features != seen:
            raise ValueError(
                f"`block` has in_features={block.in_features}, and this memory sees {seen} columns (2 * obs_dim + "
                f"state_dim + input_dim). Put a linear map before it: blocks.ResidualStack([block], in_features={seen})"
            )
        self.block, self.use_gaps = block, use_gaps
        self.features, self.sees_observations = block.out_features, obs_dim > 0

    def start(self, shape: torch.Size | tuple[int, ...]) -> tuple[Any, Tensor]:
        like = next(self.block.parameters())
        summary = torch.zeros((*shape, 1, self.features), dtype=like.dtype, device=like.device)
        return (self.block.start(shape), summary, None), summary

    def see_state(self, carry: Any, state: Tensor, gap: Tensor, inputs: Tensor | None) -> tuple[Any, Tensor]:
        held, summary, _ = carry
        seen = self._seen(state, inputs)
        dt = gap.squeeze(-1).expand(state.shape[:-1])
        if self.sees_observations:
            return (held, summary, (seen, dt)), summary
        summary, held = self._run(seen, held, dt)
        return (held, summary, None), summary

    def see_observation(self, carry: Any, values: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
        held, _, (seen, dt) = carry
        summary, held = self._run(self._with_observation(seen, values, mask), held, dt)
        return (held, summary, None), summary

    def sequence(
        self,
        states: Tensor,
        values: Tensor | None,
        mask: Tensor | None,
        gap: Tensor,
        inputs: Tensor | None,
        carry: Any = None,
    ) -> tuple[Tensor, Tensor, Any]:
        held, last = (None, self.start(states.shape[:-2])[1]) if carry is None else carry[:2]
        seen = self._seen(states, inputs)
        if self.sees_observations:
            if values is None or mask is None:
                raise ValueError("BlockMemory sees observations: `values` and `mask` are needed, got None")
            seen = self._with_observation(seen, values, mask)
        after, held = self._run(seen, held, gap.squeeze(-1))
        before = torch.cat([last.expand(after.shape[:-2] + last.shape[-2:]), after[..., :-1, :]], -2)
        carry = (held, after[..., -1:, :], None)
        return before, (before if self.sees_observations else after), carry

    def _run(self, seen: Tensor, held: Any, dt: Tensor) -> tuple[Tensor, Any]:
        return self.block(seen, held, dt=dt if self.use_gaps else None)

    def _seen(self, state: Tensor, inputs: Tensor | None) -> Tensor:
        parts = [state if self.state_dim else state[..., :0]]
        if self.input_dim:
            if inputs is None or inputs.shape[-1] != self.input_dim:
                got = "None" if inputs is None else f"shape {tuple(inputs.shape)}"
                raise ValueError(f"BlockMemory was built with input_dim={self.input_dim}, got `inputs` {got}")
            parts.append(inputs.to(state.dtype).expand(state.shape[:-1] + inputs.shape[-1:]))
        return torch.cat(parts, -1)

    def _with_observation(self, seen: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        there = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
        observed = torch.cat([there, mask.to(values.dtype)], -1)
        lead = torch.broadcast_shapes(observed.shape[:-1], seen.shape[:-1])
        return torch.cat([observed.expand(lead + observed.shape[-1:]), seen.expand(lead + seen.shape[-1:])], -1)
