"""What happens when a cloud is resampled: the interface of every kind of resampling, and the usual kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.infer.smc.tree import take
from pyro_ssm.ops.hilbert import hilbert_order
from pyro_ssm.ops.resampling import SCHEMES, at_points, resample_some

__all__ = ["AncestorResampling", "Resampled", "Resampling", "Weighted", "resampling_of"]


class Weighted(NamedTuple):
    """What a resampling gets.

    >>> from pyro_ssm.infer.smc import Weighted
    >>> Weighted._fields
    ('particles', 'states', 'log_weights', 'weights', 'need')
    """

    particles: Any  # tree, leaves (N, *batch, ...)
    states: Callable[[], Tensor]  # () -> (N, *batch, state)
    log_weights: Tensor  # (N, *batch), normalised
    weights: Tensor  # (N, *batch), their exponentials
    need: Tensor | None  # bool (*batch): the series to resample; None for all


class Resampled(NamedTuple):
    """What a resampling returns; the series that were not to be resampled are as they were.

    >>> from pyro_ssm.infer.smc import Resampled
    >>> Resampled._fields
    ('particles', 'log_weights', 'ancestors')
    """

    particles: Any
    log_weights: Tensor  # (N, *batch), of total 1 (in expectation, for what follows)
    ancestors: Tensor | None  # int64 (N, *batch); None where particles have no single ancestor


class Resampling:
    """The interface: ``resampling(weighted, uniforms) -> Resampled``.

    A subclass sets ``rows(num_particles)``, how many rows of uniforms it needs, and defines ``__call__``. A soft or
    differentiable resampling returns other log-weights than :math:`-\\log N`; one that mixes particles returns no
    ancestors. Resampling must leave estimates unbiased: :math:`E \\sum_j w'_j f(x'_j) = \\sum_i W_i f(x_i)`, or say
    that it does not. ``smooth`` says whether the result is, for given uniforms, a differentiable function of the cloud
    (a choice of ancestors is not); ``reads`` whether Python looks at values on the way, as an iteration until
    convergence does (the step then cannot be captured).

    >>> from pyro_ssm.infer.smc import AncestorResampling, Resampling
    >>> issubclass(AncestorResampling, Resampling)
    True
    """

    smooth: bool = False
    reads: bool = False

    def rows(self, num_particles: int) -> int:
        """How many uniforms it needs a series."""
        raise NotImplementedError(f"{type(self).__name__} must define rows(num_particles)")

    def __call__(self, weighted: Weighted, uniforms: Tensor) -> Resampled:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(weighted, uniforms)")


class AncestorResampling(Resampling):
    """Resampling by choice of ancestors, after which all weights are equal.

    Gradients flow through the particles, while the choice counts as fixed.

    Args:
        scheme: ``"systematic"``, ``"stratified"``, ``"multinomial"``, ``"residual"``, ``"ssp"`` or ``"killing"``; with
            the prefix ``"hilbert-"`` particles are first put in order along Hilbert's curve (less variance in few
            dimensions, at the cost of a sort).

    Raises:
        ValueError: an unknown scheme.

    >>> from pyro_ssm.infer.smc import AncestorResampling
    >>> AncestorResampling("hilbert-systematic").rows(100)
    1
    """

    def __init__(self, scheme: str = "systematic") -> None:
        self.scheme, name = scheme, scheme.removeprefix("hilbert-")
        if name not in SCHEMES:
            raise ValueError(
                f"`resampling` must be one of {sorted(SCHEMES)}, or one of them after 'hilbert-', got {scheme!r}"
            )
        self._choose, self._rows = SCHEMES[name]
        self._sorted = name != scheme

    def rows(self, num_particles: int) -> int:
        return self._rows(num_particles)

    def __call__(self, weighted: Weighted, uniforms: Tensor) -> Resampled:
        with torch.no_grad():
            order = hilbert_order(weighted.states()) if self._sorted else None
            if order is None and weighted.need is not None:
                ancestors = resample_some(self._choose, weighted.weights, uniforms, weighted.need)
            else:
                ancestors = self._ancestors(weighted.weights, uniforms, order)
        return chosen(weighted, ancestors, partly=order is None)

    def _ancestors(self, weights: Tensor, uniforms: Tensor, order: Tensor | None) -> Tensor:
        if order is None:
            return self._choose(weights, uniforms)
        return order.gather(0, self._choose(weights.gather(0, order), uniforms))


class OrderedResampling(AncestorResampling):
    """Resampling at given ascending points along Hilbert's curve, as sequential quasi-Monte Carlo does."""

    def __init__(self) -> None:
        super().__init__("hilbert-stratified")  # as many points as particles

    def _ancestors(self, weights: Tensor, uniforms: Tensor, order: Tensor | None) -> Tensor:
        return order.gather(0, at_points(weights.gather(0, order), uniforms))


def chosen(weighted: Weighted, ancestors: Tensor, partly: bool = False) -> Resampled:
    """The cloud of the given ancestors, of equal weights, in the series that need it.

    ``partly``: in the other series the given ancestors are the particles themselves already.

    >>> import torch
    >>> from pyro_ssm.infer.smc.resample import Weighted, chosen
    >>> x, log_weights = torch.tensor([1.0, 2.0]), torch.tensor([0.25, 0.75]).log()
    >>> chosen(Weighted(x, lambda: x, log_weights, log_weights.exp(), None), torch.tensor([1, 1])).particles
    tensor([2., 2.])
    """
    num, need, batch = len(ancestors), weighted.need, weighted.weights.shape[1:]
    equal = weighted.log_weights.new_full((), -math.log(num)).expand(ancestors.shape)
    if need is not None:
        if not partly:
            itself = torch.arange(num, device=ancestors.device).reshape((num,) + (1,) * len(batch))
            ancestors = torch.where(need, ancestors, itself)
        equal = torch.where(need, equal, weighted.log_weights)
    return Resampled(take(weighted.particles, ancestors, batch), equal, ancestors)


def resampling_of(given: str | Resampling) -> Resampling:
    """A resampling by name, or the object itself.

    >>> from pyro_ssm.infer.smc.resample import resampling_of
    >>> resampling_of("ssp").rows(10)
    10
    """
    if isinstance(given, Resampling):
        return given
    if isinstance(given, str):
        return AncestorResampling(given)
    raise TypeError(f"`resampling` must be a name or a Resampling, got {type(given).__name__}")
