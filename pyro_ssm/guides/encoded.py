"""What guides with a recurrent encoder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.blocks import Linear
from pyro_ssm.components import DiscreteState
from pyro_ssm.data import TimeSeries
from pyro_ssm.guides.base import Guide
from pyro_ssm.guides.encoder import Cell, Context, DataEncoder
from pyro_ssm.models import StateSpaceModel

__all__ = ["AbstractEncodedGuide"]

DIRECTIONS = ("past", "future", "both")


class AbstractEncodedGuide(Guide):
    """A guide whose steps read the features of a :class:`~pyro_ssm.guides.encoder.DataEncoder`, and the model's memory.

    A subclass adds its networks and defines ``step`` (and ``draw``).

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
        reads_memory: whether steps see the summary of the model's memory.

    Raises:
        ValueError: an unknown direction.

    >>> from pyro_ssm.guides import AbstractEncodedGuide, GaussianMarkov, Structured
    >>> issubclass(Structured, AbstractEncodedGuide), issubclass(GaussianMarkov, AbstractEncodedGuide)
    (True, True)
    """

    def __init__(
        self,
        model: StateSpaceModel,
        hidden_dim: int,
        direction: str,
        input_dim: int,
        cell: Cell,
        num_layers: int,
        dropout: float,
        scale_floor: float,
        parameters: Callable[..., Any] | None,
        reads_memory: bool = True,
    ) -> None:
        super().__init__(model, parameters)
        self.reads_memory = reads_memory
        if isinstance(model.transition, DiscreteState):
            raise TypeError(
                f"{type(self).__name__} draws real states, but the state of {type(model.transition).__name__} holds an "
                "index. Integrate the states out: infer.Marginal(model, filter=infer.hmm_filter) for finite states, "
                "filter=infer.kim_filter for switching models; or use particle filters"
            )
        if direction not in DIRECTIONS:
            raise ValueError(f"`direction` must be one of {DIRECTIONS}, got {direction!r}")
        self.direction, self.looks_ahead, self.scale_floor = direction, direction != "past", scale_floor
        self.encoder = DataEncoder(model, hidden_dim, direction, input_dim, cell, num_layers, dropout)
        if model.memory is not None and reads_memory:
            self.remember = Linear(model.memory.features, hidden_dim)

    def encode(self, data: TimeSeries, model: StateSpaceModel) -> Context:
        return self.encoder(data, model)

    def features(self, k: slice, context: Context, memory: Tensor | None) -> Tensor:
        """What the data (and memory) say of the steps ``k``: ``(..., len(k), hidden)``."""
        features = context.features[..., k, :]
        return features if memory is None or not self.reads_memory else features + self.remember(memory)

    def positive(self, raw: Tensor) -> Tensor:
        """A scale: softplus(raw) + floor."""
        return torch.nn.functional.softplus(raw) + self.scale_floor
