"""An emission that sees some coordinates of the state only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._conditioning import check_state
from pyro_ssm.components import Affine, AffineGaussian, Emission, Gaussian

__all__ = ["Coordinates"]


class Coordinates(Emission):
    """Any emission of some coordinates of the state,

    .. math:: y_k \\sim p(y_k \\mid z_{k, i_1}, \\dots, z_{k, i_n}),

    such as the positions of a second-order equation (``dynamics.SecondOrder``). It has the capabilities of the emission
    that it holds.

    Args:
        emission: of n coordinates.
        state_dim: size of the whole state.
        coordinates: which ones, in the order in which ``emission`` takes them; default: the first n.

    Raises:
        TypeError: ``emission`` is no emission.
        ValueError: the coordinates do not fit.

    >>> import torch
    >>> from pyro_ssm.emissions import Coordinates, Normal
    >>> positions = Coordinates(Normal(2, 3, hidden=8), state_dim=4)
    >>> positions(torch.zeros(5, 4), torch.arange(5.0), None).event_shape
    torch.Size([3])
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Coordinates:
        held = args[0] if args else kwargs.get("emission")
        if cls is Coordinates and isinstance(held, Gaussian):
            cls = _AffineCoordinates if isinstance(held, AffineGaussian) else _GaussianCoordinates
        return super().__new__(cls)

    def __init__(self, emission: Emission, state_dim: int, coordinates: Sequence[int] | None = None) -> None:
        super().__init__()
        if not isinstance(emission, Emission):
            raise TypeError(f"`emission` must be a components.Emission, got {type(emission).__name__}")
        self.state_dim = check_size("state_dim", state_dim)
        self.obs_dim = emission.obs_dim
        chosen = list(range(emission.state_dim)) if coordinates is None else [int(i) for i in coordinates]
        if (
            len(chosen) != emission.state_dim
            or len(set(chosen)) != len(chosen)
            or not set(chosen) <= set(range(state_dim))
        ):
            raise ValueError(
                f"`coordinates` must be {emission.state_dim} different ones of 0 to {state_dim - 1} (the emission has "
                f"state_dim={emission.state_dim}), got {chosen}"
            )
        self.emission, self.coordinates = emission, chosen

    def seen(self, state: Tensor) -> Tensor:
        """The coordinates ``(..., time, n)`` of states ``(..., time, state)``."""
        check_state(self, state)
        first, n = self.coordinates[0], len(self.coordinates)
        if self.coordinates == list(range(first, first + n)):
            return state[..., first : first + n]
        return state[..., self.coordinates]

    def forward(self, state: Tensor, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the observations; ``state`` ``(..., time, state)``."""
        return self.emission(self.seen(state), time, inputs, memory=memory)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"state_dim={self.state_dim}, coordinates={self.coordinates}"


class _GaussianCoordinates(Coordinates, Gaussian):
    """Of a Gaussian emission."""


class _AffineCoordinates(Coordinates, AffineGaussian):
    """Of an affine Gaussian emission."""

    def affine(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Affine:
        """The matrices, with zeros for what is not seen."""
        matrix, offset, scale_tril = self.emission.affine(time, inputs, memory=memory)  # type: ignore[operator]
        chosen = torch.eye(self.state_dim, dtype=matrix.dtype, device=matrix.device)[self.coordinates]
        return Affine(matrix @ chosen, offset, scale_tril)
