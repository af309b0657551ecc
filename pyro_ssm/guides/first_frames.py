"""An encoder of the first observations, and the guide of second-order equations that reads positions and velocities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_ssm.blocks import MLP
from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._gaussian import diagonal_normal
from pyro_ssm.data import TimeSeries
from pyro_ssm.guides.encoder import Context
from pyro_ssm.guides.initial_state import InitialState
from pyro_ssm.models import StateSpaceModel

__all__ = ["FirstFrames", "PositionVelocity", "encoded_laws"]


class FirstFrames(PyroModule):
    """Features of the first observations of a series, for a start that a few of them tell,

    .. math:: c_1 = \\operatorname{MLP}(y_1, \\dots, y_m;\\; \\text{masks};\\; t_2 - t_1, \\dots, t_m - t_1).

    What comes later is not read, so that a guide over it forecasts from m frames as it was trained to:
    ``guides.InitialState(model, hidden_dim, encoder=guides.FirstFrames(model, hidden_dim, num_frames=3))``. A missing
    value is 0 with mask 0; so are frames that a series does not have. Values of random parameters are not read.

    Args:
        model: gives the size of an observation.
        hidden_dim: number of features.
        num_frames: m, counted in observation times.
        hidden: hidden layers of the network.
        activation: of the network.

    Raises:
        ValueError: when called, the data have no values.

    Source: Yildiz, Heinonen and Lähdesmäki (2019), "ODE2VAE: deep generative second order ODEs with Bayesian neural
    networks", NeurIPS, section 3.2; Li, Wong, Chen and Duvenaud (2020), "Scalable gradients for stochastic differential
    equations", appendix 9.11.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.models.latent_ode(2, 3, hidden=8)
    >>> encoder = ssm.guides.FirstFrames(model, 8, num_frames=4)
    >>> guide = ssm.guides.InitialState(model, 8, encoder=encoder)
    >>> guide(ssm.TimeSeries(torch.arange(10.0), torch.randn(5, 10, 3))).shape
    torch.Size([5, 1, 2])
    """

    def __init__(
        self,
        model: StateSpaceModel,
        hidden_dim: int = 64,
        num_frames: int = 3,
        *,
        hidden: int | Sequence[int] = (64,),
        activation: str | Callable[[Tensor], Tensor] = "relu",
    ) -> None:
        super().__init__()
        self.num_frames = check_size("num_frames", num_frames)
        self.obs_dim = model.emission.obs_dim
        width = num_frames * 2 * self.obs_dim + num_frames - 1
        self.network = MLP(width, hidden, check_size("hidden_dim", hidden_dim), activation)

    def forward(self, data: TimeSeries, model: Any) -> Context:
        """The features ``(*batch, 1, hidden)``; ``model`` is not read."""
        return Context(self._encode(*(self._first(part) for part in self._record(data))))

    def windows(self, data: TimeSeries) -> tuple[Tensor, Tensor]:
        """The features of the ``num_frames`` observations from each one on, as if the series began there.

        Returns:
            ``(*batch, windows, hidden)``, one window for each observation that has enough after it, and bool
            ``(*batch, windows)``: whether every frame of it is one of the series, and something was seen there.
        """
        values, there, times, real = self._record(data)
        if values.shape[-2] < self.num_frames:
            empty = values.shape[:-2] + (0,)
            return values.new_zeros(empty + (self.network.layers[-1].out_features,)), real.new_zeros(empty)
        cut = [part.unfold(-2, self.num_frames, 1).mT for part in (values, there, times, real)]
        return self._encode(*cut).squeeze(-2), (cut[3].squeeze(-1) & cut[1].any(-1)).all(-1)

    def _record(self, data: TimeSeries) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values, what was seen, times, and what is no padding, each ``(*batch, time, n)``."""
        if data.values is None or data.mask is None:
            raise ValueError("an encoder needs observations: `data.values` is None")
        real = data.observed_step_mask.unsqueeze(-1).expand(data.values.shape[:-1] + (1,))
        there = data.mask & real
        values = torch.where(there, data.values, torch.zeros_like(data.values))
        return values, there, data.observed_times.expand(data.values.shape[:-1]).unsqueeze(-1), real

    def _encode(self, values: Tensor, there: Tensor, times: Tensor, real: Tensor) -> Tensor:
        """Features ``(..., 1, hidden)`` of frames ``(..., frame, n)``."""
        since = (times - times[..., :1, :]).to(values)
        since = torch.where(real, since, torch.zeros_like(since))
        frames = [values.flatten(-2), there.to(values).flatten(-2), since.flatten(-2)[..., 1:]]
        return self.network(torch.cat(frames, -1)).unsqueeze(-2)

    def _first(self, record: Tensor) -> Tensor:
        """The first frames of ``(..., time, n)``, with zeros where a record is shorter."""
        short = self.num_frames - record.shape[-2]
        return record[..., : self.num_frames, :] if short <= 0 else torch.nn.functional.pad(record, (0, 0, 0, short))


