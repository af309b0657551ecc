"""Draws of a law as maps of standard normals or of uniforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from pyro_ssm.distributions.diagonal_normal import DiagonalNormal, MovedNormal
from pyro_ssm.distributions.moments import gaussian_moments
from pyro_ssm.ops.gaussian_particles import affine_draw

__all__ = [
    "diagonal_moments",
    "from_normals",
    "from_uniforms",
    "like_draws",
    "normal_dim",
    "shared_moments",
    "unexpanded",
]

_TINY = 2.0**-40  # uniforms as close to 0 and 1 as this keep their quantiles finite


def normal_dim(law: Any) -> int | None:
    """How many standard normals a draw is a map of; None for laws that are drawn otherwise.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.infer.smc.draws import normal_dim
    >>> normal_dim(dist.Normal(torch.zeros(3), 1.0).to_event(1)), normal_dim(dist.Poisson(torch.ones(3)).to_event(1))
    (3, None)
    """
    if isinstance(law, MovedNormal):
        return law.state.shape[-1]
    if isinstance(law, DiagonalNormal):
        loc, scale = law.loc.shape, law.scale.shape
        return max(loc[-1] if loc else 1, scale[-1] if scale else 1)
    if isinstance(law, Independent):
        return law.event_shape[-1] if isinstance(law.base_dist, Normal) and len(law.event_shape) == 1 else None
    return law.event_shape[-1] if isinstance(law, MultivariateNormal) else None


def like_draws(law: Any) -> Tensor:
    """A tensor of a Gaussian law that shows the dtype and device of its draws, at no cost.

    >>> import torch
    >>> from pyro_ssm.distributions.diagonal_normal import DiagonalNormal, MovedNormal
    >>> from pyro_ssm.infer.smc.draws import like_draws
    >>> like_draws(DiagonalNormal(torch.zeros(2), torch.ones(5, 2))).shape
    torch.Size([2])
    """
    if isinstance(law, MovedNormal):
        return law.state
    return law.loc if isinstance(law, DiagonalNormal) else law.mean


def from_normals(law: Any, noise: Tensor) -> Tensor:
    """:math:`m + s \\epsilon` or :math:`m + L \\epsilon`; differentiable in the law's parameters.

    Args:
        law: a Gaussian law that :func:`normal_dim` knows; its batch broadcasts to that of the noise.
        noise: ``(*shape, dim)``.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.infer.smc.draws import from_normals
    >>> from_normals(dist.Normal(torch.zeros(2), 2.0).to_event(1), torch.ones(3, 2)).shape
    torch.Size([3, 2])
    """
    if isinstance(law, MovedNormal):
        return affine_draw(law.state, law.matrix, law.offset, law.scale, noise)
    if isinstance(law, DiagonalNormal):
        return torch.addcmul(law.loc, law.scale, noise)
    if isinstance(law, Independent):
        base = law.base_dist
        return torch.addcmul(base.loc, base.scale, noise)
    root = unexpanded(law.scale_tril, 2)
    if root.dim() == 2:
        return law.loc + noise @ root.mT
    return law.loc + (root @ noise.unsqueeze(-1)).squeeze(-1)


def from_uniforms(law: Any, uniforms: Tensor) -> Tensor:
    """A draw of each coordinate by its inverse distribution function, of a Gaussian law by that of its noise.

    Args:
        law: Gaussian, or independent over coordinates whose law has ``icdf``.
        uniforms: ``(*shape, dim)`` in (0, 1).

    Raises:
        TypeError: the law is no such map.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.infer.smc.draws import from_uniforms
    >>> from_uniforms(dist.Exponential(torch.ones(1)).to_event(1), torch.tensor([[0.5]]))
    tensor([[0.6931]])
    """
    safe = uniforms.clamp(_TINY, 1 - _TINY)
    if normal_dim(law) is not None:
        return from_normals(law, torch.special.ndtri(safe).to(law.mean.dtype))
    if isinstance(law, Independent) and len(law.event_shape) == 1 and not law.base_dist.event_shape:
        try:
            return law.base_dist.icdf(safe.to(law.mean.dtype))
        except NotImplementedError:
            pass
    name = f"Independent({type(law.base_dist).__name__})" if isinstance(law, Independent) else type(law).__name__
    raise TypeError(
        f"quasi-random draws need a law that is a map of uniforms: Gaussian, or independent coordinates with `icdf`; "
        f"got {name}. Run particle_filter with quasi_random=False"
    )


def diagonal_moments(law: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviations of a normal law with independent coordinates, the latter without dims that only
    repeat it; None for other laws.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.infer.smc.draws import diagonal_moments
    >>> loc, scale = diagonal_moments(dist.Normal(torch.zeros(1000, 1, 2), torch.ones(2)).to_event(1))
    >>> loc.shape, scale.shape, diagonal_moments(dist.Poisson(torch.ones(2)).to_event(1))
    (torch.Size([1000, 1, 2]), torch.Size([2]), None)
    """
    if isinstance(law, DiagonalNormal):
        return law.loc, law.scale
    if isinstance(law, Independent) and isinstance(law.base_dist, Normal) and len(law.event_shape) == 1:
        return law.base_dist.loc, unexpanded(law.base_dist.scale, 1)
    return None


def unexpanded(tensor: Tensor, event_dims: int) -> Tensor:
    """The tensor without leading dims that only repeat it, so that what is shared by particles is computed once.

    >>> import torch
    >>> from pyro_ssm.infer.smc.draws import unexpanded
    >>> unexpanded(torch.eye(2).expand(1000, 1, 2, 2), 2).shape
    torch.Size([2, 2])
    """
    lead = tensor.dim() - event_dims
    kept = [size == 1 or stride == 0 for size, stride in zip(tensor.shape[:lead], tensor.stride()[:lead], strict=True)]
    where = next((i for i, repeated in enumerate(kept) if not repeated), lead)
    if where == lead:
        return tensor[(0,) * lead] if lead and tensor.numel() else tensor
    return tensor[tuple(slice(0, 1) if repeated else slice(None) for repeated in kept)]


def shared_moments(law: Any) -> tuple[Tensor, Tensor]:
    """Mean and square-root covariance of a Gaussian law, the latter once where particles share it.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.infer.smc.draws import shared_moments
    >>> shared_moments(dist.Normal(torch.zeros(1000, 1, 2), torch.ones(2)).to_event(1))[1].shape
    torch.Size([2, 2])
    """
    if (found := diagonal_moments(law)) is not None:
        mean, scale = (x.expand(x.shape[:-1] + law.event_shape) for x in found)
        return mean, unexpanded(scale, 1).diag_embed()
    mean, root = gaussian_moments(law)
    return mean, unexpanded(root, 2)
