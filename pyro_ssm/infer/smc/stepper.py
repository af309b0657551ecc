"""One step of a particle algorithm: resample, move, weigh."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.noise import Noise
from pyro_ssm.infer.smc.resample import Resampling, Weighted
from pyro_ssm.infer.smc.tree import tree_where
from pyro_ssm.ops import normalise
from pyro_ssm.ops.reading import may_read

__all__ = ["Cloud", "Step", "Stepper", "conditions", "normalise"]


class Cloud(NamedTuple):
    """A weighted cloud of particles: :math:`p(x_k \\mid y_{\\le k}) \\approx \\sum_n W_n\\, \\delta_{x_n}`.

    >>> import torch
    >>> from pyro_ssm.infer.smc import Cloud
    >>> Cloud(torch.tensor([[1.0], [3.0]]), torch.tensor([0.5, 0.5]).log(), 0).weights
    tensor([0.5000, 0.5000])
    """

    particles: Any  # tree, leaves (N, *batch, ...)
    log_weights: Tensor  # (N, *batch), normalised over particles
    k: int  # the step after which this is the cloud

    @property
    def weights(self) -> Tensor:
        """``(N, *batch)``, summing to 1."""
        return self.log_weights.exp()

    @property
    def num_particles(self) -> int:
        """N."""
        return len(self.log_weights)


class Step(NamedTuple):
    """The cloud after one step, and how it came about: what a collector sees.

    >>> from pyro_ssm.infer.smc import Step
    >>> Step._fields
    ('cloud', 'weights', 'log_likelihood', 'ess', 'previous', 'ancestors', 'resampled')
    """

    cloud: Cloud
    weights: Tensor  # (N, *batch), of the cloud
    log_likelihood: Tensor  # (*batch,), log p(y_k | y_<k), estimated
    ess: Tensor  # (*batch,), effective sample size of the cloud
    previous: Cloud | None  # before resampling; None at the first step
    ancestors: Tensor | None  # int64 (N, *batch) in `previous`; None: each particle comes from the one at its place
    resampled: Tensor | bool  # bool (*batch,), the series that were resampled; True or False for all of them

    @property
    def k(self) -> int:
        """The index of this step."""
        return self.cloud.k


class Stepper:
    """The step form of a particle filter, without loop and without results: ``init()``, then ``step(last)``.

    Everything is differentiable as far as the process is; the choice of ancestors counts as fixed. There is no host
    synchronisation in a step (on a CPU, where reading costs nothing, a step without need for resampling skips it).

    Args:
        fk: the process.
        num_particles: N.
        resampling: what to do with an uneven cloud.
        ess_threshold: resample a series whose effective sample size is below this fraction of N; 0 never, 1 always.
        noise: what to draw from.

    >>> import torch
    >>> from pyro_ssm.infer.smc import AncestorResampling, FeynmanKac, PseudoRandom, Stepper
    >>> fk = FeynmanKac(lambda draw, shape: torch.randn(shape), lambda k, x, draw: x, lambda k, previous, x: -x**2, 2)
    >>> stepper = Stepper(fk, 10, AncestorResampling(), 0.5, PseudoRandom())
    >>> stepper.step(stepper.init()).k
    1
    """

    def __init__(
        self, fk: FeynmanKac, num_particles: int, resampling: Resampling, ess_threshold: float, noise: Noise
    ) -> None:
        self.fk, self.num_particles = fk, num_particles
        self.resampling, self.ess_threshold, self.noise = resampling, ess_threshold, noise
        self._uniforms_shape = torch.Size((resampling.rows(num_particles),)) + fk.batch_shape
        self._alive, self._active = conditions(fk)

    def init(self) -> Step:
        """Draw the first cloud and weigh it."""
        shape = torch.Size((self.num_particles,)) + self.fk.batch_shape
        particles = self._begin(shape)
        like = self.fk.state(particles)
        equal = like.new_full((), -math.log(self.num_particles)).expand(shape)
        return self._weigh(0, self._conditions(0)[1], particles, None, (equal, None), (None, None, False))

    def resume(self, cloud: Cloud) -> Step:
        """The step that left ``cloud``, to go on from."""
        total, log_weights, weights, ess = normalise(cloud.log_weights)
        return Step(Cloud(cloud.particles, log_weights, cloud.k), weights, total * 0, ess, None, None, False)

    def step(self, last: Step) -> Step:
        """Resample the cloud of ``last`` where it is too uneven, move it, weigh it."""
        k, fk = last.k + 1, self.fk
        alive, active = self._conditions(k)
        if alive is False:  # every series has ended
            before = (last.cloud.log_weights, last.weights)
            return self._weigh(k, active, last.cloud.particles, None, before, (last.cloud, None, False))
        previous, log_weights, ancestors, resampled = self._resample(k, last, alive)
        particles = self._move(k, previous)
        if alive is not None:
            particles = tree_where(alive, particles, previous, len(fk.batch_shape))
        weights = None
        if active is not None:  # a series that sees nothing keeps its weights to the last digit
            weights = last.weights if resampled is False else log_weights.exp()
            if isinstance(resampled, Tensor):
                weights = torch.where(resampled, weights, last.weights)
        return self._weigh(k, active, particles, previous, (log_weights, weights), (last.cloud, ancestors, resampled))

    def _conditions(self, k: Any) -> tuple[Any, Any]:
        """Which series go on at step k, and which see something: as :func:`conditions`."""
        return self._alive[k], self._active[k]

    def _begin(self, shape: torch.Size) -> Any:
        return self.fk.initial(partial(self.noise.draw, 0), shape)

    def _move(self, k: Any, previous: Any) -> Any:
        return self.fk.propagate(k, previous, partial(self.noise.draw, k))

    def _resample(self, k: Any, last: Step, alive: Tensor | None) -> tuple[Any, Tensor, Tensor | None, Tensor | bool]:
        """The particles to propagate, their log-weights, their ancestors, and the series that were resampled."""
        cloud, weights, ess = last.cloud, last.weights, last.ess
        log_weights, correction = cloud.log_weights, None
        if self.ess_threshold <= 0:
            return cloud.particles, log_weights, None, False
        if self.fk.log_twist is not None:
            # choose by W e^twist, and give the chosen their weight divided by what they were chosen by
            _, twisted, weights, ess = normalise(log_weights + self.fk.log_twist(k - 1, cloud.particles))
            log_weights, correction = twisted, log_weights - twisted
        uneven, need = self.ess_threshold * self.num_particles, None
        reads = ess.is_cpu and may_read()
        if self.ess_threshold < 1 and reads and ess.dim() == 0:
            if not ess.item() < uneven:
                return cloud.particles, cloud.log_weights, None, False
        elif self.ess_threshold < 1:
            need = ess < uneven
        if alive is not None:
            need = alive if need is None else need & alive
        if need is not None and reads:
            if not bool(need if need.dim() == 0 else need.any()):
                return cloud.particles, cloud.log_weights, None, False
            need = None if need.dim() == 0 else need
        weighted = Weighted(
            (cloud.particles, correction), partial(self.fk.state, cloud.particles), log_weights, weights, need
        )
        uniforms = self.noise.uniforms(k, self._uniforms_shape, weights.device)
        (particles, correction), log_weights, ancestors = self.resampling(weighted, uniforms)
        if correction is not None:
            if ancestors is None:
                raise ValueError(
                    f"{type(self.resampling).__name__} moves particles, and the twist of an auxiliary or a twisted "
                    "filter belongs to those that were weighed. Leave the twist out, or resample by ancestors"
                )
            log_weights = log_weights + correction
        return particles, log_weights, ancestors, True if need is None else need

    def _weigh(
        self,
        k: Any,
        active: Any,
        particles: Any,
        previous: Any,
        before: tuple[Tensor, Tensor | None],
        origin: tuple[Any, ...],
    ) -> Step:
        """The step of given particles; ``before``: their log-weights, and where some series may be idle, weights."""
        log_weights, old_weights = before
        factor = None if active is False else self.fk.log_potential(k, previous, particles)
        total, new_log_weights, weights, ess = normalise(log_weights, factor)
        if active is not None:
            old_weights = log_weights.exp() if old_weights is None else old_weights
        if active is False:
            total, new_log_weights, weights = torch.zeros_like(total), log_weights, old_weights
        elif active is not None:
            total = torch.where(active, total, torch.zeros_like(total))
            new_log_weights = torch.where(active, new_log_weights, log_weights)
            weights = torch.where(active, weights, old_weights)
        return Step(Cloud(particles, new_log_weights, k), weights, total, ess, *origin)


def conditions(fk: FeynmanKac) -> tuple[list[Any], list[Any]]:
    """Which series go on, and which see something, at each step: ``(*batch)``, None for all of them, False for none.

    >>> import torch
    >>> from pyro_ssm.infer.smc import FeynmanKac
    >>> from pyro_ssm.infer.smc.stepper import conditions
    >>> conditions(FeynmanKac(None, None, None, num_times=2, active=torch.tensor([True, False])))
    ([None, None], [None, False])
    """
    alive, active = fk.step_mask, fk.active
    if alive is not None and active is not None:
        active = active & alive
    return _by_step(alive, fk.num_times), _by_step(alive if active is None else active, fk.num_times)


def _by_step(mask: Tensor | None, num: int) -> list[Any]:
    if mask is None:
        return [None] * num
    flat = mask.reshape(-1, num)
    everywhere, somewhere = flat.all(0).tolist(), flat.any(0).tolist()
    rows = mask.movedim(-1, 0).contiguous().unbind(0)
    return [None if e else now if s else False for e, s, now in zip(everywhere, somewhere, rows, strict=True)]
