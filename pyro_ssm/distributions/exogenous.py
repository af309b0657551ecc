"""The noise behind a value: what it must have been, and what another law makes of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from pyro.distributions import (
    Bernoulli,
    Categorical,
    Delta,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    NegativeBinomial,
    Poisson,
    TransformedDistribution,
)
from torch import Tensor

__all__ = ["Exogenous", "exogenous"]

_MOST_ENTRIES = 2**27  # of a table of cumulative probabilities


class Exogenous(ABC):
    """A law as a mechanism :math:`x = f(\\varepsilon)` with noise of a law that never changes.

    .. math:: \\varepsilon \\sim p(\\varepsilon \\mid f(\\varepsilon) = x), \\qquad x' = f'(\\varepsilon)

    :meth:`abduct` draws (or solves for) the noise behind a value of this law, :meth:`replay` gives the value that the
    same noise has under this one. ``law.replay(law.abduct(x))`` is ``x``, and ``other.replay(law.abduct(x))`` has the
    law ``other`` when x has the law ``law``.

    Source: Pearl (2009), "Causality", section 7.1 (abduction, action, prediction).

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.distributions import exogenous
    >>> here, there = exogenous(dist.Normal(0.0, 1.0)), exogenous(dist.Normal(10.0, 2.0))
    >>> there.replay(here.abduct(torch.tensor(1.5)))
    tensor(13.)
    """

    @abstractmethod
    def abduct(self, value: Tensor) -> Tensor:
        """The noise behind ``value``, batch and event dims of the law leading."""

    @abstractmethod
    def replay(self, noise: Tensor) -> Tensor:
        """The value that ``noise`` has under this law."""


class _LocationScale(Exogenous):
    """:math:`x = m + s \\varepsilon`, entry by entry; where s is 0 the noise is 0."""

    def __init__(self, law: Any) -> None:
        self.loc, self.scale = law.loc, law.scale

    def abduct(self, value: Tensor) -> Tensor:
        moves = self.scale > 0
        noise = (value - self.loc) / torch.where(moves, self.scale, torch.ones_like(self.scale))
        return torch.where(moves, noise, torch.zeros_like(noise))

    def replay(self, noise: Tensor) -> Tensor:
        return self.loc + self.scale * noise


class _Root(Exogenous):
    """:math:`x = m + L \\varepsilon`, L lower triangular; of a singular one the shortest :math:`\\varepsilon`."""

    def __init__(self, law: Any) -> None:
        self.loc = law.loc
        self.root = law.scale_tril

    def abduct(self, value: Tensor) -> Tensor:
        residual = (value - self.loc).unsqueeze(-1)
        if bool((self.root.diagonal(dim1=-2, dim2=-1) > 0).all()):
            return torch.linalg.solve_triangular(self.root, residual, upper=False).squeeze(-1)
        return (torch.linalg.pinv(self.root) @ residual).squeeze(-1)

    def replay(self, noise: Tensor) -> Tensor:
        return self.loc + (self.root @ noise.unsqueeze(-1)).squeeze(-1)


class _Point(Exogenous):
    """A value without noise."""

    def __init__(self, law: Any) -> None:
        self.value = law.v

    def abduct(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value)

    def replay(self, noise: Tensor) -> Tensor:
        return self.value + noise


class _Transformed(Exogenous):
    """:math:`x = t(x_0)` with an invertible t."""

    def __init__(self, law: Any) -> None:
        self.base, self.transforms = exogenous(law.base_dist), law.transforms

    def abduct(self, value: Tensor) -> Tensor:
        for transform in reversed(self.transforms):
            value = transform.inv(value)
        return self.base.abduct(value)

    def replay(self, noise: Tensor) -> Tensor:
        value = self.base.replay(noise)
        for transform in self.transforms:
            value = transform(value)
        return value


class _Quantile(Exogenous):
    """:math:`x = F^{-1}(u)` for numbers 0, 1, 2 ...: the coupling of two laws that keeps their order."""

    def __init__(self, law: Any) -> None:
        self.law = law

    def _cumulative(self) -> Tensor:
        """F(-1) = 0, F(0), F(1) ... in a last dim; ends where nothing is left in double precision."""
        law = self.law
        if isinstance(law, Bernoulli):
            none = 1 - law.probs.double()
            return torch.stack([torch.zeros_like(none), none, torch.ones_like(none)], -1)
        mean, variance = law.mean.double(), law.variance.double()
        size = math.ceil(float((mean + 12 * variance.sqrt() + 40 + 30 * variance / mean.clamp(min=1)).max())) + 1
        if size * mean.numel() > _MOST_ENTRIES:
            raise ValueError(
                f"a count with mean {float(mean.max()):.3g} needs {size} cumulative probabilities for each of "
                f"{mean.numel()} entries. Use observation_noise='fresh', or fewer draws at a time (chunk=)"
            )
        counts = torch.arange(size, dtype=mean.dtype, device=mean.device).reshape((-1,) + (1,) * mean.dim())
        mass = _in_double(law).log_prob(counts).exp().movedim(0, -1)
        total = torch.nn.functional.pad(mass.cumsum(-1), (1, 0))
        total[..., -1] = 1.0
        return total

    def abduct(self, value: Tensor) -> Tensor:
        total = self._cumulative()
        at = value.long().clamp(max=total.shape[-1] - 2).unsqueeze(-1)
        total = total.expand(at.shape[:-1] + total.shape[-1:])
        below, upto = total.gather(-1, at).squeeze(-1), total.gather(-1, at + 1).squeeze(-1)
        return upto - (upto - below) * torch.rand_like(upto)

    def replay(self, noise: Tensor) -> Tensor:
        total = self._cumulative()[..., 1:]
        count = (total < noise.unsqueeze(-1)).sum(-1)
        return count.to(self.law.mean.dtype)


class _GumbelMax(Exogenous):
    """:math:`x = \\operatorname{argmax}_i (\\log p_i + G_i)` with independent Gumbel noise.

    Of two classes that the change makes equally much more likely relative to each other, none is left for the other
    (counterfactual stability). Source: Oberst and Sontag (2019), "Counterfactual off-policy evaluation with Gumbel-max
    structural causal models", section 3.2; Maddison, Tarlow and Minka (2014), "A* sampling", section 3.1 (the noise
    given the winner, top down).
    """

    def __init__(self, law: Any) -> None:
        self.logits = law.logits.log_softmax(-1)

    def abduct(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(value.shape, self.logits.shape[:-1])
        logits = self.logits.expand(shape + self.logits.shape[-1:])
        winner = value.long().expand(shape).unsqueeze(-1)
        top = _gumbel(logits[..., :1])  # the largest of all has location logsumexp(log p) = 0
        free = _gumbel(logits)  # each of the others is cut off at the top
        below = -torch.logaddexp(-(logits + free), -top.expand_as(logits))
        below = torch.where(logits == -math.inf, free, below - logits)
        return below.scatter(-1, winner, top - logits.gather(-1, winner))

    def replay(self, noise: Tensor) -> Tensor:
        return (self.logits + noise).argmax(-1).to(self.logits.dtype)


def _gumbel(like: Tensor) -> Tensor:
    return -torch.empty_like(like).exponential_().log()


def _in_double(law: Any) -> Any:
    if isinstance(law, Poisson):
        return Poisson(law.rate.double(), validate_args=False)
    return NegativeBinomial(law.total_count.double(), logits=law.logits.double(), validate_args=False)


def exogenous(law: Any) -> Exogenous:
    """The mechanism by which a law turns noise into values.

    ==========================================  ======================================================================
    law                                         mechanism
    ==========================================  ======================================================================
    with ``loc`` and ``scale`` (Normal,         :math:`x = m + s \\varepsilon`
    Laplace, StudentT ...)
    multivariate normal                         :math:`x = m + L \\varepsilon`, L lower triangular
    transformed (LogNormal ...)                 that of the base law, transformed
    Poisson, NegativeBinomial, Bernoulli        :math:`x = F^{-1}(u)`: a larger mean never gives a smaller count
    Categorical                                 Gumbel-max
    Delta                                       none
    ==========================================  ======================================================================

    The law of x does not determine the mechanism, and counterfactuals depend on it: this is a choice, the usual one.

    Args:
        law: batch and event dims as they come; ``Independent`` wrappers are looked through.

    Raises:
        TypeError: no mechanism is known for a law of this type.

    Noise that the value leaves open (counts, classes) is drawn from torch's global generator.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.distributions import exogenous
    >>> low, high = exogenous(dist.Poisson(3.0)), exogenous(dist.Poisson(5.0))
    >>> counts = torch.tensor([0.0, 2.0, 7.0])
    >>> bool((low.replay(low.abduct(counts)) == counts).all()), bool((high.replay(low.abduct(counts)) >= counts).all())
    (True, True)
    """
    while isinstance(law, (Independent, torch.distributions.Independent)):
        law = law.base_dist
    if isinstance(law, (MultivariateNormal, LowRankMultivariateNormal)):
        return _Root(law)
    if isinstance(law, Delta):
        return _Point(law)
    if isinstance(law, (TransformedDistribution, torch.distributions.TransformedDistribution)):
        return _Transformed(law)
    if isinstance(law, (Poisson, NegativeBinomial, Bernoulli)):
        return _Quantile(law)
    if isinstance(law, Categorical):
        return _GumbelMax(law)
    if isinstance(getattr(law, "loc", None), Tensor) and isinstance(getattr(law, "scale", None), Tensor):
        return _LocationScale(law)
    raise TypeError(
        f"no mechanism is known that turns noise into values of a {type(law).__name__}. Known are laws with loc and "
        "scale, multivariate normals, invertible transforms of these, counts, classes and points"
    )
