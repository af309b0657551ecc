"""A memory run along one data set: what the path and the observations of one trace share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.components import Memory

__all__ = ["History"]


class History:
    """One run of a :class:`~pyro_ssm.components.Memory` beside a path, shared by the sites ``"z"`` and ``"y"``.

    .. math::
        p(z, y) = \\prod_t \\underbrace{p(z_t \\mid z_{<t}, y_{<t})}_{\\text{site z}}\\;
                  \\underbrace{p(y_t \\mid z_{\\le t}, y_{<t})}_{\\text{site y}}

    When memory sees y, neither factor is a marginal. ``"z"`` is met first: without values its draw simulates both,
    and ``"y"`` returns that y if and only if z is still the tensor that was drawn; the density of ``"z"`` reads the y
    with which the program *ended* (:meth:`conclude`). The last whole-sequence run is cached, keyed by the identity of
    states, values and mask.

    Args:
        memory: bound (a plain copy).
        gap: ``(..., time, 1)`` the gap before each observation time, 1 before the first.
        inputs: ``(..., time, input)`` at observation times, or None.
        values: ``(*batch, time, obs)``, None to simulate.
        mask: bool as ``values``; for a simulation, the steps that are not padding.
        emission: ``(state, j, summary) -> law`` for the observation step ``j``; needed to simulate.
        observed: positions of the observation times on the latent grid (default: all of them).

    >>> from pyro_ssm.distributions.history import History
    >>> History.__name__
    'History'
    """

    def __init__(
        self,
        memory: Memory,
        gap: Tensor,
        inputs: Tensor | None = None,
        values: Tensor | None = None,
        mask: Tensor | None = None,
        emission: Callable[[Tensor, int, Tensor], Any] | None = None,
        observed: Tensor | None = None,
    ) -> None:
        self.memory, self.gap, self.inputs = memory, gap, inputs
        self.values, self.mask, self.emission = values, mask, emission
        self._observed = observed
        self._positions = range(gap.shape[-2]) if observed is None else observed.tolist()
        self._step_of = {position: j for j, position in enumerate(self._positions)}
        self._cache: tuple[Any, ...] | None = None
        self._drawn: tuple[Tensor, Tensor] | None = None

    # ------------------------------------------------------------------------------------- whole sequence

    def summaries(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The summaries before each latent step ``(..., time, features)`` and after the state at each observation
        time.
        """
        key = (states, self.values, self.mask)
        if self._cache is None or any(a is not b for a, b in zip(self._cache[0], key, strict=True)):
            values = self.values
            if self.memory.sees_observations and values is None:
                if self._drawn is None or self._drawn[0] is not states:
                    raise ValueError(
                        'the law of "z" depends on observations, and there are none: give `values` to the TimeSeries, '
                        'or evaluate the density after the model has drawn or been given "y"'
                    )
                values = self._drawn[1]
            at = states if self._observed is None else states.index_select(-2, self._observed)
            before, after, _ = self.memory.sequence(at, values, self.mask, self.gap, self.inputs)
            self._cache = (key, self._on_latent_grid(before), after)
        return self._cache[1], self._cache[2]

    def _on_latent_grid(self, before: Tensor) -> Tensor:
        """Between observations memory stands still: each latent step sees the summary left by the last observation."""
        if self._observed is None:
            return before
        steps = torch.arange(int(self._observed[-1]) + 1, device=self._observed.device)
        return before.index_select(-2, torch.searchsorted(self._observed, steps))

    # ------------------------------------------------------------------------------------------ step form

    def start(self, shape: torch.Size) -> tuple[Any, Tensor]:
        """The carry and summary before the first step, for leading dims ``shape``."""
        return self.memory.start(shape)

    def advance(self, carry: Any, summary: Tensor, state: Tensor, k: int) -> tuple[Any, Tensor, Tensor | None]:
        """One latent step: see the state, then the observation there (given, or drawn). Returns carry, summary, y
        drawn.
        """
        j = self._step_of.get(k)
        if j is None:
            return carry, summary, None
        now = slice(j, j + 1)
        inputs = None if self.inputs is None else self.inputs[..., now, :]
        carry, after = self.memory.see_state(carry, state, self.gap[..., now, :], inputs)
        drawn = None
        if self.values is None and self.emission is not None:
            drawn = self.emission(state, j, after).sample()
        if not self.memory.sees_observations:
            return carry, after, drawn
        value = drawn if self.values is None else self.values[..., now, :]
        mask = self.mask
        if value is None or mask is None:
            raise ValueError("memory sees observations: give `values` and `mask`, or `emission` to simulate them")
        carry, summary = self.memory.see_observation(carry, value, mask[..., now, :])
        return carry, summary, drawn

    # ------------------------------------------------------------------------------- joint simulation of z, y

    @property
    def simulates(self) -> bool:
        """Whether a draw of the path must draw the observations with it."""
        return self.memory.sees_observations and self.values is None

    def remember(self, states: Tensor, values: Tensor) -> None:
        """Keep the pair that was drawn jointly."""
        self._drawn = (states, values)

    def drawn_observations(self, states: Tensor) -> Tensor | None:
        """The y that was drawn with ``states``, if these are still the tensor drawn."""
        return self._drawn[1] if self._drawn is not None and self._drawn[0] is states else None

    def simulate(self, states: Tensor) -> Tensor:
        """Draw y given a path, step by step, each y seen by memory before the next."""
        carry, summary = self.start(states.shape[:-2])
        drawn = []
        for k in range(states.shape[-2]):
            carry, summary, value = self.advance(carry, summary, states[..., k : k + 1, :], k)
            if value is not None:
                drawn.append(value)
        return torch.cat(drawn, -2)

    def conclude(self, states: Tensor, values: Tensor) -> None:
        """Record the y with which the program ended; refuse a y that was conditioned on while z was drawn from the
        prior.
        """
        drawn = self.drawn_observations(states)
        if drawn is not None and drawn is not values:
            raise ValueError(
                'site "y" was conditioned while "z" is free, but the law of z depends on y: z was drawn together with '
                "another y. Pass the observations as `values` of the TimeSeries, or condition on z as well"
            )
        self.values = values
