"""Recurrent cells of which each step may stand alone: what an observation does to a state."""

from __future__ import annotations

import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_ssm.blocks._checks import check_choice
from pyro_ssm.blocks.linear import Linear

__all__ = ["ElmanCell", "GRUCell", "gru_gates", "make_cell"]


def gru_gates(given: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Update gate u and proposal n of products of the input and of the state, each ``(..., 3 hidden)``."""
    given_r, given_u, given_n = given.chunk(3, -1)
    held_r, held_u, held_n = held.chunk(3, -1)
    reset, update = torch.sigmoid(given_r + held_r), torch.sigmoid(given_u + held_u)
    return update, torch.tanh(given_n + reset * held_n)


class GRUCell(PyroModule):
    """The gated recurrent unit in torch's form (the reset gate acts after the matrix), in two parts,

    .. math:: h' = u \\odot h + (1 - u) \\odot n;

    ``products(x)`` can be computed for all steps at once, ``update(products, h)`` is the step.
    """

    def __init__(self, in_features: int, hidden_dim: int) -> None:
        super().__init__()
        self.from_input = Linear(in_features, 3 * hidden_dim)
        self.from_state = Linear(hidden_dim, 3 * hidden_dim)

    def products(self, x: Tensor) -> Tensor:
        """``(..., time, in)`` to ``(..., time, 3 hidden)``."""
        return self.from_input(x)

    def update(self, products: Tensor, state: Tensor) -> Tensor:
        """The state after the step."""
        update, proposed = gru_gates(products, self.from_state(state))
        return torch.lerp(proposed, state, update)


class ElmanCell(PyroModule):
    """The simple recurrent network :math:`h' = \\tanh(W x + V h + b)`, in the two parts of :class:`GRUCell`."""

    def __init__(self, in_features: int, hidden_dim: int) -> None:
        super().__init__()
        self.from_input = Linear(in_features, hidden_dim)
        self.from_state = Linear(hidden_dim, hidden_dim)

    def products(self, x: Tensor) -> Tensor:
        """``(..., time, in)`` to ``(..., time, hidden)``."""
        return self.from_input(x)

    def update(self, products: Tensor, state: Tensor) -> Tensor:
        """The state after the step."""
        return torch.tanh(products + self.from_state(state))


def make_cell(cell: str, in_features: int, hidden_dim: int) -> GRUCell | ElmanCell:
    """The cell of that name."""
    made = GRUCell if check_choice("cell", cell, ("gru", "rnn")) == "gru" else ElmanCell
    return made(in_features, hidden_dim)
