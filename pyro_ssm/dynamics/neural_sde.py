"""Stochastic differential equations as transitions: any drift, any diffusion, on any grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ssm.binding import bind, is_bound
from pyro_ssm.blocks._checks import check_choice, check_positive, check_size
from pyro_ssm.blocks._conditioning import check_state
from pyro_ssm.blocks._gaussian import diagonal_normal
from pyro_ssm.components import Gaussian, SampleOnly, Transition, gap
from pyro_ssm.distributions import SimulatedLaw, SingularNormal
from pyro_ssm.dynamics.sde_checks import check_scale, check_steps, tensors_with_gradient
from pyro_ssm.ops import BrownianPath, sde_path, tria
from pyro_ssm.ops.sde import NOISES, SCHEMES, Field, SDEStep, check_path, fixed_step_methods, sde_step
from pyro_ssm.ops.torchsde_path import SOLVERS, torchsde_path

__all__ = ["NeuralSDE"]

BACKENDS = ("torchsde", "torchsde_adjoint")
SITES = ("auto", "path", "noise", "girsanov")
_SOLVER_DEFAULTS = {"substeps": 1, "adaptive": False, "rtol": 1e-5, "atol": 1e-4}


class NeuralSDE(Transition):
    """A stochastic differential equation

    .. math:: dz = f(t, z, u)\\, dt + g(t, z, u)\\, dW \\quad\\text{(Itô)}, \\qquad
        dz = f\\, dt + g \\circ dW \\quad\\text{(Stratonovich)},

    solved on the grid of the data: one step a gap, so ``data.refine(n)`` makes it finer. Inputs are held within a gap.

    ``drift`` and ``diffusion`` are called as ``field(t, z, u)`` with ``t`` ``(..., time, 1)`` in the state's dtype,
    ``z`` ``(..., time, state)`` and ``u`` ``(..., time, input)`` or None; a drift returns ``(..., time, state)``, a
    diffusion the same for diagonal noise and ``(..., time, state, noise)`` for any other. They may be networks
    (``MLPDrift``, ``ElementwiseDiffusion`` ...), plain functions, or a ``PyroModule`` with the constants of a
    mechanism, to learn or to give priors (bind names them ``drift.name``); it must broadcast.

    ==================  ==========================  ==========================  ==================================
    ``method``          Itô                         Stratonovich                strong order
    ==================  ==========================  ==========================  ==================================
    ``"euler"``         all kinds of noise          additive                    1/2; 1 for additive noise
    ``"milstein"``      diagonal, scalar, additive  diagonal, scalar, additive  1
    ``"heun"``          additive                    all                         1; 1/2 for general noise
    ``"midpoint"``      none                        all                         1; 1/2 for general noise
    ``"euler_heun"``    none                        all                         1; 1/2 for general noise
    ==================  ==========================  ==========================  ==================================

    ``"torchsde:NAME"`` is a solver of torchsde (``"euler"``, ``"milstein"``, ``"srk"`` for Itô; ``"milstein"``,
    ``"midpoint"``, ``"heun"``, ``"euler_heun"``, ``"reversible_heun"``, ``"log_ode"`` for Stratonovich),
    ``"torchsde_adjoint:NAME"`` the same with the stochastic adjoint; the noise over each gap is the same as in the
    schemes above.

    **What the random variable is** (``site``; the default is the first that is right):

    * ``"path"``: the site ``"z"`` with the density of the Euler chain, :math:`N(z + f \\Delta, g g^T \\Delta)`. For
      Euler steps with at least as many noises as coordinates. Right under every inference.
    * ``"noise"``: the sites ``"z_start"`` and ``"z_noise"`` (standardised increments), and ``"z"`` is a function of
      them. For every scheme of the table, degenerate diffusions (second-order dynamics) among them; also the better
      form for NUTS and for learning a diffusion. ``"z"`` cannot be conditioned.
    * ``"girsanov"``: the site ``"z"`` relative to the law of the equation, for torchsde's solvers. For ELBOs and
      importance weights by ``guides.PosteriorSDE``; refused by NUTS, and by conditioning on a path.

    An Euler equation is ``components.Gaussian``, others are ``components.SampleOnly`` (bootstrap particle filters,
    forecasts).
    :func:`~pyro_ssm.dynamics.discretize` gives other transitions of the same equation (affine, local linearisation).

    Args:
        drift: f.
        diffusion: g.
        noise: ``"diagonal"`` (with ``"milstein"`` each :math:`g_i` depends on :math:`z_i` only), ``"scalar"`` (one
            Brownian motion), ``"additive"`` (a matrix that does not depend on z) or ``"general"``.
        interpretation: ``"ito"`` or ``"stratonovich"``.
        method: see above.
        state_dim: size of the state; by default that of ``drift``.
        noise_dim: number of Brownian motions; by default that of ``diffusion``.
        site: see above.
        options: of torchsde's solvers: ``substeps`` in a gap (1), ``adaptive`` (False), ``rtol``, ``atol``.

    Raises:
        ValueError: a scheme does not converge to the integral that was asked for, or a form of the site is wrong for
            it; or, when called, a field returns another size.
        FloatingPointError: a field blows up or returns NaN; says at what time, for which series, from what norm.

    Source: Kloeden and Platen (1992), "Numerical Solution of Stochastic Differential Equations"; Li, Wong, Chen and
    Duvenaud (2020), "Scalable gradients for stochastic differential equations".

    >>> import torch
    >>> from pyro_ssm.dynamics import ElementwiseDiffusion, MLPDrift, NeuralSDE
    >>> sde = NeuralSDE(MLPDrift(state_dim=2), ElementwiseDiffusion(state_dim=2))
    >>> times = torch.linspace(0, 1, 11, dtype=torch.float64)
    >>> sde(torch.zeros(3, 10, 2), times[:-1], times[1:], None).event_shape, sde.site
    (torch.Size([2]), 'path')
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> NeuralSDE:
        if cls is NeuralSDE:
            cls = _EulerSDE if kwargs.get("method", "euler") == "euler" else _SampledSDE
        return super().__new__(cls)

    def __init__(
        self,
        drift: Any,
        diffusion: Any,
        *,
        noise: str = "diagonal",
        interpretation: str = "ito",
        method: str = "euler",
        state_dim: int | None = None,
        noise_dim: int | None = None,
        site: str = "auto",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, field in (("drift", drift), ("diffusion", diffusion)):
            if not callable(field):
                raise TypeError(f"`{name}` must be callable as {name}(t, z, inputs), got {field!r}")
        self.drift, self.diffusion = drift, diffusion
        self.noise = check_choice("noise", noise, NOISES)
        if getattr(diffusion, "is_diagonal", noise == "diagonal") != (noise == "diagonal"):
            kind = "a vector" if noise != "diagonal" else "a matrix"
            raise ValueError(f"noise={noise!r} does not go with a diffusion that is {kind}: change one of them")
        self.interpretation = check_choice("interpretation", interpretation, tuple(SCHEMES))
        self.method = _check_method(method, interpretation, noise)
        self.state_dim = _size("state_dim", state_dim, drift, "drift")
        if noise == "diagonal":
            self.noise_dim = self.state_dim
        elif noise == "scalar":
            self.noise_dim = 1
        else:
            self.noise_dim = _size("noise_dim", noise_dim, diffusion, "diffusion")
        self.site = self._choose_site(site)
        self.options = _check_options(options, self.backend)

    @property
    def backend(self) -> str | None:
        """``"torchsde"``, ``"torchsde_adjoint"``, or None for a fixed-step scheme of ``ops.sde_path``."""
        return self.method.partition(":")[0] if ":" in self.method else None

    def _choose_site(self, site: str) -> str:
        check_choice("site", site, SITES)
        has_density = self.method == "euler" and (self.noise == "diagonal" or self.noise_dim >= self.state_dim)
        allowed = ["girsanov"] if self.backend else (["path", "noise"] if has_density else ["noise"])
        if site == "auto":
            return allowed[0]
        if site not in allowed:
            raise ValueError(
                f"site={site!r} is not right for method={self.method!r} with {self.noise} noise ({self.noise_dim} for "
                f"{self.state_dim} coordinates): use one of {allowed}. Only Euler steps of full rank have a density of "
                "the path, and only torchsde's solvers are written relative to their own law"
            )
        return site

    # ------------------------------------------------------------------------------------------------- fields

    def drift_at(self, state: Tensor, time: Tensor, inputs: Tensor | None) -> Tensor:
        """:math:`f`, ``(..., time, state)``, at states ``(..., time, state)`` and times ``(..., time)``."""
        return self._drift(time.to(state).unsqueeze(-1), state, inputs)

    def diffusion_at(self, state: Tensor, time: Tensor, inputs: Tensor | None) -> Tensor:
        """:math:`g`, ``(..., time, state)`` for diagonal noise, else ``(..., time, state, noise)``."""
        return self._diffusion(time.to(state).unsqueeze(-1), state, inputs)

    def _drift(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        value = self.drift(time, state, inputs)
        if value.shape[-1] != self.state_dim:
            raise ValueError(
                f"`drift` must return (..., time, {self.state_dim}), got {tuple(value.shape)} for a state of shape "
                f"{tuple(state.shape)}"
            )
        return value

    def _diffusion(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        value = self.diffusion(time, state, inputs)
        if self.noise == "diagonal":
            right, wanted = value.shape[-1] == self.state_dim, (self.state_dim,)
        else:
            wanted = (self.state_dim, self.noise_dim)  # type: ignore[assignment]
            right = value.shape[-2:] == wanted
        if not right:
            raise ValueError(
                f"`diffusion` must return (..., time, {', '.join(map(str, wanted))}) for {self.noise} noise, got "
                f"{tuple(value.shape)} for a state of shape {tuple(state.shape)}"
            )
        return value

    # --------------------------------------------------------------------------------------------------- laws

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Any:
        """The law of the next states, one step of the scheme; ``state`` ``(..., time, state)``."""
        check_state(self, state)
        if self.method == "euler":
            return self.gaussian_step(state, self.drift_at(state, time, inputs), time, next_time, inputs)
        return self.simulated_step(state, time, next_time, inputs)

    def gaussian_step(
        self, state: Tensor, drift: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None
    ) -> Any:
        """:math:`N(z + f \\Delta, g g^T \\Delta)` for a given f."""
        step = gap(time, next_time, state)
        loc = check_steps(state + drift * step, state, time, "the drift")
        g = self.diffusion_at(state, time, inputs)
        if self.noise != "diagonal":
            root = tria(g * step.sqrt().unsqueeze(-1))
            return SingularNormal(loc, scale_tril=root, validate_args=False)
        scale = (g * step.sqrt()).abs()
        if self.site == "path":
            return diagonal_normal(loc, check_scale(scale, state, time))
        scale = scale.expand(torch.broadcast_shapes(scale.shape, loc.shape))
        return SingularNormal(loc, scale_tril=scale.diag_embed(), validate_args=False)

    def simulated_step(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, control: Tensor | None = None
    ) -> SimulatedLaw:
        """The law of the states after each gap, by its draws; ``control`` ``(..., time, noise)`` shifts the noise."""
        t, later, step = time.to(state).unsqueeze(-1), next_time.to(state).unsqueeze(-1), gap(time, next_time, state)

        def solved(normal: Tensor) -> Tensor:
            ends = []
            for k in range(normal.shape[-2]):  # the solvers go from one time to the next
                now = slice(k, k + 1)
                clock = torch.cat([time[..., now], next_time[..., now]], -1)
                held = None if inputs is None else inputs[..., now, :]
                noise = BrownianPath.of_normal(clock, normal[..., now, :])
                ends.append(self.solve(state.expand(lead + state.shape[-1:])[..., now, :], noise, held)[..., 1:, :])
            return torch.cat(ends, -2)

        def transform(normal: Tensor) -> Tensor:
            dW = normal * step.sqrt()
            dW = dW if control is None else dW + control * step
            parts = SDEStep(self._drift, self._diffusion, self.noise, t, later, inputs, step, dW)
            moved = sde_step(state, parts, self.method, self.interpretation)
            return check_steps(moved, state, time, f"a step of {self.method!r}")

        lead = torch.broadcast_shapes(state.shape[:-1], step.shape[:-1])
        draw = solved if self.backend else transform
        return SimulatedLaw(draw, self.noise_dim, self.state_dim, lead, state, self._no_density())

    def _no_density(self) -> str:
        instead = (
            "weighs whole paths by Girsanov's ratio (guides.PosteriorSDE)"
            if self.backend
            else 'samples its noise instead (site="noise", guides.PosteriorSDE or NUTS)'
        )
        return (
            f"steps of {self.method!r} ({self.interpretation}, {self.noise} noise) are not Gaussian. The model "
            f"{instead}; bootstrap particle filters need no "
            "density; dynamics.discretize(sde, 'euler_maruyama' or 'local_linearisation') has one"
        )

    # -------------------------------------------------------------------------------------------------- paths

    def mean_of_steps(self, states: Tensor, times: Tensor, inputs: Tensor | None) -> Tensor:
        """:math:`z + f \\Delta` after each gap of ``times``, for states ``(..., time - 1, state)`` before it."""
        time, held = times[..., :-1], None if inputs is None else inputs[..., :-1, :]
        return states + self.drift_at(states, time, held) * gap(time, times[..., 1:], states)

    def diffusion_key(self, times: Tensor, inputs: Tensor | None) -> tuple[Any, ...] | None:
        """What the scales of Euler steps are computed from, to be compared by identity; None where that is not told
        by parameters alone (a plain function, or drawn and constrained values, which are new tensors each time).
        """
        if not isinstance(self.diffusion, nn.Module):
            return None
        modules = list(self.diffusion.modules())
        if any(isinstance(value, Tensor) for part in modules for value in part.__dict__.values()):
            return None
        return (*self.diffusion.parameters(), *self.diffusion.buffers(), times, inputs)

    def solve(
        self,
        start: Tensor,
        brownian: BrownianPath,
        inputs: Tensor | None = None,
        drift: Field | None = None,
        diffusion: Field | None = None,
        reads: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """The path from ``start`` for given noise, by the method of this equation.

        Args:
            start: ``(*lead, 1, state)``.
            brownian: times and increments; the same noise gives the same path.
            inputs: ``(*batch, time, input)`` or None.
            drift: takes the place of the drift (a guide's).
            diffusion: takes the place of the diffusion.
            reads: the tensors that these read, for the adjoint.

        Returns:
            ``(*lead, time, state)``; differentiable.

        Raises:
            FloatingPointError: the path is not finite.
        """
        if not is_bound(self):
            return bind(self).solve(start, brownian, inputs, drift, diffusion, reads)  # every parameter is read once
        f, g = self._drift if drift is None else drift, self._diffusion if diffusion is None else diffusion
        kind: dict[str, Any] = {"noise": self.noise, "interpretation": self.interpretation, "inputs": inputs}
        if self.backend is None:
            path = sde_path(f, g, start, brownian.times, brownian.increments, method=self.method, **kind)
        else:
            given = [x for x in (*reads, inputs) if x is not None and x.requires_grad]
            params = [*tensors_with_gradient(self), *given] if self.backend == "torchsde_adjoint" else None
            name = self.method.partition(":")[2]
            path = torchsde_path(f, g, start, brownian, method=name, adjoint_params=params, **kind, **self.options)
        return check_path(path, brownian.times, f"the path of {self.method!r}")

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return (
            f"state_dim={self.state_dim}, noise={self.noise!r}, noise_dim={self.noise_dim}, "
            f"interpretation={self.interpretation!r}, method={self.method!r}, site={self.site!r}"
        )


class _EulerSDE(NeuralSDE, Gaussian):
    """Euler steps are Gaussian."""


class _SampledSDE(NeuralSDE, SampleOnly):
    """Steps of other schemes can only be drawn."""


def _check_method(method: str, interpretation: str, noise: str) -> str:
    backend, colon, name = method.partition(":")
    if colon:
        check_choice("method", backend, BACKENDS)
        possible = [
            solver for solver, (integrals, noises) in SOLVERS.items() if interpretation in integrals and noise in noises
        ]
        if name not in possible:
            raise ValueError(
                f"`method` must name a solver after the colon, as in 'torchsde:{possible[0]}', got {method!r}; "
                f"torchsde has {possible} for the {interpretation} integral with {noise} noise"
            )
        return method
    if method not in {scheme for table in SCHEMES.values() for scheme in table}:
        raise ValueError(
            f"`method` must be one of 'euler', 'milstein', 'heun', 'midpoint', 'euler_heun', 'torchsde:NAME' or "
            f"'torchsde_adjoint:NAME', got {method!r}"
        )
    possible = fixed_step_methods(interpretation, noise)
    if method not in possible:
        raise ValueError(
            f"method={method!r} does not converge to the {interpretation} integral for {noise} noise; use one of "
            f"{possible}, or another `interpretation`"
        )
    return method


def _check_options(options: Mapping[str, Any] | None, backend: str | None) -> dict[str, Any]:
    given = dict(options or {})
    if given and backend is None:
        raise ValueError(f"`options` {sorted(given)} belong to torchsde's solvers; refine the grid with data.refine(n)")
    if unknown := sorted(set(given) - set(_SOLVER_DEFAULTS)):
        raise ValueError(f"`options` has unknown names {unknown}; there are {sorted(_SOLVER_DEFAULTS)}")
    chosen = {**_SOLVER_DEFAULTS, **given}
    check_size("substeps", chosen["substeps"])
    for name in ("rtol", "atol"):
        check_positive(name, chosen[name])
    return chosen


def _size(name: str, given: int | None, field: Any, field_name: str) -> int:
    own = getattr(field, name, None)
    if given is None and own is None:
        raise ValueError(f"`{name}` is needed: `{field_name}` does not say its own. Give NeuralSDE(..., {name}=...)")
    if given is not None and own is not None and given != own:
        raise ValueError(f"`{name}` is {given}, but `{field_name}` has {own}")
    return check_size(name, own if given is None else given)
