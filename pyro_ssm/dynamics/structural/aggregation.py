"""The state that aggregates need: running sums and lags beside the parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pyro_ssm.blocks._gaussian import with_time
from pyro_ssm.components import Affine, Gaussian, Initial, Transition
from pyro_ssm.distributions import SingularNormal, gaussian_moments
from pyro_ssm.dynamics.stacked import Stacked, end_to_end
from pyro_ssm.dynamics.stationary import Stationary
from pyro_ssm.dynamics.structural.aggregate import Aggregate
from pyro_ssm.dynamics.structural.design import Design
from pyro_ssm.ops import block_diagonal, tria

__all__ = ["Aggregated", "Aggregation", "RunInInitial"]


class Aggregation(nn.Module):
    """Signals :math:`x = G z` and what becomes of each: the rows that read the aggregates, and how their memory moves.

    .. math:: m_{k+1} = C_k z_k + D_k m_k, \\qquad a_k = R_k (z_k, m_k)

    Args:
        design: the signals.
        aggregates: one a signal.

    Raises:
        ValueError: their numbers differ.

    >>> import torch
    >>> from pyro_ssm.dynamics.structural import Aggregate, Aggregation
    >>> from pyro_ssm.dynamics.structural.design import Design
    >>> mean = Aggregation(Design(torch.ones(1, 2)), [Aggregate("mean")])
    >>> mean(torch.zeros(1), None)  # a third of: two coordinates of the state, and the running sum before now
    tensor([[[0.3333, 0.3333, 0.3333]]])
    """

    def __init__(self, design: Design, aggregates: Sequence[Aggregate]) -> None:
        super().__init__()
        if design.num_signals != len(aggregates):
            raise ValueError(f"`aggregates` must be one a signal, {design.num_signals}, got {len(aggregates)}")
        self.design, self.aggregates = design, tuple(aggregates)
        self.num_states = sum(aggregate.num_states for aggregate in aggregates)
        self.num_lags = max([a.num_states for a in aggregates if not a.is_running], default=0)

    def forward(self, time: Tensor, inputs: Tensor | None) -> Tensor:
        """:math:`R_k` ``(..., time or 1, signals, state + memory)``."""
        signals = self.design(time, inputs)
        rows, start = [], 0
        for s, aggregate in enumerate(self.aggregates):
            row = signals[..., s, :]
            if aggregate.is_running:
                weight = aggregate.weight(inputs).to(row).unsqueeze(-1)
                own = weight
            else:
                weight = row.new_tensor(aggregate.lag_weights[:1])
                own = row.new_tensor(aggregate.lag_weights[1:]).unsqueeze(0)
            here = pad(own, (start, self.num_states - start - aggregate.num_states))
            row = weight * row
            lead = torch.broadcast_shapes(row.shape[:-1], here.shape[:-1])
            rows.append(torch.cat([row.expand(lead + row.shape[-1:]), here.expand(lead + here.shape[-1:])], -1))
            start += aggregate.num_states
        lead = torch.broadcast_shapes(*(row.shape[:-1] for row in rows))
        return torch.stack([row.expand(lead + row.shape[-1:]) for row in rows], -2)

    def move(self, time: Tensor, next_time: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """:math:`C_k` ``(..., time or 1, memory, state)`` and :math:`D_k` ``(..., time or 1, memory, memory)``."""
        signals = self.design(time, inputs)
        entering, staying = [], []
        for s, aggregate in enumerate(self.aggregates):
            if aggregate.num_states == 0:
                continue
            row = signals[..., s : s + 1, :]
            if aggregate.is_running:
                stay = aggregate.keeps(time, next_time, inputs).to(row)[..., None, None]
                enter = stay * row
            else:
                n = aggregate.num_states
                stay = torch.diag(row.new_ones(n - 1), -1).unsqueeze(0)
                enter = pad(row, (0, 0, 0, n - 1))
            entering.append(enter)
            staying.append(stay)
        lead = torch.broadcast_shapes(*(enter.shape[:-2] for enter in entering))
        return torch.cat([enter.expand(lead + enter.shape[-2:]) for enter in entering], -2), block_diagonal(staying)

    def is_lag(self) -> list[bool]:
        """Which coordinates of the memory are lags (the others are running sums)."""
        return [not aggregate.is_running for aggregate in self.aggregates for _ in range(aggregate.num_states)]


class Aggregated(Stacked):
    """Parts side by side with the memory of what is aggregated,

    .. math:: \\begin{pmatrix} z_{k+1} \\\\ m_{k+1} \\end{pmatrix} =
        \\begin{pmatrix} A_k & 0 \\\\ C_k & D_k \\end{pmatrix}
        \\begin{pmatrix} z_k \\\\ m_k \\end{pmatrix} + \\begin{pmatrix} L_k \\varepsilon_k \\\\ 0 \\end{pmatrix}.

    The memory follows the rest without noise, so a path has no density: integrate the states out.

    Args:
        parts: name -> transition that is ``AffineGaussian``.
        aggregation: of signals of the parts' joint state.

    Raises:
        ValueError: the design is for another state.

    >>> import torch
    >>> from pyro_ssm.dynamics.structural import Aggregate, Aggregated, Aggregation, Level
    >>> from pyro_ssm.dynamics.structural.design import Design
    >>> level = Level(scale=1.0)
    >>> quarter = Aggregated({"level": level}, Aggregation(Design(torch.ones(1, 1)), [Aggregate("sum", period=3.0)]))
    >>> times = torch.arange(4.0).double()
    >>> quarter.affine(times[:-1], times[1:], None).matrix[:, 1].detach()  # a new quarter begins at time 3
    tensor([[1., 1.],
            [1., 1.],
            [0., 0.]])
    """

    def __init__(self, parts: Mapping[str, Transition], aggregation: Aggregation) -> None:
        super().__init__(parts)
        if aggregation.design.state_dim != self.state_dim:
            raise ValueError(
                f"the design reads {aggregation.design.state_dim} coordinates, the parts have {self.state_dim} together"
            )
        self.parts_dim = self.state_dim
        self.aggregation = aggregation
        self.state_dim += aggregation.num_states

    def affine(self, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Affine:
        """The parts' matrices, the memory's below them."""
        parts = super().affine(time, next_time, inputs, memory)
        if self.aggregation.num_states == 0:
            return parts
        enter, stay = (block.to(parts.matrix) for block in self.aggregation.move(time, next_time, inputs))
        n, extra = self.parts_dim, self.aggregation.num_states
        lead = torch.broadcast_shapes(parts.matrix.shape[:-2], enter.shape[:-2], stay.shape[:-2])
        above = pad(parts.matrix, (0, extra)).expand(lead + (n, n + extra))
        below = torch.cat([enter.expand(lead + (extra, n)), stay.expand(lead + (extra, extra))], -1)
        return Affine(
            torch.cat([above, below], -2),
            pad(parts.offset, (0, extra)),
            pad(parts.scale_tril, (0, extra, 0, extra)),
        )


class RunInInitial(Initial, Gaussian):
    """The start of an :class:`Aggregated` transition whose parts are stationary: lags are filled as if the parts had
    always run, and running sums are 0,

    .. math:: z_{1-p} \\sim N(0, P_\\infty), \\qquad p \\text{ steps of the transition (the longest lag)}.

    A step before the first time lasts one unit of time (which matters for parts in continuous time only).

    Args:
        transition: the same object as the model's transition.

    Raises:
        TypeError: a part has no stationary law.
        ValueError: the signals depend on inputs, which are not known before the first time.

    >>> import torch
    >>> from pyro_ssm.dynamics.structural import AR, Aggregate, Aggregated, Aggregation, RunInInitial
    >>> from pyro_ssm.dynamics.structural.design import Design
    >>> growth = Aggregation(Design(torch.ones(1, 1)), [Aggregate("growth")])
    >>> start = RunInInitial(Aggregated({"ar": AR(1)}, growth))
    >>> start(torch.zeros(1), None).covariance_matrix[0, 0].detach()  # autocovariances at lags 0, 1, 2, 3, 4
    tensor([1.3333, 0.6667, 0.3333, 0.1667, 0.0833])
    """

    def __init__(self, transition: Aggregated) -> None:
        super().__init__()
        for name, part in transition.parts.items():
            if not isinstance(part, Stationary):
                raise TypeError(
                    f"lags of the signal before the first time need stationary parts, but {name!r} "
                    f"({type(part).__name__}) has no stationary law. Use kind='sum' or 'mean', which need no lags"
                )
        if transition.aggregation.design.columns:
            raise ValueError(
                "lags of a signal that depends on inputs are not known before the first time. "
                "Use kind='sum' or 'mean', which need no lags"
            )
        self.state_dim = transition.state_dim
        self.transition = transition

    def forward(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the first state; ``time`` ``(..., 1)``."""
        laws = [gaussian_moments(part.stationary_law(inputs)) for part in self.transition.parts.values()]
        aggregation = self.transition.aggregation
        extra = aggregation.num_states
        mean = pad(end_to_end([with_time(mean, 1) for mean, _ in laws]), (0, extra)).unsqueeze(-1)
        root = pad(block_diagonal([with_time(root, 2) for _, root in laws]), (0, extra, 0, extra))
        origin = time.new_zeros(1)
        A, b, L = self.transition.affine(origin, origin + 1, inputs)
        fills = torch.tensor([True] * (self.state_dim - extra) + aggregation.is_lag(), device=time.device)
        A = torch.where(fills.unsqueeze(-1), A, torch.zeros((), dtype=A.dtype, device=A.device))  # sums stay 0
        for _ in range(aggregation.num_lags):
            mean = A @ mean + b.unsqueeze(-1)
            root = tria(torch.cat(torch.broadcast_tensors(A @ root, L), -1))
        mean = mean.squeeze(-1)
        return SingularNormal(mean, scale_tril=root, validate_args=False)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"state_dim={self.state_dim}"
