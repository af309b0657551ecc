"""A continuous GRU that corrects itself by the error of its own prediction: GRU-ODE-Bayes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyro_ssm.blocks._cells import GRUCell
from pyro_ssm.blocks._checks import check_positive, check_size
from pyro_ssm.blocks._flow import solver_of
from pyro_ssm.blocks._gru_flow import GRUFlow
from pyro_ssm.blocks.evolving import JumpBlock
from pyro_ssm.blocks.linear import Linear
from pyro_ssm.blocks.mlp import MLP
from pyro_ssm.blocks.parameters import softplus_above

__all__ = ["GRUODEBayes"]


class GRUODEBayes(JumpBlock):
    """A continuous GRU between observations, and at each of them a GRU that sees how far off the prediction was,

    .. math::
        (\\mu, s) &= \\text{head}(h_k^-), \\\\
        q_j &= m_j \\operatorname{relu}\\big(W_j [x_j,\\ \\mu_j,\\ \\log s_j^2,\\ (x_j - \\mu_j) / s_j] + b_j\\big),\\\\
        h_k &= \\operatorname{GRU}([q_1, \\dots, q_D, v],\\; h_k^-) \\;\\text{ where anything is observed}, \\qquad
        y_k = h_k,

    with u = [x, m, v]: values, their mask, and other columns v. Between observations h follows the flow of
    :class:`GRUODE`. At a time without any observed value the state is left to the flow.

    As an encoder it learns its prediction by what the guide gains from it; ``models.gru_ode_bayes`` shares the head
    with the model's emission, so that the error is that of the model.

    Args:
        obs_dim: D, values, each with its mask.
        hidden_dim: features of the state and of the output.
        other_dim: columns of v.
        prepared_dim: features :math:`q_j` of each value.
        head: a network from the state ``(..., time, hidden)`` to means and raw scales ``(..., time, 2 obs)``; default a
            network with one hidden layer. s is ``floor + softplus(raw)``.
        floor: least predicted standard deviation, in the units of the values.
        feed_prediction: whether :math:`(\\mu, \\log s^2)` of the state is an input of the flow too, so that the
            prediction drives it between observations.
        method, num_steps, rtol, atol: of the flow, as for :class:`GRUODE`.

    ``in_features`` is ``2 * obs_dim + other_dim``. State: ``(..., 1, hidden)``. Randomness: first values, from torch's
    generator.

    Source: E. De Brouwer, J. Simm, A. Arany, Y. Moreau (2019), GRU-ODE-Bayes: continuous modeling of
    sporadically-observed time series, sections 2.3 and 2.4.

    >>> import torch
    >>> from pyro_ssm.blocks import GRUODEBayes
    >>> values, mask = torch.randn(2, 5, 3), torch.rand(2, 5, 3) < 0.5
    >>> block = GRUODEBayes(obs_dim=3, hidden_dim=8)
    >>> block(torch.cat([values, mask.float()], -1), dt=torch.rand(2, 5))[0].shape
    torch.Size([2, 5, 8])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"first": 1, "prepare_weight": 3, "prepare_bias": 2}

    def __init__(
        self,
        obs_dim: int,
        hidden_dim: int,
        other_dim: int = 0,
        *,
        prepared_dim: int = 8,
        head: Callable[[Tensor], Tensor] | None = None,
        floor: float = 1e-3,
        feed_prediction: bool = False,
        method: str = "exponential",
        num_steps: int = 2,
        rtol: float = 1e-4,
        atol: float = 1e-5,
    ) -> None:
        super().__init__()
        self.obs_dim = check_size("obs_dim", obs_dim)
        self.out_features = self.hidden_dim = check_size("hidden_dim", hidden_dim)
        self.in_features = 2 * obs_dim + check_size("other_dim", other_dim, least=0)
        self.flow = GRUFlow(hidden_dim, solver_of(method, num_steps, rtol, atol, "exponential"))
        self.floor = check_positive("floor", floor)
        size = check_size("prepared_dim", prepared_dim)
        self.prepare_weight = nn.Parameter(torch.randn(obs_dim, size, 4) * (2 / (4 + size)) ** 0.5)
        self.prepare_bias = nn.Parameter(torch.full((obs_dim, size), 0.1))
        self.head = MLP(hidden_dim, (hidden_dim,), 2 * obs_dim) if head is None else head
        self.cell = GRUCell(obs_dim * size + other_dim, hidden_dim)
        self.feed = Linear(2 * obs_dim, 3 * hidden_dim, bias=False) if feed_prediction else None
        self.first = nn.Parameter(torch.zeros(hidden_dim))

    def evolve(self, state: Tensor, gap: Tensor) -> Tensor:
        return self.flow(state, gap, None if self.feed is None else self._fed)

    def predict(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``(..., time, obs)`` of the values that a state expects."""
        loc, raw = self.head(state).chunk(2, -1)
        return loc, softplus_above(raw, self.floor)

    def _fed(self, state: Tensor) -> Tensor:
        loc, scale = self.predict(state)
        return self.feed(torch.cat([loc, 2 * scale.log()], -1))

    def see(self, state: Tensor, seen: tuple[Tensor, ...]) -> Tensor:
        values, mask, rest = seen
        loc, scale = self.predict(state)
        error = (values - loc) / scale
        parts = torch.stack(torch.broadcast_tensors(values, loc, 2 * scale.log(), error), -1)
        weighed = (self.prepare_weight * parts.unsqueeze(-2)).sum(-1) + self.prepare_bias
        prepared = (torch.relu(weighed) * mask.unsqueeze(-1)).flatten(-2)
        u = torch.cat([prepared, rest.expand(prepared.shape[:-1] + rest.shape[-1:])], -1)
        return self.where_any(mask, self.cell.update(self.cell.products(u), state), state)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        other = self.in_features - 2 * self.obs_dim
        return f"{self.obs_dim}, {self.hidden_dim}, other_dim={other}, method={self.flow.solver.method!r}"
