"""A guide that starts as the exact posterior of a linear-Gaussian model, and that an encoder corrects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor

from pyro_ssm.binding import random_parameters
from pyro_ssm.blocks import Linear, linear
from pyro_ssm.blocks._gaussian import corrected_normal, corrections
from pyro_ssm.components import AffineGaussian, Diffuse, Gaussian, require
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions.markov_path import Draw
from pyro_ssm.guides.encoded import AbstractEncodedGuide
from pyro_ssm.guides.encoder import Cell, Context
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.models.linear_gaussian import system_of
from pyro_ssm.ops.kalman import kalman_filter_reference, matvec
from pyro_ssm.ops.kalman_backward import (
    backward_conditionals_reference,
    forward_conditionals,
    kalman_smoother_reference,
)

__all__ = ["LinearGaussian"]


class _Chain(NamedTuple):
    """The exact posterior of the core as a Markov chain, and what the encoder says of each step."""

    gain: Tensor  # (..., time, state, state), 0 at the first step
    offset: Tensor  # (..., time, state)
    scale_tril: Tensor  # (..., time, state, state)
    encoded: Context


class LinearGaussian(AbstractEncodedGuide):
    """The exact posterior of a linear-Gaussian model, the ``core``, with corrections by an encoder.

    .. math::
        q(z_k \\mid z_{k-1}, y) &: \\quad z_k = G_k z_{k-1} + c_k + D_k e_k, \\qquad
        e_k \\sim N(f(e^y_k), \\text{diag}(g(e^y_k)^2)), \\\\
        p_{\\text{core}}(z_k \\mid z_{k-1}, y_{1:T}) &= N(G_k z_{k-1} + c_k,\\; D_k D_k^T)

    where the second line is what the Kalman smoother gives, and f and g read the features :math:`e^y_k` of
    :class:`~pyro_ssm.guides.encoder.DataEncoder` and start at 0 and 1. For a model equal to the core the bound is the
    log-likelihood, before any step of training; for a model near the core (say one with a
    :class:`~pyro_ssm.dynamics.CorrectedTransition` of it) it starts near. Correlations between the coordinates of the
    state, which :class:`GaussianMarkov` leaves out, and the precision of the states, which an encoder is slow to learn,
    are there from the beginning. The core's parameters are the guide's own and are learnt with it.

    Args:
        model: the state-space model; unbound. Real observations: the core sees them as they are.
        core: a linear-Gaussian :class:`~pyro_ssm.models.StateSpaceModel` over as many states and observations, which
            has not run yet, and shares no parameter with ``model`` (give a fresh one the values:
            ``core.load_state_dict(fitted.state_dict())``).
        hidden_dim: of the encoder.
        input_dim: columns of ``data.inputs`` that the encoder sees (0 for none).
        cell: of the encoder: ``"gru"``, ``"lstm"``, ``"rnn"``, ``"relu"``; in continuous time ``"gru_d"``,
            ``"ode_rnn"``, ``"gru_ode"``, ``"gru_ode_bayes"``, ``"neural_cde"``; a structured block class such as
            ``blocks.S5``, or a ``blocks.Bidirectional`` (see ``guides.encoder.DataEncoder``).
        num_layers: of the encoder.
        dropout: between the encoder's layers.
        scale_floor: least factor of the core's scales, in (0, 1).
        parameters: a guide over random parameters (default: ``AutoNormal``).

    Raises:
        TypeError: a part of the core is not linear and Gaussian, or it has a memory.
        ValueError: the core's sizes are not those of the model, or they share parameters.

    Source: amortised corrections of a graphical model's own posterior, after M. J. Johnson, D. Duvenaud, A. Wiltschko,
    R. Adams, S. Datta (2016), Composing graphical models with neural networks, NeurIPS, section 4.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro.infer import Trace_ELBO
    >>> def linear_model():
    ...     torch.manual_seed(0)
    ...     return ssm.StateSpaceModel(
    ...         ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> model, data = linear_model(), ssm.TimeSeries(torch.arange(6.0), torch.ones(4, 6, 1))
    >>> guide = ssm.guides.LinearGaussian(model, linear_model(), hidden_dim=8)
    >>> exact = ssm.infer.kalman_filter(model, data).log_likelihood.sum().item()
    >>> abs(Trace_ELBO().loss(model, guide, data) + exact) < 1e-3
    True
    """

    def __init__(
        self,
        model: StateSpaceModel,
        core: StateSpaceModel,
        hidden_dim: int = 64,
        *,
        input_dim: int = 0,
        cell: Cell = "gru",
        num_layers: int = 1,
        dropout: float = 0.0,
        scale_floor: float = 1e-3,
        parameters: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, hidden_dim, "both", input_dim, cell, num_layers, dropout, scale_floor, parameters)
        _check(core, model)
        self.core = core
        self.head = Linear(hidden_dim, 2 * model.initial.state_dim)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.bias.zero_()

    def encode(self, data: TimeSeries, model: StateSpaceModel) -> Any:
        return _Chain(*_posterior_chain(self.core.bind(), data), self.encoder(data, model))

    def step(self, state: Tensor | None, k: slice, context: _Chain, memory: Tensor | None = None) -> MultivariateNormal:
        gain, loc, scale_tril = context.gain[..., k, :, :], context.offset[..., k, :], context.scale_tril[..., k, :, :]
        if state is not None:
            loc = loc + linear(state, gain)
        return corrected_normal(loc, scale_tril, *self._corrections(k, context, memory))

    def draw(self, context: _Chain) -> Draw:
        def path(shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
            shift, factor = self._corrections(slice(0, shape[-2]), context, None)
            noise = torch.randn(shape, dtype=context.offset.dtype, device=context.offset.device)
            fresh = context.offset + linear(shift + factor * noise, context.scale_tril)
            states = [fresh[..., 0, :]]
            for gain, now in zip(context.gain.unbind(-3)[1:], fresh.unbind(-2)[1:], strict=True):
                states.append(matvec(gain, states[-1]) + now)
            return (
                torch.stack(states, -2),
                noise,
                (context.scale_tril.diagonal(dim1=-2, dim2=-1) * factor).expand(shape),
            )

        return path

    def _corrections(self, k: slice, context: _Chain, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        return corrections(self.head(self.features(k, context.encoded, memory)), self.scale_floor)


def _posterior_chain(core: StateSpaceModel, data: TimeSeries) -> tuple[Tensor, Tensor, Tensor]:
    """The laws :math:`p(z_k | z_{k-1}, y_{1:T})` of a bound linear-Gaussian model: gains, offsets, square roots."""
    if data.values is None or data.mask is None:
        raise ValueError("a guide needs observations: `data.values` is None")
    system = system_of(core, data)
    step_mask = system.step_mask
    steps = kalman_filter_reference(
        system.values,
        system.mask,
        system.mean,
        system.scale_tril,
        *system.transition,
        *system.emission,
        num_times=system.num_times,
        observed_index=system.observed_index,
        step_mask=step_mask,
    )
    if data.num_times == 1:
        return torch.zeros_like(steps.filtered_scale_tril), steps.filtered_mean, steps.filtered_scale_tril
    backwards = backward_conditionals_reference(steps, *system.transition, step_mask=step_mask)
    means, roots = kalman_smoother_reference(steps, backwards)
    gain, offset, scale_tril = forward_conditionals(means, roots, backwards)
    if step_mask is not None:  # a padded step copies the one before, and has no density; any regular law will do
        eye = torch.eye(means.shape[-1], dtype=means.dtype, device=means.device)
        scale_tril = torch.where(step_mask[..., 1:, None, None], scale_tril, eye)
    return (
        torch.cat([torch.zeros_like(gain[..., :1, :, :]), gain], -3),
        torch.cat([means[..., :1, :], offset], -2),
        torch.cat([roots[..., :1, :, :].expand(scale_tril[..., :1, :, :].shape), scale_tril], -3),
    )


def _check(core: Any, model: StateSpaceModel) -> None:
    if not isinstance(core, StateSpaceModel):
        raise TypeError(f"`core` must be a StateSpaceModel, got {type(core).__name__}")
    instead = "guides.Structured or guides.GaussianMarkov, which need no core"
    for part, capability in (
        (core.initial, Gaussian),
        (core.transition, AffineGaussian),
        (core.emission, AffineGaussian),
    ):
        require(part, capability, "the core of guides.LinearGaussian", instead)
    if isinstance(core.initial, Diffuse):
        raise TypeError("`core` starts diffuse, and a guide draws its first state. Use dynamics.NormalInitial")
    if core.memory is not None or random_parameters(core):
        raise TypeError("`core` must have no memory and no parameters with a prior: its posterior is computed exactly")
    sizes = [(each.initial.state_dim, each.emission.obs_dim) for each in (core, model)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"`core` has (state_dim, obs_dim) = {sizes[0]}, the model has {sizes[1]}: make them equal")
    if {id(parameter) for parameter in core.parameters()} & {id(parameter) for parameter in model.parameters()}:
        raise ValueError(
            "`core` shares parameters with the model. Build a second one and copy the values: "
            "core.load_state_dict(fitted.state_dict())"
        )
