"""A deep Markov model in the way of Pyro's own example: one sample site for every time step, in model and guide.

Written anew from the equations of Krishnan, Shalit and Sontag (2017), with the sites, plate, masks, sizes and networks
of `examples/dmm.py` in Pyro's repository (T = 100, batch 20, latent 100, transition 200, emission 100, RNN 600 there),
so that a step of it is the step that users of that example pay for.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class PerStepDMM(nn.Module):
    """Model and guide with the sites ``z_1 ... z_T`` and ``y_1 ... y_T``."""

    def __init__(self, obs: int, state: int, emission: int, transition: int, hidden: int) -> None:
        super().__init__()
        self.emit = nn.Sequential(
            nn.Linear(state, emission), nn.ReLU(), nn.Linear(emission, emission), nn.ReLU(), nn.Linear(emission, obs)
        )
        self.gate = nn.Sequential(nn.Linear(state, transition), nn.ReLU(), nn.Linear(transition, state))
        self.proposal = nn.Sequential(nn.Linear(state, transition), nn.ReLU(), nn.Linear(transition, state))
        self.linear = nn.Linear(state, state)
        self.raw_scale = nn.Linear(state, state)
        self.recurrent = nn.RNN(obs, hidden, nonlinearity="relu", batch_first=True)
        self.combiner = nn.Linear(state, hidden)
        self.loc = nn.Linear(hidden, state)
        self.guide_scale = nn.Linear(hidden, state)
        self.first = nn.Parameter(torch.zeros(state))
        self.guide_first = nn.Parameter(torch.zeros(state))
        self.hidden_first = nn.Parameter(torch.zeros(1, 1, hidden))
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def transition(self, z: Tensor) -> tuple[Tensor, Tensor]:
        gate, proposal = torch.sigmoid(self.gate(z)), self.proposal(z)
        loc = (1 - gate) * self.linear(z) + gate * proposal
        return loc, nn.functional.softplus(self.raw_scale(torch.relu(proposal)))

    def model(self, y: Tensor, y_reversed: Tensor, mask: Tensor, lengths: Tensor) -> None:
        pyro.module("dmm", self)
        z = self.first.expand(len(y), -1)
        with pyro.plate("series", len(y)):
            for t in pyro.markov(range(y.shape[1])):
                seen = mask[:, t : t + 1]
                z = pyro.sample(f"z_{t}", dist.Normal(*self.transition(z)).mask(seen).to_event(1))
                probs = torch.sigmoid(self.emit(z))
                pyro.sample(f"y_{t}", dist.Bernoulli(probs).mask(seen).to_event(1), obs=y[:, t])

    def guide(self, y: Tensor, y_reversed: Tensor, mask: Tensor, lengths: Tensor) -> None:
        pyro.module("dmm", self)
        features = self.encode(y_reversed, lengths)
        z = self.guide_first.expand(len(y), -1)
        with pyro.plate("series", len(y)):
            for t in pyro.markov(range(y.shape[1])):
                combined = 0.5 * (torch.tanh(self.combiner(z)) + features[:, t])
                scale = nn.functional.softplus(self.guide_scale(combined))
                seen = mask[:, t : t + 1]
                z = pyro.sample(f"z_{t}", dist.Normal(self.loc(combined), scale).mask(seen).to_event(1))

    def encode(self, y_reversed: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(y_reversed, lengths, batch_first=True, enforce_sorted=False)
        first = self.hidden_first.expand(1, len(lengths), -1).contiguous()
        hidden, _ = pad_packed_sequence(self.recurrent(packed, first)[0], batch_first=True)
        return torch.stack([_reverse(h, int(length)) for h, length in zip(hidden, lengths, strict=True)])


def _reverse(sequence: Tensor, length: int) -> Tensor:
    return torch.cat([sequence[:length].flip(0), sequence[length:]])


def reversed_within_length(y: Tensor, lengths: Tensor) -> Tensor:
    """What the guide's network reads: each series backwards."""
    return torch.stack([_reverse(series, int(length)) for series, length in zip(y, lengths, strict=True)])
