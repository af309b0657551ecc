"""An encoder of the first observations, and the guide of second-order equations that reads positions and velocities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_ssm.blocks import MLP
from pyro_ssm.blocks._checks import check_size
from pyro_ssm.data import TimeSeries
from pyro_ssm.guides.encoder import Context
from pyro_ssm.models import StateSpaceModel

__all__ = ["FirstFrames"]


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
        if data.values is None or data.mask is None:
            raise ValueError("an encoder needs observations: `data.values` is None")
        there = data.mask & data.observed_step_mask.unsqueeze(-1)
        values = torch.where(there, data.values, torch.zeros_like(data.values))
        since = (data.observed_times - data.observed_times[..., :1]).to(values).expand(values.shape[:-1])
        since = torch.where(data.observed_step_mask, since, torch.zeros_like(since))
        frames = [
            self._first(values).flatten(-2),
            self._first(there.to(values)).flatten(-2),
            self._first(since.unsqueeze(-1)).flatten(-2)[..., 1:],
        ]
        return Context(self.network(torch.cat(frames, -1)).unsqueeze(-2))

    def _first(self, record: Tensor) -> Tensor:
        """The first frames of ``(..., time, n)``, with zeros where a record is shorter."""
        short = self.num_frames - record.shape[-2]
        return record[..., : self.num_frames, :] if short <= 0 else torch.nn.functional.pad(record, (0, 0, 0, short))
