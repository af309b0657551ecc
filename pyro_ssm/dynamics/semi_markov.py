"""Hidden semi-Markov states: a finite state that stays for a duration with a law of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._conditioning import check_state
from pyro_ssm.blocks._gaussian import with_time
from pyro_ssm.blocks._tables import log_of_probability, pick, simplex_parameter, state_index, table_of
from pyro_ssm.components import DiscreteState, Initial, Transition
from pyro_ssm.distributions.durations import RemainingLaw
from pyro_ssm.dynamics.durations import Duration

__all__ = ["SemiMarkov", "SemiMarkovInitial"]


class SemiMarkov(Transition, DiscreteState):
    """A semi-Markov chain: segments of a state, of explicit durations,

    .. math::
        z_k = (j, r): \\qquad r > 1 &: \\; z_{k+1} = (j, r - 1), \\\\
        r = 1 &: \\; P(z_{k+1} = (j', d)) = A_{jj'}\\, P(d \\mid j').

    The state tensor has ``state_dim = 2``: the index, and how many steps of its segment remain, this one included. It
    counts steps: the length of a time gap does not enter. The last segment may go on beyond the data. For exact
    inference see ``infer.hsmm_filter``; emissions are tables built with ``state_dim=2``.

    Args:
        num_states: K.
        duration: the law of durations of each state (``CategoricalDuration``, ``PoissonDuration``,
            ``NegativeBinomialDuration``).
        matrix: first value of ``A`` ``(K, K)``, rows sum to 1; None goes to any other state alike. The diagonal is
            zero as a rule (a segment followed by one of the same state is allowed, but hard to tell from one longer).

    Parameters: ``matrix`` ``(K, K)``, rows on the simplex; those of ``duration``.

    Raises:
        TypeError: ``duration`` is no Duration.
        ValueError: a size is wrong, or ``matrix`` has no probabilities in its rows.

    Source: Yu (2010), "Hidden semi-Markov models"; the expansion by the remaining duration, section 2.3.

    >>> import torch
    >>> from pyro_ssm.dynamics import CategoricalDuration, SemiMarkov
    >>> transition = SemiMarkov(2, CategoricalDuration(2, 3))
    >>> times = torch.arange(2, dtype=torch.float64)
    >>> transition(torch.tensor([[1.0, 3.0]]), times[:1], times[1:], None).sample()
    tensor([[1., 2.]])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"matrix": 2}
    state_dim = 2

    def __init__(self, num_states: int, duration: Duration, matrix: Tensor | None = None) -> None:
        super().__init__()
        K = self.num_states = check_size("num_states", num_states)
        if not isinstance(duration, Duration):
            raise TypeError(f"`duration` must be a Duration, got {type(duration).__name__}: CategoricalDuration, say")
        if duration.num_states != K:
            raise ValueError(f"`duration` has {duration.num_states} states, the chain {K}")
        if matrix is None:
            matrix = torch.full((K, K), 1 / max(K - 1, 1)).fill_diagonal_(0.0 if K > 1 else 1.0)
        self.matrix = simplex_parameter("matrix", table_of("matrix", matrix, (K, K)))
        self.duration = duration

    def log_matrix(self) -> Tensor:
        """:math:`\\log A`, ``(..., 1, K, K)`` with a time axis of 1."""
        return with_time(log_of_probability(self.matrix), 2)

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> RemainingLaw:
        """The law of the next index and remaining steps; ``state`` ``(..., time, 2)``."""
        check_state(self, state)
        index, remaining = state_index(state), state[..., 1].round().long()
        log_duration = self.duration.log_probs()
        fresh = pick(self.log_matrix(), index, 1).unsqueeze(-1) + log_duration
        K, D = log_duration.shape[-2:]
        cell = (index * D + (remaining - 2).clamp(0, D - 1)).unsqueeze(-1)
        stay = torch.full(index.shape + (K * D,), -torch.inf, dtype=fresh.dtype, device=fresh.device)
        stay = stay.scatter(-1, cell, 0.0).unflatten(-1, (K, D))
        return RemainingLaw(torch.where((remaining > 1)[..., None, None], stay, fresh))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"num_states={self.num_states}, state_dim=2"


class SemiMarkovInitial(Initial, DiscreteState):
    """The first segment of a semi-Markov chain, which starts at the first time,

    .. math:: P(z_1 = (j, d)) = \\pi_j\\, P(d \\mid j).

    Args:
        transition: the chain; its durations are shared. Give the same object to the model as its transition.
        probs: first value of :math:`\\pi`, ``(K,)``; None is uniform.

    Parameters: ``probs`` ``(K,)`` on the simplex; those of the durations keep the transition's names.

    Raises:
        TypeError: ``transition`` is no SemiMarkov.

    >>> import torch
    >>> from pyro_ssm.dynamics import CategoricalDuration, SemiMarkov, SemiMarkovInitial
    >>> initial = SemiMarkovInitial(SemiMarkov(2, CategoricalDuration(2, 3)))
    >>> initial(torch.zeros(1), None).event_shape
    torch.Size([2])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"probs": 1}
    state_dim = 2

    def __init__(self, transition: SemiMarkov, probs: Tensor | None = None) -> None:
        super().__init__()
        if not isinstance(transition, SemiMarkov):
            raise TypeError(f"`transition` must be a SemiMarkov, got {type(transition).__name__}")
        K = self.num_states = transition.num_states
        start = torch.full((K,), 1 / K) if probs is None else probs
        self.probs = simplex_parameter("probs", table_of("probs", start, (K,)))
        self.transition = transition

    def log_weights(self) -> Tensor:
        """:math:`\\log \\pi`, ``(..., 1, K)`` with a time axis of 1."""
        return with_time(log_of_probability(self.probs), 1)

    def forward(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the first index and remaining steps; ``time`` ``(..., 1)``."""
        log_weights = self.log_weights().unsqueeze(-1) + self.transition.duration.log_probs()
        batch = torch.broadcast_shapes(log_weights.shape[:-2], time.shape)
        return RemainingLaw(log_weights.expand(batch + log_weights.shape[-2:]))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"num_states={self.num_states}, state_dim=2"
