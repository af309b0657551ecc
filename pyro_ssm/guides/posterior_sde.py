"""The guide of latent stochastic differential equations: the prior's diffusion, a drift that has seen the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_ssm.blocks import Linear
from pyro_ssm.blocks._checks import check_choice
from pyro_ssm.blocks._gaussian import diagonal_normal
from pyro_ssm.components import gap
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import EulerDraw, EulerPath, GirsanovPath, MarkovPath
from pyro_ssm.distributions.markov_path import Draw
from pyro_ssm.dynamics import EulerMaruyama, NeuralSDE
from pyro_ssm.dynamics.sde_checks import tensors_with_gradient
from pyro_ssm.guides.encoded import AbstractEncodedGuide
from pyro_ssm.guides.encoder import Cell
from pyro_ssm.guides.posterior_drift import PosteriorDrift
from pyro_ssm.models import StateSpaceModel, batch_shape, series_plate, site_name
from pyro_ssm.models.sde_sites import known_start, noise_law, refuse_memory, solve_noise, start_law
from pyro_ssm.ops import SDEStep, euler_network_path, sde_step
from pyro_ssm.ops.sde import check_path, noise_times

__all__ = ["PosteriorSDE", "SDEContext"]


class SDEContext(NamedTuple):
    """What ``PosteriorSDE.step`` needs to know: features of each latent step, the grid, inputs and the prior's parts.

    >>> from pyro_ssm.guides import SDEContext
    >>> SDEContext._fields
    ('features', 'times', 'inputs', 'sde', 'initial')
    """

    features: Tensor
    times: Tensor
    inputs: Tensor | None
    sde: NeuralSDE
    initial: Any


class PosteriorSDE(AbstractEncodedGuide):
    """The posterior of a latent stochastic differential equation as another equation with the same diffusion,

    .. math::
        z_1 \\sim q(z_1 \\mid c_1), \\qquad dz = f_q(t, z, c(t))\\, dt + g(t, z)\\, dW, \\qquad
        f_q = v \\;\\;(\\text{form "drift"}) \\quad\\text{or}\\quad f_q = f + g\\, v \\;\\;(\\text{form "control"}),

    with features c of the data from a :class:`~pyro_ssm.guides.encoder.DataEncoder`, and v a network. It goes with a
    model whose transition is a :class:`~pyro_ssm.dynamics.NeuralSDE` (or its Euler-Maruyama discretisation), in each
    form of the path's site: the density of the Euler chain (a particle filter may then take the guide as a proposal),
    driven noise, or Girsanov's ratio for torchsde's solvers. The prior's drift is evaluated once, on the whole path.

    **A learned diffusion collapses** (torchsde issues 112, 113) because an Euler step of the guide keeps the variance
    :math:`g^2 \\Delta` whatever the data say, while the true posterior's step is narrower where an observation is near;
    on a coarse grid the bound then gains by shrinking g. ``tilt=True`` removes the cause: each step is multiplied by a
    Gaussian factor, a pseudo-observation m with precision :math:`\\lambda`, both functions of c,

    .. math:: q(z' \\mid z) \\propto N(z';\\; z + f_q \\Delta,\\; g^2 \\Delta)\\; N(m;\\; z',\\; \\lambda^{-1}),

    which contains the exact posterior of a linear equation with diagonal noise and observations, on every grid. It
    needs diagonal noise and the density of the Euler chain.

    Args:
        model: the state-space model; unbound.
        hidden_dim: of the encoder.
        direction: what the encoder reads: ``"past"``, ``"future"`` or ``"both"``.
        drift: takes the place of the network v: a module ``(t, z, features) -> (..., time, state)`` (form "drift") or
            ``(..., time, noise)`` (form "control").
        form: ``"drift"`` (Li et al.; the default for diagonal noise) or ``"control"`` (the only one for other noise,
            and where the noise is the site): starts near the prior, and follows it when f and g are learnt.
        tilt: see above.
        drift_hidden: hidden layers of the network v.
        activation: of the network v.
        input_dim: columns of ``data.inputs`` that the encoder sees (0 for none).
        cell: of the encoder: ``"gru"``, ``"lstm"``, ``"rnn"``, ``"relu"``; in continuous time ``"gru_d"``,
            ``"ode_rnn"``, ``"gru_ode"``, ``"gru_ode_bayes"``, ``"neural_cde"``; a structured block class such as
            ``blocks.S5``, or a ``blocks.Bidirectional`` (see ``guides.encoder.DataEncoder``).
        num_layers: of the encoder.
        dropout: between the encoder's layers.
        scale_floor: added to the scale of the first state.
        parameters: a guide over random parameters (default: ``AutoNormal``).

    Raises:
        TypeError: the model's transition is no such equation.
        ValueError: a form that does not go with the noise or the site.

    Source: Li, Wong, Chen and Duvenaud (2020), "Scalable gradients for stochastic differential equations", section 5;
    with Euler transitions and a constant diffusion: Hasan, Pereira, Farsiu and Tarokh (2021), "Identifying latent
    stochastic differential equations".

    >>> import torch, pyro_ssm as ssm
    >>> sde = ssm.dynamics.NeuralSDE(ssm.dynamics.MLPDrift(2), ssm.dynamics.ElementwiseDiffusion(2))
    >>> model = ssm.StateSpaceModel(ssm.dynamics.NormalInitial(2), sde, ssm.emissions.LinearNormal(2, 1))
    >>> guide = ssm.guides.PosteriorSDE(model, hidden_dim=8)
    >>> guide(ssm.TimeSeries(torch.arange(4.0), torch.ones(3, 4, 1)).refine(5)).shape
    torch.Size([3, 16, 2])
    """

    samples_noise = True

    def __init__(
        self,
        model: StateSpaceModel,
        hidden_dim: int = 64,
        direction: str = "both",
        *,
        drift: Any = None,
        form: str | None = None,
        tilt: bool = False,
        drift_hidden: int | Sequence[int] = (64, 64),
        activation: str | Callable[[Tensor], Tensor] = "softplus",
        input_dim: int = 0,
        cell: Cell = "gru",
        num_layers: int = 1,
        dropout: float = 0.0,
        scale_floor: float = 1e-4,
        parameters: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, hidden_dim, direction, input_dim, cell, num_layers, dropout, scale_floor, parameters)
        sde = _equation(model.transition)
        self.form = _check_form(form, sde)
        self.tilt = tilt
        if tilt and (sde.site != "path" or sde.noise != "diagonal"):
            raise ValueError(
                f"`tilt` needs diagonal noise and the density of the Euler chain, got noise={sde.noise!r} and "
                f"site={sde.site!r}. Build NeuralSDE(..., noise='diagonal', method='euler')"
            )
        self.first = Linear(hidden_dim, 2 * sde.state_dim)
        if drift is None:
            out = sde.state_dim if self.form == "drift" else sde.noise_dim
            drift = PosteriorDrift(sde.state_dim, hidden_dim, out, drift_hidden, activation)
        self.drift = drift
        if tilt:
            self.pseudo = Linear(hidden_dim, 2 * sde.state_dim)

    # ---------------------------------------------------------------------------------------------- the equation

    def encode(self, data: TimeSeries, model: StateSpaceModel) -> SDEContext:  # type: ignore[override]
        held = None if data.inputs is None else data.inputs[..., :1, :]
        initial = model.initial(data.times[..., :1], held)
        features = self.encoder(data, model).features
        return SDEContext(features, data.times, data.inputs, _equation(model.transition), initial)

    def first_law(self, features: Tensor) -> Any:
        """:math:`q(z_1 \\mid c_1)` of features ``(..., 1, hidden)``."""
        loc, raw = self.first(features).chunk(2, -1)
        return diagonal_normal(loc, self.positive(raw))

    def step(self, state: Tensor | None, k: slice, context: Any, memory: Tensor | None = None) -> Any:
        features = self.features(k, context, memory)
        if state is None:
            point = known_start(start_law(context.initial, torch.Size()))
            return self.first_law(features) if point is None else context.initial
        last, sde = k - 1 if isinstance(k, Tensor) else slice(k.start - 1, k.stop - 1), context.sde
        time, next_time = context.times[..., last], context.times[..., k]
        inputs = None if context.inputs is None else context.inputs[..., last, :]
        value = self.drift(time.to(state).unsqueeze(-1), state, features)
        if sde.site == "noise":
            return sde.simulated_step(state, time, next_time, inputs, value)
        if sde.noise != "diagonal":
            drift = sde.drift_at(state, time, inputs)
            drift = drift + noise_times(sde.diffusion_at(state, time, inputs), value, sde.noise)
            return sde.gaussian_step(state, drift, time, next_time, inputs)
        g, step = sde.diffusion_at(state, time, inputs), gap(time, next_time, state)
        if self.form == "control":
            value = sde.drift_at(state, time, inputs) + g * value
        pseudo = self.pseudo(features) if self.tilt else None
        return diagonal_normal(*_seen_through(state + value * step, (g * step.sqrt()).abs(), pseudo))

    # ------------------------------------------------------------------------------------------------- the path

    def draw(self, context: Any) -> Draw | None:  # type: ignore[override]
        sde = context.sde
        known = known_start(start_law(context.initial, torch.Size())) is not None
        if sde.site != "path" or sde.noise != "diagonal" or known:
            return None
        key = sde.diffusion_key(context.times, context.inputs)
        fused = self._fused(sde) if context.times.shape[-1] > 1 else None

        def path(shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
            features = context.features
            noise = torch.randn(shape, dtype=features.dtype, device=features.device)
            start_features, later = features.split([1, features.shape[-2] - 1], -2)
            first = self.first_law(start_features).base_dist
            gaps = context.times.diff(dim=-1).to(features).unsqueeze(-1)
            if fused is not None:
                start = first.loc + first.scale * noise[..., :1, :]
                # time first, as the operator needs it: the features are fewer numbers to turn than the hidden units
                given = self.drift.from_features(later.movedim(-2, 0).contiguous()).movedim(0, -2)
                drawn = euler_network_path(noise[..., 1:, :], start.squeeze(-2), given, gaps.squeeze(-1), *fused)
                z = check_path(torch.cat([start, drawn.states], -2), context.times, "the path of the guide")
                if key is not None:
                    z.euler_draw = EulerDraw(key, drawn.locs, drawn.scales, drawn.scales)  # type: ignore[attr-defined]
                return z, noise, torch.cat([first.scale.expand(start.shape), drawn.scales], -2)
            e, drift = noise.split(1, -2), self._drift_of_steps(features)
            pseudo = self.pseudo(features).split(1, -2) if self.tilt else [None] * len(e)
            clock = context.times.to(features).unsqueeze(-1)
            t, h, root = clock.split(1, -2), gaps.split(1, -2), gaps.sqrt().split(1, -2)
            u = None if context.inputs is None else context.inputs.split(1, -2)
            states, locs, scales, priors = [first.loc + first.scale * e[0]], [], [first.scale.expand(e[0].shape)], []
            for k in range(1, len(e)):
                z, held = states[-1], None if u is None else u[k - 1]
                g, f = sde._diffusion(t[k - 1], z, held), drift(k, t[k - 1], z)
                if self.form == "control":
                    f = sde._drift(t[k - 1], z, held) + g * f
                prior = (g * root[k - 1]).abs()
                loc, scale = _seen_through(z + f * h[k - 1], prior, pseudo[k])
                states.append(torch.addcmul(loc, scale, e[k]))
                locs.append(loc.expand(e[k].shape))
                scales.append(scale.expand(e[k].shape))
                priors.append(prior.expand(e[k].shape))
            z, scale = check_path(torch.cat(states, -2), context.times, "the path of the guide"), torch.cat(scales, -2)
            if key is not None and locs:
                prior = torch.cat(priors, -2) if self.tilt else scale[..., 1:, :]
                z.euler_draw = EulerDraw(key, torch.cat(locs, -2), scale[..., 1:, :], prior)  # type: ignore[attr-defined]
            return z, noise, scale

        return path

    def _fused(self, sde: NeuralSDE) -> tuple[Sequence[Tensor], Any] | None:
        """Networks of drift and diffusion for :func:`~pyro_ssm.ops.euler_network_path`, where they have its form."""
        if self.form != "drift" or self.tilt or not isinstance(self.drift, PosteriorDrift):
            return None
        network = self.drift.softplus_layers()
        scale = getattr(sde.diffusion, "coordinate_scale", lambda: None)()
        return None if network is None or scale is None else (network, scale)

    def _drift_of_steps(self, features: Tensor) -> Callable[[int, Tensor, Tensor], Tensor]:
        """``(k, t, z) -> v``; what it can know before the state is computed for all steps at once."""
        if isinstance(self.drift, PosteriorDrift):
            prepared = self.drift.from_features(features).split(1, -2)
            return lambda k, t, z: self.drift.given(z, prepared[k])
        steps = features.split(1, -2)
        return lambda k, t, z: self.drift(t, z, steps[k])

    def path(self, data: TimeSeries, model: StateSpaceModel) -> MarkovPath | GirsanovPath:  # type: ignore[override]
        sde = _equation(model.transition)
        if sde.site == "path":
            law = super().path(data, model)
            return law if law._draw is None else self._euler(law, data, model)
        refuse_memory(model)
        if sde.site == "noise" or data.values is None:
            return super().path(data, model)
        return self._girsanov(data, model, self.encode(data, model))

    def _euler(self, law: MarkovPath, data: TimeSeries, model: StateSpaceModel) -> EulerPath:
        """The same law with the form of the divergence that a draw of it allows."""
        first = law._step(None, slice(0, 1), None)
        shape, mask = (data.num_times, model.initial.state_dim), law._step_mask
        return EulerPath(law._step, first, lambda states: states, None, *shape, mask, law.batch_shape, law._draw)

    def _girsanov(self, data: TimeSeries, model: StateSpaceModel, context: SDEContext) -> GirsanovPath:
        sde, features, width = context.sde, context.features, 0 if data.inputs is None else data.inputs.shape[-1]
        ahead = torch.cat([features[..., 1:, :], features[..., -1:, :]], -2)  # a gap sees the features of its end
        held = ahead
        if data.inputs is not None:
            lead = torch.broadcast_shapes(data.inputs.shape[:-1], ahead.shape[:-1])
            held = torch.cat([data.inputs.to(ahead).expand(lead + (width,)), ahead.expand(lead + ahead.shape[-1:])], -1)

        def diffusion(t: Tensor, z: Tensor, both: Any) -> Tensor:
            return sde._diffusion(t, z, both[..., :width] if width else None)

        def drift(t: Tensor, z: Tensor, both: Any) -> Tensor:
            value = self.drift(t, z, both[..., width:])
            if self.form == "drift":
                return value
            return sde._drift(t, z, both[..., :width] if width else None) + noise_times(
                diffusion(t, z, both), value, sde.noise
            )

        def control(z: Tensor) -> Tensor:
            times = data.times[..., :-1]
            value = self.drift(times.to(z).unsqueeze(-1), z, ahead[..., :-1, :])
            if self.form == "control":
                return value
            u = None if data.inputs is None else data.inputs[..., :-1, :]
            return (value - sde.drift_at(z, times, u)) / sde.diffusion_at(z, times, u)

        reads = tuple(tensors_with_gradient(self.drift)) if isinstance(self.drift, torch.nn.Module) else ()
        known = known_start(start_law(context.initial, torch.Size()))
        return GirsanovPath(
            self.first_law(features[..., :1, :]) if known is None else context.initial,
            lambda start, noise: sde.solve(start, noise, held, drift, diffusion, reads),
            data.times,
            sde.noise_dim,
            batch_shape(model, data),
            features,
            control,
            None if data.lengths is None else data.step_mask,
        )

    # ------------------------------------------------------------------------------------------------- the noise

    def forward(self, data: TimeSeries) -> Tensor:
        """Sample the parameters, bind the model to them, and sample the path ``(*batch, time, state)``."""
        bound = self.bind_model(self.parameters_given(data))
        sde = _equation(bound.transition)
        with series_plate(self.model, data):
            if sde.site != "noise":
                return pyro.sample(site_name(self.model, "z"), self.path(data, bound))
            refuse_memory(bound)
            if data.values is None:
                self.path(data, bound)  # raises: a guide needs observations
            context, shape = self.encode(data, bound), batch_shape(bound, data)
            start = known_start(start_law(context.initial, shape))
            if start is None:
                first = start_law(self.first_law(context.features[..., :1, :]), shape)
                start = pyro.sample(site_name(self.model, "z_start"), first)
            if data.num_times == 1:
                return start
            law = noise_law(bound, data, start, **self._driven(bound, data, context, start))
            noise = pyro.sample(site_name(self.model, "z_noise"), law)
            return solve_noise(bound, data, start, noise)

    def _driven(self, bound: Any, data: TimeSeries, context: SDEContext, start: Tensor) -> dict[str, Any]:
        """Control, solver and draw of the guide's :class:`~pyro_ssm.distributions.DrivenNoise`."""
        sde, features, times = context.sde, context.features, context.times
        clock, gaps = times.to(features).unsqueeze(-1), times.diff(dim=-1).to(features).unsqueeze(-1)
        t, h, root = clock.split(1, -2), gaps.split(1, -2), gaps.sqrt().split(1, -2)
        u = None if data.inputs is None else data.inputs.split(1, -2)

        def means(path: Tensor) -> Tensor:
            return self.drift(clock[..., :-1, :], path, features[..., 1:, :]) * gaps.sqrt()

        def draw(white: Tensor) -> tuple[Tensor, Tensor]:
            drift, z, values, shifts = self._drift_of_steps(features), start, [], []
            for k, e in enumerate(white.split(1, -2)):
                mean = drift(k + 1, t[k], z) * root[k]
                value = e + mean
                held = None if u is None else u[k]
                step = SDEStep(sde._drift, sde._diffusion, sde.noise, t[k], t[k + 1], held, h[k], value * root[k])
                z = sde_step(z, step, sde.method, sde.interpretation)
                values.append(value)
                shifts.append(mean.expand(value.shape))
            return torch.cat(values, -2), torch.cat(shifts, -2)

        return {"control": means, "solve": lambda noise: solve_noise(bound, data, start, noise), "draw": draw}


def _seen_through(loc: Tensor, scale: Tensor, pseudo: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and scale of a step N(loc, scale^2), times the factor of a pseudo-observation (m, log precision) if any."""
    if pseudo is None:
        return loc, scale
    m, raw = pseudo.chunk(2, -1)
    # precision of the factor over that of the step; an observation may be a thousand times as precise, hence exp
    ratio = raw.clamp(max=20.0).exp() * scale.square()
    return loc + ratio / (1 + ratio) * (m - loc), scale * (1 + ratio).rsqrt()


def _equation(transition: Any, who: str = "PosteriorSDE") -> NeuralSDE:
    if isinstance(transition, NeuralSDE):
        return transition
    if isinstance(transition, EulerMaruyama) and transition.sde.site == "path":
        return transition.sde
    raise TypeError(
        f"{who} needs a model whose transition is a dynamics.NeuralSDE (or the 'euler_maruyama' discretisation "
        f"of one with site='path'), got {type(transition).__name__.removeprefix('Bound')}. Use guides.Structured"
    )


def _check_form(form: str | None, sde: NeuralSDE) -> str:
    only_control = sde.noise != "diagonal" or sde.site == "noise"
    if form is None:
        return "control" if only_control else "drift"
    check_choice("form", form, ("drift", "control"))
    if form == "drift" and only_control:
        raise ValueError(
            f"form='drift' needs diagonal noise and a site other than the noise, got noise={sde.noise!r} and "
            f"site={sde.site!r}; use form='control'"
        )
    return form
