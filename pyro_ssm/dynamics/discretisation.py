"""From a differential equation to a transition."""

from __future__ import annotations

from typing import Any

from pyro.nn import PyroModule
from torch import Tensor

from pyro_ssm.blocks._checks import check_choice, check_size
from pyro_ssm.components import Transition
from pyro_ssm.dynamics.discretized import (
    _ODE_METHODS,
    AffineEulerMaruyama,
    EulerMaruyama,
    ExactLinear,
    LocalLinearisation,
    ODESteps,
    SimulatedSteps,
)
from pyro_ssm.dynamics.linear_sde import LinearSDEProcess
from pyro_ssm.dynamics.neural_ode import NeuralODE
from pyro_ssm.dynamics.neural_sde import NeuralSDE
from pyro_ssm.dynamics.noisy_flow import NoisyFlow
from pyro_ssm.dynamics.ornstein_uhlenbeck import OrnsteinUhlenbeck
from pyro_ssm.dynamics.sde_fields import ConstantDiffusion, LinearDrift
from pyro_ssm.ops.sde import fixed_step_methods

__all__ = ["discretize"]

_SDE_METHODS = ("euler_maruyama", "milstein", "heun", "midpoint", "euler_heun", "local_linearisation", "exact")


def discretize(
    equation: Any,
    method: str = "euler_maruyama",
    *,
    substeps: int = 1,
    state_dim: int | None = None,
    noise_floor: float = 0.0,
) -> Transition:
    """A transition that moves a state over a gap as the equation does, with the capabilities that are true of it.

    ==========================  ==================================================  ====================================
    ``method``                  equation                                            the transition is
    ==========================  ==================================================  ====================================
    ``"euler_maruyama"``        any SDE (Itô, or a diffusion free of the state)     ``Gaussian``; ``AffineGaussian`` for
                                                                                    a linear drift and constant
                                                                                    diffusion; ``SampleOnly`` with
                                                                                    ``substeps > 1``
    ``"local_linearisation"``   any SDE (likewise)                                  ``Gaussian``
    ``"exact"``                 linear drift and constant diffusion                 ``AffineGaussian``
    ``"milstein"``, ``"heun"``  as in ``NeuralSDE``                                 ``SampleOnly``
    ``"midpoint"``,
    ``"euler_heun"``
    ``"rk4"``, ``"euler"``,     an ODE field ``f(t, z, u)``                         ``Gaussian`` (a point mass without
    ``"heun"``, ``"midpoint"``                                                      ``noise_floor``)
    ``"flow"``                  a :class:`NeuralODE`, by its own solver             likewise
    ==========================  ==================================================  ====================================

    Steps are one a gap (``data.refine(n)`` makes them shorter), or ``substeps`` where only draws are wanted. The fields
    are shared, not copied: what is learnt by one inference is there for the next.

    Args:
        equation: a :class:`NeuralSDE`, a linear process (:class:`LinearSDE`, :class:`OrnsteinUhlenbeck`, ...), a
            :class:`NeuralODE`, or the field of an ODE, a function or module.
        method: see above.
        substeps: steps in each gap.
        state_dim: of an ODE field that does not say its own.
        noise_floor: s of an ODE, in state / sqrt(time): a step is :math:`N(\\Phi(z), s^2 \\Delta)`.

    A :class:`NeuralODE` with a ``log_intensity`` keeps it: the model has the site ``"times"``, and particle filters
    count the Poisson process of the times of observation.

    Raises:
        ValueError: the method does not belong to the equation.
        TypeError: the equation is of an unknown kind.
        RuntimeError: it has run already outside of this transition.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.components import AffineGaussian, Gaussian
    >>> ou = ssm.dynamics.OrnsteinUhlenbeck(state_dim=2)
    >>> isinstance(ssm.dynamics.discretize(ou, "euler_maruyama"), AffineGaussian)
    True
    >>> sde = ssm.dynamics.NeuralSDE(ssm.dynamics.MLPDrift(2), ssm.dynamics.ConstantDiffusion(0.5, 2))
    >>> step = ssm.dynamics.discretize(sde, "local_linearisation")
    >>> isinstance(step, Gaussian), isinstance(step, AffineGaussian)
    (True, False)
    """
    check_size("substeps", substeps)
    if isinstance(equation, PyroModule) and equation._pyro_context.used:
        raise RuntimeError(
            "`equation` has run already, and Pyro cannot rename its parameters: discretise first, run afterwards (two "
            "models may share the equation, and whatever else they have in common)"
        )
    if isinstance(equation, (LinearSDEProcess, OrnsteinUhlenbeck)):
        if method == "exact":
            return equation
        equation = _as_sde(equation)
    if isinstance(equation, NeuralSDE):
        if noise_floor or state_dim is not None:
            raise ValueError("`noise_floor` and `state_dim` belong to ODE fields; an SDE has its own")
        return _of_sde(equation, check_choice("method", method, _SDE_METHODS), substeps)
    if noise_floor < 0:
        raise ValueError(f"`noise_floor` must not be negative, got {noise_floor}")
    if isinstance(equation, NeuralODE):
        if method != "flow" or substeps > 1 or state_dim is not None:
            raise ValueError(
                f"a NeuralODE brings its solver: discretize(ode, 'flow', noise_floor=...), got method={method!r}, "
                f"substeps={substeps}, state_dim={state_dim}. For other steps give its field"
            )
        return NoisyFlow(equation, float(noise_floor))
    if isinstance(equation, Transition) or not callable(equation):
        raise TypeError(
            f"`equation` must be a NeuralSDE, a LinearSDE or OrnsteinUhlenbeck process, a NeuralODE, or an ODE field "
            f"f(t, z, u), got {type(equation).__name__}"
        )
    check_choice("method", method, _ODE_METHODS)
    size = getattr(equation, "state_dim", None) if state_dim is None else state_dim
    if size is None:
        raise ValueError("`state_dim` is needed: the ODE field does not say its own")
    return ODESteps(equation, check_size("state_dim", size), method, substeps, float(noise_floor))


