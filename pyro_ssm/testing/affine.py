"""Affine Gaussian laws: what ``affine`` says against what ``forward`` does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.components import Affine
from pyro_ssm.testing.checks import Contract, hold

__all__ = ["assert_affine", "compose", "covariance"]


def covariance(law: Any) -> Tensor:
    """The covariance ``(..., event, event)`` of a Gaussian law with one event dim.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.testing.affine import covariance
    >>> covariance(dist.Normal(torch.zeros(2), 3.0).to_event(1))
    tensor([[9., 0.],
            [0., 9.]])
    """
    if hasattr(law, "covariance_matrix"):
        return law.covariance_matrix
    return torch.diag_embed(law.variance)


def assert_affine(contract: Contract, parts: Affine, state: Tensor, law: Any) -> None:
    """Fail unless :math:`A z + b` and :math:`L L^T` are the mean and covariance of ``law``."""
    hold(isinstance(parts, Affine), f"`affine` must return components.Affine, got {type(parts).__name__}")
    mean = (parts.matrix @ state.unsqueeze(-1)).squeeze(-1) + parts.offset
    contract.assert_equal(
        mean, law.mean.expand(mean.shape), "matrix @ state + offset must be the mean of forward's law"
    )
    hold(bool((parts.scale_tril.triu(1) == 0).all()), "`scale_tril` must be lower triangular")
    wanted = covariance(law)
    square = (parts.scale_tril @ parts.scale_tril.mT).expand(wanted.shape)
    contract.assert_equal(square, wanted, "scale_tril @ scale_tril.T must be the covariance of forward's law")


def compose(first: Affine, second: Affine) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix, offset and covariance of one affine Gaussian law after another.

    >>> import torch
    >>> from pyro_ssm.components import Affine
    >>> from pyro_ssm.testing.affine import compose
    >>> half = Affine(0.5 * torch.eye(1), torch.ones(1), torch.ones(1, 1))
    >>> [float(x) for x in compose(half, half)]
    [0.25, 1.5, 1.25]
    """
    matrix = second.matrix @ first.matrix
    offset = (second.matrix @ first.offset.unsqueeze(-1)).squeeze(-1) + second.offset
    root = second.matrix @ first.scale_tril
    return matrix, offset, root @ root.mT + second.scale_tril @ second.scale_tril.mT
