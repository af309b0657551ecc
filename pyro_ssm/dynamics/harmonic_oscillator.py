"""A spring with friction, shaken by noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pyro_ssm.blocks.parameters import positive_parameter
from pyro_ssm.components import Initial
from pyro_ssm.dynamics.diffuse import DiffuseInitial
from pyro_ssm.dynamics.linear_sde import LinearSDEProcess

__all__ = ["HarmonicOscillator"]


class HarmonicOscillator(LinearSDEProcess):
    """The stochastic damped harmonic oscillator,

    .. math:: \\ddot x = -\\omega^2 x - \\gamma \\dot x + q\\, \\dot W, \\qquad z = (x, \\dot x).

    It swings at :math:`\\sqrt{\\omega^2 - \\gamma^2 / 4}` radians a time where friction is weak
    (:math:`\\gamma < 2 \\omega`), and creeps back otherwise. Its stationary law is
    :math:`N(0, \\text{diag}(q^2 / 2 \\gamma \\omega^2,\\; q^2 / 2 \\gamma))`.

    Args:
        frequency: first value of ``frequency`` :math:`\\omega`, in radians a time; :math:`2 \\pi` over the period.
        damping: first value of ``damping`` :math:`\\gamma`, in 1 / time; None: no friction, no stationary law, and a
            diffuse start in a sum of parts.
        diffusion: first value of ``diffusion`` q, in x / time^(3/2).
        floor: lower bound of the learnable parameters.

    Parameters: ``frequency`` ``(1,)``, ``damping`` ``(1,)``, ``diffusion`` ``(1,)``.

    Raises:
        ValueError: a value does not lie above the floor.

    Source: Wang and Uhlenbeck (1945), "On the theory of the Brownian motion II", section 10.

    >>> import torch
    >>> from pyro_ssm.dynamics import HarmonicOscillator
    >>> swing = HarmonicOscillator(frequency=2.0, damping=0.5)
    >>> swing.stationary()(torch.zeros(1), None).variance.detach()
    tensor([[0.2500, 1.0000]])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"frequency": 1, "damping": 1, "diffusion": 1}
    label = "oscillator"
    state_dim = 2

    def __init__(
        self,
        frequency: float | Tensor = 1.0,
        damping: float | Tensor | None = 0.1,
        diffusion: float | Tensor = 1.0,
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.frequency = positive_parameter("frequency", frequency, 1, floor)
        self.is_damped = damping is not None
        if damping is not None:
            self.damping = positive_parameter("damping", damping, 1, floor)
        self.diffusion = positive_parameter("diffusion", diffusion, 1, floor)

    def system(self) -> tuple[Tensor, Tensor]:
        """:math:`F = ((0, 1), (-\\omega^2, -\\gamma))`, :math:`L = (0, q)^T`."""
        stiffness = self.frequency.square()
        friction = self.damping if self.is_damped else torch.zeros_like(stiffness)
        below = torch.cat(torch.broadcast_tensors(-stiffness, -friction), -1)
        above = below.new_tensor([0.0, 1.0]).expand(below.shape)
        diffusion = torch.cat([torch.zeros_like(self.diffusion), self.diffusion], -1)
        return torch.stack([above, below], -2), diffusion.unsqueeze(-1)

    def stationary_covariance_root(self) -> Tensor:
        """In closed form; raises where there is no friction."""
        if not self.is_damped:
            raise ValueError("an oscillator without damping has no stationary law. Use a diffuse or a normal start")
        speed = self.diffusion / (2 * self.damping).sqrt()
        return torch.diag_embed(torch.cat(torch.broadcast_tensors(speed / self.frequency, speed), -1))

    def usual_start(self) -> Initial:
        """Stationary where there is friction, else diffuse."""
        return self.stationary() if self.is_damped else DiffuseInitial(2)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"state_dim=2, damped={self.is_damped}"
