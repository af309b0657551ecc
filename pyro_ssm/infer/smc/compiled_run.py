"""A whole run of a filter whose particles move by diagonal normal laws, one compiled call a step."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.infer.smc.collectors.base import Collector
from pyro_ssm.infer.smc.compiled_moves import AffineMotion, LawMotion, Motion
from pyro_ssm.infer.smc.densities import log_density
from pyro_ssm.infer.smc.draws import diagonal_moments
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.noise import FixedNoise, Noise, PseudoRandom
from pyro_ssm.infer.smc.resample import AncestorResampling, Resampling
from pyro_ssm.infer.smc.stepper import Cloud, Step, conditions
from pyro_ssm.infer.smc.tree import leaves, tree_map
from pyro_ssm.infer.smc.whole_run import WholeRun
from pyro_ssm.ops.composite import transformed
from pyro_ssm.ops.gaussian_particles import operands
from pyro_ssm.ops.particle_step import StepMemory, particle_step_of
from pyro_ssm.ops.resampling_kernel import STRATIFIED, SYSTEMATIC

__all__ = ["compiled_run"]

_SCHEMES = {"systematic": SYSTEMATIC, "stratified": STRATIFIED}
_BLOCK = 2**16  # numbers of states made room for at a time


def compiled_run(
    fk: FeynmanKac,
    num_particles: int,
    resampling: Resampling,
    ess_threshold: float,
    noise: Noise,
    collectors: Sequence[Collector] = (),
) -> WholeRun | None:
    """All steps of :class:`~pyro_ssm.infer.smc.Stepper` as compiled steps, or None where these do not serve.

    They serve on a CPU, where no gradient is wanted, for a process that says ``gaussian`` and whose laws are then
    diagonal normals at every step, systematic or stratified resampling, and ``PseudoRandom`` or ``FixedNoise``. The
    result is that of the stepper with the same numbers, to rounding. Collectors see the steps that the stepper would
    show them; where the answer is None they may have seen some, and must be started again.

    >>> from pyro_ssm.infer.smc import AncestorResampling, FeynmanKac, PseudoRandom
    >>> from pyro_ssm.infer.smc.compiled_run import compiled_run
    >>> fk = FeynmanKac(lambda draw, shape: None, lambda k, x, draw: x, lambda k, previous, x: x, 2)
    >>> compiled_run(fk, 10, AncestorResampling(), 0.5, PseudoRandom()) is None  # nobody said how it moves
    True
    """
    if fk.gaussian is None or fk.log_twist is not None or torch.is_grad_enabled() or fk.num_times < 2:
        return None
    if type(resampling) is not AncestorResampling or resampling.scheme not in _SCHEMES:
        return None
    if type(noise) not in (PseudoRandom, FixedNoise) or particle_step_of(torch.float32) is None:
        return None
    moves = fk.gaussian.moves()
    if moves is None and fk.gaussian.law is None:
        return None
    shape = torch.Size((num_particles, *fk.batch_shape))
    first = fk.initial(partial(noise.draw, 0), shape)
    state, *rest = leaves(first)
    dtypes = {state.dtype} | ({noise.dtype} if isinstance(noise, FixedNoise) else set())
    if rest or not state.is_cpu or transformed(state) or len(dtypes) > 1 or particle_step_of(state.dtype) is None:
        return None
    state = state.contiguous()
    motion: Motion = AffineMotion(moves, fk.batch_shape) if moves is not None else LawMotion(fk.gaussian.law, state)
    for collector in collectors:
        collector.start(fk, num_particles)
    return _Run(fk, first, state, resampling, ess_threshold, noise).result(motion, collectors)


class _Run:
    """One run. Tensors whose addresses stand in the struct are referenced until its call."""

    def __init__(
        self, fk: FeynmanKac, first: Any, state: Tensor, resampling: AncestorResampling, threshold: float, noise: Any
    ) -> None:
        self.fk, self.first, self.state, self.noise = fk, first, state, noise
        self.shape = torch.Size((len(state), *fk.batch_shape))
        self.rows = torch.Size((resampling.rows(len(state)), *fk.batch_shape)) if threshold > 0 else None
        self.memory = StepMemory(fk.num_times, self.shape, state, resampling.rows(len(state)))
        self.job = job = self.memory.struct
        job.resampling, job.always = _SCHEMES[resampling.scheme], int(threshold >= 1)
        job.least_ess = threshold * len(state)
        self.draws = isinstance(noise, PseudoRandom) and self.memory.draws(state.dtype)
        self.potential = fk.gaussian.potential  # type: ignore[union-attr]
        self.kind: Any = None  # of the last density's arguments, where these are read as they are

    def result(self, motion: Motion, collectors: Sequence[Collector]) -> WholeRun | None:
        fk, job, memory, x = self.fk, self.job, self.memory, self.state
        address, step = ctypes.addressof(job), particle_step_of(x.dtype)
        alive, active = conditions(fk)
        states, last = _rooms(x), fk.num_times - 1
        watched = _Watched(self, alive) if collectors else None
        for k in range(fk.num_times):
            try:
                weighed = self._weigh(k, x, active[k])
            except Exception:  # of the user's law: the stepper will tell, and where
                return None
            if k < last:
                how = motion.fill(job, k + 1, x)
                if how is None:
                    return None
                moved = next(states)
                drawn = self._draw(k + 1, x, moved, alive[k + 1])
            else:
                job.moved, moved, drawn, how = 0, x, None, None
            if watched is not None:
                watched.prepare(k)
            if step(address):
                raise MemoryError(f"particle filter: no memory for a step of {len(x)} particles a series")
            del weighed, drawn, how
            if watched is not None:
                seen = watched.step(k, x)
                for collector in collectors:
                    collector.collect(seen)
            x = moved
        total, ess, resampled = (x.movedim(0, -1).contiguous() for x in (memory.total, memory.ess, memory.resampled))
        return WholeRun(total, Cloud(self.particles(x), memory.log_weights, last), ess, resampled)

    def _weigh(self, k: int, x: Tensor, active: Any) -> Any:
        """Fill in the potential of step k; what is returned must live until the call."""
        job = self.job
        job.potential = job.density_scale = job.active = 0
        if active is False:
            return None
        if active is not None:
            job.active = active.data_ptr()
        found = self.potential(k, x)
        if isinstance(found, Tensor):
            return self._given(found)
        law, value, mask = found
        moments = diagonal_moments(law) if mask is None else None
        if moments is None:
            return self._given(log_density(law, value, mask))
        given = (value, *moments)
        if [(x.shape, x.dtype) for x in given if x.is_contiguous()] == self.kind:  # as in the step before
            held = given
        else:
            found = operands(*given, self.shape) if value.dtype is x.dtype else None
            if found is None:
                return self._given(log_density(law, value))
            parts, job.obs_dim = found
            held = tuple(x for x, _ in parts)
            job.value_whole, job.loc_whole, job.scale_whole = (whole for _, whole in parts)
            same = all(a is b for a, b in zip(held, given, strict=True))
            self.kind = [(x.shape, x.dtype) for x in given] if same else None
        job.value, job.density_loc, job.density_scale = [x.data_ptr() for x in held]
        return held

    def _given(self, potential: Tensor) -> Tensor:
        potential = potential.to(self.state.dtype).expand(self.shape).contiguous()
        self.job.potential = potential.data_ptr()
        return potential

    def _draw(self, k: int, x: Tensor, moved: Tensor, alive: Any) -> Any:
        """Fill in the noise of the move to step k, and between what it moves; what is returned must live until the
        call.
        """
        job, normals, uniforms = self.job, None, None
        if not self.draws:
            normals = self.noise.normals(k, self.shape, x)
            job.noise = normals.data_ptr()
            if self.rows is not None:
                uniforms = self.noise.uniforms(k, self.rows, x.device)
                job.uniforms = uniforms.data_ptr()
        if alive is not None:
            alive = torch.zeros(self.shape[1:], dtype=torch.bool) if alive is False else alive
            job.alive = alive.data_ptr()
        else:
            job.alive = 0
        job.state, job.moved = x.data_ptr(), moved.data_ptr()
        return normals, uniforms, alive

    def particles(self, x: Tensor) -> Any:
        """The tree of particles with a given state."""
        return x if isinstance(self.first, Tensor) else tree_map(lambda _: x, self.first)


class _Watched:
    """What a run shows to collectors: the steps of the stepper."""

    def __init__(self, run: _Run, alive: Sequence[Any]) -> None:
        self._run, self._alive = run, alive
        self._last: Cloud | None = None
        self._ancestors: Any = None  # of the next step

    def prepare(self, k: int) -> None:
        """Have the compiled step keep what it would overwrite."""
        run = self._run
        self._log_weights = run.memory.log_weights
        self._origin = (self._last, self._ancestors, self._resampled(k))
        if run.job.moved:
            self._log_weights, self._ancestors = (
                run.state.new_empty(run.shape),
                torch.empty(run.shape, dtype=torch.int64),
            )
            run.job.kept_log_weights = self._log_weights.data_ptr()
            run.job.kept_ancestors = self._ancestors.data_ptr()

    def step(self, k: int, x: Tensor) -> Step:
        """After the call."""
        memory = self._run.memory
        cloud = Cloud(self._run.particles(x), self._log_weights, k)
        previous, ancestors, resampled = self._origin
        self._last = cloud
        ancestors = None if resampled is False else ancestors
        return Step(cloud, cloud.weights, memory.total[k], memory.ess[k], previous, ancestors, resampled)

    def _resampled(self, k: int) -> Tensor | bool:
        flags = self._run.memory.resampled[k]
        if not bool(flags.any()):
            return False
        return True if flags.dim() == 0 or (self._run.job.always and self._alive[k] is None) else flags


def _rooms(x: Tensor) -> Iterator[Tensor]:
    """Room for states, for several steps at once where they are small; never the same twice."""
    while True:
        yield from x.new_empty((max(1, min(64, _BLOCK // x.numel())), *x.shape)).unbind(0)
