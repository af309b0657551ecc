"""A state carried over a gap by a differential equation, in the gap's own time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torchdiffeq import odeint

from pyro_ssm.blocks._checks import check_choice, check_positive, check_size

__all__ = ["ADAPTIVE", "FIXED", "Solver", "flow", "solver_of"]

#: ``(s, h) -> dh/ds`` for s from 0 to 1
Velocity = Callable[[float | Tensor, Tensor], Tensor]

FIXED = ("euler", "midpoint", "rk4")
ADAPTIVE = ("adaptive_heun", "bosh3", "dopri5", "dopri8")


class Solver(NamedTuple):
    """How a gap is crossed: in ``num_steps`` equal steps, or adaptively."""

    method: str
    num_steps: int
    rtol: float
    atol: float


def solver_of(method: str, num_steps: int, rtol: float, atol: float, *more: str) -> Solver:
    """The solver of checked arguments; ``more`` are methods beside those that every equation has."""
    check_choice("method", method, sorted((*FIXED, *ADAPTIVE, *more)))
    return Solver(
        method, check_size("num_steps", num_steps), check_positive("rtol", rtol), check_positive("atol", atol)
    )


def flow(velocity: Velocity, state: Tensor, solver: Solver) -> Tensor:
    """The solution at 1 of :math:`dh/ds = v(s, h)` from ``state`` at 0.

    Every element of a batch has its own gap in ``velocity`` (:math:`v = \\Delta f`), so own time grids need no union of
    times. The error that an adaptive method holds is that of the whole batch. Gradients go through the solver's steps.
    """
    if solver.method in ADAPTIVE:
        shape = torch.broadcast_shapes(state.shape, velocity(0.0, state).shape)
        ends = torch.tensor([0.0, 1.0], dtype=state.dtype, device=state.device)
        # an error of torchdiffeq's would name its own arguments; what it cannot step over is not finite
        return odeint(velocity, state.expand(shape), ends, rtol=solver.rtol, atol=solver.atol, method=solver.method)[-1]
    h = 1.0 / solver.num_steps
    step = _STEPS[solver.method]
    for i in range(solver.num_steps):
        state = step(velocity, i * h, h, state)
    return state


def _euler(v: Velocity, s: float, h: float, x: Tensor) -> Tensor:
    return x + h * v(s, x)


def _midpoint(v: Velocity, s: float, h: float, x: Tensor) -> Tensor:
    return x + h * v(s + h / 2, x + h / 2 * v(s, x))


def _rk4(v: Velocity, s: float, h: float, x: Tensor) -> Tensor:
    k1 = v(s, x)
    k2 = v(s + h / 2, x + h / 2 * k1)
    k3 = v(s + h / 2, x + h / 2 * k2)
    k4 = v(s + h, x + h * k3)
    return x + h / 6 * (k1 + 2 * (k2 + k3) + k4)


_STEPS = {"euler": _euler, "midpoint": _midpoint, "rk4": _rk4}
