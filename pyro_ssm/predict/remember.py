"""A model's memory, run through paths and data up to each series' own end, and on from there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.components import Memory
from pyro_ssm.data import TimeSeries
from pyro_ssm.models import StateSpaceModel, history

__all__ = ["Remembered", "remember"]


class Remembered:
    """What a memory holds now: its carry and its summary ``(..., 1, features)``; moved on by what it sees.

    >>> from pyro_ssm.predict.remember import Remembered
    >>> Remembered.__init__.__code__.co_varnames[1:]
    ('memory', 'carry', 'summary')
    """

    def __init__(self, memory: Memory, carry: Any, summary: Tensor) -> None:
        self.memory, self.carry, self.summary = memory, carry, summary

    def see_state(self, state: Tensor, gap: Tensor, inputs: Tensor | None) -> Tensor:
        """See ``state`` ``(..., 1, state)``; returns the summary that the emission gets."""
        self.carry, self.summary = self.memory.see_state(self.carry, state, gap, inputs)
        return self.summary

    def see_observation(self, values: Tensor, mask: Tensor | None = None) -> None:
        """See ``values`` ``(..., 1, obs)`` where ``mask`` is True (default: all), if this memory sees observations."""
        if self.memory.sees_observations:
            mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
            self.carry, self.summary = self.memory.see_observation(self.carry, values, mask)


def remember(bound: StateSpaceModel, states: Tensor, data: TimeSeries) -> Remembered | None:
    """Run the memory through paths and data; None for a model without memory.

    A series that has ended keeps what it had at its own end.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.predict.remember import remember
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> remember(model.bind(), torch.zeros(4, 2), ssm.TimeSeries(torch.arange(4.0), torch.zeros(4, 1))) is None
    True
    """
    run = history(bound, data)
    if run is None:
        return None
    carry, summary = run.start(states.shape[:-2])
    for k in range(states.shape[-2]):
        new_carry, new_summary, _ = run.advance(carry, summary, states[..., k : k + 1, :], k)
        if data.is_ragged:
            alive = data.step_mask[..., k]
            lead = states.dim() - 2
            new_carry, new_summary = _where(alive, (new_carry, new_summary), (carry, summary), lead)
        carry, summary = new_carry, new_summary
    return Remembered(run.memory, carry, summary)


def _where(alive: Tensor, new: Any, old: Any, lead: int) -> Any:
    """``new`` where a series goes on, ``old`` where it has ended, leaf by leaf; ``lead`` dims are sample and batch."""
    if new is None:
        return None
    if isinstance(new, Tensor):
        return torch.where(alive.reshape(alive.shape + (1,) * (new.dim() - lead)), new, old)
    parts = [_where(alive, *leaves, lead) for leaves in zip(new, old, strict=True)]
    return type(new)(*parts) if hasattr(new, "_fields") else type(new)(parts)
