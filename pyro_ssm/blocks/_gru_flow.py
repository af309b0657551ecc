"""The gated recurrent unit in continuous time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_ssm.blocks._cells import gru_gates
from pyro_ssm.blocks._flow import Solver, flow
from pyro_ssm.blocks.linear import Linear

__all__ = ["GRUFlow"]

Given = Callable[[Tensor], Tensor]


class GRUFlow(PyroModule):
    """The flow of :math:`dh/dt = (1 - u(h)) \\odot (n(h) - h)` over a gap (see :class:`~pyro_ssm.blocks.GRUODE`).

    ``given``, from ``(..., time, hidden)`` to ``(..., time, 3 hidden)``, may add to the gates what the state says.
    """

    event_dims: ClassVar[Mapping[str, int]] = {"drive": 1}

    def __init__(self, hidden_dim: int, solver: Solver) -> None:
        super().__init__()
        self.solver = solver
        self.recur = Linear(hidden_dim, 3 * hidden_dim)
        self.drive = nn.Parameter(torch.zeros(3 * hidden_dim))

    def velocity(self, state: Tensor, given: Given | None = None) -> Tensor:
        """dh/dt."""
        update, proposed = self._gates(state, given)
        return (1 - update) * (proposed - state)

    def forward(self, state: Tensor, gap: Tensor, given: Given | None = None) -> Tensor:
        """The state ``(..., 1, hidden)`` after a gap ``(..., 1, 1)``."""
        if self.solver.method != "exponential":
            return flow(lambda s, h: gap * self.velocity(h, given), state, gap, self.solver)
        step = gap / self.solver.num_steps
        for _ in range(self.solver.num_steps):
            midpoint = self._pulled(state, state, step / 2, given)
            state = self._pulled(midpoint, state, step, given)
        return state

    def _gates(self, at: Tensor, given: Given | None) -> tuple[Tensor, Tensor]:
        return gru_gates(self.drive if given is None else self.drive + given(at), self.recur(at))

    def _pulled(self, at: Tensor, state: Tensor, step: Tensor, given: Given | None) -> Tensor:
        """The solution with the gates held at ``at``: :math:`n + (h - n) e^{-(1 - u) \\Delta}`."""
        update, proposed = self._gates(at, given)
        return proposed + (state - proposed) * torch.exp((update - 1) * step)
