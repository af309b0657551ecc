"""Transitions that are discretisations of a differential equation; each has the capabilities that are true of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.binding import bind, is_bound
from pyro_ssm.blocks._conditioning import check_state
from pyro_ssm.blocks._gaussian import with_time
from pyro_ssm.components import Affine, AffineGaussian, Gaussian, SampleOnly, Transition, gap
from pyro_ssm.distributions import SimulatedLaw, SingularNormal
from pyro_ssm.dynamics.linear_sde import LinearSDEProcess
from pyro_ssm.dynamics.neural_sde import NeuralSDE
from pyro_ssm.dynamics.sde_checks import check_steps
from pyro_ssm.ops import linear_sde_step, tria
from pyro_ssm.ops.sde import SDEStep, sde_step

__all__ = [
    "AffineEulerMaruyama",
    "EulerMaruyama",
    "ExactLinear",
    "LocalLinearisation",
    "ODESteps",
    "SimulatedSteps",
]

_ODE_METHODS = ("euler", "heun", "midpoint", "rk4")


class EulerMaruyama(Transition, Gaussian):
    """One Euler step a gap, :math:`z_{k+1} \\sim N(z_k + f \\Delta, g g^T \\Delta)`; weak order 1.

    Made by :func:`~pyro_ssm.dynamics.discretize`.

    >>> import torch, pyro_ssm as ssm
    >>> sde = ssm.dynamics.NeuralSDE(lambda t, z, u: -z**3, lambda t, z, u: 0.5 + 0 * z, state_dim=1)
    >>> times = torch.tensor([0.0, 0.1], dtype=torch.float64)
    >>> step = ssm.dynamics.discretize(sde, "euler_maruyama")
    >>> step(torch.ones(1, 1), times[:1], times[1:], None).mean
    tensor([[0.9000]])
    """

    def __init__(self, sde: NeuralSDE) -> None:
        super().__init__()
        self.sde, self.state_dim = sde, sde.state_dim

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Any:
        """The law of the next states; ``state`` ``(..., time, state)``."""
        check_state(self, state)
        return self.sde.gaussian_step(state, self.sde.drift_at(state, time, inputs), time, next_time, inputs)


class AffineEulerMaruyama(AffineGaussian, EulerMaruyama):
    """One Euler step a gap of a linear drift with a constant diffusion: affine, so the Kalman filter applies.

    .. math:: z_{k+1} \\sim N\\big((I + F \\Delta) z_k + (B u_k + c) \\Delta,\\; g g^T \\Delta\\big)

    Made by :func:`~pyro_ssm.dynamics.discretize`.

    >>> import torch, pyro_ssm as ssm
    >>> sde = ssm.dynamics.NeuralSDE(
    ...     ssm.dynamics.LinearDrift(torch.tensor([[-2.0]])), ssm.dynamics.ConstantDiffusion(0.5, 1))
    >>> times = torch.tensor([0.0, 0.25], dtype=torch.float64)
    >>> ssm.dynamics.discretize(sde, "euler_maruyama").affine(times[:1], times[1:], None).matrix.detach()
    tensor([[[0.5000]]])
    """

    def affine(self, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Affine:
        """The matrices of the step."""
        drift, sde = self.sde.drift, self.sde
        matrix = with_time(drift.matrix, 2)
        step = gap(time, next_time, matrix)
        origin = matrix.new_zeros(1, self.state_dim)
        g = _as_matrix(sde, sde.diffusion_at(origin, time, inputs))
        eye = torch.eye(self.state_dim, dtype=matrix.dtype, device=matrix.device)
        root = tria(g * step.sqrt().unsqueeze(-1))
        return Affine(eye + matrix * step.unsqueeze(-1), drift.forcing(inputs) * step, root)


class ExactLinear(LinearSDEProcess):
    """The exact law over a gap of a linear drift with a constant diffusion (see ``dynamics.LinearSDE``).

    Made by :func:`~pyro_ssm.dynamics.discretize`.

    >>> import torch, pyro_ssm as ssm
    >>> sde = ssm.dynamics.NeuralSDE(
    ...     ssm.dynamics.LinearDrift(torch.tensor([[-2.0]])), ssm.dynamics.ConstantDiffusion(0.5, 1))
    >>> times = torch.tensor([0.0, 0.5], dtype=torch.float64)
    >>> ssm.dynamics.discretize(sde, "exact").affine(times[:1], times[1:], None).matrix.detach().squeeze()
    tensor(0.3679)
    """

    def __init__(self, sde: NeuralSDE) -> None:
        super().__init__()
        self.sde, self.state_dim, self.input_dim = sde, sde.state_dim, sde.drift.input_dim

    def system(self) -> tuple[Tensor, Tensor]:
        """F and g."""
        F = with_time(self.sde.drift.matrix, 2)
        origin, clock = F.new_zeros(1, self.state_dim), F.new_zeros(1, 1)
        return F, _as_matrix(self.sde, self.sde.diffusion(clock, origin, None))

    def forcing(self, inputs: Tensor | None) -> Tensor | None:
        """:math:`B u + c`."""
        return self.sde.drift.forcing(inputs)


class LocalLinearisation(Transition, Gaussian):
    """The drift linearised at each state, with the exact law of the linear equation over the gap,

    .. math:: z_{k+1} \\sim N\\Big(z_k + \\Gamma f(z_k),\\; \\int_0^\\Delta e^{J s} g g^T e^{J^T s} ds\\Big), \\qquad
        J = \\frac{\\partial f}{\\partial z}(z_k), \\quad \\Gamma = \\int_0^\\Delta e^{J s} ds.

    Exact for linear drifts; stable where Euler steps are not; of full rank for many degenerate diffusions (the noise
    on a velocity reaches the position within the step). g, t and u are held within the gap.

    Made by :func:`~pyro_ssm.dynamics.discretize`. Source: Ozaki (1992), "A bridge between nonlinear time series models
    and nonlinear stochastic dynamical systems: a local linearization approach", Statistica Sinica 2.

    >>> import torch, pyro_ssm as ssm
    >>> sde = ssm.dynamics.NeuralSDE(lambda t, z, u: -2 * z, lambda t, z, u: 0.5 + 0 * z, state_dim=1)
    >>> times = torch.tensor([0.0, 0.5], dtype=torch.float64)
    >>> ssm.dynamics.discretize(sde, "local_linearisation")(torch.ones(1, 1), times[:1], times[1:], None).mean
    tensor([[0.3679]])
    """

    def __init__(self, sde: NeuralSDE) -> None:
        super().__init__()
        self.sde, self.state_dim = sde, sde.state_dim

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Any:
        """The law of the next states; ``state`` ``(..., time, state)``."""
        check_state(self, state)
        sde = self.sde if is_bound(self) else bind(self.sde)  # a differentiated function cannot register parameters
        f, J = _drift_and_jacobian(lambda z: sde.drift_at(z, time, inputs), state)
        g = _as_matrix(sde, sde.diffusion_at(state, time, inputs))
        step = linear_sde_step(J, g, gap(time, next_time, state).squeeze(-1))
        loc = state + (step.integral @ f.unsqueeze(-1)).squeeze(-1)
        return SingularNormal(
            check_steps(loc, state, time, "the linearised drift"), scale_tril=step.scale_tril, validate_args=False
        )


class SimulatedSteps(Transition, SampleOnly):
    """Some steps of a fixed-step scheme a gap: draws without a density.

    Made by :func:`~pyro_ssm.dynamics.discretize`.

    >>> import torch, pyro_ssm as ssm
    >>> sde = ssm.dynamics.NeuralSDE(lambda t, z, u: -z, lambda t, z, u: 0.5 * z, state_dim=1)
    >>> times = torch.tensor([0.0, 0.5], dtype=torch.float64)
    >>> step = ssm.dynamics.discretize(sde, "milstein", substeps=4)
    >>> step(torch.ones(3, 1, 1), times[:1], times[1:], None).sample().shape
    torch.Size([3, 1, 1])
    """

    def __init__(self, sde: NeuralSDE, method: str, substeps: int) -> None:
        super().__init__()
        self.sde, self.state_dim, self.method, self.substeps = sde, sde.state_dim, method, substeps

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> SimulatedLaw:
        """The law of the next states, by its draws; ``state`` ``(..., time, state)``."""
        check_state(self, state)
        sde, n = self.sde, self.substeps
        start, short = time.to(state).unsqueeze(-1), gap(time, next_time, state) / n

        def transform(normal: Tensor) -> Tensor:
            z = state
            for i, e in enumerate(normal.chunk(n, -1)):
                t = start + i * short
                step = SDEStep(sde._drift, sde._diffusion, sde.noise, t, t + short, inputs, short, e * short.sqrt())
                z = sde_step(z, step, self.method, sde.interpretation)
            return check_steps(z, state, time, f"a step of {self.method!r}")

        lead = torch.broadcast_shapes(state.shape[:-1], short.shape[:-1])
        return SimulatedLaw(transform, n * sde.noise_dim, self.state_dim, lead, state, sde._no_density())

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"method={self.method!r}, substeps={self.substeps}"


class ODESteps(Transition, Gaussian):
    """An ordinary differential equation by a Runge-Kutta method, with a floor of noise or none,

    .. math:: z_{k+1} \\sim N(\\Phi_\\Delta(z_k),\\; s^2 \\Delta\\, I), \\qquad \\dot z = f(t, z, u).

    With s = 0 a step is a point mass: it can be drawn, goes into the Kalman family, and has no density.

    Made by :func:`~pyro_ssm.dynamics.discretize`.

    >>> import torch, pyro_ssm as ssm
    >>> times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    >>> step = ssm.dynamics.discretize(lambda t, z, u: -z, "rk4", state_dim=1, noise_floor=0.1, substeps=4)
    >>> step(torch.ones(1, 1), times[:1], times[1:], None).mean
    tensor([[0.3679]])
    """

    def __init__(self, field: Callable[..., Tensor], state_dim: int, method: str, substeps: int, floor: float) -> None:
        super().__init__()
        self.field, self.state_dim, self.method, self.substeps, self.floor = field, state_dim, method, substeps, floor

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Any:
        """The law of the next states; ``state`` ``(..., time, state)``."""
        check_state(self, state)
        whole = gap(time, next_time, state)
        t, h, z = time.to(state).unsqueeze(-1), whole / self.substeps, state
        for _ in range(self.substeps):
            z = z + h * self._slope(t, z, h, inputs)
            t = t + h
        loc = check_steps(z, state, time, "the field")
        scale = (self.floor * whole.sqrt()).expand(loc.shape)
        return SingularNormal(loc, scale_tril=scale.diag_embed(), validate_args=False)

    def _slope(self, t: Tensor, z: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
        f = self.field
        first = f(t, z, u)
        if self.method == "euler":
            return first
        if self.method == "heun":
            return 0.5 * (first + f(t + h, z + h * first, u))
        second = f(t + h / 2, z + h / 2 * first, u)
        if self.method == "midpoint":
            return second
        third = f(t + h / 2, z + h / 2 * second, u)
        return (first + 2 * second + 2 * third + f(t + h, z + h * third, u)) / 6

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"method={self.method!r}, substeps={self.substeps}, noise_floor={self.floor}"


def _as_matrix(sde: NeuralSDE, g: Tensor) -> Tensor:
    """The diffusion as ``(..., time or 1, state, noise)``."""
    return with_time(g, 1).diag_embed() if sde.noise == "diagonal" else with_time(g, 2)


def _drift_and_jacobian(f: Callable[[Tensor], Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """f ``(..., time, n)`` and its Jacobian ``(..., time, n, n)``, row by row; rows of the batch do not mix."""
    value, pull, *_ = torch.func.vjp(f, state)
    if value.shape != state.shape:  # drawn parameters have more leading dims than the state, which pull would sum over
        value, pull, *_ = torch.func.vjp(f, state.expand(value.shape))
    directions = torch.eye(state.shape[-1], dtype=state.dtype, device=state.device)
    return value, torch.stack([pull(direction.expand(value.shape))[0] for direction in directions], -2)
