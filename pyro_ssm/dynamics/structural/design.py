"""Which sums of the state are signals: known rows, some of whose entries are inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_ssm.dynamics.part import Parts

__all__ = ["Design", "sum_design"]


class Design(nn.Module):
    """Known rows :math:`G_k` that read signals :math:`x_k = G_k z_k` off a state,

    .. math:: G_k = G + \\sum_j u_{k, c_j} E_j,

    where :math:`E_j` is 1 at one signal and one coordinate, and 0 elsewhere.

    Args:
        rows: G ``(signals, state)``.
        entries: triples (signal, coordinate, column of the inputs).

    >>> import torch
    >>> from pyro_ssm.dynamics.structural.design import Design
    >>> design = Design(torch.tensor([[1.0, 0.0]]), [(0, 1, 2)])
    >>> design(torch.zeros(1), torch.tensor([[5.0, 6.0, 7.0]]))
    tensor([[[1., 7.]]])
    """

    rows: Tensor
    spread: Tensor

    def __init__(self, rows: Tensor, entries: Sequence[tuple[int, int, int]] = ()) -> None:
        super().__init__()
        self.register_buffer("rows", rows.to(torch.get_default_dtype()), persistent=False)
        self.columns = [column for _, _, column in entries]
        spread = torch.zeros((len(entries), *rows.shape))
        for j, (signal, coordinate, _) in enumerate(entries):
            spread[j, signal, coordinate] = 1.0
        self.register_buffer("spread", spread, persistent=False)
        self.num_signals, self.state_dim = rows.shape

    def forward(self, time: Tensor, inputs: Tensor | None) -> Tensor:
        """``(..., time, signals, state)``; a time axis of 1 where no input enters."""
        if not self.columns:
            return self.rows.unsqueeze(0)
        u = column_of(inputs, self.columns, "a regression").to(self.rows)
        return self.rows + torch.einsum("...c,csn->...sn", u, self.spread)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"signals={self.num_signals}, state_dim={self.state_dim}, columns={self.columns}"


def column_of(inputs: Tensor | None, columns: Sequence[int], reader: str) -> Tensor:
    """Those columns of the inputs, ``(..., time, len(columns))``; raises where they are not there."""
    if inputs is None:
        raise ValueError(
            f"{reader} of this model reads column(s) {list(columns)} of the inputs, but the data has no `inputs`. "
            "Give TimeSeries(times, values, inputs=...)"
        )
    if max(columns) >= inputs.shape[-1]:
        raise ValueError(
            f"{reader} of this model reads column(s) {list(columns)} of the inputs, counted from 0, but `inputs` has "
            f"{inputs.shape[-1]} of them"
        )
    return inputs[..., list(columns)]


def sum_design(parts: Parts, repeats: int = 1) -> Design:
    """The sum of all parts as one signal, written ``repeats`` times.

    >>> from pyro_ssm.dynamics.structural import Level, Trend, sum_design
    >>> sum_design(Level() + Trend()).rows
    tensor([[1., 1., 0.]])
    """
    row, entries, start = [], [], 0
    for _, part in parts.items():
        row.append(part.row())
        entries += [(start + coordinate, column) for coordinate, column in part.input_columns().items()]
        start += part.state_dim
    rows = torch.cat(row).expand(repeats, -1)
    return Design(rows, [(s, coordinate, column) for s in range(repeats) for coordinate, column in entries])
