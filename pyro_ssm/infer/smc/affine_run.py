"""A whole run of a filter whose particles move by affine Gaussian laws, one compiled call a step."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.distributions import DiagonalNormal
from pyro_ssm.infer.smc.densities import log_density
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.noise import FixedNoise, Noise, PseudoRandom
from pyro_ssm.infer.smc.resample import AncestorResampling, Resampling
from pyro_ssm.infer.smc.stepper import Cloud, conditions
from pyro_ssm.infer.smc.tree import leaves, tree_map
from pyro_ssm.ops.gaussian_particles import operands
from pyro_ssm.ops.particle_step import StepMemory, particle_step_of
from pyro_ssm.ops.resampling_kernel import STRATIFIED, SYSTEMATIC

__all__ = ["AffineRun", "affine_run"]

_SCHEMES = {"systematic": SYSTEMATIC, "stratified": STRATIFIED}
_BLOCK = 2**16  # numbers of states made room for at a time


class AffineRun(NamedTuple):
    """What a run leaves.

    >>> from pyro_ssm.infer.smc.affine_run import AffineRun
    >>> AffineRun._fields
    ('log_likelihood', 'ess', 'resampled', 'cloud')
    """

    log_likelihood: Tensor  # (*batch, time)
    ess: Tensor  # (*batch, time)
    resampled: Tensor  # bool (*batch, time)
    cloud: Cloud  # after the last step


def affine_run(
    fk: FeynmanKac, num_particles: int, resampling: Resampling, ess_threshold: float, noise: Noise
) -> AffineRun | None:
    """All steps of :class:`~pyro_ssm.infer.smc.Stepper` as compiled steps, or None where these do not serve.

    They serve on a CPU, where no gradient is wanted, for a process that says ``affine``, systematic or stratified
    resampling, and ``PseudoRandom`` or ``FixedNoise``. The result is that of the stepper with the same numbers, to
    rounding.

    >>> from pyro_ssm.infer.smc import AncestorResampling, FeynmanKac, PseudoRandom
    >>> from pyro_ssm.infer.smc.affine_run import affine_run
    >>> fk = FeynmanKac(lambda draw, shape: None, lambda k, x, draw: x, lambda k, previous, x: x, 2)
    >>> affine_run(fk, 10, AncestorResampling(), 0.5, PseudoRandom()) is None  # nobody said how it moves
    True
    """
    if fk.affine is None or fk.log_twist is not None or torch.is_grad_enabled() or fk.num_times < 2:
        return None
    if type(resampling) is not AncestorResampling or resampling.scheme not in _SCHEMES:
        return None
    if type(noise) not in (PseudoRandom, FixedNoise) or particle_step_of(torch.float32) is None:
        return None
    moves = fk.affine.moves()
    if moves is None:
        return None
    shape = torch.Size((num_particles, *fk.batch_shape))
    first = fk.initial(partial(noise.draw, 0), shape)
    state, *rest = leaves(first)
    dtypes = {state.dtype, *(x.dtype for x in moves[0])} | ({noise.dtype} if isinstance(noise, FixedNoise) else set())
    if rest or not state.is_cpu or len(dtypes) > 1 or particle_step_of(state.dtype) is None:
        return None
    return _Run(fk, first, state.contiguous(), resampling, ess_threshold, noise).result(moves)


class _Run:
    """One run. Tensors whose addresses stand in the struct are referenced until its call."""

    def __init__(
        self, fk: FeynmanKac, first: Any, state: Tensor, resampling: AncestorResampling, threshold: float, noise: Any
    ) -> None:
        self.fk, self.first, self.state, self.noise = fk, first, state, noise
        self.shape = torch.Size((len(state), *fk.batch_shape))
        self.rows = torch.Size((resampling.rows(len(state)), *fk.batch_shape)) if threshold > 0 else None
        self.memory = StepMemory(fk.num_times, self.shape, state)
        self.job = job = self.memory.struct
        job.resampling, job.always = _SCHEMES[resampling.scheme], int(threshold >= 1)
        job.least_ess = threshold * len(state)
        self.potential = fk.affine.potential  # type: ignore[union-attr]
        self.kind: Any = None  # of the last density's arguments, where these are read as they are

    def result(self, moves: Sequence[tuple[Tensor, Tensor, Tensor]]) -> AffineRun:
        fk, job, memory, x = self.fk, self.job, self.memory, self.state
        address, step = ctypes.addressof(job), particle_step_of(x.dtype)
        alive, active = conditions(fk)
        states, own, last = _rooms(x), _Own(self.shape[1:], x.shape[-1]), fk.num_times - 1
        for k in range(fk.num_times):
            weighed = self._weigh(k, x, active[k])
            if k < last:
                moved = next(states)
                drawn = self._move(k + 1, x, moved, own.of(moves[k]), alive[k + 1])
            else:
                job.moved, moved, drawn = 0, x, None
            if step(address):
                raise MemoryError(f"particle filter: no memory for a step of {len(x)} particles a series")
            del weighed, drawn
            x = moved
        total, ess, resampled = (x.movedim(0, -1).contiguous() for x in (memory.total, memory.ess, memory.resampled))
        return AffineRun(total, ess, resampled, Cloud(self._particles(x), memory.log_weights, last))

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
        if mask is not None or not isinstance(law, DiagonalNormal):
            return self._given(log_density(law, value, mask))
        given = (value, law.loc, law.scale)
        if [(x.shape, x.stride(), x.dtype) for x in given] == self.kind:  # as in the step before
            held = given
        else:
            found = operands(*given, self.shape)
            if found is None:
                return self._given(log_density(law, value))
            parts, job.obs_dim = found
            held = tuple(x for x, _ in parts)
            job.value_whole, job.loc_whole, job.scale_whole = (whole for _, whole in parts)
            same = all(a is b for a, b in zip(held, given, strict=True))
            self.kind = [(x.shape, x.stride(), x.dtype) for x in given] if same else None
        job.value, job.density_loc, job.density_scale = [x.data_ptr() for x in held]
        return held

    def _given(self, potential: Tensor) -> Tensor:
        potential = potential.to(self.state.dtype).expand(self.shape).contiguous()
        self.job.potential = potential.data_ptr()
        return potential

    def _move(self, k: int, x: Tensor, moved: Tensor, how: tuple[Any, ...], alive: Any) -> Any:
        """Fill in the move to step k; what is returned must live until the call."""
        job, noise = self.job, self.noise
        normals, uniforms = noise.normals(k, self.shape, x), None
        if self.rows is not None:
            uniforms = noise.uniforms(k, self.rows, x.device)
            job.uniforms = uniforms.data_ptr()
        if alive is not None:
            alive = torch.zeros(self.shape[1:], dtype=torch.bool) if alive is False else alive
            job.alive = alive.data_ptr()
        else:
            job.alive = 0
        job.state, job.moved, job.noise = x.data_ptr(), moved.data_ptr(), normals.data_ptr()
        job.matrix, job.offset, job.scale, job.own, _ = how
        return normals, uniforms, alive

    def _particles(self, x: Tensor) -> Any:
        return x if isinstance(self.first, Tensor) else tree_map(lambda _: x, self.first)


class _Own:
    """The addresses of affine moves, found once where steps share them."""

    def __init__(self, batch: torch.Size, dim: int) -> None:
        self.batch, self.dim = batch, dim
        self._last: Any = None
        self._found: Any = None

    def of(self, move: tuple[Tensor, Tensor, Tensor]) -> Any:
        """Of the matrix, the offset and the scale; whether each series has its own; and what holds them."""
        if self._last is None or any(a is not b for a, b in zip(move, self._last, strict=True)):
            n, (matrix, offset, scale) = self.dim, move
            own = matrix.numel() > n * n or offset.numel() > n or scale.numel() > n
            if own:
                matrix = _per_series(matrix, self.batch, (n, n))
                offset, scale = (_per_series(x, self.batch, (n,)) for x in (offset, scale))
            matrix, offset, scale = (x.contiguous() for x in (matrix, offset, scale))
            held = (matrix, offset, scale)
            self._last, self._found = move, (*(x.data_ptr() for x in held), int(own), held)
        return self._found


def _per_series(x: Tensor, batch: torch.Size, event: tuple[int, ...]) -> Tensor:
    """``(..., 1, *event)``, with a time axis or without any lead, as ``(*batch, 1, *event)``."""
    return x.expand(batch + (1,) + event)


def _rooms(x: Tensor) -> Iterator[Tensor]:
    """Room for states, for several steps at once where they are small; never the same twice."""
    while True:
        yield from x.new_empty((max(1, min(64, _BLOCK // x.numel())), *x.shape)).unbind(0)
