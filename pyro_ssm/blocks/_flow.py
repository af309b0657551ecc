"""A state carried over a gap by a differential equation, in the gap's own time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.blocks._checks import check_choice, check_positive, check_size
from pyro_ssm.ops.runge_kutta import TABLEAUX, Clock, Slope, Tolerance, adaptive_steps, fixed_steps

__all__ = ["Solver", "field_value", "flow", "solver_of"]


class Solver(NamedTuple):
    """How a gap is crossed: in ``num_steps`` equal steps, or by steps whose errors are below a tolerance."""

    method: str
    num_steps: int
    tolerance: Tolerance


def solver_of(method: str, num_steps: int, rtol: float, atol: float, *more: str) -> Solver:
    """The solver of checked arguments; ``more`` are methods beside the Runge-Kutta methods."""
    check_choice("method", method, sorted((*TABLEAUX, *more)))
    tolerance = Tolerance(check_positive("rtol", rtol), check_positive("atol", atol))
    return Solver(method, check_size("num_steps", num_steps), tolerance)


def field_value(field: Callable[[Tensor], Tensor], state: Tensor, *after: int) -> Tensor:
    """``field(state)``, which must have the state's last dims and ``after``: another size would broadcast."""
    value = field(state)
    size = (*state.shape[-2:], *after)
    if value.shape[-len(size) :] != size:
        raise ValueError(
            f"`field` must return (..., {', '.join(map(str, size))}) for a state of shape {tuple(state.shape)}, got "
            f"{tuple(value.shape)}"
        )
    return value


def flow(slope: Slope, state: Tensor, gap: Tensor, solver: Solver) -> Tensor:
    """The solution at 1 of :math:`dh/ds = v(s, h)` from ``state`` ``(..., 1, hidden)`` at 0.

    Every element of a batch has its own gap in ``slope`` (:math:`v = \\Delta f`), so own time grids need no union of
    times; an adaptive method takes the steps that the worst of them wants. Gradients go through the steps.

    Raises:
        FloatingPointError: an adaptive method cannot take a step; times in its message count from the last observation.
    """
    table = TABLEAUX[solver.method]
    if not table.is_adaptive:
        return fixed_steps(table, slope, state, solver.num_steps)
    crossed = gap.detach().squeeze(-1).double()
    return adaptive_steps(table, slope, state, Clock(torch.zeros_like(crossed), crossed), solver.tolerance)[0]
