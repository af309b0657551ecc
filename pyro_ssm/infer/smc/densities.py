"""Log densities in a loop over time: the frequent law written out, the others asked."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributions import Independent, Normal

from pyro_ssm.distributions import DiagonalNormal, masked
from pyro_ssm.ops.gaussian_particles import normal_density

__all__ = ["log_density"]


def log_density(law: Any, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """The log density of ``value``, with a hidden entry adding exactly 0.

    .. math:: \\log p(y_{\\text{seen}})

    Args:
        law: batch ``(..., 1)``, event ``(n,)``.
        value: broadcastable to ``(..., 1, n)``.
        mask: bool, as ``value``, True where seen; None where all is.

    Returns:
        ``(...)``: the time axis of 1 is dropped.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.infer.smc.densities import log_density
    >>> law = dist.Normal(torch.zeros(5, 1, 2), 1.0).to_event(1)
    >>> log_density(law, torch.zeros(1, 2)).shape
    torch.Size([5])
    """
    if mask is not None:
        return masked(law, mask).log_prob(value).squeeze(-1)
    if isinstance(law, DiagonalNormal):
        return normal_density(value, law.loc, law.scale)
    if isinstance(law, Independent) and len(law.event_shape) == 1 and isinstance(law.base_dist, Normal):
        return normal_density(value, law.base_dist.loc, law.base_dist.scale)
    return law.log_prob(value).squeeze(-1)
