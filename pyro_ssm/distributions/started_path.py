"""The law of a path that is a function of its start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

__all__ = ["StartedPath"]

_NO_DENSITY = (
    "the path of an ordinary differential equation has no density: it is a function of its start. Use the site "
    '"z_start" (guides.InitialState, automatic guides, NUTS), or dynamics.discretize(ode, "flow", noise_floor=s), '
    "whose paths have one"
)
_SAME_PATH = 1e-3  # relative to the path's size


class StartedPath(TorchDistribution):
    """The law of the path :math:`z = \\Phi(z_1)` of an equation from a random start; event ``(time, state)``.

    Its ``log_prob`` is the density of the start, :math:`\\log p(z_1)`, for a path that solves the equation, and -inf
    for any other. That orders draws and weighs a guide's draws against a model's; it is no function to differentiate,
    so asking for it with gradients raises, as do NUTS and automatic guides over the path.

    Args:
        first: the law of the first state, event ``(1, state)``, batch ``(*batch,)``.
        solve: ``(*lead, 1, state)`` to ``(*lead, time, state)``.
        num_times: length of a path.
        known: whether the start is a point, whose density is left out.

    Raises:
        NotImplementedError: a density is asked for while gradients are taken.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.distributions import StartedPath
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.NeuralODE(lambda t, z, u: -z, state_dim=1),
    ...     ssm.emissions.LinearNormal(1, 1))
    >>> law = ssm.models.path_law(model.bind(), ssm.TimeSeries(torch.arange(3.0), torch.zeros(4, 3, 1)))
    >>> isinstance(law, StartedPath), law.sample().shape
    (True, torch.Size([4, 3, 1]))
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = True

    def __init__(self, first: Any, solve: Callable[[Tensor], Tensor], num_times: int, known: bool = False) -> None:
        self.first, self.solve, self.known = first, solve, known
        event = torch.Size([num_times, first.event_shape[-1]])
        super().__init__(first.batch_shape, event, validate_args=False)

    @property
    def support(self) -> Any:  # type: ignore[override]
        """There is none to walk over: raises."""
        raise ValueError(f"NUTS and automatic guides cannot walk over the path: {_NO_DENSITY}")

    def expand(self, batch_shape: Any, _instance: Any = None) -> StartedPath:
        return StartedPath(self.first.expand(torch.Size(batch_shape)), self.solve, self.event_shape[0], self.known)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self.solve(self.first.rsample(torch.Size(sample_shape)))

    def log_prob_steps(self, value: Tensor) -> Tensor:
        """The terms of ``log_prob`` ``(*batch, time)``: that of the start, then 0 (or -inf)."""
        if torch.is_grad_enabled():
            raise NotImplementedError(_NO_DENSITY)
        start = value[..., :1, :]
        path = self.solve(start)
        size = path.abs().amax((-1, -2), keepdim=True).clamp_min(1e-6)
        off = ((path - value).abs() > _SAME_PATH * size).any(-1)
        terms = torch.where(off, -torch.inf, torch.zeros((), dtype=value.dtype, device=value.device))
        first = torch.zeros_like(terms[..., :1]) if self.known else self.first.log_prob(start).unsqueeze(-1)
        lead = torch.broadcast_shapes(first.shape[:-1], terms.shape[:-1])
        return torch.cat([first.expand(lead + (1,)), terms[..., 1:].expand(lead + terms[..., 1:].shape[-1:])], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_prob_steps(value).sum(-1)
