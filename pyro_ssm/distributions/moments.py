"""Means and square-root covariances of Gaussian laws, read off their parameters."""

from __future__ import annotations

from typing import Any

from pyro.distributions import Delta, Independent, LowRankMultivariateNormal, MultivariateNormal, Normal
from torch import Tensor

__all__ = ["gaussian_moments", "gaussian_parts"]


def gaussian_moments(law: Any) -> tuple[Tensor, Tensor]:
    """The mean and the lower-triangular square root of the covariance of a Gaussian law.

    .. math:: x \\sim N(m, L L^T)

    A point mass is a Gaussian with L = 0.

    Args:
        law: ``Normal(...).to_event(1)``, ``MultivariateNormal``, ``LowRankMultivariateNormal`` or
            ``Delta(value, event_dim=1)``, batch ``(...)``, event ``(n,)``.

    Returns:
        ``(..., n)`` and ``(..., n, n)``, differentiable with respect to the parameters of the law.

    Raises:
        TypeError: the law is of another family.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.distributions.moments import gaussian_moments
    >>> gaussian_moments(dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))
    (tensor([0., 0.]), tensor([[1., 0.],
            [0., 2.]]))
    """
    loc, root, diagonal = gaussian_parts(law)
    return loc, root.diag_embed() if diagonal else root


def gaussian_parts(law: Any) -> tuple[Tensor, Tensor, bool]:
    """As :func:`gaussian_moments`, with the square root as it is kept: deviations ``(..., n)`` where it is diagonal.

    Dims along which the noise does not vary keep a stride of zero.

    Returns:
        The mean ``(..., n)``; the deviations ``(..., n)`` and True, or the square root ``(..., n, n)`` and False.

    Raises:
        TypeError: the law is of another family.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.distributions.moments import gaussian_parts
    >>> gaussian_parts(dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))
    (tensor([0., 0.]), tensor([1., 2.]), True)
    """
    if isinstance(law, (MultivariateNormal, LowRankMultivariateNormal)):
        return law.loc, law.scale_tril, False
    if isinstance(law, Independent) and law.event_dim == 1 and isinstance(law.base_dist, Normal):
        return law.base_dist.loc, law.base_dist.scale, True
    if isinstance(law, Delta) and law.event_dim == 1:
        return law.v, law.v.new_zeros(()).expand(law.v.shape), True
    name = f"Independent({type(law.base_dist).__name__})" if isinstance(law, Independent) else type(law).__name__
    raise TypeError(
        f"a Gaussian law over a vector is needed, got {name} with event shape {tuple(law.event_shape)}. "
        "Return Normal(...).to_event(1), MultivariateNormal, LowRankMultivariateNormal or Delta(value, event_dim=1)"
    )
