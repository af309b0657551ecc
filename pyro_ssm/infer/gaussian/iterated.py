"""Iterated posterior linearisation: linearise where the smoother found the path, and smooth again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.components import Affine
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.gaussian.approximate import GaussianSmoothed, check_steps, no_moves, run_filter, smooth_steps
from pyro_ssm.infer.gaussian.linearise import Linearisation, Regression, Taylor
from pyro_ssm.infer.gaussian.nonlinear import NonlinearSystem, nonlinear_system
from pyro_ssm.models.laws import observation_law, path_law
from pyro_ssm.ops.kalman import kalman_filter_reference
from pyro_ssm.ops.linalg import tria
from pyro_ssm.ops.quadrature import SigmaPoints, cubature_rule, gauss_hermite_rule, unscented_rule

__all__ = ["iterated_posterior_linearisation_smoother"]

RULES: dict[str, Callable[[int], SigmaPoints]] = {
    "cubature": cubature_rule,
    "unscented": unscented_rule,
    "gauss_hermite": gauss_hermite_rule,
}
SHORTEST_STEP = 1 / 64

Law = tuple[Tensor, Tensor]  # means (*lead, time, n) and square roots (*lead, time, n, n)


def iterated_posterior_linearisation_smoother(
    model: Any,
    data: TimeSeries,
    rule: str | SigmaPoints = "cubature",
    max_iterations: int = 50,
    tolerance: float | None = None,
) -> GaussianSmoothed:
    """The iterated posterior-linearisation smoother; with ``rule="taylor"`` the iterated extended Kalman smoother.

    .. math::
        (A_k, b_k, \\Omega_k)^{(i+1)} = \\text{linearise } f \\text{ around } N(\\hat m_k, \\hat P_k)^{(i)}, \\qquad
        N(\\hat m_k, \\hat P_k)^{(i+1)} = p(z_k \\mid y_{1:T}) \\text{ of that affine model.}

    A filter linearises around what it knew before an observation; where the observation tells much more than the
    prior, that is the wrong place. Here every law is linearised around the smoothed law, until that stops changing.
    With ``"taylor"`` the means are Gauss-Newton steps to the most probable path, each as long as makes the path most
    probable (of the whole step and its halves). With sigma points, which have no such measure, a series goes on with
    half its step where the change no longer falls. Such steps change the way, not the fixed point. A series that has
    converged is left alone, so that a batch gives what each series gives. The first pass is the smoother of the same
    rule. Where a posterior has several modes there may be no fixed point for a rule of few points; more points help
    (``rule=gauss_hermite_rule(n, order=10)``).

    ``log_likelihood`` is that of the last affine model. Missing entries, padding, refined grids, sample dims and the
    demands on the user's functions as in :func:`extended_kalman_filter` and :func:`unscented_kalman_filter`.

    Args:
        model: as for :func:`extended_kalman_filter`.
        data: with values.
        rule: ``"taylor"``, ``"cubature"``, ``"unscented"``, ``"gauss_hermite"`` (order 3), or the points of a rule in n
            dimensions, such as ``pyro_ssm.ops.gauss_hermite_rule(n, order=7)``.
        max_iterations: passes after the first.
        tolerance: the change of a mean or a standard deviation, in posterior standard deviations, below which a series
            has converged. None takes the square root of the machine precision.

    Returns:
        With ``iterations``, ``converged`` and ``change``; ``exact`` is False. Differentiable in parameters and values
        through all passes (the gradient of what was computed; memory grows with the passes). Nothing is random.

    Raises:
        TypeError: a component is not ``Gaussian``, or the model has a memory.
        ValueError: the data has no values, the rule is not known, or a law of the model is not finite (with its time
            and series).

    Warns:
        RuntimeWarning: a series has not converged.

    Sources: García-Fernández, Svensson and Särkkä (2017), "Iterated posterior linearization smoother"; Bell (1994),
    "The iterated Kalman smoother as a Gauss-Newton method".

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer import iterated_posterior_linearisation_smoother
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1),
    ...     ssm.dynamics.LinearNormal(1),
    ...     ssm.emissions.FunctionNormal(1, 1, lambda z, u: torch.sin(z), scale=0.1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), 0.5 * torch.ones(3, 4, 1))
    >>> result = iterated_posterior_linearisation_smoother(model, data)
    >>> result.mean.shape, result.converged
    (torch.Size([3, 4, 1]), tensor([True, True, True]))
    """
    system = nonlinear_system(model, data, "iterated_posterior_linearisation_smoother")
    linearise, name = _linearisation(rule, system)
    system = system._replace(method=f"{system.method} ({name})")
    if max_iterations < 1:
        raise ValueError(f"`max_iterations` must be at least 1, got {max_iterations}")
    tolerance = torch.finfo(system.mean.dtype).eps ** 0.5 if tolerance is None else tolerance

    m, L, *_ = smooth_steps(system, *run_filter(system, linearise))
    step = torch.ones(m.shape[:-2], dtype=m.dtype, device=m.device)
    before = torch.full_like(step, float("inf"))
    iterations = 1
    while True:
        smoothed = _pass(system, linearise, m, L)
        iterations += 1
        change = _change((m, L), smoothed[:2])
        converged = change <= tolerance
        if bool(converged.all()) or iterations > max_iterations:
            break
        step = torch.where(
            change > (1 - step / 10) * before,
            (step / 2).clamp(min=SHORTEST_STEP),
            torch.where(change < before / 2, (2 * step).clamp(max=1.0), step),
        )
        if isinstance(linearise, Taylor):
            step = _searched(system, step, m, smoothed[0])
        m, L = _towards(torch.where(converged, torch.zeros_like(step), step), (m, L), smoothed[:2])
        before = change
    if not bool(converged.all()):
        warnings.warn(
            f"{system.method}: {int((~converged).sum())} of {converged.numel()} series did not converge in "
            f"{max_iterations} iterations (largest change {change.max().item():.2g} posterior standard deviations, "
            f"tolerance {tolerance:.2g}). Raise `max_iterations` or `tolerance`, or try another `rule`",
            RuntimeWarning,
            stacklevel=2,
        )
    return GaussianSmoothed(*smoothed, system.method, iterations, converged, change)


def _linearisation(rule: str | SigmaPoints, system: NonlinearSystem) -> tuple[Linearisation, str]:
    if isinstance(rule, str) and rule == "taylor":
        return Taylor(), rule
    n = system.mean.shape[-1]
    if isinstance(rule, SigmaPoints):
        if rule.points.shape[-1] != n:
            raise ValueError(f"`rule` has points in {rule.points.shape[-1]} dimensions, but the state has {n}")
        return Regression(rule.like(system.mean)), f"{len(rule.points)} points"
    if rule not in RULES:
        names = ", ".join(map(repr, ["taylor", *RULES]))
        raise ValueError(f"`rule` must be one of {names}, or SigmaPoints from pyro_ssm.ops, got {rule!r}")
    return Regression(RULES[rule](n).like(system.mean)), rule


def _pass(
    system: NonlinearSystem, linearise: Linearisation, m: Tensor, L: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The smoothed laws of the model that is linearised around the laws ``m``, ``L`` of the path."""
    last, index = system.num_times - 1, system.observed_index
    at = slice(None) if index is None else index
    seen = slice(0, system.num_times if index is None else len(index))
    transition = no_moves(system)
    if last:
        transition = system.transition(linearise, slice(0, last), m[..., :last, :], L[..., :last, :, :])
    emission: Affine = system.emission(linearise, seen, m[..., at, :], L[..., at, :, :])
    steps = kalman_filter_reference(
        system.values,
        system.mask,
        system.mean,
        system.scale_tril,
        *transition,
        *emission,
        num_times=system.num_times,
        observed_index=index,
        step_mask=system.step_mask,
    )
    check_steps(system, steps)
    return smooth_steps(system, steps, transition)


