"""Explicit Runge-Kutta methods: their tables, one step, the polynomial within a step, and the choice of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.ops.solver_error import SolverError

__all__ = ["TABLEAUX", "Clock", "Segment", "Tableau", "Tolerance", "adaptive_steps", "fixed_steps"]

#: ``(s, z) -> dz/ds`` with s in [0, 1]
Slope = Callable[[float, Tensor], Tensor]

_SAFETY, _GROW, _SHRINK = 0.9, 10.0, 0.2  # of a step, from its error
_SHORTEST = 32 * torch.finfo(torch.float64).eps  # of a step, in parts of the whole interval


class Tableau(NamedTuple):
    """A method :math:`k_i = f(s + c_i h, z + h \\sum_j a_{ij} k_j)`, :math:`z' = z + h \\sum_i b_i k_i`.

    With an ``error``, the last stage is the slope at z' (first same as last).

    >>> from pyro_ssm.ops.runge_kutta import TABLEAUX
    >>> [(name, table.order, table.is_adaptive) for name, table in TABLEAUX.items() if table.order > 3]
    [('rk4', 4, False), ('dopri5', 5, True)]
    """

    order: int
    nodes: tuple[float, ...]  # c_2, c_3, ...
    rows: tuple[tuple[float, ...], ...]  # a_2, a_3, ...
    weights: tuple[float, ...]  # b
    error: tuple[float, ...] = ()  # b - b of the embedded method
    quartic: tuple[float, ...] = ()  # of the polynomial within a step, beside Hermite's cubic

    @property
    def is_adaptive(self) -> bool:
        """Whether the method knows its error."""
        return bool(self.error)


TABLEAUX = {
    "euler": Tableau(1, (), (), (1.0,)),
    "midpoint": Tableau(2, (1 / 2,), ((1 / 2,),), (0.0, 1.0)),
    "heun": Tableau(2, (1.0,), ((1.0,),), (1 / 2, 1 / 2)),
    "rk4": Tableau(4, (1 / 2, 1 / 2, 1.0), ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    # Bogacki and Shampine (1989)
    "bosh3": Tableau(
        3,
        (1 / 2, 3 / 4, 1.0),
        ((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
        (2 / 9, 1 / 3, 4 / 9, 0.0),
        (-5 / 72, 1 / 12, 1 / 9, -1 / 8),
    ),
    # Dormand and Prince (1980), with the continuous extension of order 4 of Hairer, Norsett and Wanner, section II.6
    "dopri5": Tableau(
        5,
        (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
        (
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
        (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
        (
            -12715105075 / 11282082432,
            0.0,
            87487479700 / 32700410799,
            -10690763975 / 1880347072,
            701980252875 / 199316789632,
            -1453857185 / 822651844,
            69997945 / 29380423,
        ),
    ),
}


class Tolerance(NamedTuple):
    """How an adaptive method chooses its steps: every series has to meet the tolerance by itself.

    The error of a step is at most ``atol + rtol * |z|``, root mean square over the state. Steps of all series are the
    same in normalised time, and end after ``max_steps`` with a :class:`~pyro_ssm.ops.SolverError`.

    >>> from pyro_ssm.ops.runge_kutta import Tolerance
    >>> Tolerance().rtol
    1e-05
    """

    rtol: float = 1e-5
    atol: float = 1e-6
    max_steps: int = 4000

    def ratio(self, error: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Root mean square over the state of the error in units of the tolerance, ``(..., time)``."""
        rtol = max(self.rtol, 4 * torch.finfo(error.dtype).eps)  # less cannot be met
        scale = self.atol + rtol * torch.maximum(before.abs(), after.abs())
        return (error / scale).square().mean(-1).sqrt()


class Clock(NamedTuple):
    """Times of each series at s in [0, 1]: :math:`t = t_0 + s\\, \\Delta`, taken in float64.

    >>> import torch
    >>> from pyro_ssm.ops.runge_kutta import Clock
    >>> Clock(torch.tensor([1.0]).double(), torch.tensor([4.0]).double()).at(0.5, torch.zeros(1))
    tensor([[3.]])
    """

    start: Tensor  # (..., time) float64
    gap: Tensor  # (..., time) float64

    def at(self, s: float, like: Tensor) -> Tensor:
        """``(..., time, 1)`` in the dtype of ``like``."""
        return (self.start + s * self.gap).to(like).unsqueeze(-1)


class Segment(NamedTuple):
    """One step from s to s + h as the polynomial

    .. math:: z(s + \\theta h) = z_0 + \\theta (p_1 + \\bar\\theta (p_2 + \\theta (p_3 + \\bar\\theta p_4))), \\qquad
        \\bar\\theta = 1 - \\theta.

    >>> from pyro_ssm.ops.runge_kutta import Segment
    >>> Segment._fields
    ('start', 'length', 'parts')
    """

    start: float
    length: float
    parts: tuple[Tensor, ...]  # z_0, p_1, p_2, p_3 (, p_4), each (..., 1, state)


