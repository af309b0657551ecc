"""Observations that depend on the whole course of the state so far, through a structured block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_ssm.blocks import BlockMemory, StructuredBlock
from pyro_ssm.components import Emission

__all__ = ["Structured"]


class Structured(Emission):
    """An emission over :math:`z_{1:t}`: a causal block reads the states, and a head the block.

    .. math:: m'_t = \\text{block}(z_{1:t})_t, \\qquad y_t \\sim \\text{head}(m'_t) \\quad \\text{or} \\quad
        y_t \\sim \\text{head}(z_t, m'_t)

    The latent chain stays Markov; only what is seen has a memory, which this component brings (``.memory``, a
    :class:`~pyro_ssm.blocks.BlockMemory`; the model must not be given another). SVI runs the block over whole
    sequences, filters and forecasts step it, each particle with its own state. On a refined grid the block runs over
    observation times.

    Args:
        block: a structured block, or a stack of them (``blocks.S4D``, ``blocks.Mamba``, ``blocks.ResidualStack`` ...).
            Its ``in_features`` is ``state_dim + input_dim``.
        head: any emission. With ``memory_dim=0`` the block's output takes the place of its state (its ``state_dim`` is
            ``block.out_features``); with ``memory_dim=block.out_features`` it reads the state itself, beside the
            output.
        input_dim: columns of ``inputs`` that the block sees beside the state.
        use_gaps: whether the block is told the true gaps between observations; False counts steps.

    Raises:
        TypeError: a part is not of its kind.
        ValueError: sizes that do not fit.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm import blocks, emissions
    >>> emission = emissions.Structured(
    ...     blocks.ResidualStack([blocks.S5(8)], in_features=2), head=emissions.Normal(state_dim=8, obs_dim=3))
    >>> model = ssm.StateSpaceModel(ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), emission)
    >>> model(ssm.TimeSeries(torch.arange(5.0)))[1].shape
    torch.Size([5, 3])
    """

    def __init__(self, block: StructuredBlock, head: Emission, input_dim: int = 0, *, use_gaps: bool = True) -> None:
        super().__init__()
        if not isinstance(head, Emission):
            raise TypeError(f"`head` must be an emission, got {type(head).__name__}")
        if getattr(head, "memory", None) is not None:
            raise TypeError("`head` brings a memory of its own; a head is an emission without memory")
        if not isinstance(block, StructuredBlock):
            raise TypeError(f"`block` must be a structured block (blocks.S4D ...), got {type(block).__name__}")
        self.state_dim, self.obs_dim, self.input_dim = block.in_features - input_dim, head.obs_dim, input_dim
        self.memory = BlockMemory(block, self.state_dim, input_dim=input_dim, use_gaps=use_gaps)
        self.head_sees_state = bool(getattr(head, "memory_dim", 0))
        if self.head_sees_state:
            wanted = {"memory_dim": block.out_features, "state_dim": self.state_dim}
        else:
            wanted = {"state_dim": block.out_features}
        for name, size in wanted.items():
            if getattr(head, name) != size:
                raise ValueError(
                    f"`head` has {name}={getattr(head, name)}, and the block gives {block.out_features} features of a "
                    f"state of {self.state_dim}: wanted {name}={size}. A head of memory_dim=0 reads the block alone"
                )
        self.head = head

    def forward(self, state: Tensor, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the observations; ``memory`` is the block's output ``(..., time, features)``."""
        if memory is None:
            raise ValueError(
                "emissions.Structured reads its memory, and got memory=None: run it inside a StateSpaceModel, or pass "
                "the summary of `.memory`"
            )
        if self.head_sees_state:
            return self.head(state, time, inputs, memory=memory)
        return self.head(memory, time, inputs)
