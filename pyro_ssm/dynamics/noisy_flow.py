"""An ordinary differential equation as a transition with a floor of noise."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_ssm.components import Gaussian, Transition, gap
from pyro_ssm.distributions import SingularNormal
from pyro_ssm.dynamics.neural_ode import NeuralODE

__all__ = ["NoisyFlow"]


class NoisyFlow(Transition, Gaussian):
    """The flow of an equation, by its own solver, and noise,

    .. math:: z_{k+1} \\sim N(\\Phi_{\\Delta}(z_k),\\; s^2 \\Delta\\, I).

    With s > 0 paths have a density and particles part; with s = 0 a step is a point mass. Jumps and inputs are those of
    the equation. So is its intensity, if it has one: within a gap the path is the flow, on which the intensity is
    integrated, and the noise comes at the end of the gap.

    Made by :func:`~pyro_ssm.dynamics.discretize`.

    >>> import torch, pyro_ssm as ssm
    >>> ode = ssm.dynamics.NeuralODE(lambda t, z, u: -z, state_dim=1)
    >>> step = ssm.dynamics.discretize(ode, "flow", noise_floor=0.1)
    >>> law = step(torch.ones(1, 1), torch.zeros(1).double(), torch.full((1,), 4.0).double(), None)
    >>> law.mean, law.stddev
    (tensor([[0.0183]]), tensor([[0.2000]]))
    """

    def __init__(self, ode: NeuralODE, floor: float) -> None:
        super().__init__()
        self.ode, self.state_dim, self.floor = ode, ode.state_dim, floor

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Any:
        """The law of the next states; ``state`` ``(..., time, state)``."""
        loc = self.ode.flow(state, time, next_time, inputs)
        scale = (self.floor * gap(time, next_time, state).sqrt()).expand(loc.shape)
        return SingularNormal(loc, scale_tril=scale.diag_embed(), validate_args=False)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"noise_floor={self.floor}"
