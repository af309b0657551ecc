"""Paths of ordinary differential equations by the solvers of torchdiffeq, with backpropagation or the adjoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

from pyro_ssm.ops.ode import Forcing, Jump
from pyro_ssm.ops.runge_kutta import Clock
from pyro_ssm.ops.sde import Field
from pyro_ssm.ops.solver_error import SolverError

__all__ = ["torchdiffeq_flow", "torchdiffeq_path"]


def torchdiffeq_path(
    field: Field,
    start: Tensor,
    times: Tensor,
    inputs: Forcing | None = None,
    jump: Jump | None = None,
    **solver: Any,
) -> Tensor:
    """A whole path by ``torchdiffeq.odeint`` or ``odeint_adjoint``; arguments as :func:`~pyro_ssm.ops.ode_path`.

    One solve for the whole path where all series have the same times and there are neither inputs nor jumps;
    otherwise one a gap, each in normalised time, so that every series may have its own times and no step crosses one.

    Args:
        field: as for :func:`~pyro_ssm.ops.ode_path`, as are ``start``, ``times``, ``inputs`` and ``jump``.
        **solver: ``method``, ``rtol``, ``atol``, ``step_size``, ``options`` and ``adjoint_params`` of
            :func:`torchdiffeq_flow`.

    Returns:
        ``(*lead, time, state)``; differentiable.

    Raises:
        SolverError: a step cannot be taken.

    >>> import torch
    >>> from pyro_ssm.ops import torchdiffeq_path
    >>> times = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.5, 3.0]]).double()
    >>> torchdiffeq_path(lambda t, z, u: -z, torch.ones(2, 1, 1), times, method="dopri8").squeeze(-1)
    tensor([[1.0000, 0.3679, 0.1353],
            [1.0000, 0.6065, 0.0498]])
    """
    if times.shape[-1] == 1:
        return start
    rows = times.reshape(-1, times.shape[-1])
    if inputs is None and jump is None and bool((rows == rows[:1]).all()) and bool((rows[0].diff() != 0).all()):
        clock = Clock(rows[0, :1], torch.ones_like(rows[0, :1]))
        path = _solve(_Slope(field, clock, None), start, rows[0] - rows[0, 0], **solver)
        return path.movedim(0, -3).squeeze(-2)
    state, states = start, [start]
    for k in range(times.shape[-1] - 1):
        state = state if jump is None else jump(k, state)
        held = None if inputs is None else (lambda since, k=k: inputs(k, since))
        state = torchdiffeq_flow(field, state, times[..., k : k + 1], times[..., k + 1 : k + 2], held, **solver)
        states.append(state)
    shape = torch.broadcast_shapes(*(state.shape for state in states))
    return torch.cat([state.expand(shape) for state in states], -2)


def torchdiffeq_flow(
    field: Field, state: Tensor, time: Tensor, next_time: Tensor, inputs: Any = None, **solver: Any
) -> Tensor:
    """The states after a gap, by one solve in normalised time; arguments as :func:`~pyro_ssm.ops.ode_flow`.

    Args:
        field: as for :func:`~pyro_ssm.ops.ode_flow`, as are ``state``, ``time``, ``next_time`` and ``inputs``.
        **solver: ``method`` (torchdiffeq's name), ``rtol``, ``atol``, ``step_size`` of a fixed-step method (None: one
            step a gap), ``options`` (torchdiffeq's), ``adjoint_params``: every tensor that the field reads and that
            needs a gradient, which is then taken by the adjoint method; None backpropagates through the solver.

    >>> import torch
    >>> from pyro_ssm.ops import torchdiffeq_flow
    >>> time = torch.zeros(1).double()
    >>> torchdiffeq_flow(lambda t, z, u: -z, torch.ones(1, 1), time, time + 1, method="rk4", step_size=0.1)
    tensor([[0.3679]])
    """
    clock = Clock(time, next_time - time)
    if solver.get("step_size") is not None:  # in normalised time
        solver["step_size"] = solver["step_size"] / max(float(clock.gap.abs().max()), 1e-300)
    unit = torch.tensor([0.0, 1.0], dtype=torch.float64, device=state.device)
    return _solve(_Slope(field, clock, inputs), state, unit, **solver)[1]


class _Slope(nn.Module):
    """The equation as torchdiffeq wants it; remembers the last state that it saw, for messages."""

    def __init__(self, field: Field, clock: Clock, inputs: Any) -> None:
        super().__init__()
        self.parts = (field, clock, inputs)  # a tuple, so that nothing is registered
        self.gap = clock.gap.unsqueeze(-1)
        self.seen: tuple[float, Tensor] | None = None

    def forward(self, s: Tensor, z: Tensor) -> Tensor:
        """:math:`dz/ds`."""
        field, clock, inputs = self.parts
        if bool(z.detach().sum().isfinite()):
            self.seen = (float(s.detach()), z.detach())
        gap = self.gap.to(z)
        time = (clock.start + s.double() * clock.gap).to(z).unsqueeze(-1)
        value = field(time, z, None if inputs is None else inputs(s.to(z) * gap)) * gap
        return value.expand(z.shape)

    def error(self, why: str) -> SolverError:
        """What is known of a step that cannot be taken."""
        if self.seen is None:
            return SolverError(f"the start of the path is not finite ({why})")
        s, z = self.seen
        clock = self.parts[1]
        norm = z.norm(dim=-1)
        with torch.no_grad():
            slope = self(torch.tensor(s, dtype=torch.float64, device=z.device), z).norm(dim=-1)
        worst = slope.nan_to_num(nan=torch.inf, posinf=torch.inf)
        at = tuple(int(i) for i in torch.unravel_index(worst.flatten().argmax(), worst.shape))
        time = float((clock.start + s * clock.gap).expand(norm.shape)[at])
        name = f"series {at[:-1] if len(at) > 2 else at[0]}" if len(at) > 1 else "the series"
        return SolverError(
            f"torchdiffeq cannot take a step at time {time:.6g} of {name}, where the state has norm "
            f"{float(norm[at]):.4g} ({why}). The field blows up or returns NaN there, or the equation is stiff: bound "
            "the field, start nearer to the data, loosen `rtol` and `atol`, or use a fixed-step method"
        )


def _solve(
    slope: _Slope,
    start: Tensor,
    clock: Tensor,
    *,
    method: str,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    step_size: float | None = None,
    options: Mapping[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
) -> Tensor:
    given = dict(options or {})
    if step_size is not None:
        # equal steps, as a multistep method asks for; a trifle longer, lest rounding leave a last step of length 0
        whole = float((clock[-1] - clock[0]).abs())
        step_size = whole / max(1, math.ceil(whole / step_size - 1e-9)) * (1 + 1e-12)
        given = {"step_size": step_size, "interp": "cubic", **given}
    with torch.no_grad():  # drawn parameters may have more leading dims than the state
        field, at, inputs = slope.parts
        time = at.at(0.0, start)
        shape = field(time, start, None if inputs is None else inputs(torch.zeros_like(time))).shape
    start = start.expand(torch.broadcast_shapes(start.shape, shape, time.shape))
    more: dict[str, Any] = {} if adjoint_params is None else {"adjoint_params": tuple(adjoint_params)}
    solve = torchdiffeq.odeint if adjoint_params is None else torchdiffeq.odeint_adjoint
    try:
        return solve(slope, start, clock, rtol=rtol, atol=atol, method=method, options=given, **more)
    except AssertionError as error:  # "underflow in dt", "max_num_steps exceeded"
        raise slope.error(str(error)) from error
