"""How a state-space model and a proposal become a Feynman-Kac process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import AffineGaussian, FiniteState, SampleOnly
from pyro_ssm.infer.smc.densities import log_density
from pyro_ssm.infer.smc.feynman_kac import Draw, FeynmanKac
from pyro_ssm.infer.smc.model_steps import ModelSteps, StateParticles
from pyro_ssm.infer.smc.step_index import StepIndex, same_step

__all__ = ["Kernel", "Proposed", "process"]


class Proposed(NamedTuple):
    """The law of the next state, and where it is known the weight that comes with it, whatever state is drawn.

    >>> from pyro_ssm.infer.smc.build import Proposed
    >>> Proposed._fields
    ('law', 'log_weight')
    """

    law: Any  # batch (N, *batch, 1), event (state,)
    log_weight: Tensor | None = None  # (N, *batch)


class Beginning(NamedTuple):
    """What is known when a step begins."""

    carry: Any  # of the memory, which has seen the last observation
    summary: Tensor | None
    proposed: Proposed


#: ``(k, previous state or None, summary) -> Proposed``
Propose = Callable[[StepIndex, Tensor | None, Tensor | None], Proposed]


class Kernel:
    """Draws states from a proposal and lets the memory see them.

    The law and the summary with which a step begins are kept for the potential of the same step, keyed by the identity
    of the particles that were moved.

    Args:
        steps: the model along its data.
        propose: the proposal.

    >>> from pyro_ssm.infer.smc.build import Kernel
    >>> Kernel.__name__
    'Kernel'
    """

    def __init__(self, steps: ModelSteps, propose: Propose) -> None:
        self.steps, self.propose = steps, propose
        self._last: tuple[StepIndex, Any, Any, Any] = (-1, None, None, None)

    def begin(self, k: StepIndex, previous: StateParticles | None, shape: torch.Size) -> Beginning:
        """The memory with which step k begins, and the proposal, for particles of leading dims ``shape``."""
        step, lead, found, kept = self._last
        if kept is None or found is not previous or lead != shape or not same_step(step, k):
            carry, summary = self.steps.before(k, previous, shape)
            proposed = self.propose(k, None if previous is None else previous.state, summary)
            kept = Beginning(carry, summary, proposed)
            self._last = (k, shape, previous, kept)
        return kept

    def initial(self, draw: Draw, shape: torch.Size) -> StateParticles:
        """Particles of leading dims ``shape``."""
        self._last = (-1, None, None, None)  # a new run: parameters may have moved on
        carry, summary, proposed = self.begin(0, None, shape)
        return self.steps.particles(0, carry, summary, draw(proposed.law, shape + (1,)))

    def propagate(self, k: StepIndex, previous: StateParticles, draw: Draw) -> StateParticles:
        """The particles one step on."""
        shape = previous.state.shape[:-2]
        carry, summary, proposed = self.begin(k, previous, shape)
        return self.steps.particles(k, carry, summary, draw(proposed.law, shape + (1,)))

    def extend(self, k: int, previous: StateParticles | None, state: Tensor) -> StateParticles:
        """The particles of a given state ``(N, *batch, state)``."""
        carry, summary = self.steps.before(k, previous, state.shape[:-1])
        return self.steps.particles(k, carry, summary, state.unsqueeze(-2))


def process(
    steps: ModelSteps,
    kernel: Kernel,
    log_potential: Callable[[int, Any, Any], Tensor],
    active: Tensor | None,
    **more: Any,
) -> FeynmanKac:
    """The process of a kernel and a potential, with all that the model and its data say of it.

    >>> from pyro_ssm.infer.smc.build import process
    >>> process.__name__
    'process'
    """
    has_density = not isinstance(steps.model.transition, SampleOnly)
    markov = steps.memory is None and has_density
    return FeynmanKac(
        kernel.initial,
        kernel.propagate,
        log_potential,
        steps.num_times,
        steps.batch_shape,
        step_mask=steps.step_mask,
        active=active,
        log_backward=_log_transition(steps) if markov else None,
        log_bound=_log_bound(steps) if markov else None,
        log_step=_log_step(steps) if has_density and not isinstance(steps.model.initial, SampleOnly) else None,
        extend=kernel.extend,
        state=_state,
        describe=steps.describe,
        **more,
    )


def _state(particles: StateParticles) -> Tensor:
    return particles.state.squeeze(-2)


def _log_transition(steps: ModelSteps) -> Callable[[int, StateParticles, StateParticles], Tensor]:
    """Of all that weighs a pair of states, only the transition density and the times depend on the earlier one."""

    def log_backward(k: int, previous: StateParticles, particles: StateParticles) -> Tensor:
        moved = log_density(steps.law(k, previous.state, None), particles.state)
        return moved + steps.log_times(k, previous.state, particles.state)

    return log_backward


def _log_bound(steps: ModelSteps) -> Callable[[int], Tensor | float] | None:
    """The largest density of a transition whose covariance is the same from everywhere; a probability is at most 1."""
    if isinstance(steps.model.transition, FiniteState):
        return lambda k: 0.0
    if not isinstance(steps.model.transition, AffineGaussian):
        return None
    like = steps.data.values
    anywhere = like.new_zeros((1,) + tuple(steps.batch_shape) + (1, steps.model.initial.state_dim))

    def log_bound(k: int) -> Tensor:
        law = steps.law(k, anywhere, None)
        return log_density(law, law.mean)[0]

    return log_bound


def _log_step(steps: ModelSteps) -> Callable[[int, StateParticles | None, StateParticles], Tensor]:
    def log_step(k: int, previous: StateParticles | None, particles: StateParticles) -> Tensor:
        state = particles.state
        _, summary = steps.before(k, previous, state.shape[:-2])
        before = None if previous is None else previous.state
        moved = log_density(steps.law(k, before, summary), state) + steps.log_times(k, before, state)
        return moved + steps.log_observation(k, state, particles.summary)

    return log_step
