"""Ordinary differential equations as transitions: any field, any solver, every series on its own times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.binding import bind, is_bound
from pyro_ssm.blocks._checks import check_choice, check_positive, check_size
from pyro_ssm.blocks._conditioning import check_state
from pyro_ssm.components import Gaussian, Transition, gap
from pyro_ssm.distributions import SingularNormal
from pyro_ssm.dynamics.field_penalty import FieldPenalty
from pyro_ssm.dynamics.interpolation import InputPath
from pyro_ssm.dynamics.sde_checks import check_steps, tensors_with_gradient
from pyro_ssm.ops.ode import ode_flow, ode_path
from pyro_ssm.ops.runge_kutta import TABLEAUX, Tolerance
from pyro_ssm.ops.sde import check_path
from pyro_ssm.ops.torchdiffeq_path import torchdiffeq_flow, torchdiffeq_path

__all__ = ["NeuralODE"]

#: those of torchdiffeq; a method that is in TABLEAUX too is ours unless the backend is asked for. Left out is
#: "explicit_adams": in 0.2.5 its error does not fall with the step (0.005 at h = 0.04, 0.07 at 0.02, 0.13 at 0.01 for a
#: linear oscillator on [0, 1])
ADAPTIVE = ("dopri5", "bosh3", "dopri8", "fehlberg2", "adaptive_heun")
FIXED_STEP = ("euler", "midpoint", "heun", "rk4", "heun2", "heun3", "implicit_adams")
_SAME_TIME = 1e-6  # in parts of a gap


class NeuralODE(Transition, Gaussian):
    """An ordinary differential equation with inputs and jumps,

    .. math:: \\dot z = f(t, z, u(t)), \\qquad z(t_k^+) = J(t_k, z(t_k), u_k).

    ``field`` is called as ``field(t, z, u)`` with ``t`` ``(..., time, 1)`` in the state's dtype, ``z`` ``(..., time,
    state)`` and ``u`` ``(..., time, input)`` or None, and returns ``(..., time, state)``. It may be a network
    (:class:`MLPDrift`, :class:`SecondOrder`), a plain function, or a ``PyroModule`` with the constants of a mechanism,
    to learn or to give priors (bind names them ``field.name``), alone or beside a network (:class:`GreyBox`); it must
    broadcast. Weights with priors (``blocks.with_normal_priors``) are drawn once a trace and stay what they are through
    the whole solve, backward passes of the adjoint included.

    **The random variable is the start**: a path is a function of :math:`z_1` and has no density. A model samples the
    site ``"z_start"``, and ``"z"`` is deterministic; conditioning ``"z"`` raises. ``guides.InitialState`` amortises
    :math:`q(z_1 \\mid y)`; automatic guides and NUTS work on ``"z_start"``. As a law of single steps the transition
    is ``Gaussian`` with no variance, so the extended and unscented filters run (exactly, for a linear field); particles
    of a bootstrap filter cannot part once they are equal: give the equation a floor of noise there,
    ``discretize(ode, "flow", noise_floor=s)``.

    =================================  ======  =======================================
    ``method``                         order   steps
    =================================  ======  =======================================
    ``"dopri5"``                       5       by ``rtol`` and ``atol``
    ``"bosh3"``                        3       by ``rtol`` and ``atol``
    ``"rk4"``                          4       one a gap, or ``step_size`` at most
    ``"heun"``, ``"midpoint"``         2       one a gap, or ``step_size`` at most
    ``"euler"``                        1       one a gap, or ``step_size`` at most
    ``"dopri8"``, ``"adaptive_heun"``  8, 2    torchdiffeq's, by ``rtol`` and ``atol``
    ``"implicit_adams"``, ...                  torchdiffeq's, ``step_size`` at most
    =================================  ======  =======================================

    **Own times.** ``"dopri5"``, ``"bosh3"``, and the others with a ``step_size``, solve all series of a batch at once
    in normalised time, :math:`t = t_1 + s (t_T - t_1)`, and each series reads its states off the polynomials of the
    steps at its own times: its own grid costs about what a shared one costs, and the number of observations does not
    make steps. Every series meets the tolerance by itself. Where something happens at each time (inputs, jumps), and
    with torchdiffeq on own grids, the solve goes gap by gap, each gap in its normalised time.

    **Inputs** are held within a gap. With ``interpolation="linear"``, ``"cubic"`` or ``"rectilinear"`` they move as the
    polynomials that :func:`interpolate_inputs` puts into the data, and ``u`` is their value at the time t.

    **Jumps** are at the beginning of each gap: ``jump(t, z, u)`` returns the state with which the gap after
    :math:`t_k` starts; ``z[k]``, which is observed, is the state before. What is known to happen at some times only
    (a dose) is an input that is 0 elsewhere. On a refined grid this needs an ``interpolation`` (``"held"`` will do),
    whose rows know the time to which they belong; the jump is made there only.

    Args:
        field: f.
        method: see above.
        adjoint: take gradients by solving the adjoint equation backward (torchdiffeq's ``odeint_adjoint``): memory does
            not grow with the number of steps; slower, and exact for vanishing tolerances only. The field must then be a
            module, whose parameters and drawn values are passed to the solver.
        backend: ``"dense"`` (ours) or ``"torchdiffeq"``; default: ours where it has the method.
        rtol: relative tolerance of an adaptive method, at least 4 units of rounding.
        atol: absolute tolerance, in the units of the state.
        step_size: the longest step of a fixed-step method, in time; None takes one step a gap.
        max_steps: of an adaptive method, in one solve.
        options: further ones of torchdiffeq's solver.
        interpolation: how the inputs move within a gap; None holds them, whatever they are.
        jump: J; a function or a module.
        penalty: regularisation of the field, a term of the model while it trains (:class:`FieldPenalty`).
        log_intensity: ``(t, z, u) -> (..., time, channels)``, the logarithm of the rate, per unit of time, of a Poisson
            process of observation times: one channel for all of them, or one for each column of the observations
            (:class:`LogIntensity`). The model then has the observed site ``"times"``, whose law is
            ``distributions.PoissonTimes``: when something was measured tells of the state as well as what was.
            The solver carries its integral beside the state. Particle filters count the times too; methods that cannot
            refuse the model.
        state_dim: size of the state; by default that of ``field``.

    Raises:
        TypeError: ``field``, ``jump`` or ``log_intensity`` cannot be called.
        ValueError: an unknown method, or options that do not go with it; when called, a field that returns another
            size, or times that go back.
        ops.SolverError: the field blows up or returns NaN, or no step can be taken: says at what time, for which
            series, at what norm of the state.

    Gradients: through the steps that were taken (discretise, then differentiate), or by the adjoint. Nothing is random.

    Source: Chen, Rubanova, Bettencourt and Duvenaud (2018), "Neural ordinary differential equations", NeurIPS; own
    times: Chen, Amos and Nickel (2021), "Learning neural event functions for ordinary differential equations", ICLR.

    >>> import torch, pyro_ssm as ssm
    >>> ode = ssm.dynamics.NeuralODE(ssm.dynamics.LinearDrift(torch.tensor([[0.0, 1.0], [-1.0, 0.0]])))
    >>> times = torch.linspace(0, 2 * torch.pi, 5, dtype=torch.float64)
    >>> ode.solve(torch.tensor([[1.0, 0.0]]), times).round(decimals=3).abs()     # once around the circle
    tensor([[1., 0.],
            [0., 1.],
            [1., 0.],
            [0., 1.],
            [1., 0.]], grad_fn=<AbsBackward0>)
    """

    def __init__(
        self,
        field: Any,
        *,
        method: str = "dopri5",
        adjoint: bool = False,
        backend: str | None = None,
        rtol: float = 1e-5,
        atol: float = 1e-6,
        step_size: float | None = None,
        max_steps: int = 4000,
        options: Mapping[str, Any] | None = None,
        interpolation: str | None = None,
        jump: Any = None,
        penalty: FieldPenalty | None = None,
        log_intensity: Any = None,
        state_dim: int | None = None,
    ) -> None:
        super().__init__()
        if not callable(field):
            raise TypeError(f"`field` must be callable as field(t, z, inputs), got {field!r}")
        for name, part in (("jump", jump), ("log_intensity", log_intensity)):
            if part is not None and not callable(part):
                raise TypeError(f"`{name}` must be callable as {name}(t, z, inputs), got {part!r}")
        if penalty is not None and not isinstance(penalty, FieldPenalty):
            raise TypeError(f"`penalty` must be a dynamics.FieldPenalty, got {type(penalty).__name__}")
        self.field, self.jump, self.penalty, self.log_intensity = field, jump, penalty, log_intensity
        self.method = check_choice("method", method, (*ADAPTIVE, *FIXED_STEP))
        self.adjoint, self.backend = adjoint, _check_backend(backend, method, adjoint, options)
        if adjoint and not all(isinstance(part, torch.nn.Module) for part in (field, log_intensity or field)):
            raise TypeError(
                "`adjoint` needs a field that is a module (and a log-intensity), so that the tensors it reads are "
                "known to the backward solve. Put what the function reads into a PyroModule, or leave `adjoint` out"
            )
        self.tolerance = Tolerance(
            check_positive("rtol", rtol), check_positive("atol", atol), check_size("max_steps", max_steps)
        )
        self.step_size = None if step_size is None else check_positive("step_size", step_size)
        if step_size is not None and method in ADAPTIVE:
            raise ValueError(f"`step_size` is of fixed-step methods; {method!r} chooses its steps by `rtol` and `atol`")
        self.options = dict(options or {})
        self.interpolation = None if interpolation is None else InputPath(interpolation)
        own = getattr(field, "state_dim", None)
        if state_dim is None and own is None:
            raise ValueError("`state_dim` is needed: `field` does not say its own. Give NeuralODE(..., state_dim=...)")
        if state_dim is not None and own is not None and state_dim != own:
            raise ValueError(f"`state_dim` is {state_dim}, but `field` has {own}")
        self.state_dim = check_size("state_dim", own if state_dim is None else state_dim)

    # ------------------------------------------------------------------------------------------------- the field

    def field_at(self, state: Tensor, time: Tensor, inputs: Tensor | None) -> Tensor:
        """:math:`f`, ``(..., time, state)``, at states ``(..., time, state)`` and times ``(..., time)``."""
        moving = self.interpolation
        u = inputs if moving is None or inputs is None else moving.at(inputs, time)
        return self._field(time.to(state).unsqueeze(-1), state, u)

    def _field(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        value = self.field(time, state, inputs)
        if value.shape[-1] != self.state_dim:
            raise ValueError(
                f"`field` must return (..., time, {self.state_dim}), got {tuple(value.shape)} for a state of shape "
                f"{tuple(state.shape)}"
            )
        return value

    def log_intensity_at(self, state: Tensor, time: Tensor, inputs: Tensor | None) -> Tensor:
        """``(..., time, channels)`` at states ``(..., time, state)`` and times ``(..., time)``."""
        moving = self.interpolation
        u = inputs if moving is None or inputs is None else moving.at(inputs, time)
        return self.log_intensity(time.to(state).unsqueeze(-1), state, u)

    def _augmented(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        """:math:`(f, e^{\\log \\lambda})` at states beside which their integrated intensities stand."""
        z = state[..., : self.state_dim]
        slope, rate = self._field(time, z, inputs), self.log_intensity(time, z, inputs).exp()
        lead = torch.broadcast_shapes(slope.shape[:-1], rate.shape[:-1])
        return torch.cat([slope.expand(lead + slope.shape[-1:]), rate.expand(lead + rate.shape[-1:])], -1)

    def _ignores_inputs(self) -> bool:
        read = (self.field,) if self.log_intensity is None else (self.field, self.log_intensity)
        return all(getattr(part, "input_dim", None) == 0 for part in read)

    def _forcing(self, inputs: Tensor | None, time: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The time since ``time`` to the inputs, for a gap that starts there."""
        if inputs is None or self._ignores_inputs():
            return None
        if self.interpolation is None:
            return lambda since: inputs
        path, begun = self.interpolation, self.interpolation.elapsed(inputs, time)
        return lambda since: path.after(inputs, begun + since)

    def _jumped(self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None) -> Tensor:
        """The states with which the gaps after ``time`` start."""
        if self.jump is None:
            return state
        u = inputs if self.interpolation is None or inputs is None else self.interpolation.at(inputs, time)
        after = self.jump(time.to(state).unsqueeze(-1), state, u)
        if after.shape[-1] != self.state_dim:
            raise ValueError(f"`jump` must return (..., time, {self.state_dim}), got {tuple(after.shape)}")
        if self.interpolation is None or inputs is None:
            return after
        there = self.interpolation.elapsed(inputs, time) <= _SAME_TIME * gap(time, next_time, inputs)
        return torch.where(there, after, state)

    # ------------------------------------------------------------------------------------------------- one step

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> SingularNormal:
        """The next states as a law without variance; ``state`` ``(..., time, state)``."""
        loc = self.flow(state, time, next_time, inputs)
        zero = loc.new_zeros(self.state_dim, self.state_dim)
        return SingularNormal(loc, scale_tril=zero, validate_args=False)

    def flow(self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None) -> Tensor:
        """The states ``(..., time, state)`` after each gap, jumps included."""
        check_state(self, state)
        before = self._jumped(state, time, next_time, inputs)
        return check_steps(
            self._flow(self._field, before, time, next_time, inputs), state, time, f"a step of {self.method!r}"
        )

    def flow_intensity(self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None) -> Tensor:
        """The integrals ``(..., time, channels)`` of the intensity over each gap, on the flow from ``state``.

        .. math:: \\int_{t_k}^{t_{k+1}} \\lambda_i(t, \\Phi_{t - t_k}(z_k), u(t))\\, dt
        """
        check_state(self, state)
        before = self._jumped(state, time, next_time, inputs)
        beside = self._beside_nothing(before, time, inputs)
        return self._flow(self._augmented, beside, time, next_time, inputs)[..., self.state_dim :]

    def _flow(self, field: Any, before: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None) -> Tensor:
        held = self._forcing(inputs, time)
        if self.backend == "torchdiffeq":
            return torchdiffeq_flow(field, before, time, next_time, held, **self._torchdiffeq(inputs))
        return ode_flow(field, before, time, next_time, held, **self._dense())[0]

    def _beside_nothing(self, state: Tensor, time: Tensor, inputs: Tensor | None) -> Tensor:
        """The state, and beside it an integral of 0 for each channel."""
        first = self.log_intensity_at(state, time, inputs)
        lead = torch.broadcast_shapes(state.shape[:-1], first.shape[:-1])
        none = torch.zeros_like(first)
        return torch.cat([state.expand(lead + state.shape[-1:]), none.expand(lead + first.shape[-1:])], -1)

    # ------------------------------------------------------------------------------------------------- a path

    def solve(self, start: Tensor, times: Tensor, inputs: Tensor | None = None) -> Tensor:
        """The path from ``start``.

        Args:
            start: ``(*lead, 1, state)``, the state at ``times[..., 0]``.
            times: ``(time,)`` or ``(*batch, time)``, best float64. A repeated time has the same state, as padding.
            inputs: ``(*batch, time, input)`` or None.

        Returns:
            ``(*lead, time, state)``; differentiable.

        Raises:
            ValueError: a time lies before the one before it, or ``start`` has more than one time.
            ops.SolverError: see the class.
        """
        if not is_bound(self):
            return bind(self).solve(start, times, inputs)  # every parameter is read once
        check_state(self, start)
        return self._solve(self._field, start, times, inputs)

    def solve_with_intensity(self, start: Tensor, times: Tensor, inputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The path, and the integral of the intensity from the first time to each, by one solve of both.

        .. math:: \\Lambda_i(t) = \\int_{t_1}^{t} \\lambda_i(s, z(s), u(s))\\, ds

        Args:
            start, times, inputs: see :meth:`solve`.

        Returns:
            ``(*lead, time, state)`` and ``(*lead, time, channels)``; differentiable.

        Raises:
            TypeError: the equation has no ``log_intensity``.
        """
        if not is_bound(self):
            return bind(self).solve_with_intensity(start, times, inputs)
        if self.log_intensity is None:
            raise TypeError("this equation has no intensity: build NeuralODE(..., log_intensity=...)")
        check_state(self, start)
        held = None if inputs is None else inputs[..., :1, :]
        path = self._solve(self._augmented, self._beside_nothing(start, times[..., :1], held), times, inputs)
        return path[..., : self.state_dim], path[..., self.state_dim :]

    def _solve(self, field: Any, start: Tensor, times: Tensor, inputs: Tensor | None) -> Tensor:
        """The path of ``field``, whose first coordinates are the state; jumps move these only."""
        if start.dim() > 1 and start.shape[-2] != 1:
            raise ValueError(
                f"`start` must have shape (*lead, 1, {self.state_dim}), with a time axis of one time, got "
                f"{tuple(start.shape)}. For one start a series give start.unsqueeze(-2)"
            )
        _check_order(times)
        rows = None if inputs is None else inputs.split(1, -2)
        clock = times.split(1, -1)
        forcing = jump = None
        if rows is not None and not self._ignores_inputs():
            of_gap = [self._forcing(u, t) for u, t in zip(rows, clock, strict=True)]
            forcing = lambda k, since: of_gap[k](since)  # noqa: E731
        if self.jump is not None:

            def jump(k: int, z: Tensor) -> Tensor:
                held = None if rows is None else rows[k]
                state, beside = z[..., : self.state_dim], z[..., self.state_dim :]
                after = self._jumped(state, clock[k], clock[k + 1], held)
                if not beside.shape[-1]:
                    return after
                return torch.cat([after, beside.expand(after.shape[:-1] + beside.shape[-1:])], -1)

        if self.backend == "torchdiffeq":
            path = torchdiffeq_path(field, start, times, forcing, jump, **self._torchdiffeq(inputs))
        else:
            path = ode_path(field, start, times, forcing, jump, **self._dense())
        return check_path(path, times, f"the path of {self.method!r}")

    def _dense(self) -> dict[str, Any]:
        return {"method": self.method, "tolerance": self.tolerance, "step_size": self.step_size}

    def _torchdiffeq(self, inputs: Tensor | None) -> dict[str, Any]:
        read = [] if inputs is None or not inputs.requires_grad else [inputs]
        name = "heun2" if self.method == "heun" else self.method
        more = {"max_num_steps": self.tolerance.max_steps} if name in ADAPTIVE else {}
        return {
            "method": name,
            "rtol": self.tolerance.rtol,
            "atol": self.tolerance.atol,
            "step_size": self.step_size,
            "options": {**more, **self.options},
            "adjoint_params": [*tensors_with_gradient(self), *read] if self.adjoint else None,
        }

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        chosen = "" if self.step_size is None else f", step_size={self.step_size}"
        moving = "" if self.interpolation is None else f", interpolation={self.interpolation.kind!r}"
        return (
            f"state_dim={self.state_dim}, method={self.method!r}, backend={self.backend!r}, adjoint={self.adjoint}"
            f"{chosen}{moving}"
        )


def _check_backend(backend: str | None, method: str, adjoint: bool, options: Mapping[str, Any] | None) -> str:
    """The backend that is asked for, or ours where it has the method."""
    if backend is None:
        return "torchdiffeq" if adjoint or options or method not in TABLEAUX else "dense"
    check_choice("backend", backend, ("dense", "torchdiffeq"))
    if backend == "dense" and (adjoint or options or method not in TABLEAUX):
        raise ValueError(
            f"backend='dense' has the methods {list(TABLEAUX)}, no adjoint and no `options`; got method={method!r}, "
            f"adjoint={adjoint} and options={dict(options or {})}. Use backend='torchdiffeq'"
        )
    return backend


def _check_order(times: Tensor) -> None:
    back = times.diff(dim=-1) < 0
    if not bool(back.any()):
        return
    at = tuple(back.nonzero()[0].tolist())
    series = f"series {at[:-1] if len(at) > 2 else at[0]}" if len(at) > 1 else "the series"
    before = float(times[at])
    raise ValueError(
        f"`times` go back from {before:g} to {float(times[at[:-1]][at[-1] + 1]):g} in {series}: an equation is solved "
        "from the first time on. Start earlier (times[0] is where the initial law holds), or solve backward with "
        "ops.ode_path"
    )
