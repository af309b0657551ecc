"""The engine of the Gaussian-approximate filters and smoothers: linearise, then the square-root Kalman recursions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import Affine
from pyro_ssm.infer.gaussian.linearise import Linearisation
from pyro_ssm.infer.gaussian.nonlinear import NonlinearSystem
from pyro_ssm.ops.kalman import FilterSteps, filter_loop, hide_rows
from pyro_ssm.ops.kalman_smoother import backward_conditionals, kalman_smoother

__all__ = [
    "GaussianFiltered",
    "GaussianSmoothed",
    "check_steps",
    "gaussian_filter",
    "gaussian_smoother",
    "no_moves",
    "run_filter",
    "smooth_steps",
]


class GaussianFiltered(NamedTuple):
    """What a Gaussian-approximate filter returns; ``*batch`` is ``(*draws, *batch)`` of parameters and data together.

    >>> from pyro_ssm.infer.gaussian import GaussianFiltered
    >>> GaussianFiltered._fields[-1]
    'method'
    """

    log_likelihood: Tensor  # (*batch, time)  approximates log p(y_k | y_<k); exactly 0 where nothing is observed
    filtered_mean: Tensor  # (*batch, time, state)  approximates E[z_k | y_<=k]
    filtered_scale_tril: Tensor  # (*batch, time, state, state)
    predicted_mean: Tensor  # (*batch, time, state)  approximates E[z_k | y_<k]
    predicted_scale_tril: Tensor  # (*batch, time, state, state)
    method: str  # the name of the filter

    @property
    def exact(self) -> bool:
        """False: the likelihood and the laws are an approximation of the model's."""
        return False


class GaussianSmoothed(NamedTuple):
    """What a Gaussian-approximate smoother returns.

    >>> from pyro_ssm.infer.gaussian import GaussianSmoothed
    >>> GaussianSmoothed._fields[:4]
    ('mean', 'scale_tril', 'log_likelihood', 'gain')
    """

    mean: Tensor  # (*batch, time, state)  approximates E[z_k | y]
    scale_tril: Tensor  # (*batch, time, state, state)
    log_likelihood: Tensor  # (*batch, time)  approximates log p(y_k | y_<k)
    gain: Tensor  # (*batch, time - 1, state, state)  d E[z_k | z_{k+1}, y] / d z_{k+1}
    method: str  # the name of the smoother
    iterations: int = 1  # passes of an iterated smoother
    converged: Tensor | None = None  # bool (*batch,); None for a smoother that does not iterate
    change: Tensor | None = None  # (*batch,)  the last change of a mean or deviation, in posterior standard deviations

    @property
    def exact(self) -> bool:
        """False: the likelihood and the laws are an approximation of the model's."""
        return False

    @property
    def lag_one_covariance(self) -> Tensor:
        """:math:`Cov(z_k, z_{k+1} \\mid y)`, ``(*batch, time - 1, state, state)``."""
        root = self.scale_tril[..., 1:, :, :]
        return self.gain @ root @ root.mT


def gaussian_filter(system: NonlinearSystem, linearise: Linearisation) -> GaussianFiltered:
    """One pass of a Gaussian filter: each law linearised where the filter stands.

    >>> from pyro_ssm.infer.gaussian.approximate import gaussian_filter
    >>> gaussian_filter.__name__
    'gaussian_filter'
    """
    steps, _ = run_filter(system, linearise)
    terms, m, L, predicted_m, predicted_L = steps
    lead = terms.shape[:-1]
    parts = (terms, 1), (m, 2), (L, 3), (predicted_m, 2), (predicted_L, 3)
    terms, m, L, predicted_m, predicted_L = (part.expand(lead + part.shape[-event:]) for part, event in parts)
    return GaussianFiltered(terms, m, L, predicted_m, predicted_L, system.method)


def gaussian_smoother(system: NonlinearSystem, linearise: Linearisation) -> GaussianSmoothed:
    """The Rauch-Tung-Striebel smoother on the transitions that the filter linearised.

    >>> from pyro_ssm.infer.gaussian.approximate import gaussian_smoother
    >>> gaussian_smoother.__name__
    'gaussian_smoother'
    """
    steps, transition = run_filter(system, linearise)
    return GaussianSmoothed(*smooth_steps(system, steps, transition), system.method)


def smooth_steps(
    system: NonlinearSystem, steps: FilterSteps, transition: Affine
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Smoothed means and roots, the filter's log-likelihood, and the gains, all with full leading dims."""
    conditionals = backward_conditionals(steps, *transition, step_mask=system.step_mask)
    mean, scale_tril = kalman_smoother(steps, conditionals)
    lead = steps.log_likelihood.shape[:-1]
    parts = (mean, 2), (scale_tril, 3), (steps.log_likelihood, 1), (conditionals.gain, 3)
    mean, scale_tril, log_likelihood, gain = (part.expand(lead + part.shape[-event:]) for part, event in parts)
    return mean, scale_tril, log_likelihood, gain


def run_filter(system: NonlinearSystem, linearise: Linearisation) -> tuple[FilterSteps, Affine]:
    """The steps of the filter, and the moves as it linearised them.

    >>> from pyro_ssm.infer.gaussian.approximate import run_filter
    >>> run_filter.__name__
    'run_filter'
    """
    moves: list[Affine] = []

    def move(k: int, m: Tensor, L: Tensor) -> tuple[Tensor, ...]:
        law = system.transition(linearise, slice(k, k + 1), m.unsqueeze(-2), L.unsqueeze(-3))
        moves.append(law)
        return law.matrix[..., 0, :, :], law.offset[..., 0, :], law.scale_tril[..., 0, :, :]

    def look(j: int, m: Tensor, L: Tensor) -> tuple[Tensor, ...]:
        H, d, R = system.emission(linearise, slice(j, j + 1), m.unsqueeze(-2), L.unsqueeze(-3))
        law = H[..., 0, :, :], d[..., 0, :], R[..., 0, :, :]
        return hide_rows(system.mask[..., j, :], system.values[..., j, :], *law)

    steps = filter_loop(
        system.mask,
        system.mean,
        system.scale_tril,
        move,
        look,
        num_times=system.num_times,
        observed_index=system.observed_index,
        step_mask=system.step_mask,
    )
    check_steps(system, steps)
    return steps, _stacked(moves) if moves else no_moves(system)


def check_steps(system: NonlinearSystem, steps: FilterSteps) -> None:
    """Raise where a filtered law is not finite (an observation whose covariance is singular)."""
    m, L = steps.filtered_mean, steps.filtered_scale_tril
    lead = torch.broadcast_shapes(m.shape[:-1], L.shape[:-2])
    m, L = m.expand(lead + m.shape[-1:]), L.expand(lead + L.shape[-2:])
    system.check_finite("filtered law at", slice(0, system.num_times), m, (m, L), system.step_mask)


def no_moves(system: NonlinearSystem) -> Affine:
    """The transitions of a path of one time."""
    m, n = system.mean, system.mean.shape[-1]
    return Affine(m.new_zeros(0, n, n), m.new_zeros(0, n), m.new_zeros(0, n, n))


def _stacked(moves: list[Affine]) -> Affine:
    """The linearised moves along time."""
    parts = []
    for event, steps in zip((2, 1, 2), zip(*moves, strict=True), strict=True):
        lead = torch.broadcast_shapes(*(step.shape[: -1 - event] for step in steps))
        parts.append(torch.cat([step.expand(lead + step.shape[-1 - event :]) for step in steps], -1 - event))
    return Affine(*parts)
