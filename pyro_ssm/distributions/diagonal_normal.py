"""The law that loops over time build most often, made light."""

from __future__ import annotations

from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import constraints

__all__ = ["DiagonalNormal", "MovedNormal"]


class DiagonalNormal(dist.Independent):
    """A normal law with independent coordinates, one event dim: ``Normal(loc, scale).to_event(1)``, quick to build.

    .. math:: N(\\text{loc}, \\text{diag}(\\text{scale}^2))

    It is an ``Independent`` whose ``base_dist`` is made when somebody asks for it: everything that knows the one knows
    the other (densities, draws, Kullback-Leibler divergences, masks). Particle filters and smoothers read ``loc`` and
    ``scale`` alone. Its arguments are not validated.

    Args:
        loc: ``(..., n)``.
        scale: positive, broadcastable with ``loc``.

    Gradients: through both arguments, as for ``Normal``.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.distributions import DiagonalNormal
    >>> law = DiagonalNormal(torch.zeros(4, 2), torch.ones(2))
    >>> law.batch_shape, law.event_shape, isinstance(law, dist.Independent)
    (torch.Size([4]), torch.Size([2]), True)
    """

    arg_constraints = {
        "loc": constraints.independent(constraints.real, 1),
        "scale": constraints.independent(constraints.positive, 1),
    }
    support = constraints.independent(constraints.real, 1)
    reinterpreted_batch_ndims = 1
    has_rsample = True
    has_enumerate_support = False
    _validate_args = False

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        self._base: Any = None

    @property
    def base_dist(self) -> Any:  # type: ignore[override]
        """The normal law of the coordinates."""
        if self._base is None:
            self._base = dist.Normal(self.loc, self.scale, validate_args=False)
        return self._base

    @property
    def _shape(self) -> torch.Size:
        loc, scale = self.loc.shape, self.scale.shape
        return loc if loc == scale else torch.broadcast_shapes(loc, scale)

    @property
    def _batch_shape(self) -> torch.Size:  # type: ignore[override]
        return self._shape[:-1]

    @property
    def _event_shape(self) -> torch.Size:  # type: ignore[override]
        return self._shape[-1:]

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiagonalNormal:
        """The law with its parameters expanded to ``batch_shape``."""
        shape = torch.Size(batch_shape) + self.event_shape
        return DiagonalNormal(self.loc.expand(shape), self.scale.expand(shape))


class MovedNormal(DiagonalNormal):
    """The law of states after an affine motion with independent noise; the mean is computed when it is read.

    .. math:: N(A z + b, \\text{diag}(s^2))

    Args:
        state: ``(..., n)``.
        matrix: ``(..., n, n)``; offset: ``(..., n)``; scale: ``(..., n)``; each broadcasts against the state.

    >>> import torch
    >>> from pyro_ssm.distributions.diagonal_normal import MovedNormal
    >>> MovedNormal(torch.ones(4, 1), torch.full((1, 1), 0.5), torch.ones(1), torch.ones(1)).loc[0]
    tensor([1.5000])
    """

    def __init__(self, state: Tensor, matrix: Tensor, offset: Tensor, scale: Tensor) -> None:
        self.state, self.matrix, self.offset, self.scale = state, matrix, offset, scale
        self._loc: Any = None
        self._base: Any = None

    @property
    def loc(self) -> Tensor:  # type: ignore[override]
        """The mean."""
        if self._loc is None:
            self._loc = (self.matrix @ self.state.unsqueeze(-1)).squeeze(-1) + self.offset
        return self._loc
