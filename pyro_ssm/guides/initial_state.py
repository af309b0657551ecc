"""The guide of latent ordinary differential equations: where the path starts, given all that was seen of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_ssm.blocks import MLP
from pyro_ssm.blocks._checks import check_choice
from pyro_ssm.blocks._gaussian import diagonal_normal
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import SingularNormal, StartedPath
from pyro_ssm.dynamics import NeuralODE
from pyro_ssm.guides.encoded import AbstractEncodedGuide
from pyro_ssm.guides.encoder import Cell, Context
from pyro_ssm.models import StateSpaceModel, batch_shape, series_plate, site_name
from pyro_ssm.models.laws import solve_from
from pyro_ssm.models.start import known_start, refuse_memory, start_law

__all__ = ["InitialState"]


class InitialState(AbstractEncodedGuide):
    """An amortised posterior of the start of a path,

    .. math:: q(z_1 \\mid y) = N\\big(m(c_1),\\; S(c_1)\\, S(c_1)^T\\big), \\qquad z = \\Phi(z_1),

    with features :math:`c_1` at the first time of an encoder that runs backward over the whole series, and m, S by a
    network (the head). For models whose transition is a :class:`~pyro_ssm.dynamics.NeuralODE`: the site is
    ``"z_start"``. Random parameters (a field's weights or constants) get their own guide, as everywhere, and the
    encoder sees their values.

    Where the start is known (``dynamics.KnownInitial``) there is nothing to sample but parameters.

    Args:
        model: the state-space model; unbound.
        hidden_dim: of the encoder.
        direction: what the encoder reads, seen from the first time: ``"future"`` (backward over the data) or
            ``"both"``.
        encoder: takes the place of the recurrent encoder: a module ``(data, model) -> context`` with ``features``
            ``(*batch, time, hidden_dim)``, of which the first time is used. ``input_dim``, ``cell``, ``num_layers`` and
            ``dropout`` are then its own affair.
        head: hidden layers of the head; ``()`` is an affine map.
        covariance: ``"diagonal"`` or ``"full"`` (a Cholesky factor from the head).
        activation: of the head.
        input_dim: columns of ``data.inputs`` that the encoder sees (0 for none).
        cell: of the encoder: ``"gru"``, ``"lstm"``, ``"rnn"``, ``"relu"``, a structured block class such as
            ``blocks.S5``, or a ``blocks.Bidirectional`` (see ``guides.encoder.DataEncoder``).
        num_layers: of the encoder.
        dropout: between the encoder's layers.
        scale_floor: added to the scales.
        parameters: a guide over random parameters (default: ``AutoNormal``).

    Raises:
        TypeError: the model's transition is no ``NeuralODE``, or the encoder cannot be called.
        ValueError: an encoder that reads the past only, which at the first time has seen one observation.

    Source: Chen, Rubanova, Bettencourt and Duvenaud (2018), "Neural ordinary differential equations", NeurIPS, section
    5; Rubanova, Chen and Duvenaud (2019), "Latent ODEs for irregularly-sampled time series", NeurIPS, section 3.2.

    A latent ODE on irregular times, trained for some steps:

    >>> import torch, pyro_ssm as ssm
    >>> _ = torch.manual_seed(0)
    >>> times = torch.rand(16, 12).sort(-1).values.double() * 6                     # own times of each series
    >>> phase = 6 * torch.rand(16, 1)
    >>> data = ssm.TimeSeries(times, torch.sin(times.float() + phase).unsqueeze(-1))
    >>> ode = ssm.dynamics.NeuralODE(ssm.dynamics.MLPDrift(2, 16, activation="tanh"), rtol=1e-3, atol=1e-4)
    >>> model = ssm.StateSpaceModel(ssm.dynamics.NormalInitial(2), ode, ssm.emissions.Normal(2, 1, scale=0.2))
    >>> guide = ssm.guides.InitialState(model, hidden_dim=16)
    >>> result = ssm.infer.fit(model, guide, data, num_steps=60, lr=0.02, progress=False)
    >>> bool(result.losses[-10:].mean() < result.losses[:10].mean())
    True
    >>> ssm.predict.forecast(model, guide, data, times=[7.0, 8.0], num_samples=10).values.shape
    torch.Size([10, 16, 2, 1])
    """

    samples_start = True

    def __init__(
        self,
        model: StateSpaceModel,
        hidden_dim: int = 64,
        direction: str = "future",
        *,
        encoder: Any = None,
        head: int | Sequence[int] = (),
        covariance: str = "diagonal",
        activation: str | Callable[[Tensor], Tensor] = "tanh",
        input_dim: int = 0,
        cell: Cell = "gru",
        num_layers: int = 1,
        dropout: float = 0.0,
        scale_floor: float = 1e-4,
        parameters: Callable[..., Any] | None = None,
    ) -> None:
        if direction == "past":
            raise ValueError("`direction` must be 'future' or 'both': at its start a series has no past, got 'past'")
        super().__init__(model, hidden_dim, direction, input_dim, cell, num_layers, dropout, scale_floor, parameters)
        if not isinstance(model.transition, NeuralODE):
            raise TypeError(
                "InitialState needs a model whose transition is a dynamics.NeuralODE, got "
                f"{type(model.transition).__name__}. Use guides.Structured, or guides.PosteriorSDE for a NeuralSDE"
            )
        if encoder is not None:
            if not callable(encoder):
                raise TypeError(f"`encoder` must be callable as encoder(data, model), got {encoder!r}")
            self.encoder = encoder
        self.covariance = check_choice("covariance", covariance, ("diagonal", "full"))
        size = model.initial.state_dim
        rest = size if covariance == "diagonal" else size * (size + 1) // 2
        self.head = MLP(hidden_dim, head, size + rest, activation)

    def first_law(self, features: Tensor) -> Any:
        """:math:`q(z_1 \\mid c_1)` of features ``(..., 1, hidden)``."""
        size = self.model.initial.state_dim
        loc, raw = self.head(features).split((size, self.head.layers[-1].out_features - size), -1)
        if self.covariance == "diagonal":
            return diagonal_normal(loc, self.positive(raw))
        rows, columns = torch.tril_indices(size, size, -1)
        lower = raw.new_zeros(raw.shape[:-1] + (size, size))
        lower[..., rows, columns] = raw[..., size:]
        return SingularNormal(loc, scale_tril=lower + self.positive(raw[..., :size]).diag_embed(), validate_args=False)

    def step(self, state: Tensor | None, k: slice, context: Context, memory: Tensor | None = None) -> Any:
        if state is None:
            return self.first_law(context.features[..., k, :])
        raise NotImplementedError(
            "the steps of an ordinary differential equation have no law to propose from: only its start is random. For "
            "a particle filter give the equation noise, dynamics.discretize(ode, 'flow', noise_floor=s), and use "
            "guides.Structured"
        )

    def start(self, data: TimeSeries, model: StateSpaceModel) -> Any:
        """The law of the start ``(*batch, 1, state)`` given data and a bound model."""
        refuse_memory(model)
        shape, held = batch_shape(model, data), None if data.inputs is None else data.inputs[..., :1, :]
        prior = start_law(model.initial(data.times[..., :1], held), shape)
        if known_start(prior) is not None:
            return prior
        if data.values is None:
            raise ValueError(
                "a guide needs observations: `data.values` is None. Simulate the prior with the model alone"
            )
        return start_law(self.first_law(self.encode(data, model).features[..., :1, :]), shape)

    def path(self, data: TimeSeries, model: StateSpaceModel) -> StartedPath:  # type: ignore[override]
        """The law of the path given data and a bound model."""
        first = self.start(data, model)
        known = known_start(first) is not None
        return StartedPath(first, lambda start: solve_from(model, data, start), data.num_times, known)

    def forward(self, data: TimeSeries) -> Tensor:
        """Sample the parameters, bind the model to them, and sample the start ``(*batch, 1, state)``."""
        bound = self.bind_model(self.parameters_given(data))
        with series_plate(self.model, data):
            law = self.start(data, bound)
            known = known_start(law)
            return pyro.sample(site_name(self.model, "z_start"), law) if known is None else known