def _combine(z: Tensor, h: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """:math:`z + h \\sum_i w_i k_i`."""
    for w, k in zip(weights, slopes, strict=False):
        if w:
            z = torch.add(z, k, alpha=h * w)
    return z


def _step(table: Tableau, f: Slope, s: float, h: float, z: Tensor, first: Tensor) -> tuple[Tensor, list[Tensor]]:
    """z' and the stages."""
    stages, moved = [first], z
    for c, row in zip(table.nodes, table.rows, strict=True):
        moved = _combine(z, h, row, stages)
        stages.append(f(s + c * h, moved))
    return (moved if table.is_adaptive else _combine(z, h, table.weights, stages)), stages


def _segment(
    table: Tableau, s: float, h: float, z: Tensor, moved: Tensor, stages: list[Tensor], last: Tensor
) -> Segment:
    """The polynomial with the values and slopes of both ends (Hermite), and the table's quartic term."""
    rise = moved - z
    bend = torch.add(-rise, stages[0], alpha=h)
    parts: tuple[Tensor, ...] = (z, rise, bend, torch.add(rise - bend, last, alpha=-h))
    if table.quartic:
        parts = (*parts, _combine(torch.zeros_like(z), h, table.quartic, stages))
    return Segment(s, h, parts)


def fixed_steps(table: Tableau, f: Slope, z: Tensor, steps: int, keep: list[Segment] | None = None) -> Tensor:
    """``steps`` equal steps from s = 0 to 1; ``keep`` takes their polynomials.

    >>> import torch
    >>> from pyro_ssm.ops.runge_kutta import TABLEAUX, fixed_steps
    >>> fixed_steps(TABLEAUX["rk4"], lambda s, z: -z, torch.ones(1, 1), 4)
    tensor([[0.3679]])
    """
    h = 1.0 / steps
    first = f(0.0, z)
    z = z.expand(first.shape)
    for i in range(steps):
        moved, stages = _step(table, f, i * h, h, z, first)
        if keep is not None or i + 1 < steps:
            first = f((i + 1) * h, moved)
        if keep is not None:
            keep.append(_segment(table, i * h, h, z, moved, stages, first))
        z = moved
    return z


def adaptive_steps(
    table: Tableau,
    f: Slope,
    z: Tensor,
    clock: Clock,
    tolerance: Tolerance,
    length: float | None = None,
    keep: list[Segment] | None = None,
) -> tuple[Tensor, float]:
    """Steps from s = 0 to 1 with errors below the tolerance; returns the end and the next step's length.

    The lengths of steps are numbers without a gradient; the steps themselves are differentiable.

    Args:
        table: of a method that knows its error.
        f: the slope in s.
        z: ``(..., time, state)``.
        clock: for messages.
        tolerance: see :class:`Tolerance`.
        length: of the first step; None chooses it (Hairer, Norsett and Wanner, section II.4).
        keep: takes the polynomials of the steps.

    Raises:
        SolverError: a step cannot be taken: says at what time, for which series, at what norm of the state.

    >>> import torch
    >>> from pyro_ssm.ops.runge_kutta import TABLEAUX, Clock, Tolerance, adaptive_steps
    >>> clock = Clock(torch.zeros(1).double(), torch.ones(1).double())
    >>> adaptive_steps(TABLEAUX["dopri5"], lambda s, z: -z, torch.ones(1, 1), clock, Tolerance())[0]
    tensor([[0.3679]])
    """
    first = f(0.0, z)
    z = z.expand(first.shape)
    s, exponent = 0.0, 1.0 / table.order
    h = _first_length(table, f, z, first, tolerance, clock) if length is None else length
    for _ in range(tolerance.max_steps):
        whole = h >= 1.0 - s
        h = 1.0 - s if whole else h
        moved, stages = _step(table, f, s, h, z, first)
        with torch.no_grad():
            error = _combine(torch.zeros_like(z), h, table.error, stages)
            ratios = tolerance.ratio(error, z, moved)
            ratio = float(ratios.max())
        if ratio <= 1.0:
            if keep is not None:
                keep.append(_segment(table, s, h, z, moved, stages, stages[-1]))
            z, first = moved, stages[-1]
            s = 1.0 if whole else s + h
            h *= min(_GROW, _SAFETY * ratio**-exponent) if ratio > 0 else _GROW
            if whole:
                return z, h
        else:  # too large, or not a number
            h *= max(_SHRINK, _SAFETY * ratio**-exponent) if math.isfinite(ratio) else _SHRINK
            if h < _SHORTEST:
                raise _stuck("the step underflows", clock, s, ratios, z)
    raise _stuck(f"{tolerance.max_steps} steps are not enough", clock, s, ratios, z)


@torch.no_grad()
def _first_length(table: Tableau, f: Slope, z: Tensor, first: Tensor, tolerance: Tolerance, clock: Clock) -> float:
    """A length whose Euler step is small and whose error, guessed from the change of the slope, is right."""
    size, speed = tolerance.ratio(z, z, z), tolerance.ratio(first, z, z)
    if not bool(speed.sum().isfinite()):
        raise _stuck("the field is not finite", clock, 0.0, speed, z)
    small = float((0.01 * size.clamp_min(1.0) / speed.clamp_min(1e-10)).min().clamp(max=1.0))
    change = tolerance.ratio(f(small, torch.add(z, first, alpha=small)) - first, z, z) / small
    fast = torch.maximum(speed, change).clamp_min(1e-10)
    right = float((0.01 / fast).pow(1.0 / table.order).min())
    return min(100 * small, right, 1.0) if math.isfinite(right) else small


def _stuck(what: str, clock: Clock, s: float, ratios: Tensor, z: Tensor) -> SolverError:
    """The error for the series whose ratio is worst, or not a number."""
    worst = ratios.nan_to_num(nan=torch.inf, posinf=torch.inf)
    at = tuple(int(i) for i in torch.unravel_index(worst.flatten().argmax(), worst.shape))
    time = float((clock.start + s * clock.gap).expand(ratios.shape)[at])
    series = at[:-1]
    name = f"series {series if len(series) > 1 else series[0]}" if series else "the series"
    norm = float(z.detach()[at].norm())
    return SolverError(
        f"{what} at time {time:.6g} of {name}, where the state has norm {norm:.4g}. The field blows up "
        "or returns NaN there, or the equation is stiff: bound the field, start nearer to the data, loosen `rtol` and "
        "`atol`, or use a fixed-step method on a refined grid"
    )
