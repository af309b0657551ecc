"""One step of conditional SMC: a filter's step in which particle 0 is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.noise import Noise
from pyro_ssm.infer.smc.resample import Resampled, Resampling, Weighted, chosen
from pyro_ssm.infer.smc.stepper import Cloud, Step, Stepper
from pyro_ssm.infer.smc.tree import tree_map
from pyro_ssm.ops.conditional_resampling import CONDITIONAL_SCHEMES
from pyro_ssm.ops.resampling import at_unsorted_points

__all__ = ["ConditionalResampling", "ConditionalStepper", "FutureLogWeights", "future_log_weights"]

#: ``(k, cloud after k - 1) -> (N, *batch)``, how well each particle continues in the kept path from step k on
FutureLogWeights = Callable[[int, Cloud], Tensor]


class ConditionalResampling(Resampling):
    """Resampling given the ancestor of particle 0: itself, or one drawn by weights of its own.

    Args:
        scheme: ``"multinomial"``, ``"stratified"`` or ``"systematic"``.

    Raises:
        ValueError: an unknown scheme.

    >>> from pyro_ssm.infer.smc.conditional_stepper import ConditionalResampling
    >>> ConditionalResampling("systematic").rows(100)
    2
    """

    def __init__(self, scheme: str) -> None:
        if scheme not in CONDITIONAL_SCHEMES:
            raise ValueError(
                f"`resampling` of conditional SMC must be one of {sorted(CONDITIONAL_SCHEMES)}, got {scheme!r}: other "
                "schemes have no known conditional form that leaves the smoothing law invariant"
            )
        self._scheme = CONDITIONAL_SCHEMES[scheme]
        self.log_weights: Tensor | None = None  # (N, *batch), by which the ancestor of particle 0 is drawn

    def rows(self, num_particles: int) -> int:
        return 1 + self._scheme.rows(num_particles)

    def __call__(self, weighted: Weighted, uniforms: Tensor) -> Resampled:
        if self.log_weights is None:
            first = torch.zeros(weighted.weights.shape[1:], dtype=torch.int64, device=weighted.weights.device)
        else:
            first = at_unsorted_points((self.log_weights - self.log_weights.amax(0)).exp(), uniforms[:1])[0]
        return chosen(weighted, self._scheme.ancestors(weighted.weights, first, uniforms[1:]))


class ConditionalStepper(Stepper):
    """The step form of conditional SMC: as :class:`~pyro_ssm.infer.smc.Stepper`, with a path as particle 0.

    Args:
        fk: the process, with ``extend``.
        path: ``(*batch, time, state)``.
        num_particles: N.
        resampling: conditional.
        ess_threshold: as for the filter.
        noise: what to draw from.
        future: for ancestor sampling; None keeps the past of the path.

    >>> import torch
    >>> from pyro_ssm.infer.smc import FeynmanKac, PseudoRandom
    >>> from pyro_ssm.infer.smc.conditional_stepper import ConditionalResampling, ConditionalStepper
    >>> fk = FeynmanKac(lambda draw, shape: torch.randn(shape + (1,)), lambda k, x, draw: x + torch.randn_like(x),
    ...     lambda k, previous, x: -x[..., 0]**2, 2, extend=lambda k, previous, state: state)
    >>> path = torch.tensor([[0.5], [0.7]])
    >>> stepper = ConditionalStepper(fk, path, 10, ConditionalResampling("systematic"), 1.0, PseudoRandom())
    >>> stepper.step(stepper.init()).cloud.particles[0]
    tensor([0.7000])
    """

    def __init__(
        self,
        fk: FeynmanKac,
        path: Tensor,
        num_particles: int,
        resampling: ConditionalResampling,
        ess_threshold: float,
        noise: Noise,
        future: FutureLogWeights | None = None,
    ) -> None:
        super().__init__(fk, num_particles, resampling, ess_threshold, noise)
        self._path, self._future, self._conditional = path, future, resampling

    def _begin(self, shape: torch.Size) -> Any:
        return self._keep(0, None, super()._begin(shape))

    def _move(self, k: int, previous: Any) -> Any:
        return self._keep(k, previous, super()._move(k, previous))

    def _resample(self, k: int, last: Step, alive: Tensor | None) -> Any:
        if self._future is not None:
            self._conditional.log_weights = last.cloud.log_weights + self._future(k, last.cloud)
        return super()._resample(k, last, alive)

    def _keep(self, k: int, previous: Any, particles: Any) -> Any:
        """The particles with the kept path in place 0."""
        state = self._path[..., k, :].to(self.fk.state(particles).dtype).unsqueeze(0)
        before = None if previous is None else tree_map(lambda x: x[:1], previous)

        def put(drawn: Tensor, kept: Tensor) -> Tensor:
            event = torch.broadcast_shapes(drawn.shape[1:], kept.shape[1:])
            return torch.cat([kept.expand((1,) + event), drawn[1:].expand((len(drawn) - 1,) + event)])

        return tree_map(put, particles, self.fk.extend(k, before, state))


def future_log_weights(fk: FeynmanKac, path: Tensor) -> FutureLogWeights:
    """How well each particle continues in a given path: of one step, or, where the future shows more, of all.

    .. math:: \\log M_k G_k(x_{k-1}^i, x_k), \\qquad\\text{or}\\qquad
        \\sum_{j \\ge k} \\log M_j G_j(x_{j-1}^i, x_j^i)

    the latter without a backward kernel: the memory runs on from each particle along the path.

    Args:
        fk: with ``extend`` and ``log_backward`` or ``log_step``.
        path: ``(*batch, time, state)``.

    Raises:
        ValueError: the process has neither density.

    Source: Lindsten, Jordan and Schon (2014), sections 3.2 and 4.

    >>> import torch
    >>> from pyro_ssm.infer.smc import Cloud, FeynmanKac
    >>> from pyro_ssm.infer.smc.conditional_stepper import future_log_weights
    >>> walk = FeynmanKac(None, None, None, 2, log_backward=lambda k, x, y: -0.5 * (y - x)[..., 0] ** 2,
    ...     extend=lambda k, previous, state: state)
    >>> cloud = Cloud(torch.tensor([[0.0], [3.0]]), torch.zeros(2), 0)
    >>> future_log_weights(walk, torch.tensor([[0.0], [1.0]]))(1, cloud)
    tensor([-0.5000, -2.0000])
    """
    if fk.log_backward is not None:

        def next_step(k: int, cloud: Cloud) -> Tensor:
            first = tree_map(lambda x: x[:1], cloud.particles)
            return fk.log_backward(k, cloud.particles, fk.extend(k, first, path[..., k, :].unsqueeze(0)))

        return next_step
    if fk.log_step is None:
        raise ValueError(
            "ancestor sampling weighs how a particle goes on, and this process has no density of a step (`log_step`): "
            "its transition is SampleOnly, or it was made by hand. Pass ancestor_sampling=False"
        )

    def all_steps(k: int, cloud: Cloud) -> Tensor:
        previous, total = cloud.particles, torch.zeros_like(cloud.log_weights)
        lead = (cloud.num_particles,) + tuple(fk.batch_shape)
        for j in range(k, fk.num_times):
            now = fk.extend(j, previous, path[..., j, :].expand(lead + path.shape[-1:]))
            terms = fk.log_step(j, previous, now)
            total = total + (terms if fk.step_mask is None else torch.where(fk.step_mask[..., j], terms, 0.0))
            previous = now
        return total

    return all_steps