class PositionVelocity(InitialState):
    """The guide of a second-order equation: the position from the first observation, the velocity from several.

    .. math:: q(x_1, v_1 \\mid y) = N\\big(x_1;\\; m_x(y_1), s_x^2(y_1)\\big)\\;
        N\\big(v_1;\\; m_v(y_1, \\dots, y_m), s_v^2(y_1, \\dots, y_m)\\big)

    For :func:`~pyro_ssm.models.ode2vae`, and any model whose state is positions, then as many velocities. Random
    weights get their own guide, as everywhere.

    Args:
        model: the state-space model; unbound.
        hidden_dim: features of each of the two encoders (:class:`FirstFrames`).
        num_frames: m.
        hidden: hidden layers of the encoders.
        activation: of the encoders.
        scale_floor: added to the scales.
        parameters: a guide over random parameters (default: ``AutoNormal``).

    Raises:
        TypeError: the model's transition is no ``NeuralODE``.
        ValueError: the state has an odd number of coordinates.

    Source: Yildiz, Heinonen and Lähdesmäki (2019), "ODE2VAE", NeurIPS, section 3.2.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.models.ode2vae(2, 3, hidden=4, emission_dim=4)
    >>> guide = ssm.guides.PositionVelocity(model, 8, num_frames=3)
    >>> guide(ssm.TimeSeries(torch.arange(6.0), torch.randn(5, 6, 3))).shape
    torch.Size([5, 1, 4])
    """

    def __init__(
        self,
        model: StateSpaceModel,
        hidden_dim: int = 64,
        num_frames: int = 3,
        *,
        hidden: int | Sequence[int] = (64,),
        activation: str | Callable[[Tensor], Tensor] = "relu",
        scale_floor: float = 1e-4,
        parameters: Callable[..., Any] | None = None,
    ) -> None:
        first = FirstFrames(model, hidden_dim, 1, hidden=hidden, activation=activation)
        super().__init__(model, hidden_dim, encoder=first, scale_floor=scale_floor, parameters=parameters)
        size = model.initial.state_dim
        if size % 2:
            raise ValueError(f"a state of positions and velocities has an even size, and that of `model` is {size}")
        self.motion = FirstFrames(model, hidden_dim, num_frames, hidden=hidden, activation=activation)
        self.head = MLP(hidden_dim, (), size)
        self.velocity_head = MLP(hidden_dim, (), size)

    def encode(self, data: TimeSeries, model: StateSpaceModel) -> Context:
        """The features of both encoders, side by side."""
        return Context(torch.cat([self.encoder(data, model).features, self.motion(data, model).features], -1))

    def first_law(self, features: Tensor) -> Any:
        """:math:`q(x_1, v_1)` of features ``(..., 1, 2 * hidden)``."""
        of_position, of_velocity = features.chunk(2, -1)
        x, raw_x = self.head(of_position).chunk(2, -1)
        v, raw_v = self.velocity_head(of_velocity).chunk(2, -1)
        return diagonal_normal(torch.cat([x, v], -1), self.positive(torch.cat([raw_x, raw_v], -1)))


def encoded_laws(guide: Any, data: TimeSeries) -> tuple[Any, Tensor]:
    """What a guide over first frames would say of the state at each observation, if the series began there.

    .. math:: q_{enc}(z_k) = q(z_1 \\mid y_k, \\dots, y_{k + m - 1})

    Args:
        guide: a :class:`PositionVelocity`, or an ``InitialState`` whose encoder is :class:`FirstFrames`.
        data: with values.

    Returns:
        The laws, batch ``(*batch, windows)`` and event ``(state,)``, and which of them have all their frames.

    Raises:
        TypeError: another guide.

    Source: Yildiz, Heinonen and Lähdesmäki (2019), "ODE2VAE", NeurIPS, section 3.3.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.guides import encoded_laws
    >>> model = ssm.models.ode2vae(2, 3, hidden=4, emission_dim=4)
    >>> guide = ssm.guides.PositionVelocity(model, 8, num_frames=3)
    >>> law, complete = encoded_laws(guide, ssm.TimeSeries(torch.arange(6.0), torch.randn(5, 6, 3)))
    >>> law.batch_shape, complete.all()
    (torch.Size([5, 4]), tensor(True))
    """
    if isinstance(guide, PositionVelocity):
        of_velocity, complete = guide.motion.windows(data)
        of_position, _ = guide.encoder.windows(data)
        of_position = of_position[..., : of_velocity.shape[-2], :]
        return guide.first_law(torch.cat([of_position, of_velocity], -1)), complete
    if isinstance(guide, InitialState) and isinstance(guide.encoder, FirstFrames):
        features, complete = guide.encoder.windows(data)
        return guide.first_law(features), complete
    raise TypeError(
        "the law of a later state needs a guide that reads a few frames from there on: guides.PositionVelocity, or "
        f"guides.InitialState(..., encoder=guides.FirstFrames(...)), got {type(guide).__name__}"
    )
