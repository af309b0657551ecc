"""A gated recurrent unit that knows how long ago each value was seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyro_ssm.blocks._cells import GRUCell
from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks.evolving import EvolvingBlock, first_state
from pyro_ssm.blocks.linear import Linear

__all__ = ["GRUD"]

State = tuple[Tensor, Tensor, Tensor]


class GRUD(EvolvingBlock):
    """A GRU that lets missing values decay to their mean, and its state to zero, while nothing is seen,

    .. math::
        \\delta_k &= \\text{time since each value was last seen}, \\qquad
        \\gamma^x_k = e^{-\\max(0,\\, w \\odot \\delta_k + b)}, \\qquad
        \\gamma^h_k = e^{-\\max(0,\\, W \\delta_k + c)}, \\\\
        \\hat x_k &= m_k \\odot x_k + (1 - m_k) \\odot
            (\\gamma^x_k \\odot x_{\\text{last}} + (1 - \\gamma^x_k) \\odot \\bar x), \\\\
        h_k &= \\operatorname{GRU}([\\hat x_k, m_k, v_k],\\; \\gamma^h_k \\odot h_{k-1}), \\qquad y_k = h_k

    with u = [x, m, v]: values, their mask (1 observed), and other columns v. Where everything is seen and no time
    passes it is the GRU. A value that was never seen is :math:`\\bar x`, and :math:`\\delta` counts from the start.

    Args:
        obs_dim: values, each with its mask.
        hidden_dim: features of the state and of the output.
        other_dim: columns of v.
        mean: :math:`\\bar x`, the empirical mean of the values, a number or ``(obs_dim,)``; default 0, for standardised
            data. Kept as a buffer.

    ``in_features`` is ``2 * obs_dim + other_dim``. State: h ``(..., 1, hidden)``, the last values and the times since
    ``(..., 1, obs)``. Randomness: first values, from torch's generator.

    Source: Z. Che, S. Purushotham, K. Cho, D. Sontag, Y. Liu (2018), Recurrent neural networks for multivariate time
    series with missing values, Scientific Reports 8:6085, equations 10 to 14.

    >>> import torch
    >>> from pyro_ssm.blocks import GRUD
    >>> values, mask = torch.randn(2, 5, 3), torch.rand(2, 5, 3) < 0.5
    >>> GRUD(obs_dim=3, hidden_dim=8)(torch.cat([values, mask.float()], -1), dt=torch.rand(2, 5))[0].shape
    torch.Size([2, 5, 8])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"first": 1, "decay_rate": 1, "decay_start": 1}

    def __init__(self, obs_dim: int, hidden_dim: int, other_dim: int = 0, *, mean: float | Tensor = 0.0) -> None:
        super().__init__()
        self.obs_dim = check_size("obs_dim", obs_dim)
        self.out_features = self.hidden_dim = check_size("hidden_dim", hidden_dim)
        self.in_features = 2 * obs_dim + check_size("other_dim", other_dim, least=0)
        self.cell = GRUCell(self.in_features, hidden_dim)
        self.state_decay = Linear(obs_dim, hidden_dim)
        nn.init.zeros_(self.state_decay.bias)  # no decay where no time passes
        self.decay_rate = nn.Parameter(torch.rand(obs_dim))
        self.decay_start = nn.Parameter(torch.zeros(obs_dim))
        self.first = nn.Parameter(torch.zeros(hidden_dim))
        mean = torch.as_tensor(mean, dtype=torch.get_default_dtype())
        if mean.dim() and mean.shape != (obs_dim,):
            raise ValueError(f"`mean` must be a number or have shape ({obs_dim},), got {tuple(mean.shape)}")
        self.register_buffer("mean", mean.expand(obs_dim).clone())

    def start(self, shape: torch.Size | tuple[int, ...]) -> State:
        since = self.mean.new_zeros((*shape, 1, self.obs_dim))
        return first_state(self.first, tuple(shape)), since + self.mean, since

    def evolve(self, state: State, gap: Tensor) -> State:
        h, last, since = state
        since = since + gap
        return h * _decay(self.state_decay(since)), last, since

    def see(self, state: State, seen: tuple[Tensor, ...]) -> State:
        h, last, since = state
        values, mask, rest = seen
        there = mask.bool()
        decay = _decay(self.decay_rate * since + self.decay_start)
        imputed = torch.where(there, values, torch.lerp(self.mean.expand(last.shape), last, decay))
        parts = torch.broadcast_tensors(imputed[..., :1], mask[..., :1])[0].shape[:-1]
        u = torch.cat([part.expand(parts + part.shape[-1:]) for part in (imputed, mask, rest)], -1)
        h = self.cell.update(self.cell.products(u), h)
        return h, torch.where(there, values, last), torch.where(there, torch.zeros_like(since), since)

    def read(self, state: State) -> Tensor:
        return state[0]

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self.obs_dim}, {self.hidden_dim}, other_dim={self.in_features - 2 * self.obs_dim}"


def _decay(exponent: Tensor) -> Tensor:
    return torch.exp(-torch.relu(exponent))