def _of_sde(sde: NeuralSDE, method: str, substeps: int) -> Transition:
    constant = isinstance(sde.diffusion, ConstantDiffusion)
    linear = isinstance(sde.drift, LinearDrift)
    if method in ("euler_maruyama", "local_linearisation"):
        if sde.interpretation == "stratonovich" and not (constant or sde.noise == "additive"):
            raise ValueError(
                f"{method!r} is a scheme for Itô's integral, and the equation is Stratonovich's with a diffusion that "
                f"depends on the state; use one of {fixed_step_methods(sde.interpretation, sde.noise)}"
            )
    if method == "exact":
        if not (linear and constant):
            raise ValueError(
                "the exact law over a gap is known for a dynamics.LinearDrift with a dynamics.ConstantDiffusion, got "
                f"{type(sde.drift).__name__} and {type(sde.diffusion).__name__}. Use 'local_linearisation'"
            )
        return ExactLinear(sde)
    if method == "local_linearisation":
        if substeps > 1:
            raise ValueError("'local_linearisation' takes one step a gap; refine the grid with data.refine(n)")
        return LocalLinearisation(sde)
    if method == "euler_maruyama":
        if substeps > 1:
            return SimulatedSteps(sde, "euler", substeps)
        return AffineEulerMaruyama(sde) if linear and constant else EulerMaruyama(sde)
    if method not in (possible := fixed_step_methods(sde.interpretation, sde.noise)):
        raise ValueError(
            f"{method!r} does not converge to the {sde.interpretation} integral for {sde.noise} noise; use one of "
            f"{possible}"
        )
    return SimulatedSteps(sde, method, substeps)


class _ProcessDrift(LinearDrift):
    """The drift of a linear process, read from its parameters."""

    def __init__(self, process: Any) -> None:
        PyroModule.__init__(self)
        self.process, self.state_dim, self.input_dim = process, process.state_dim, process.input_dim

    @property
    def matrix(self) -> Tensor:  # type: ignore[override]
        """F."""
        if isinstance(self.process, LinearSDEProcess):
            return self.process.system()[0]
        rate = self.process._full(self.process.rate)
        return -rate.diag_embed()

    def forcing(self, inputs: Tensor | None) -> Tensor:
        """The rest of the drift."""
        if isinstance(self.process, LinearSDEProcess):
            value = self.process.forcing(inputs)
            return self.matrix.new_zeros(1, self.state_dim) if value is None else value
        return self.process._full(self.process.rate * self.process._mean_level(inputs))

    def forward(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        """F z + the rest."""
        return (self.matrix @ state.unsqueeze(-1)).squeeze(-1) + self.forcing(inputs)


class _ProcessDiffusion(ConstantDiffusion):
    """The diffusion of a linear process, read from its parameters."""

    def __init__(self, process: Any) -> None:
        PyroModule.__init__(self)
        self.process, self.state_dim = process, process.state_dim
        self.is_diagonal = isinstance(process, OrnsteinUhlenbeck)

    def forward(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        """g."""
        if self.is_diagonal:
            return self.process._full(self.process.diffusion)
        return self.process.system()[1]


def _as_sde(process: Any) -> NeuralSDE:
    if isinstance(process, OrnsteinUhlenbeck):
        return NeuralSDE(_ProcessDrift(process), _ProcessDiffusion(process))
    noise_dim = process.system()[1].shape[-1]
    return NeuralSDE(_ProcessDrift(process), _ProcessDiffusion(process), noise="additive", noise_dim=noise_dim)
