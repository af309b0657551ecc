"""How the particles of a compiled run move: what its step needs, filled in before each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.infer.smc.draws import diagonal_moments
from pyro_ssm.ops.composite import transformed
from pyro_ssm.ops.gaussian_particles import part

__all__ = ["AffineMotion", "LawMotion", "Motion"]


class Motion:
    """The interface: ``fill(job, k, state)``.

    >>> from pyro_ssm.infer.smc.compiled_moves import AffineMotion, LawMotion, Motion
    >>> issubclass(AffineMotion, Motion) and issubclass(LawMotion, Motion)
    True
    """

    def fill(self, job: Any, k: int, state: Tensor) -> Any:
        """Write into ``job`` how ``state``, the particles at k - 1 before resampling, move to step k.

        Returns:
            What must live until the call; None where the compiled step cannot move them.
        """
        raise NotImplementedError(f"{type(self).__name__} must define fill(job, k, state)")


class AffineMotion(Motion):
    """By :math:`N(A_k x + b_k, \\text{diag}(s_k^2))`; addresses are found once where steps share the matrices.

    Args:
        moves: :math:`(A_k, b_k, s_k)` of each step from the second on.
        batch: the shape of the series.

    >>> import torch
    >>> from pyro_ssm.infer.smc.compiled_moves import AffineMotion
    >>> from pyro_ssm.ops.particle_step import ParticleStep
    >>> job, move = ParticleStep(), (torch.eye(1), torch.zeros(1), torch.ones(1))
    >>> held = AffineMotion([move], torch.Size()).fill(job, 1, torch.zeros(5, 1, 1))
    >>> job.matrix == held[0].data_ptr(), job.own
    (True, 0)
    """

    def __init__(self, moves: Sequence[tuple[Tensor, Tensor, Tensor]], batch: torch.Size) -> None:
        self.moves, self.batch = moves, batch
        self._last: Any = None
        self._held: Any = None

    def fill(self, job: Any, k: int, state: Tensor) -> Any:
        move = self.moves[k - 1]
        if self._last is not None and all(a is b for a, b in zip(move, self._last, strict=True)):
            return self._held
        n, (matrix, offset, scale) = state.shape[-1], move
        if any(x.dtype is not state.dtype or not x.is_cpu or transformed(x) for x in move):
            return None
        own = matrix.numel() > n * n or offset.numel() > n or scale.numel() > n
        if own:
            matrix = _per_series(matrix, self.batch, (n, n))
            offset, scale = (_per_series(x, self.batch, (n,)) for x in (offset, scale))
        held = (matrix.contiguous(), offset.contiguous(), scale.contiguous())
        job.matrix, job.offset, job.scale = [x.data_ptr() for x in held]
        job.own, self._last, self._held = int(own), move, held
        return held


def _per_series(x: Tensor, batch: torch.Size, event: tuple[int, ...]) -> Tensor:
    """``(..., 1, *event)``, with a time axis or without any lead, as ``(*batch, 1, *event)``."""
    return x.expand(batch + (1,) + event)


class LawMotion(Motion):
    """By the laws of a function of the particles, as long as these are diagonal normals.

    They are asked of all particles before the ancestors are chosen: the law of a copy is that of its ancestor.

    Args:
        law: ``(k, state)`` to the law of the states of step k given those of the step before.
        state: like the particles.

    >>> import torch
    >>> from pyro_ssm.distributions import DiagonalNormal
    >>> from pyro_ssm.infer.smc.compiled_moves import LawMotion
    >>> from pyro_ssm.ops.particle_step import ParticleStep
    >>> x, job = torch.zeros(5, 1, 1), ParticleStep()
    >>> held = LawMotion(lambda k, x: DiagonalNormal(x.sin(), torch.ones(1)), x).fill(job, 1, x)
    >>> job.mean == held[0].data_ptr(), job.each_scale
    (True, 0)
    """

    def __init__(self, law: Callable[[int, Tensor], Any], state: Tensor) -> None:
        self.law, self._shape, self._dtype = law, state.shape, state.dtype
        self._scale: Any = None  # the last one that is shared by particles, its version, and what is read of it
        self._plain = False  # whether a law was looked at closely

    def fill(self, job: Any, k: int, state: Tensor) -> Any:
        try:
            law = self.law(k, state)
        except Exception:  # perhaps only of a particle without weight: the stepper will tell
            return None
        moments = diagonal_moments(law)
        if moments is None:
            return None
        loc, scale = moments
        if loc.dtype is not self._dtype or scale.dtype is not self._dtype:
            return None
        if not self._plain and not all(x.is_cpu and not transformed(x) for x in moments):
            return None
        self._plain = True
        if loc.shape != self._shape or not loc.is_contiguous():
            try:
                loc = loc.expand(self._shape).contiguous()
            except RuntimeError:  # not a law of the particles: the stepper will tell
                return None
        job.mean = loc.data_ptr()
        known = self._scale
        if known is None or scale is not known[0] or scale._version != known[1]:
            read = self._read(scale)
            if read is None:
                return None
            row, job.each_scale = read
            job.own, job.scale = 1, row.data_ptr()
            kept = not job.each_scale and not scale.is_inference()  # those do not count their changes
            self._scale = (scale, scale._version, row) if kept else None
            return loc, row
        return loc, known

    def _read(self, scale: Tensor) -> tuple[Tensor, int] | None:
        """A row for all particles and 0, or a number for each of their coordinates and 1."""
        found = part(scale, self._shape)
        try:
            x, whole = (scale.expand(self._shape), 1) if found is None else found
        except RuntimeError:
            return None
        return x.contiguous(), whole
