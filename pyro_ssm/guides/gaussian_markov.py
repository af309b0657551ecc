"""A Gaussian Markov chain as guide, whose path is drawn by one scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Independent, Normal
from torch import Tensor

from pyro_ssm.blocks import Linear
from pyro_ssm.distributions.markov_path import Draw
from pyro_ssm.guides.encoded import AbstractEncodedGuide
from pyro_ssm.guides.encoder import Cell, Context
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.ops import linear_scan

__all__ = ["GaussianMarkov"]


class GaussianMarkov(AbstractEncodedGuide):
    """A linear-Gaussian chain whose coefficients the encoder gives; its path is one :func:`~pyro_ssm.ops.linear_scan`.

    .. math:: z_1 = b_1 + s_1 \\epsilon_1, \\qquad z_k = a_k \\odot z_{k-1} + b_k + s_k \\odot \\epsilon_k

    with :math:`a_k = \\tanh(\\cdot)`, :math:`s_k = \\operatorname{softplus}(\\cdot)` and :math:`b_k` linear in the
    features :math:`e_k` of :class:`~pyro_ssm.guides.encoder.DataEncoder`. No network is called in a loop over time: a
    draw costs one elementwise scan, so long series train much faster than with :class:`Structured`; the posterior of
    each state is correlated in time, but independent across coordinates given the data.

    Args:
        model: the state-space model; unbound.
        hidden_dim: of the encoder.
        direction: what the encoder reads: ``"past"``, ``"future"`` or ``"both"``.
        input_dim: columns of ``data.inputs`` that the encoder sees (0 for none).
        cell: of the encoder: ``"gru"``, ``"lstm"``, ``"rnn"``, ``"relu"``; in continuous time ``"gru_d"``,
            ``"ode_rnn"``, ``"gru_ode"``, ``"gru_ode_bayes"``, ``"neural_cde"``; a structured block class such as
            ``blocks.S5``, or a ``blocks.Bidirectional`` (see ``guides.encoder.DataEncoder``).
        num_layers: of the encoder.
        dropout: between the encoder's layers.
        scale_floor: added to the scale of each step.
        parameters: a guide over random parameters (default: ``AutoNormal``).

    Raises:
        ValueError: an unknown direction.

    Source: the Gaussian chain posterior of E. Archer, I. M. Park, L. Buesing, J. Cunningham, L. Paninski (2015),
    Black box variational inference for state space models, section 3, here in its autoregressive form.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> guide = ssm.guides.GaussianMarkov(model, hidden_dim=8)
    >>> guide(ssm.TimeSeries(torch.arange(6.0), torch.ones(4, 6, 1))).shape
    torch.Size([4, 6, 2])
    """

    def __init__(
        self,
        model: StateSpaceModel,
        hidden_dim: int = 64,
        direction: str = "both",
        *,
        input_dim: int = 0,
        cell: Cell = "gru",
        num_layers: int = 1,
        dropout: float = 0.0,
        scale_floor: float = 1e-4,
        parameters: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, hidden_dim, direction, input_dim, cell, num_layers, dropout, scale_floor, parameters)
        self.head = Linear(hidden_dim, 3 * model.initial.state_dim)

    def coefficients(self, k: slice, context: Context, memory: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """:math:`a_k, b_k, s_k`, each ``(..., len(k), state)``."""
        raw_decay, offset, raw_scale = self.head(self.features(k, context, memory)).chunk(3, -1)
        return torch.tanh(raw_decay), offset, self.positive(raw_scale)

    def step(self, state: Tensor | None, k: slice, context: Context, memory: Tensor | None = None) -> Independent:
        decay, offset, scale = self.coefficients(k, context, memory)
        loc = offset if state is None else decay * state + offset
        return Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)

    def draw(self, context: Context) -> Draw:
        def path(shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
            decay, offset, scale = self.coefficients(slice(0, shape[-2]), context)
            noise = torch.randn(shape, dtype=offset.dtype, device=offset.device)
            return linear_scan(decay, offset + scale * noise), noise, scale.expand(shape)

        return path
