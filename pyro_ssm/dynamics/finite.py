"""Finite states: where a Markov chain starts and how it moves, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._conditioning import check_state, inputs_of
from pyro_ssm.blocks._gaussian import with_time
from pyro_ssm.blocks._tables import log_of_probability, pick, simplex_parameter, state_index, table_of
from pyro_ssm.blocks.linear import linear
from pyro_ssm.components import FiniteState, Initial, Transition
from pyro_ssm.distributions.codes import index_law

__all__ = ["CategoricalInitial", "MarkovChain"]


class CategoricalInitial(Initial, FiniteState):
    """The first of finitely many states,

    .. math:: P(z_1 = j) = \\pi_j, \\qquad\\text{with inputs}\\quad
        P(z_1 = j) = \\text{softmax}_j(\\log \\pi_j + b_j^T u_1).

    Args:
        num_states: K.
        input_dim: size of the inputs; 0 ignores them.
        probs: first value of :math:`\\pi`, ``(K,)``; None is uniform. A zero stays zero.

    Parameters: ``probs`` ``(K,)`` on the simplex (a prior: ``Dirichlet``), ``input_matrix`` ``(K, input)`` (from zero).

    Shapes:
        The law has batch ``(..., 1)`` and event ``(1,)``: the index, as a float.

    Raises:
        ValueError: a size is wrong, or ``probs`` is no probability vector; or, when called, inputs are missing.

    >>> import torch
    >>> from pyro_ssm.dynamics import CategoricalInitial
    >>> initial = CategoricalInitial(2, probs=torch.tensor([0.25, 0.75]))
    >>> initial.log_weights(torch.zeros(1), None).exp().detach()
    tensor([[0.2500, 0.7500]])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"probs": 1, "input_matrix": 2}
    state_dim = 1

    def __init__(self, num_states: int, input_dim: int = 0, probs: Tensor | None = None) -> None:
        super().__init__()
        self.num_states = check_size("num_states", num_states)
        self.input_dim = check_size("input_dim", input_dim, least=0)
        start = torch.full((num_states,), 1 / num_states) if probs is None else probs
        self.probs = simplex_parameter("probs", table_of("probs", start, (num_states,)))
        if input_dim:
            self.input_matrix = nn.Parameter(torch.zeros(num_states, input_dim))

    def log_weights(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Tensor:
        """:math:`\\log P(z_1 = j)`, ``(..., 1, K)``."""
        log_probs = with_time(log_of_probability(self.probs), 1)
        u = inputs_of(self, inputs, log_probs)
        return log_probs if u is None else torch.log_softmax(linear(u, self.input_matrix) + log_probs, -1)

    def forward(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the first index; ``time`` ``(..., 1)``, ``inputs`` ``(..., 1, input)`` or None."""
        log_weights = self.log_weights(time, inputs)
        batch = torch.broadcast_shapes(log_weights.shape[:-1], time.shape)
        return index_law(log_weights.expand(batch + (self.num_states,)))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"num_states={self.num_states}, state_dim=1, input_dim={self.input_dim}"


class MarkovChain(Transition, FiniteState):
    """A Markov chain on finitely many states, one transition a step,

    .. math:: P(z_{k+1} = j \\mid z_k = i) = A_{ij}, \\qquad\\text{with inputs}\\quad
        \\text{softmax}_j(\\log A_{ij} + b_{ij}^T u_k).

    It counts steps: the length of a time gap does not enter (see :class:`MarkovJump` for irregular times).

    Args:
        num_states: K.
        input_dim: size of the inputs; 0 ignores them.
        matrix: first value of ``A`` ``(K, K)``, rows sum to 1; None stays with probability 0.9. A zero stays zero (a
            left-right chain, say).

    Parameters: ``matrix`` ``(K, K)``, rows on the simplex (a prior: ``Dirichlet(...).to_event(1)``), ``input_matrix``
    ``(K, K, input)`` (from zero).

    Raises:
        ValueError: a size is wrong, or ``matrix`` has no probabilities in its rows; or, when called, inputs are missing
            or have another size.

    >>> import torch
    >>> from pyro_ssm.dynamics import MarkovChain
    >>> times = torch.arange(4, dtype=torch.float64)
    >>> law = MarkovChain(2)(torch.tensor([[0.0], [1.0], [1.0]]), times[:-1], times[1:], None)
    >>> law.log_prob(torch.ones(3, 1)).exp().detach()
    tensor([0.1000, 0.9000, 0.9000])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"matrix": 2, "input_matrix": 3}
    state_dim = 1

    def __init__(self, num_states: int, input_dim: int = 0, matrix: Tensor | None = None) -> None:
        super().__init__()
        K = self.num_states = check_size("num_states", num_states)
        self.input_dim = check_size("input_dim", input_dim, least=0)
        if matrix is None:
            matrix = torch.full((K, K), 0.1 / max(K - 1, 1)).fill_diagonal_(0.9 if K > 1 else 1.0)
        self.matrix = simplex_parameter("matrix", table_of("matrix", matrix, (K, K)))
        if input_dim:
            self.input_matrix = nn.Parameter(torch.zeros(K, K, input_dim))

    def log_matrix(
        self, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Tensor:
        """:math:`\\log P(z_{k+1} = j \\mid z_k = i)`, ``(..., time or 1, K, K)``, from row to column."""
        log_matrix = with_time(log_of_probability(self.matrix), 2)
        u = inputs_of(self, inputs, log_matrix)
        if u is None:
            return log_matrix
        shift = (self.input_matrix @ u[..., None, :, None]).squeeze(-1)
        return torch.log_softmax(shift + log_matrix, -1)

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Any:
        """The law of the next index; ``state`` ``(..., time, 1)``."""
        check_state(self, state)
        return index_law(pick(self.log_matrix(time, next_time, inputs), state_index(state), 1))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"num_states={self.num_states}, state_dim=1, input_dim={self.input_dim}"
