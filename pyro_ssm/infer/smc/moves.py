"""Metropolis-Hastings moves of many vectors of parameters at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["AdaptiveWalk", "best_acceptance", "metropolis", "walk_root"]

_FIRST_FIT = 50  # iterations after which a walk is first fitted to where the chains have been
_TRUST = 20  # proposals that such a fit is worth


P = TypeVar("P", bound=Any)


def metropolis(
    current: P, proposed: P, log_target: Callable[[P], Tensor], log_uniforms: Tensor
) -> tuple[P, Tensor, Tensor]:
    """One Metropolis-Hastings decision for each member, of a symmetric proposal.

    .. math:: \\alpha = \\min\\left(1, \\pi(\\theta') / \\pi(\\theta)\\right)

    With an unbiased estimate of the target beside each vector, kept until the next acceptance, this is the
    pseudo-marginal chain, whose stationary law is the exact one (Andrieu and Roberts 2009).

    Args:
        current: a population, as :class:`Evaluated` is: ``take(index)`` its members, ``where(accepted, other)`` theirs
            or those of another; members of density 0 leave at the first chance.
        proposed: another.
        log_target: of a population, ``(S,)``.
        log_uniforms: ``(S,)``.

    Returns:
        The population after the decision, which were accepted ``(S,)``, and with what probability ``(S,)``.

    >>> import torch
    >>> from pyro_ssm.infer.smc.moves import metropolis
    >>> from pyro_ssm.infer.smc.parameter_likelihood import Evaluated
    >>> a, b = (Evaluated(torch.full((1, 1), x), torch.zeros(1), torch.full((1,), x), None) for x in (0.0, 1.0))
    >>> metropolis(a, b, lambda x: x.log_likelihood, torch.tensor([-0.1]))[0].vectors
    tensor([[1.]])
    """
    log_ratio = torch.nan_to_num(log_target(proposed) - log_target(current), nan=-math.inf)
    probability = log_ratio.clamp(max=0).exp()
    accepted = log_uniforms < log_ratio
    return current.where(accepted, proposed), accepted, probability


def walk_root(vectors: Tensor, weights: Tensor | None = None) -> Tensor:
    """The square root ``(dim, dim)`` of the covariance of a random walk fitted to a cloud.

    .. math:: \\frac{2.38^2}{d}\\, \\widehat{\\mathrm{Cov}}(\\theta)

    Source: Roberts, Gelman and Gilks (1997), "Weak convergence and optimal scaling of random walk Metropolis
    algorithms".

    >>> import torch
    >>> from pyro_ssm.infer.smc.moves import walk_root
    >>> walk_root(torch.tensor([[0.0], [2.0]])).shape
    torch.Size([1, 1])
    """
    weights = torch.full_like(vectors[:, 0], 1 / len(vectors)) if weights is None else weights
    centred = vectors - weights @ vectors
    covariance = centred.mT @ (weights.unsqueeze(-1) * centred)
    # a cloud of few distinct members is flat in some direction: a thousandth of each variance keeps it moving
    jitter = torch.diag(1e-3 * covariance.diagonal() + 1e-12)
    dim = vectors.shape[-1]
    return 2.38 / math.sqrt(dim) * torch.linalg.cholesky(covariance + jitter)


def best_acceptance(dim: int) -> float:
    """The acceptance at which a random walk in so many dimensions moves fastest.

    Source: Roberts and Rosenthal (2001), "Optimal scaling for various Metropolis-Hastings algorithms".

    >>> from pyro_ssm.infer.smc.moves import best_acceptance
    >>> best_acceptance(1), best_acceptance(5)
    (0.44, 0.234)
    """
    return 0.44 if dim == 1 else 0.234


class AdaptiveWalk:
    """Gaussian random walks, one for each chain, whose shape and scale learn to be accepted at a given rate.

    .. math::
        \\theta' = \\theta + S \\epsilon, \\qquad
        S S^\\top \\leftarrow S \\left(I + \\eta\\, (\\alpha - \\alpha_*)\\, \\frac{\\epsilon \\epsilon^\\top}
        {\\|\\epsilon\\|^2}\\right) S^\\top, \\qquad \\eta = \\min(1, d\\, n^{-2/3})

    Args:
        root: S, ``(chains, dim, dim)``.
        target_acceptance: :math:`\\alpha_*`.
        count: n, proposals that went before: with more of them a proposal teaches less.
        visited: where the chains were after each of them, ``(chains, dim)``.

    Source: Vihola (2012), "Robust adaptive Metropolis algorithm with coerced acceptance rate", section 2; Haario,
    Saksman and Tamminen (2001), "An adaptive Metropolis algorithm", for the fit to what was visited.

    >>> import torch
    >>> from pyro_ssm.infer.smc.moves import AdaptiveWalk
    >>> walk = AdaptiveWalk(torch.eye(2).expand(3, 2, 2), 0.234)
    >>> noise = torch.ones(3, 2)
    >>> walk.learn(noise, torch.ones(3))
    >>> bool((walk.root.diagonal(dim1=-2, dim2=-1) > 1).all())  # accepted: longer steps
    True
    """

    def __init__(
        self, root: Tensor, target_acceptance: float, count: int = 0, visited: Sequence[Tensor] | None = None
    ) -> None:
        self.root, self.target_acceptance, self.count = root, target_acceptance, count
        self.visited = list(visited or ())

    @property
    def state(self) -> dict[str, Any]:
        """Everything that changes, by the names of the arguments."""
        return {"root": self.root, "count": self.count, "visited": self.visited}

    def step(self, noise: Tensor) -> Tensor:
        """:math:`S \\epsilon`, ``(chains, dim)``."""
        return (self.root @ noise.unsqueeze(-1)).squeeze(-1)

    def learn(self, noise: Tensor, probability: Tensor) -> None:
        """Take account of a proposal made with ``noise`` ``(chains, dim)`` and its probability of acceptance."""
        self.count += 1
        dim = noise.shape[-1]
        rate = min(1.0, dim * self.count ** (-2 / 3))
        # at the first steps a rejection may take all length but a tenth of the direction's variance
        change = (rate * (probability - self.target_acceptance)).clamp(min=-0.9) / noise.square().sum(-1)
        outer = noise.unsqueeze(-1) * noise.unsqueeze(-2)
        middle = torch.eye(dim, dtype=noise.dtype, device=noise.device) + change[:, None, None] * outer
        self.root = self.root @ torch.linalg.cholesky(middle)

    def visit(self, vectors: Tensor) -> None:
        """Take account of where the chains are: after 50, 100, 200 ... calls all walks are fitted to the later half."""
        self.visited.append(vectors)
        doublings = math.log2(len(self.visited) / _FIRST_FIT)
        if doublings >= 0 and doublings.is_integer():
            lately = torch.cat(self.visited[len(self.visited) // 2 :])
            self.root, self.count = walk_root(lately).expand_as(self.root), _TRUST
