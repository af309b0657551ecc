"""`FeynmanKac`: the waist between models and particle algorithms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.infer.smc.tree import leaves

__all__ = ["Draw", "FeynmanKac", "GaussianSteps"]

#: ``draw(law, shape)``: a draw of a law of batch ``shape``, from the run's noise
Draw = Callable[[Any, torch.Size], Tensor]


def _where(k: int, position: tuple[int, ...]) -> str:
    return f"step {k}" + (f", series {position[0] if len(position) == 1 else position}" if position else "")


def _state(particles: Any) -> Tensor:
    return next(leaves(particles))


class GaussianSteps(NamedTuple):
    """Moves of which a filter may make the draws itself, in a compiled step: of the state, which is all of a particle.

    .. math:: M_k(x_{k-1}, \\cdot) = N(m_k(x_{k-1}), \\mathrm{diag}(s_k(x_{k-1})^2)),
        \\qquad \\text{or affine:}\\ N(A_k x_{k-1} + b_k, \\mathrm{diag}(s_k^2))

    Attributes:
        moves: called when a run begins: :math:`(A_k, b_k, s_k)` for each step from the second on, of shapes ``(state,
            state)``, ``(state,)``, ``(state,)`` or with leading dims ``(*batch, 1)``; None where the moves are not
            affine, or not known beforehand: then ``law`` is asked. ``s`` is positive.
        potential: ``(k, state)`` to ``log_potential``, which must depend on the state of step k alone: ``(N, *batch)``,
            or ``(law, value, mask)`` of which it is the log density (mask is None where all is seen).
        law: ``(k, state)`` to the law of the state of step k given that of the step before, particle by particle. It is
            asked before resampling: the law of a copy is that of its ancestor. Where it is no normal law with
            independent coordinates, ``propagate`` serves. None where only ``moves`` serves.

    >>> import torch
    >>> from pyro_ssm.infer.smc import GaussianSteps
    >>> walk = GaussianSteps(
    ...     lambda: [(torch.eye(1), torch.zeros(1), torch.ones(1))] * 9, lambda k, x: -x.squeeze(-1) ** 2)
    >>> len(walk.moves())
    9
    """

    moves: Callable[[], Sequence[tuple[Tensor, Tensor, Tensor]] | None]
    potential: Callable[[int, Tensor], Tensor | tuple[Any, Tensor, Tensor | None]]
    law: Callable[[int, Tensor], Any] | None = None


@dataclass(frozen=True)
class FeynmanKac:
    """A sequence of weighted laws: all that particle algorithms see of a model and its data.

    .. math::
        \\gamma_k(x_{0:k}) = M_0(dx_0)\\, G_0(x_0) \\prod_{j=1}^{k} M_j(x_{j-1}, dx_j)\\, G_j(x_{j-1}, x_j),
        \\qquad \\log p(y_k \\mid y_{<k}) = \\log \\frac{\\gamma_k(1)}{\\gamma_{k-1}(1)}

    *Particles* are a tensor or a nested tuple, list or dict of tensors whose leading dims are ``(N, *batch)``:
    particles leftmost, then the series. Everything in the tree is resampled together: a state and its memory's
    carry stay together. What never differs between particles is best kept out of it.

    Three functions are the process; the rest tells an algorithm what it may leave out and what else is possible.
    :func:`~pyro_ssm.infer.smc.bootstrap`, ``guided``, ``locally_optimal``, ``auxiliary`` and ``rao_blackwellised``
    build it from models; anything else may build it by hand.

    A step is named by an integer k; in a captured run (``particle_filter(..., cuda_graph=True)``) by an int64 tensor
    ``(1,)`` on the device, from step 1 on. ``y[k]`` of a tensor ``(time, *batch)`` serves both: its axis of 1
    broadcasts over particles. Then no function may read a value, k among them, or keep count of calls.

    Attributes:
        initial: ``(draw, shape) -> particles`` of leading dims ``shape = (N, *batch)``; draws of :math:`M_0`.
            ``draw(law, shape)`` takes the run's noise; a law may also be sampled directly.
        propagate: ``(k, particles, draw) -> particles``; draws of :math:`M_k(x_{k-1}, \\cdot)`, k from 1. The particles
            given are those after resampling, and must not be changed in place.
        log_potential: ``(k, previous, particles) -> (N, *batch)``, :math:`\\log G_k`; previous is None at k = 0, and
            otherwise the very object that was propagated.
        num_times: steps, padding included.
        batch_shape: of the series.
        step_mask: bool ``(*batch, time)``, False where a series has ended: its cloud stays as it is, and the increment
            is exactly 0. None: no series ends early.
        active: bool ``(*batch, time)``, False where :math:`G_k = 1` for every particle of a series (nothing is
            observed): the increment is exactly 0 and ``log_potential`` is not called where no series is active. None:
            all steps.
        log_twist: ``(k, particles) -> (N, *batch)``, an estimate of :math:`\\log p(y_{>k} \\mid x_k)` up to a constant.
            Resampling before step k + 1 then chooses by weights times twist, and the chosen are divided by it again:
            the evidence stays unbiased, and weights are always those of the filter. It must be 0 for a series that is
            not active at k + 1.
        log_backward: ``(k, previous, particles)``, :math:`\\log M_k G_k` up to terms without ``previous``, broadcast
            over leading dims: the weights of the backward kernel. None where the future depends on more than the
            particle shows (memory) or there is no density; backward sampling and its kin then do not apply.
        log_bound: ``k -> (*batch)``, an upper bound of ``log_backward`` at step k; None where none is known.
        log_step: ``(k, previous, particles) -> (N, *batch)``, :math:`\\log M_k G_k` in full, as a density of the state;
            previous is None at k = 0. None where there is no density.
        extend: ``(k, previous, state) -> particles``: the particles at k whose state ``(N, *batch, state)`` is given
            instead of drawn (a retained path of conditional SMC); previous is None at k = 0.
        state: ``particles -> (N, *batch, state)``, what moments are taken of; by default the first tensor of the tree.
        looks_ahead: whether :math:`M_k` depends on data after k. On-line filters refuse it; resampling without
            ``log_twist`` warns.
        gaussian: where moves are normal with independent coordinates, what a compiled step needs of them; the particles
            are then one tensor. It must say what ``propagate`` does, which serves everywhere else.
        describe: ``(k, position) -> str``, how an error names a step of a series.

    Source: Del Moral (2004), "Feynman-Kac formulae"; Chopin and Papaspiliopoulos (2020), "An introduction to
    sequential Monte Carlo", chapter 5.

    >>> import torch
    >>> from pyro_ssm.infer import FeynmanKac, particle_filter
    >>> y = torch.tensor([0.3, -0.2, 0.5])
    >>> walk = FeynmanKac(
    ...     initial=lambda draw, shape: torch.randn(shape + (1,)),
    ...     propagate=lambda k, x, draw: x + torch.randn_like(x),
    ...     log_potential=lambda k, previous, x: -0.5 * (y[k] - x[..., 0]) ** 2,
    ...     num_times=3,
    ... )
    >>> particle_filter(walk, num_particles=100).log_likelihood.shape
    torch.Size([3])
    """

    initial: Callable[[Draw, torch.Size], Any]
    propagate: Callable[[int, Any, Draw], Any]
    log_potential: Callable[[int, Any, Any], Tensor]
    num_times: int
    batch_shape: torch.Size = torch.Size()
    step_mask: Tensor | None = None
    active: Tensor | None = None
    log_twist: Callable[[int, Any], Tensor] | None = None
    log_backward: Callable[[int, Any, Any], Tensor] | None = None
    log_bound: Callable[[int], Tensor | float] | None = None
    log_step: Callable[[int, Any, Any], Tensor] | None = None
    extend: Callable[[int, Any, Tensor], Any] | None = None
    state: Callable[[Any], Tensor] = _state
    looks_ahead: bool = False
    gaussian: GaussianSteps | None = None
    describe: Callable[[int, tuple[int, ...]], str] = _where

    def __post_init__(self) -> None:
        if self.num_times < 1:
            raise ValueError(f"`num_times` is {self.num_times}, but at least 1 is wanted")
        wanted = tuple(self.batch_shape) + (self.num_times,)
        for name in ("step_mask", "active"):
            mask = getattr(self, name)
            if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != wanted):
                raise ValueError(
                    f"`{name}` must be bool of shape {wanted} (*batch, time), got {mask.dtype} of {tuple(mask.shape)}"
                )
