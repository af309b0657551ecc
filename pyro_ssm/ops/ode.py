"""Ordinary differential equations: a flow over one gap, and a whole path with every series on its own times."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.runge_kutta import TABLEAUX, Clock, Segment, Tolerance, adaptive_steps, fixed_steps
from pyro_ssm.ops.sde import Field

__all__ = ["Forcing", "Jump", "ode_flow", "ode_path"]

#: ``(k, since) -> u``: the inputs ``since`` ``(..., 1, 1)`` after the k-th time
Forcing = Callable[[int, Tensor], Tensor]
#: ``(k, z) -> z``: what happens to the state at the k-th time
Jump = Callable[[int, Tensor], Tensor]


def ode_flow(
    field: Field,
    state: Tensor,
    time: Tensor,
    next_time: Tensor,
    inputs: Callable[[Tensor], Tensor] | None = None,
    *,
    method: str = "dopri5",
    tolerance: Tolerance = Tolerance(),  # noqa: B008  (a constant)
    step_size: float | None = None,
    length: float | None = None,
) -> tuple[Tensor, float]:
    """The states after a gap, :math:`z(t')` with :math:`\\dot z = f(t, z, u(t))`, all gaps of a path at once.

    In normalised time: :math:`dz/ds = \\Delta f(t + s \\Delta, z, u)` for s in [0, 1], so each state may have its own
    gap. An adaptive method takes the same steps in s for all; the error of each state meets the tolerance.

    Args:
        field: ``(t, z, u) -> (..., time, state)`` with ``t`` ``(..., time, 1)``.
        state: ``(..., time, state)``.
        time: ``(..., time)`` float64.
        next_time: ``(..., time)`` float64; before ``time`` for a flow backward.
        inputs: the time since ``time``, ``(..., time, 1)``, to inputs ``(..., time, input)``; None has none.
        method: ``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"`` (one step a gap, or steps of ``step_size`` at
            most), ``"bosh3"`` or ``"dopri5"`` (adaptive).
        tolerance: of an adaptive method.
        step_size: of a fixed-step method.
        length: of the first step of an adaptive method, in parts of the gap.

    Returns:
        ``(..., time, state)``, differentiable in the state and in what the field reads, by the steps that were taken;
        and the length that an adaptive method would take next.

    Raises:
        SolverError: a step cannot be taken.

    Source: Hairer, Norsett and Wanner (1993), "Solving Ordinary Differential Equations I", chapter II.

    >>> import torch
    >>> from pyro_ssm.ops import ode_flow
    >>> ode_flow(lambda t, z, u: -z, torch.ones(1, 1), torch.zeros(1).double(), torch.ones(1).double())[0]
    tensor([[0.3679]])
    """
    table, clock = TABLEAUX[method], Clock(time, next_time - time)
    gap = clock.gap.to(state).unsqueeze(-1)

    def slope(s: float, z: Tensor) -> Tensor:
        return field(clock.at(s, z), z, None if inputs is None else inputs(s * gap)) * gap

    if table.is_adaptive:
        return adaptive_steps(table, slope, state, clock, tolerance, length)
    return fixed_steps(table, slope, state, _num_steps(clock, step_size)), 1.0


def ode_path(
    field: Field,
    start: Tensor,
    times: Tensor,
    inputs: Forcing | None = None,
    jump: Jump | None = None,
    *,
    method: str = "dopri5",
    tolerance: Tolerance = Tolerance(),  # noqa: B008  (a constant)
    step_size: float | None = None,
) -> Tensor:
    """A whole path, every series on its own times.

    .. math:: \\dot z = f(t, z, u(t)), \\qquad z(t_k^+) = \\text{jump}_k(z(t_k))

    Without inputs and jumps all series are solved together in one normalised time, :math:`t = t_1 + s\\, (t_T - t_1)`,
    by an adaptive method (or one with a ``step_size``), and each reads its states off the polynomials of the steps at
    its own times: own times cost little more than shared ones, and many times no more steps than few. With inputs or
    jumps, which change at every time, and for a fixed-step method without ``step_size``, one gap is solved after the
    other (each in its normalised time); a step never crosses a time.

    Args:
        field: as for :func:`ode_flow`, with a time axis of 1.
        start: ``(*lead, 1, state)``.
        times: ``(time,)`` or ``(*batch, time)`` float64, not decreasing (or not increasing, for a path backward); where
            a time is repeated, so is the state.
        inputs: ``(k, since) -> (..., 1, input)``, the inputs ``since`` ``(..., 1, 1)`` after the k-th time.
        jump: ``(k, z) -> z``, applied before the gap after the k-th time; ``z[k]`` itself is the state before.
        method: see :func:`ode_flow`, as ``tolerance`` and ``step_size``.
        tolerance: of an adaptive method.
        step_size: of a fixed-step method; None takes one step a gap.

    Returns:
        ``(*lead, time, state)``; differentiable. No randomness.

    Raises:
        SolverError: an adaptive method cannot take a step.

    >>> import torch
    >>> from pyro_ssm.ops import ode_path
    >>> times = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.5, 3.0]]).double()
    >>> ode_path(lambda t, z, u: -z, torch.ones(2, 1, 1), times).squeeze(-1)
    tensor([[1.0000, 0.3679, 0.1353],
            [1.0000, 0.6065, 0.0498]])
    """
    table = TABLEAUX[method]
    if times.shape[-1] == 1:
        return start
    if inputs is None and jump is None and (table.is_adaptive or step_size is not None):
        return _dense_path(field, start, times, method, tolerance, step_size)
    state, states, length = start, [start], None
    longest = times.diff(dim=-1).abs().reshape(-1, times.shape[-1] - 1).amax(0).tolist()
    for k in range(times.shape[-1] - 1):
        time, next_time = times[..., k : k + 1], times[..., k + 1 : k + 2]
        state = state if jump is None else jump(k, state)
        held = None if inputs is None else _of_gap(inputs, k)
        if length is not None:  # the same step in time, for the longest gap
            known = longest[k] > 0 and longest[k - 1] > 0
            length = min(max(length * longest[k - 1] / longest[k], 1e-9), 1.0) if known else None
        options: dict[str, Any] = {"method": method, "tolerance": tolerance, "step_size": step_size, "length": length}
        state, length = ode_flow(field, state, time, next_time, held, **options)
        states.append(state)
    shape = torch.broadcast_shapes(*(state.shape for state in states))
    return torch.cat([state.expand(shape) for state in states], -2)


def _of_gap(inputs: Forcing, k: int) -> Callable[[Tensor], Tensor]:
    return lambda since: inputs(k, since)


def _num_steps(clock: Clock, step_size: float | None) -> int:
    return 1 if step_size is None else max(1, math.ceil(float(clock.gap.abs().max()) / step_size - 1e-9))


def _dense_path(
    field: Field, start: Tensor, times: Tensor, method: str, tolerance: Tolerance, step_size: float | None
) -> Tensor:
    """One solve over the whole horizon; states at the times by the polynomials of its steps."""
    table, clock = TABLEAUX[method], Clock(times[..., :1], times[..., -1:] - times[..., :1])
    whole, segments = clock.gap.to(start).unsqueeze(-1), list[Segment]()

    def slope(s: float, z: Tensor) -> Tensor:
        return field(clock.at(s, z), z, None) * whole

    if table.is_adaptive:
        adaptive_steps(table, slope, start, clock, tolerance, keep=segments)
    else:
        fixed_steps(table, slope, start, _num_steps(clock, step_size), keep=segments)
    part = (times - clock.start) / torch.where(clock.gap == 0, torch.ones_like(clock.gap), clock.gap)
    edges = torch.tensor([x.start for x in segments] + [1.0], dtype=part.dtype, device=part.device)
    at = torch.searchsorted(edges[1:-1], part.contiguous())
    theta = ((part - edges[at]) / edges.diff()[at]).clamp(0.0, 1.0).to(start).unsqueeze(-1)
    return _evaluate(segments, at, theta)


def _evaluate(segments: list[Segment], at: Tensor, theta: Tensor) -> Tensor:
    """The polynomials ``at`` ``(*batch, time)`` at ``theta`` ``(*batch, time, 1)``, ``(*lead, time, state)``."""
    stacked = [torch.cat(parts, -2) for parts in zip(*(x.parts for x in segments), strict=True)]
    if at.dim() == 1:
        z, *p = (part.index_select(-2, at) for part in stacked)
    else:
        index = at.unsqueeze(-1).expand(stacked[0].shape[:-2] + (at.shape[-1], stacked[0].shape[-1]))
        z, *p = (part.gather(-2, index) for part in stacked)
    rest = 1 - theta
    value = p[2] if len(p) == 3 else torch.addcmul(p[2], rest, p[3])
    value = torch.addcmul(p[0], rest, torch.addcmul(p[1], theta, value))
    return torch.addcmul(z, theta, value)
