"""What the structural parts share: matrices that are the same at every step."""

from __future__ import annotations

from typing import Any

import torch
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyro_ssm.blocks._gaussian import with_time
from pyro_ssm.blocks.parameters import positive_parameter
from pyro_ssm.components import Affine, Initial
from pyro_ssm.distributions import SingularNormal
from pyro_ssm.dynamics.diffuse import DiffuseInitial
from pyro_ssm.dynamics.part import Part
from pyro_ssm.dynamics.stationary import Stationary
from pyro_ssm.ops import stationary_root

__all__ = ["Motion", "StationaryMotion", "diagonal_root", "set_damping", "set_scale"]


class Motion(Part):
    """A part that moves by the same law at every step, however long the gap,

    .. math:: z_{k+1} = A z_k + L \\varepsilon_k.

    A subclass defines :meth:`matrices`. The usual start is diffuse.
    """

    def matrices(self) -> tuple[Tensor, Tensor]:
        """``A`` and a lower-triangular ``L``, both ``(..., 1, state, state)`` or without leading dims."""
        raise NotImplementedError(f"{type(self).__name__} must define matrices()")

    def affine(self, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Affine:
        """:math:`(A, 0, L)` with a time axis of 1."""
        A, L = (with_time(matrix, 2) for matrix in self.matrices())
        return Affine(A, L.new_zeros(1, self.state_dim), L)

    def usual_start(self) -> Initial:
        """Diffuse."""
        return DiffuseInitial(self.state_dim)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"state_dim={self.state_dim}"


class StationaryMotion(Stationary, Motion):
    """A :class:`Motion` that forgets; the usual start is its stationary law."""

    def stationary_law(self, inputs: Tensor | None) -> Any:
        """:math:`N(0, P)` with :math:`P = A P A^T + L L^T`."""
        A, L = (with_time(matrix, 2) for matrix in self.matrices())
        root = stationary_root(A, L)
        return SingularNormal(root.new_zeros(1, self.state_dim), scale_tril=root, validate_args=False)

    def usual_start(self) -> Initial:
        """Stationary."""
        return self.stationary()


def set_scale(part: Motion, name: str, value: float | Tensor | None, floor: float) -> None:
    """Give ``part`` a learnable positive scale ``(1,)``, or a fixed 0 for None."""
    if value is None:
        part.register_buffer(name, torch.zeros(1), persistent=False)
    else:
        setattr(part, name, positive_parameter(name, value, 1, floor))


def set_damping(part: Motion, name: str, value: float | Tensor | None) -> None:
    """Give ``part`` a learnable ``(1,)`` between 0 and 1, or a fixed 1 for None."""
    if value is None:
        part.register_buffer(name, torch.ones(1), persistent=False)
        return
    start = torch.as_tensor(value, dtype=torch.get_default_dtype()).detach().reshape(-1)
    if start.shape != (1,) or not bool((start > 0) & (start < 1)):
        raise ValueError(f"`{name}` must lie between 0 and 1, got {value}. None leaves it out")
    setattr(part, name, PyroParam(start, constraint=constraints.unit_interval, event_dim=1))


def diagonal_root(*scales: Tensor) -> Tensor:
    """``diag(s_1, s_2, ...)`` of scales ``(..., 1)``."""
    return torch.diag_embed(torch.cat(torch.broadcast_tensors(*scales), -1))
