"""Models that remember: a recurrent memory of observations (and states), and laws that read it."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Independent, Normal
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_ssm.blocks import MLP
from pyro_ssm.components import Gaussian, Initial, Memory, Transition

__all__ = ["MemoryNormal", "MemoryNormalInitial", "RecurrentMemory"]


class RecurrentMemory(Memory):
    """A GRU over observations, and over states where ``state_dim`` is given.

    .. math::
        h_t = \\operatorname{GRU}\\left([\\phi_y(m_t \\odot y_t, m_t),\\ \\phi_z(z_t),\\ \\log(1 + \\Delta_t),\\ u_t],\\
        h_{t-1}\\right)

    Summary before step t and after its state: :math:`h_{t-1}`. A missing entry enters as 0 beside its mask: it is
    *skipped*, which is not the same as marginalised.

    Args:
        obs_dim: columns of an observation.
        hidden_dim: features of the summary.
        state_dim: of the states it sees; 0 when it sees observations only (the stochastic part stays Markov).
        input_dim: columns of ``inputs`` it sees.

    Source: J. Chung et al. (2015), A recurrent latent variable model for sequential data, section 3.

    >>> import torch
    >>> from pyro_ssm.models import RecurrentMemory
    >>> memory = RecurrentMemory(obs_dim=1, hidden_dim=4, state_dim=2)
    >>> carry, summary = memory.start((3,))
    >>> summary.shape
    torch.Size([3, 1, 4])
    """

    sees_observations = True

    def __init__(self, obs_dim: int, hidden_dim: int, state_dim: int = 0, input_dim: int = 0) -> None:
        super().__init__()
        self.features, self.state_dim, self.input_dim = hidden_dim, state_dim, input_dim
        self.observation_net = MLP(2 * obs_dim, (hidden_dim,), hidden_dim)
        if state_dim:
            self.state_net = MLP(state_dim, (hidden_dim,), hidden_dim)
        seen = (2 if state_dim else 1) * hidden_dim + 1 + input_dim
        self.recurrent = nn.GRU(seen, hidden_dim, batch_first=True)
        self.first = nn.Parameter(torch.zeros(hidden_dim))

    def start(self, shape: torch.Size | tuple[int, ...]) -> tuple[Any, Tensor]:
        first = self.first.expand(tuple(shape) + (1, self.features))
        return (first, None), first

    def see_state(self, carry: Any, state: Tensor, gap: Tensor, inputs: Tensor | None) -> tuple[Any, Tensor]:
        summary = carry[0]
        return (summary, self._seen_state(state, gap, inputs)), summary

    def see_observation(self, carry: Any, values: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
        summary, seen_state = carry
        after = self._run(self._with_observation(seen_state, values, mask), summary)[..., -1:, :]
        return (after, None), after

    def sequence(
        self,
        states: Tensor,
        values: Tensor | None,
        mask: Tensor | None,
        gap: Tensor,
        inputs: Tensor | None,
        carry: Any = None,
    ) -> tuple[Tensor, Tensor, Any]:
        if values is None or mask is None:
            raise ValueError("RecurrentMemory sees observations: `values` and `mask` are needed, got None")
        carry = self.start(states.shape[:-2])[0] if carry is None else carry
        steps = self._run(self._with_observation(self._seen_state(states, gap, inputs), values, mask), carry[0])
        before = torch.cat([carry[0], steps[..., :-1, :]], -2)
        return before, before, (steps[..., -1:, :], None)

    def _seen_state(self, state: Tensor, gap: Tensor, inputs: Tensor | None) -> Tensor:
        parts = [self.state_net(state)] if self.state_dim else []
        parts.append(gap.log1p().expand(state.shape[:-1] + (1,)))
        if self.input_dim:
            if inputs is None:
                raise ValueError(f"RecurrentMemory was built with input_dim={self.input_dim}, and `inputs` is None")
            parts.append(inputs.expand(state.shape[:-1] + inputs.shape[-1:]))
        return torch.cat(parts, -1)

    def _with_observation(self, seen_state: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.zeros((), dtype=values.dtype, device=values.device)
        seen = self.observation_net(torch.cat([torch.where(mask, values, hidden), mask.to(values.dtype)], -1))
        return torch.cat([seen.expand(seen_state.shape[:-1] + seen.shape[-1:]), seen_state], -1)

    def _run(self, seen: Tensor, summary: Tensor) -> Tensor:
        lead = seen.shape[:-2]
        first = summary.expand(lead + (1, self.features)).reshape(1, -1, self.features).contiguous()
        steps, _ = self.recurrent(seen.reshape((-1,) + seen.shape[-2:]), first)
        return steps.reshape(lead + steps.shape[-2:])


class MemoryNormalInitial(Initial, Gaussian):
    """The law of the first state given memory alone: :math:`N(\\mu(m), \\operatorname{softplus}(\\rho(m))^2)`.

    Args:
        state_dim: of the state.
        net: from ``memory`` features to ``2 * state_dim``; may be shared with the transition.
        scale_floor: added to the scale.

    >>> import torch
    >>> from pyro_ssm.blocks import MLP
    >>> from pyro_ssm.models import MemoryNormalInitial
    >>> initial = MemoryNormalInitial(2, MLP(4, (8,), 4))
    >>> initial(torch.zeros(1).double(), None, memory=torch.zeros(3, 1, 4)).event_shape
    torch.Size([2])
    """

    def __init__(self, state_dim: int, net: nn.Module, scale_floor: float = 1e-4) -> None:
        super().__init__()
        self.state_dim, self.net, self.scale_floor = state_dim, net, scale_floor

    def forward(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Independent:
        return _normal(self.net, memory, self.scale_floor)


class MemoryNormal(Transition, Gaussian):
    """A state that depends on memory alone.

    .. math:: z_t \\sim N(\\mu(m_{t-1}), \\operatorname{softplus}(\\rho(m_{t-1}))^2)

    Args:
        state_dim: of the state.
        net: from ``memory`` features to ``2 * state_dim``; may be shared with the initial law.
        scale_floor: added to the scale.

    >>> from pyro_ssm.blocks import MLP
    >>> from pyro_ssm.models import MemoryNormal
    >>> MemoryNormal(2, MLP(4, (8,), 4)).state_dim
    2
    """

    def __init__(self, state_dim: int, net: nn.Module, scale_floor: float = 1e-4) -> None:
        super().__init__()
        self.state_dim, self.net, self.scale_floor = state_dim, net, scale_floor

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Independent:
        return _normal(self.net, memory, self.scale_floor)


def _normal(net: nn.Module, memory: Tensor | None, floor: float) -> Independent:
    if memory is None:
        raise ValueError("this law reads a memory, and got memory=None. Give the StateSpaceModel `memory=...`")
    loc, raw = net(memory).chunk(2, -1)
    return Independent(Normal(loc, softplus(raw) + floor, validate_args=False), 1, validate_args=False)
