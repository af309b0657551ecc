"""The guides of Krishnan, Shalit and Sontag (2017): mean-field and structured, from the past, the future or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Independent, Normal
from torch import Tensor, nn

from pyro_ssm.blocks import Linear
from pyro_ssm.distributions.markov_path import Draw
from pyro_ssm.guides.encoded import AbstractEncodedGuide
from pyro_ssm.guides.encoder import Cell, Context
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.ops import combiner_path

__all__ = ["Structured"]


class Structured(AbstractEncodedGuide):
    """Structured inference network: a recurrent encoder and, step by step, a combiner with the state before.

    .. math::
        c_k = \\tfrac{1}{2} \\left( \\tanh(W z_{k-1} + b) + e_k \\right), \\qquad
        q(z_k \\mid z_{k-1}, y) = N\\!\\left(U c_k + u,\\ \\operatorname{softplus}(V c_k + v)^2 \\right)

    with :math:`e_k` from :class:`~pyro_ssm.guides.encoder.DataEncoder`. With ``structured=False`` the first term of
    :math:`c_k` is left out and the posterior is mean-field in time. The six families of the paper are ``direction =
    "past" | "future" | "both"`` times ``structured = False | True``: MF-L, MF-R, MF-LR, ST-L, DKS (= ST-R), ST-LR.
    Exact smoothing needs only the future beside :math:`z_{k-1}` (conditional independence), so ``"future"`` is lean
    and ``"both"`` is safe.

    Args:
        model: the state-space model; unbound.
        hidden_dim: of the encoder and the combiner.
        direction: what the encoder reads.
        structured: whether a step sees the state before.
        input_dim: columns of ``data.inputs`` that the encoder sees (0 for none).
        cell: of the encoder: ``"gru"``, ``"lstm"``, ``"rnn"``, ``"relu"``; in continuous time ``"gru_d"``,
            ``"ode_rnn"``, ``"gru_ode"``, ``"gru_ode_bayes"``, ``"neural_cde"``; a structured block class such as
            ``blocks.S5``, or a ``blocks.Bidirectional`` (see ``guides.encoder.DataEncoder``).
        num_layers: of the encoder.
        dropout: between the encoder's layers.
        scale_floor: added to the scale of each step.
        parameters: a guide over random parameters (default: ``AutoNormal``).
        reads_memory: whether a step sees the summary of the model's memory (structured emissions, VRNNs). False leaves
            it out of the posterior, which is a looser family and much faster: paths are drawn at once, not step by
            step with the memory.

    Raises:
        ValueError: an unknown direction.

    Source: R. G. Krishnan, U. Shalit, D. Sontag (2017), Structured inference networks for nonlinear state space
    models, AAAI, section 4 and table 1.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.GatedTransition(2, 16), ssm.emissions.Bernoulli(2, 3))
    >>> guide = ssm.guides.Structured(model, hidden_dim=8, direction="both")
    >>> guide(ssm.TimeSeries(torch.arange(6.0), torch.ones(4, 6, 3))).shape
    torch.Size([4, 6, 2])
    """

    def __init__(
        self,
        model: StateSpaceModel,
        hidden_dim: int = 64,
        direction: str = "both",
        structured: bool = True,
        *,
        input_dim: int = 0,
        cell: Cell = "gru",
        num_layers: int = 1,
        dropout: float = 0.0,
        scale_floor: float = 1e-4,
        parameters: Callable[..., Any] | None = None,
        reads_memory: bool = True,
    ) -> None:
        super().__init__(
            model, hidden_dim, direction, input_dim, cell, num_layers, dropout, scale_floor, parameters, reads_memory
        )
        state_dim = model.initial.state_dim
        self.structured = structured
        self.head = Linear(hidden_dim, 2 * state_dim)
        if structured:
            self.combiner = Linear(state_dim, hidden_dim)
            self.first_state = nn.Parameter(torch.zeros(state_dim))

    def step(self, state: Tensor | None, k: slice, context: Context, memory: Tensor | None = None) -> Independent:
        combined = self.features(k, context, memory)
        if self.structured:
            before = self.first_state if state is None else state
            combined = 0.5 * (torch.tanh(self.combiner(before)) + combined)
        loc, raw = self.head(combined).chunk(2, -1)
        return Independent(Normal(loc, self.positive(raw), validate_args=False), 1, validate_args=False)

    def draw(self, context: Context) -> Draw:
        if not self.structured:
            return _draw_independent(self, context)

        def path(shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
            features = context.features
            noise = torch.randn(shape, dtype=features.dtype, device=features.device)
            states, scale = combiner_path(
                noise,
                features,
                self.first_state,
                self.combiner.weight,
                self.combiner.bias,
                self.head.weight,
                self.head.bias,
                self.scale_floor,
            )
            return states, noise, scale

        return path


def _draw_independent(guide: Structured, context: Context) -> Draw:
    def path(shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        law = guide.step(None, slice(0, shape[-2]), context).base_dist
        noise = torch.randn(shape, dtype=law.loc.dtype, device=law.loc.device)
        return law.loc + law.scale * noise, noise, law.scale.expand(shape)

    return path
