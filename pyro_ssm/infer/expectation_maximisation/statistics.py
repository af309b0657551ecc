"""The E-step of EM: expected residual moments of the three regressions, given the smoothed states."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.blocks._radial import RadialNormal
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.expectation_maximisation.regression import ResidualMoments
from pyro_ssm.ops import radial_moments
from pyro_ssm.ops.kalman import matvec

__all__ = ["Features", "Posterior", "emission_moments", "features", "initial_moments", "transition_moments"]


class Posterior(NamedTuple):
    """Smoothed laws of the states: what a smoother must tell EM.

    >>> from pyro_ssm.infer.expectation_maximisation.statistics import Posterior
    >>> Posterior._fields
    ('mean', 'covariance', 'lag_one')
    """

    mean: Tensor  # (*batch, time, n)
    covariance: Tensor  # (*batch, time, n, n)
    lag_one: Tensor  # (*batch, time - 1, n, n)  Cov(z_k, z_{k+1})


class Features(NamedTuple):
    """The regressors :math:`\\phi = (z, \\rho(z), u, 1)` of one component under Gaussian states."""

    mean: Tensor  # (..., q)
    slope: Tensor  # (..., q, n)  E[d phi / dz]: Cov(phi, x) = slope Cov(z, x) for x jointly Gaussian with z
    covariance: Tensor  # (..., q, q)


def features(component: Any, mean: Tensor, covariance: Tensor, inputs: Tensor | None) -> Features:
    """Moments of the regressors of a transition or emission for :math:`z \\sim N(m, P)`; exact.

    Args:
        component: a linear or radial component, bound or not.
        mean: ``(..., n)``.
        covariance: ``(..., n, n)``.
        inputs: ``(..., input)`` or None.

    >>> import torch
    >>> from pyro_ssm.dynamics import LinearNormal
    >>> from pyro_ssm.infer.expectation_maximisation.statistics import features
    >>> features(LinearNormal(1), torch.tensor([2.0]), torch.ones(1, 1), None).mean
    tensor([2., 1.])
    """
    n = mean.shape[-1]
    slope = torch.eye(n, dtype=mean.dtype, device=mean.device).expand(covariance.shape)
    level, spread = mean, covariance
    if isinstance(component, RadialNormal):
        bumps = radial_moments(mean, covariance, component.centers, component.width)
        level = torch.cat([mean, bumps.value], -1)
        slope = torch.cat([slope, bumps.slope], -2)
        spread = slope @ covariance @ slope.mT  # right but for the block of the bumps among themselves
        among = bumps.product - bumps.value.unsqueeze(-1) * bumps.value.unsqueeze(-2)
        spread = torch.cat(
            [spread[..., :n, :], torch.cat([spread[..., n:, :n], among], -1)],
            -2,
        )
    known = _known(mean, inputs if component.input_dim else None)
    extra = known.shape[-1]
    return Features(
        torch.cat([level, known], -1),
        torch.nn.functional.pad(slope, (0, 0, 0, extra)),
        torch.nn.functional.pad(spread, (0, extra, 0, extra)),
    )


def _known(like: Tensor, inputs: Tensor | None) -> Tensor:
    """The regressors without uncertainty: inputs, and 1."""
    one = like.new_ones(like.shape[:-1] + (1,))
    return one if inputs is None else torch.cat([inputs.to(like.dtype).expand(like.shape[:-1] + (-1,)), one], -1)


def initial_moments(component: Any, W: Tensor, posterior: Posterior, data: TimeSeries) -> ResidualMoments:
    """Moments of :math:`e = z_1 - W (u_1, 1)`, one step a series.

    >>> from pyro_ssm.infer.expectation_maximisation.statistics import initial_moments
    >>> initial_moments.__name__
    'initial_moments'
    """
    mean, covariance = posterior.mean[..., 0, :], posterior.covariance[..., 0, :, :]
    known = _known(mean, data.inputs[..., 0, :] if component.input_dim and data.inputs is not None else None)
    away = mean - matvec(W, known)
    return _full(away, covariance, known, None, None, mean.new_ones(mean.shape[:-1]))


def transition_moments(component: Any, W: Tensor, posterior: Posterior, data: TimeSeries) -> ResidualMoments:
    """Moments of :math:`e = z_{k+1} - W \\phi(z_k)` over all real moves.

    >>> from pyro_ssm.infer.expectation_maximisation.statistics import transition_moments
    >>> transition_moments.__name__
    'transition_moments'
    """
    mean, covariance = posterior.mean, posterior.covariance
    inputs = None if data.inputs is None else data.inputs[..., :-1, :]
    phi = features(component, mean[..., :-1, :], covariance[..., :-1, :, :], inputs)
    across = phi.slope @ posterior.lag_one  # Cov(phi, z_{k+1})
    explained = W @ across
    spread = covariance[..., 1:, :, :] - explained - explained.mT + W @ phi.covariance @ W.mT
    away = mean[..., 1:, :] - matvec(W, phi.mean)
    weight = data.step_mask[..., 1:].to(mean.dtype)
    return _full(away, spread, phi.mean, phi.covariance, across.mT - W @ phi.covariance, weight)


def emission_moments(
    component: Any, W: Tensor, S: Tensor, diagonal: bool, posterior: Posterior, data: TimeSeries
) -> ResidualMoments:
    """Moments of :math:`e = y_k - W \\phi(z_k)` over all steps at which something was seen.

    With diagonal noise a missing entry is left out of its row. With correlated noise the seen entries o tell of the
    missing ones, :math:`e | e_o \\sim N(J e_o, V)` with :math:`J = S_{:o} S_{oo}^{-1}`, :math:`V = S - J S_{o:}`.

    >>> from pyro_ssm.infer.expectation_maximisation.statistics import emission_moments
    >>> emission_moments.__name__
    'emission_moments'
    """
    values, mask, index = data.values, data.mask, data.observed_index
    if values is None or mask is None:
        raise ValueError("em needs observations, but `data` has no values. Give TimeSeries(times, values)")
    mean, covariance, inputs = posterior.mean, posterior.covariance, data.inputs
    if index is not None:
        mean, covariance = mean[..., index, :], covariance[..., index, :, :]
        inputs = None if inputs is None else inputs[..., index, :]
    phi = features(component, mean, covariance, inputs)
    away = values.to(mean.dtype) - matvec(W, phi.mean)
    joint = -W @ phi.covariance  # Cov(e, phi)
    spread = W @ phi.covariance @ W.mT
    if diagonal:
        seen = mask.to(mean.dtype)
        away, second = away * seen, _second(phi.mean, phi.covariance)
        flat, second = seen.flatten(0, -2), second.flatten(0, -3)
        return ResidualMoments(
            flat.sum(0),
            torch.einsum("ki,kab->iab", flat, second),
            away.flatten(0, -2).mT @ phi.mean.flatten(0, -2) + _sum(joint * seen.unsqueeze(-1)),
            _sum((away.square() + spread.diagonal(dim1=-2, dim2=-1) * seen).unsqueeze(-1)).squeeze(-1).diag(),
        )
    if not bool(mask.all()):
        J, V = _given_seen(S, mask)
        away, joint, spread = matvec(J, away), J @ joint, J @ spread @ J.mT + V
    return _full(away, spread, phi.mean, phi.covariance, joint, mask.any(-1).to(mean.dtype))


def _given_seen(S: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """J (zero in missing columns) and V of the errors given the seen ones, for each step."""
    seen = mask.to(S.dtype)
    inner = S * seen.unsqueeze(-1) * seen.unsqueeze(-2) + torch.diag_embed(1 - seen)
    J = torch.cholesky_solve(S * seen.unsqueeze(-1), torch.linalg.cholesky(inner)).mT
    left = torch.eye(len(S), dtype=S.dtype, device=S.device) - J
    return J, left @ S @ left.mT


def _second(mean: Tensor, covariance: Tensor | None) -> Tensor:
    outer = mean.unsqueeze(-1) * mean.unsqueeze(-2)
    return outer if covariance is None else outer + covariance


def _sum(steps: Tensor) -> Tensor:
    """The sum of matrices over all steps and series."""
    return steps.flatten(0, -3).sum(0) if steps.dim() > 2 else steps


def _full(
    away: Tensor, spread: Tensor, known: Tensor, covariance: Tensor | None, joint: Tensor | None, weight: Tensor
) -> ResidualMoments:
    """Moments that all rows share: each step counts ``weight`` (1 or 0)."""
    w = weight[..., None, None]
    cross = away.unsqueeze(-1) * known.unsqueeze(-2)
    return ResidualMoments(
        weight.sum().reshape(1),
        _sum(w * _second(known, covariance)).unsqueeze(0),
        _sum(w * (cross if joint is None else cross + joint)),
        _sum(w * _second(away, spread)),
    )
