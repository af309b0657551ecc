"""Recurrent encoders of ragged batches: padding never leaks into an output or a gradient."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_choice, check_size
from pyro_ssm.data import step_mask
from pyro_ssm.ops import elman_scan, gru_scan

__all__ = ["RecurrentEncoder"]

_CELLS = {"gru": nn.GRU, "lstm": nn.LSTM, "relu": partial(nn.RNN, nonlinearity="relu"), "rnn": nn.RNN}
RECURRENT_CELLS = tuple(_CELLS)


class _Direction(PyroModule):
    """One recurrent network from left to right, with a first state that may be learnable.

    On the CPU a layer of simple or gated cells runs through :mod:`pyro_ssm.ops`, whose backward pass defers the weight
    gradients; elsewhere, and for LSTMs, through torch's own module.
    """

    def __init__(
        self, in_features: int, hidden_dim: int, cell: str, num_layers: int, dropout: float, learn_start: bool
    ) -> None:
        super().__init__()
        self.recurrent = _CELLS[cell](in_features, hidden_dim, num_layers, batch_first=True, dropout=dropout)
        self.cell, self.num_layers, self.is_lstm = cell, num_layers, cell == "lstm"
        if learn_start:
            self.start = nn.Parameter(torch.zeros(1 + self.is_lstm, num_layers, 1, hidden_dim))
        else:
            self.register_parameter("start", None)

    def forward(self, features: Tensor) -> Tensor:
        if self.num_layers == 1 and not self.is_lstm and features.device.type == "cpu":
            return self._scan(features)
        start = self.start
        if start is None:
            return self.recurrent(features)[0]
        first = start.expand(start.shape[:-2] + (features.shape[0], start.shape[-1])).contiguous()
        return self.recurrent(features, (first[0], first[1]) if self.is_lstm else first[0])[0]

    def _scan(self, features: Tensor) -> Tensor:
        net = self.recurrent
        first = features.new_zeros(1) if self.start is None else self.start[0, 0]
        first = first.expand(features.shape[0], net.hidden_size)
        products = F.linear(features, net.weight_ih_l0, net.bias_ih_l0)
        if self.cell == "gru":
            return gru_scan(products, first, net.weight_hh_l0, net.bias_hh_l0)
        return elman_scan(products, first, net.weight_hh_l0, net.bias_hh_l0, rectify=self.cell == "relu")


class RecurrentEncoder(PyroModule):
    """A recurrent network over each series' own steps, from the past, from the future, or both,

    .. math::
        \\overrightarrow{h}_k = f(x_k, \\overrightarrow{h}_{k-1}), \\qquad
        \\overleftarrow{h}_k = g(x_k, \\overleftarrow{h}_{k+1}), \\qquad
        \\overleftarrow{h}_{n+1} = \\overleftarrow{h}^{\\text{start}} \\text{ at the series' own length } n.

    The future direction reverses each series within its own length, runs an ordinary network, and turns its outputs
    back. What stands in padding (NaN included) changes no output and no gradient; outputs there are 0. A ragged batch
    equals a loop over its series to rounding. Nothing waits for the device.

    Args:
        in_features: features of a step.
        hidden_dim: features of each output.
        direction: ``"past"``, ``"future"`` or ``"both"``.
        cell: ``"gru"``, ``"lstm"``, ``"rnn"`` (simple, hyperbolic tangent) or ``"relu"`` (simple, rectifier).
        num_layers: how many networks stand on each other.
        dropout: between layers, while training; random from torch's generator.
        learn_start: whether the state before the first step is learnable (from zero) rather than zero.

    Raises:
        ValueError: an argument is out of its range; or, when called, ``features`` or ``lengths`` have a wrong shape.

    >>> import torch
    >>> from pyro_ssm.blocks import RecurrentEncoder
    >>> encoder = RecurrentEncoder(3, hidden_dim=8, direction="both")
    >>> past, future = encoder(torch.zeros(2, 5, 3), torch.tensor([5, 2]))
    >>> past.shape, bool((future[1, 2:] == 0).all())
    (torch.Size([2, 5, 8]), True)
    """

    def __init__(
        self,
        in_features: int,
        hidden_dim: int,
        direction: str = "both",
        cell: str = "gru",
        num_layers: int = 1,
        dropout: float = 0.0,
        learn_start: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = check_size("in_features", in_features)
        self.hidden_dim = check_size("hidden_dim", hidden_dim)
        self.direction = check_choice("direction", direction, ("past", "future", "both"))
        self.cell = check_choice("cell", cell, sorted(_CELLS))
        check_size("num_layers", num_layers)
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {dropout}")
        if dropout and num_layers == 1:
            raise ValueError(f"`dropout` acts between layers: with num_layers=1 it must be 0, got {dropout}")
        for name in ("past", "future"):
            wanted = direction in (name, "both")
            arguments = (in_features, hidden_dim, cell, num_layers, dropout, learn_start)
            setattr(self, name, _Direction(*arguments) if wanted else None)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """The outputs of both directions, None for one that is not there.

        Args:
            features: ``(*batch, time, in)``.
            lengths: ``(*batch,)`` integers, each series' number of steps; or ``(*batch, time)`` bool, True at a
                series' steps, all before its padding; None where nothing is padded. Leading dims broadcast.

        Returns:
            ``(past, future)``, each ``(*batch, time, hidden)``, 0 in padding.
        """
        if features.dim() < 2 or features.shape[-1] != self.in_features:
            raise ValueError(
                f"RecurrentEncoder has in_features={self.in_features}, got `features` of shape "
                f"{tuple(features.shape)}; wanted (*batch, time, {self.in_features})"
            )
        weight = next(self.parameters(), features)  # weights with priors are no parameters
        if features.dtype != weight.dtype and not torch.is_autocast_enabled(features.device.type):
            raise ValueError(
                f"RecurrentEncoder has weights of {weight.dtype}, got `features` of {features.dtype}. Give data and "
                "networks one precision: data.to(dtype=torch.float32), or model.double() and guide.double()"
            )
        batch, steps = features.shape[:-2], features.shape[-2]
        valid = None if lengths is None else valid_steps(lengths, batch, steps).reshape(-1, steps, 1)
        x = features.reshape(-1, steps, self.in_features)
        if valid is not None:
            x = x.where(valid, 0.0)  # a NaN in padding would reach gradients through a product with 0
        past = None if self.past is None else self._restored(self.past(x), valid, batch)
        if self.future is None:
            return past, None
        if valid is None:
            return past, self._restored(self.future(x.flip(1)).flip(1), None, batch)
        turned = reversal(valid)
        return past, self._restored(take(self.future(take(x, turned)), turned), valid, batch)

    def _restored(self, outputs: Tensor, valid: Tensor | None, batch: torch.Size) -> Tensor:
        if valid is not None:
            outputs = outputs.where(valid, 0.0)
        return outputs.reshape(batch + outputs.shape[-2:])

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self.in_features}, {self.hidden_dim}, direction={self.direction!r}, cell={self.cell!r}"


def valid_steps(lengths: Tensor, batch: torch.Size, steps: int) -> Tensor:
    """``(*batch, time)`` bool, True before each series' end."""
    if lengths.dtype == torch.bool:
        mask, wanted = lengths, batch + (steps,)
    elif lengths.is_floating_point():
        raise TypeError(f"`lengths` must hold integers, or be a bool step mask, got {lengths.dtype}")
    else:
        mask, wanted = step_mask(lengths, steps), batch + (steps,)
    try:
        return mask.expand(wanted)
    except RuntimeError as error:
        raise ValueError(
            f"`lengths` of shape {tuple(lengths.shape)} does not fit `features` of batch {tuple(batch)} and {steps} "
            f"steps: give integers {tuple(batch)} or a bool mask {tuple(wanted)}"
        ) from error


def reversal(valid: Tensor) -> Tensor:
    """The order that reverses each series within its length and leaves padding in place, ``(batch * time,)`` rows."""
    batch, steps, _ = valid.shape
    step = torch.arange(steps, device=valid.device)
    last = valid.squeeze(-1).sum(1, keepdim=True) - 1
    within = torch.where(step <= last, last - step, step)
    return (within + steps * torch.arange(batch, device=valid.device).unsqueeze(-1)).flatten()


def take(x: Tensor, rows: Tensor) -> Tensor:
    """``x`` ``(batch, time, features)``, its rows in another order; whole rows are quicker than a gather of entries."""
    return x.flatten(0, 1).index_select(0, rows).reshape(x.shape)