def _change(old: Law, new: Law) -> Tensor:
    """The largest change of a mean or a deviation along each path, in new deviations; ``(*lead,)``. Rounding errors of
    the mean do not count.
    """
    deviation = [torch.linalg.vector_norm(L.detach(), dim=-1) for _, L in (old, new)]
    moved = torch.maximum((new[0] - old[0]).detach().abs(), (deviation[1] - deviation[0]).abs())
    rounding = 100 * torch.finfo(moved.dtype).eps * new[0].detach().abs()
    relative = torch.where(moved > rounding, moved / deviation[1], torch.zeros_like(moved))
    return relative.flatten(-2).amax(-1)


@torch.no_grad()
def _searched(system: NonlinearSystem, step: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The step ``(*lead,)``, of halves of the whole, after which the path is most probable; ``step`` if none helps."""
    halves = 0.5 ** torch.arange(1 - torch.tensor(SHORTEST_STEP).log2().item(), device=old.device).to(old.dtype)
    tried = torch.cat([halves.new_zeros(1), halves]).reshape(-1, *[1] * old.dim())
    path = (old + tried * (new - old)).to(system.state_dtype)  # (tries, *lead, time, n)
    law = path_law(system.model, system.data)
    score = law.log_prob(path) + observation_law(system.model, system.data, path).log_prob(system.data.values)
    score = score.nan_to_num(nan=-float("inf"))
    best, at = score[1:].max(0)
    return torch.where(best > score[0], halves[at], step)


def _towards(step: Tensor, old: Law, new: Law) -> Law:
    """From ``old`` to ``new`` by a part ``step`` ``(*lead,)`` of the way, in mean and covariance."""
    if bool((step == 1).all()):
        return new
    s = step[..., None, None]
    m = old[0] + s * (new[0] - old[0])
    root = torch.cat([s.sqrt().unsqueeze(-1) * new[1], (1 - s).sqrt().unsqueeze(-1) * old[1]], -1)
    whole = s.unsqueeze(-1)
    L = torch.where(whole == 1, new[1], torch.where(whole == 0, old[1], tria(root)))
    return m, L
