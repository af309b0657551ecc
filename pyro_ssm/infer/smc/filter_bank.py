"""Particle filters for many vectors of parameters side by side, each of them free to fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from pyro import validation_enabled
from torch import Tensor

from pyro_ssm.infer.smc.collectors.genealogy import Ancestry
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.noise import Noise, PseudoRandom
from pyro_ssm.infer.smc.resample import Resampling
from pyro_ssm.infer.smc.stepper import Cloud, Step, Stepper
from pyro_ssm.infer.smc.tree import leaves, tree_map

__all__ = ["FilterBank"]


class FilterBank:
    """One particle filter for each of S vectors of parameters, all of them at the same step.

    .. math:: \\log \\hat p(y_{\\le k} \\mid \\theta_s), \\qquad s = 1, \\dots, S

    The filters run as the batch ``(S, *batch)`` of one process. Where a filter of :func:`particle_filter` would raise,
    because no particle explains an observation or a law returned NaN, the estimate of that vector is 0 from there on
    (its logarithm -inf), and the others go on: a sampler proposes impossible parameters, and has to reject them.

    A bank is a population of a sampler over parameters: ``take`` and ``where`` give banks of other members.

    Args:
        process: of vectors ``(S, dim)`` to their Feynman-Kac process, of batch ``(S, *batch)``.
        vectors: ``(S, dim)``.
        log_prior: ``(S,)``.
        num_particles: of each filter.
        resampling: as in :class:`Stepper`.
        ess_threshold: as in :class:`Stepper`.
        noise: what to draw from.
        keep_paths: keep all clouds, so that paths can be drawn: memory then grows with time.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.smc import AncestorResampling
    >>> from pyro_ssm.infer.smc.filter_bank import FilterBank
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.OrnsteinUhlenbeck(1), ssm.emissions.LinearNormal(1, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(4, 1))
    >>> def process(vectors):
    ...     return ssm.infer.bootstrap(model.bind({"transition.rate": vectors.float().exp()}), data)
    >>> bank = FilterBank(process, torch.zeros(3, 1), torch.zeros(3), 50, AncestorResampling(), 0.5).run()
    >>> bank.log_likelihood.shape, bank.paths().shape
    (torch.Size([3]), torch.Size([3, 4, 1]))
    """

    def __init__(
        self,
        process: Callable[[Tensor], FeynmanKac],
        vectors: Tensor,
        log_prior: Tensor,
        num_particles: int,
        resampling: Resampling,
        ess_threshold: float,
        noise: Noise | None = None,
        keep_paths: bool = True,
    ) -> None:
        self._process, self._resampling, self._ess_threshold = process, resampling, ess_threshold
        self._noise, self.keep_paths, self.num_particles = noise or PseudoRandom(), keep_paths, num_particles
        self.vectors, self.log_prior = vectors, log_prior
        self._noise.restart()
        self._stepper = self._new_stepper()
        self._last: Step | None = None
        self._states: list[Tensor] = []  # (N, S, *batch, state) of each step
        self._ancestors: list[Tensor] = []
        self.log_likelihood = torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)

    def _new_stepper(self) -> Stepper:
        fk = self._process(self.vectors)
        if fk.batch_shape[:1] != self.vectors.shape[:1]:
            raise ValueError(
                f"`filter` gave a process of batch {tuple(fk.batch_shape)} for {len(self.vectors)} vectors of "
                "parameters: their dim must come first. Do the random parameters reach the model's laws?"
            )
        return Stepper(fk, self.num_particles, self._resampling, self._ess_threshold, self._noise)

    # ------------------------------------------------------------------------------------------------- in time

    @property
    def num_times(self) -> int:
        """Steps of the process."""
        return self._stepper.fk.num_times

    @property
    def k(self) -> int:
        """The last step that was taken; -1 before the first."""
        return -1 if self._last is None else self._last.k

    def advance(self) -> Tensor:
        """One step of every filter; the increments ``(S,)`` of the log-likelihoods, summed over series."""
        with validation_enabled(False):  # laws of NaN parameters are to return NaN, not to raise for all the others
            step = self._stepper.init() if self._last is None else self._stepper.step(self._last)
        batch = self._stepper.fk.batch_shape
        increments = step.log_likelihood.expand(batch)
        failed = ~torch.isfinite(increments)
        if bool(failed.any()):
            equal = torch.full_like(step.weights, -math.log(self.num_particles))
            log_weights = torch.where(failed, equal, step.cloud.log_weights)
            cloud = step.cloud._replace(log_weights=log_weights)
            step = step._replace(cloud=cloud, weights=log_weights.exp(), ess=log_weights.exp().square().sum(0).pow(-1))
            increments = torch.where(failed, -math.inf, increments)
        self._last = step
        if self.keep_paths:
            itself = torch.arange(self.num_particles, device=increments.device)
            ancestors = itself.reshape((-1,) + (1,) * len(batch)) if step.ancestors is None else step.ancestors
            self._ancestors.append(ancestors.expand((self.num_particles,) + batch))
            self._states.append(_over(self._stepper.fk.state(step.cloud.particles), batch))
        total = increments.double().reshape(len(self.vectors), -1).sum(-1)
        self.log_likelihood = self.log_likelihood + total
        return total

    def run(self, until: int | None = None) -> FilterBank:
        """Go on to step ``until`` (default: the last), and return the bank."""
        until = self.num_times - 1 if until is None else until
        while self.k < until:
            self.advance()
        return self

    def restart_noise(self) -> None:
        """Forget random numbers that were drawn in advance."""
        self._noise.restart()

    def paths(self) -> Tensor:
        """A path of each filter ``(S, *batch, time, state)``, drawn by its weights from its genealogy.

        With such a path beside it the estimate of the likelihood is a density of parameters and states together
        (Andrieu, Doucet and Holenstein 2010, section 4.4).
        """
        cloud, batch = self._last.cloud, self._stepper.fk.batch_shape
        cloud = cloud._replace(log_weights=_over(cloud.log_weights, batch))
        return Ancestry([cloud], self._ancestors, torch.stack(self._states)).sample_paths(1)[0]

    # ------------------------------------------------------------------------------------------ as a population

    def take(self, index: Tensor) -> FilterBank:
        """The bank of the members ``index``; copies of one go on independently."""
        return self.with_parts([x.index_select(dim, index) for x, dim in self._parts()], self.k)

    def where(self, accepted: Tensor, other: FilterBank) -> FilterBank:
        """The members of ``other`` where ``accepted`` ``(S,)`` holds, and one's own elsewhere."""

        def choose(own: Tensor, others: Tensor, dim: int) -> Tensor:
            return torch.where(accepted.reshape((1,) * dim + (-1,) + (1,) * (own.dim() - dim - 1)), others, own)

        pairs = zip(self._parts(), other._parts(), strict=True)
        return self.with_parts([choose(own, others, dim) for (own, dim), (others, _) in pairs], self.k)

    def parts(self) -> list[Tensor]:
        """All tensors that make up a bank; :meth:`with_parts` takes them."""
        return [x for x, _ in self._parts()]

    def with_parts(self, parts: list[Tensor], k: int) -> FilterBank:
        """The bank of these tensors after step ``k``; this one must have taken a step, unless ``k`` is -1."""
        new, rest = object.__new__(FilterBank), iter(parts)
        new.__dict__.update(self.__dict__)
        new.vectors, new.log_prior, new.log_likelihood = next(rest), next(rest), next(rest)
        new._stepper = new._new_stepper()
        if k >= 0:
            particles, log_weights = tree_map(lambda _: next(rest), tuple(self._last.cloud[:2]))
            weights = log_weights.exp()  # normalised as they are: to do it again would change their last digits
            ess = weights.square().sum(0).reciprocal()
            new._last = Step(Cloud(particles, log_weights, k), weights, ess * 0, ess, None, None, False)
        kept = list(rest)
        new._states, new._ancestors = kept[: len(kept) // 2], kept[len(kept) // 2 :]
        return new

    def _parts(self) -> Iterator[tuple[Tensor, int]]:
        """Each tensor, and its dim of members."""
        yield from ((self.vectors, 0), (self.log_prior, 0), (self.log_likelihood, 0))
        if self._last is not None:
            batch = self._stepper.fk.batch_shape
            yield from ((_over(x, batch), 1) for x in leaves(tuple(self._last.cloud[:2])))
        yield from ((x, 1) for x in self._states)
        yield from ((x, 1) for x in self._ancestors)


def _over(x: Tensor, batch: torch.Size) -> Tensor:
    """A tensor ``(N, *batch, ...)`` whose batch dims are not merely broadcast."""
    return x.expand(x.shape[:1] + batch + x.shape[1 + len(batch) :])
