"""What a guide reads from data: features at observation times, a recurrent network, and the way to the latent grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Union

import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_ssm.binding import random_parameters
from pyro_ssm.blocks import (
    GRUD,
    GRUODE,
    ODERNN,
    Bidirectional,
    EvolvingBlock,
    GRUODEBayes,
    Linear,
    NeuralCDE,
    RecurrentEncoder,
    StructuredBlock,
)
from pyro_ssm.blocks._checks import check_choice
from pyro_ssm.blocks.evolving import JumpBlock
from pyro_ssm.blocks.recurrent import RECURRENT_CELLS
from pyro_ssm.components import gaps
from pyro_ssm.data import TimeSeries
from pyro_ssm.models import StateSpaceModel

__all__ = ["Cell", "Context", "DataEncoder"]

#: the name of a recurrent cell or an evolving block, a structured block as a function of its features, or an encoder
Cell = Union[str, Callable[[int], StructuredBlock], Bidirectional]  # noqa: UP007  (an alias at run time, Python 3.10)

#: evolving blocks over values, their mask and other columns, by name: ``(obs_dim, other_dim, hidden_dim) -> block``
_EVOLVING: dict[str, Callable[[int, int, int], EvolvingBlock]] = {
    "gru_d": lambda obs, other, hidden: GRUD(obs, hidden, other),
    "gru_ode": lambda obs, other, hidden: GRUODE(2 * obs + other, hidden, obs_dim=obs),
    "gru_ode_bayes": lambda obs, other, hidden: GRUODEBayes(obs, hidden, other),
    "neural_cde": lambda obs, other, hidden: NeuralCDE(2 * obs + other, hidden, obs_dim=obs),
    "ode_rnn": lambda obs, other, hidden: ODERNN(2 * obs + other, hidden, obs_dim=obs),
}


class Context(NamedTuple):
    """What ``step`` needs to know of the data: one feature vector for each latent step.

    ``features`` is ``(..., time, hidden)``.

    >>> from pyro_ssm.guides.encoder import Context
    >>> Context._fields
    ('features',)
    """

    features: Tensor


class DataEncoder(PyroModule):
    """Masked, ragged-safe recurrent encoder of a :class:`~pyro_ssm.data.TimeSeries`.

    .. math::
        e_k = \\tfrac1n \\left( \\overrightarrow{h}_{j \\le k} + \\overleftarrow{h}_{j \\ge k} + W \\theta \\right)

    It sees values (0 where missing), the mask, :math:`\\log(1 + \\Delta)` of the gap before each time, and inputs; it
    runs over observation times only. On a refined grid an unobserved step sees the last (past) and the next (future)
    observation's features and how far away they are; a state that follows an equation (``"ode_rnn"``, ``"gru_ode"``,
    ``"gru_ode_bayes"``) is carried there by it. Values of random parameters enter linearly, so that :math:`q(z
    \\mid y, \\theta)` is amortised over them.

    Args:
        model: gives the dimensions of observations and which parameters are random.
        hidden_dim: features of the recurrent network, and of the result.
        direction: ``"past"``, ``"future"`` or ``"both"``.
        input_dim: columns of ``data.inputs`` (0 for none).
        cell: ``"gru"``, ``"lstm"``, ``"rnn"`` or ``"relu"``, which see gaps as a feature; or, for irregular series, a
            network in continuous time, one in each direction: ``"gru_d"``, ``"ode_rnn"``, ``"gru_ode"``,
            ``"gru_ode_bayes"`` or ``"neural_cde"`` (``blocks.GRUD`` ... with their defaults, which count time in units
            of the data); or a structured block as a function of its features (``blocks.S5``, ``lambda size:
            blocks.Mamba(size, 8)``), stacked ``num_layers`` times in each direction and told the true gaps; or a
            :class:`~pyro_ssm.blocks.Bidirectional` of ``2 * obs_dim + 1 + input_dim`` features in (values, their mask,
            the logarithm of the gap, inputs), ``hidden_dim`` out, for instance of two ``blocks.ODERNN`` with a solver
            of your own.
        num_layers: of the recurrent network; 1 for a network in continuous time.
        dropout: between its layers.

    Raises:
        ValueError: a cell that does not fit, or layers of a network in continuous time.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.guides.encoder import DataEncoder
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> DataEncoder(model, 8, "both")(data, model.bind()).features.shape
    torch.Size([3, 4, 8])
    """

    def __init__(
        self,
        model: StateSpaceModel,
        hidden_dim: int,
        direction: str,
        input_dim: int = 0,
        cell: Cell = "gru",
        num_layers: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.input_dim = input_dim
        obs_dim = model.emission.obs_dim
        self.recurrent = _network(obs_dim, 1 + input_dim, hidden_dim, direction, cell, num_layers, dropout)
        self.distance = Linear(2, hidden_dim, bias=False)
        self.parameter_events = _parameter_events(model)
        numel = sum(event.numel() for event in self.parameter_events.values())
        if numel:
            self.parameter_map = Linear(numel, hidden_dim, bias=False)

    def forward(self, data: TimeSeries, model: StateSpaceModel) -> Context:
        """The features of each latent step; ``model`` is bound."""
        values = data.values
        if values is None or data.mask is None:
            raise ValueError("an encoder needs observations: `data.values` is None")
        times = data.observed_times
        gap = gaps(times, values)
        features = [values, data.mask.to(values.dtype), gap.log1p().expand(values.shape[:-1] + (1,))]
        if self.input_dim:
            features.append(self._inputs(data).to(values.dtype))
        valid = None if data.lengths is None else data.observed_step_mask
        if isinstance(self.recurrent, Bidirectional):
            # A regular grid of unit steps convolves; asking costs nothing where the times are on the CPU.
            regular = times.device.type == "cpu" and bool((gap == 1).all())
            past, future = self.recurrent(torch.cat(features, -1), valid, dt=None if regular else gap.squeeze(-1))
        else:
            past, future = self.recurrent(torch.cat(features, -1), valid)
        terms = []
        if past is not None:
            terms.append(past if data.observed_index is None else self._from_past(past, data))
        if future is not None:
            terms.append(future if data.observed_index is None else self._from_future(future, data))
        total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
        if self.parameter_events:
            drawn = [_drawn(model, name, event) for name, event in self.parameter_events.items()]
            shape = torch.broadcast_shapes(*(value.shape[:-1] for value in drawn))
            theta = torch.cat([value.expand(shape + value.shape[-1:]) for value in drawn], -1)
            total = total + self.parameter_map(theta.to(total.dtype))
        return Context(total / len(terms))

    def _inputs(self, data: TimeSeries) -> Tensor:
        if data.inputs is None or data.inputs.shape[-1] != self.input_dim:
            got = "None" if data.inputs is None else f"{data.inputs.shape[-1]} columns"
            raise ValueError(f"the guide was built with input_dim={self.input_dim}, `data.inputs` has {got}")
        at = data.inputs if data.observed_index is None else data.inputs.index_select(-2, data.observed_index)
        return at.expand(data.observed_step_mask.shape + at.shape[-1:])

    def _from_past(self, past: Tensor, data: TimeSeries) -> Tensor:
        """For each latent step, the features of the last observation at or before it, and the time since."""
        steps = torch.arange(data.num_times, device=past.device)
        at = torch.searchsorted(data.observed_index, steps, right=True) - 1
        since = data.times - data.observed_times.index_select(-1, at)
        return self._carried("past", past.index_select(-2, at), since) + self._away(since, past, 0)

    def _from_future(self, future: Tensor, data: TimeSeries) -> Tensor:
        """For each latent step, the features of the next observation at or after it, and the time until."""
        steps = torch.arange(data.num_times, device=future.device)
        at = torch.searchsorted(data.observed_index, steps).clamp_max(future.shape[-2] - 1)
        until = data.observed_times.index_select(-1, at) - data.times
        return self._carried("future", future.index_select(-2, at), until) + self._away(until, future, 1)

    def _carried(self, direction: str, features: Tensor, distance: Tensor) -> Tensor:
        """Features moved to a latent step, where the network knows how its state moves when nothing is seen."""
        block = getattr(self.recurrent, direction)
        if not isinstance(block, JumpBlock):
            return features
        return block.evolve(features, distance.to(features.dtype).unsqueeze(-1))

    def _away(self, distance: Tensor, like: Tensor, column: int) -> Tensor:
        away = distance.to(like.dtype).log1p().unsqueeze(-1)
        return away * self.distance.weight[..., column]


def _network(
    obs_dim: int, other_dim: int, hidden_dim: int, direction: str, cell: Cell, num_layers: int, dropout: float
) -> RecurrentEncoder | Bidirectional:
    in_features = 2 * obs_dim + other_dim
    if isinstance(cell, str) and cell in _EVOLVING:
        if num_layers != 1 or dropout:
            raise ValueError(
                f"`cell` {cell!r} has one layer without dropout, got num_layers={num_layers}, dropout={dropout}. Stack "
                "blocks by a function of the number of features: cell=lambda size: blocks.ODERNN(size, size)"
            )
        made = {
            name: _EVOLVING[cell](obs_dim, other_dim, hidden_dim) if direction in (name, "both") else None
            for name in ("past", "future")
        }
        return Bidirectional(made["past"], made["future"])
    if isinstance(cell, str):
        check_choice("cell", cell, (*RECURRENT_CELLS, *_EVOLVING))
        return RecurrentEncoder(in_features, hidden_dim, direction, cell, num_layers, dropout)
    if not isinstance(cell, Bidirectional):
        return Bidirectional.of(cell, in_features, hidden_dim, direction, num_layers, dropout)
    found, wanted = (cell.in_features, cell.hidden_dim, cell.direction), (in_features, hidden_dim, direction)
    if found != wanted:
        raise ValueError(
            f"`cell` is a Bidirectional of (in_features, hidden_dim, direction) = {found}; this guide needs {wanted}"
        )
    return cell


def _parameter_events(model: StateSpaceModel) -> dict[str, torch.Size]:
    """Event shapes of the random parameters whose prior is a plain distribution."""
    events = {}
    for name in random_parameters(model):
        path, _, attribute = name.rpartition(".")
        prior = model.get_submodule(path)._pyro_samples[attribute]
        if hasattr(prior, "event_shape"):
            events[name] = torch.Size(prior.event_shape)
    return events


def _drawn(model: StateSpaceModel, name: str, event: torch.Size) -> Tensor:
    """A bound parameter ``(*draws, *plates, 1, *event)`` as ``(*draws, *plates, 1, numel)``."""
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    value = getattr(owner, attribute)
    # a field of an equation may be any PyroModule, which declares nothing
    declared = getattr(owner, "event_dims", {}).get(attribute, max(len(event), 1))
    return value.reshape(value.shape[: value.dim() - declared] + (event.numel(),))
