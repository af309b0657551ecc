"""Exact laws of what is to come."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.gaussian.kalman import kalman_filter
from pyro_ssm.infer.gaussian.results import DiffuseFiltered
from pyro_ssm.ops.kalman import matvec
from pyro_ssm.ops.linalg import tria

__all__ = ["GaussianForecast", "forecast"]


class GaussianForecast(NamedTuple):
    """The laws of future states and observations, one a time; covariances are ``scale_tril @ scale_tril.mT``.

    >>> from pyro_ssm.infer.gaussian import GaussianForecast
    >>> GaussianForecast._fields
    ('mean', 'scale_tril', 'state_mean', 'state_scale_tril', 'times')
    """

    mean: Tensor  # (*batch, H, obs)  of the observations, their noise included
    scale_tril: Tensor  # (*batch, H, obs, obs)
    state_mean: Tensor  # (*batch, H, state)
    state_scale_tril: Tensor  # (*batch, H, state, state)
    times: Tensor  # (H,) or (*batch, H), float64

    @property
    def exact(self) -> bool:
        """True: the laws are the model's own given its parameters."""
        return True


def forecast(model: Any, data: TimeSeries, times: Any, *, inputs: Any = None, method: str = "auto") -> GaussianForecast:
    """Exact laws of states and observations at future times, parameters given.

    .. math:: p(z_{T+h} \\mid y_{1:T}) = N(m, L L^T), \\qquad
        p(y_{T+h} \\mid y_{1:T}) = N(H m + d,\\; H L L^T H^T + R R^T)

    Each series goes on from its own end. For draws of whole future paths, or with a posterior over parameters, use
    :func:`pyro_ssm.predict.forecast`; a bound model whose parameters have sample dims gives one law a draw here.

    Args:
        model: linear-Gaussian; as for :func:`~pyro_ssm.infer.gaussian.kalman_filter`.
        data: with values.
        times: ``(H,)`` or ``(*batch, H)``, increasing and later than the last time of each series; or dates, where the
            times of ``data`` count dates.
        inputs: ``(H, input)`` or ``(*batch, H, input)``; ``inputs[k]`` holds from ``times[k]`` on. Wanted exactly if
            the data has inputs.
        method: of the filter.

    Returns:
        Differentiable with respect to parameters and values.

    Raises:
        TypeError, ValueError: as ``kalman_filter``; times that are not later; inputs that are missing or too many; a
            refined grid (its new gaps would not be refined: forecast the data on its own grid); a diffuse start that
            the data does not determine.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.gaussian import forecast
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> law = forecast(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)), times=[4.0, 6.0])
    >>> law.mean.shape, law.state_scale_tril.shape
    (torch.Size([3, 2, 1]), torch.Size([3, 2, 2, 2]))
    """
    if data.observed_index is not None:
        raise ValueError(
            "forecast on a refined grid: give the data before `refine`, or use predict.forecast, which refines new gaps"
        )
    longer, bound = data.extend(times, inputs), model.bind()
    filtered = kalman_filter(bound, longer, method=method)
    length = data.lengths if data.lengths is not None else torch.tensor(data.num_times, device=data.device)
    new = longer.num_times - int(length.max())
    at = length.unsqueeze(-1) + torch.arange(new, device=data.device)  # (H,) or (*batch, H)
    mean, root = (
        _pick(part, at, event) for part, event in ((filtered.predicted_mean, 1), (filtered.predicted_scale_tril, 2))
    )
    if isinstance(filtered, DiffuseFiltered) and bool(_pick(filtered.predicted_diffuse, at, 2).any()):
        raise ValueError(
            "forecast: the observations do not determine the diffuse start, so variances are infinite. Give the model "
            "a proper start (dynamics.NormalInitial)"
        )
    when = longer.times[at] if not longer.has_own_times else _pick(longer.times, at, 0)
    held = None if longer.inputs is None else _pick(longer.inputs, at, 1)
    look = bound.emission.affine(when, held)
    H, d, R = (part.to(mean.dtype) for part in look)
    spread = H @ root
    lead = torch.broadcast_shapes(spread.shape[:-2], R.shape[:-2])
    both = torch.cat([part.expand(lead + part.shape[-2:]) for part in (spread, R)], -1)
    return GaussianForecast(matvec(H, mean) + d, tria(both), mean, root, when)


def _pick(part: Tensor, at: Tensor, event: int) -> Tensor:
    """The times ``at`` of ``(*lead, time, *event)``, of which the last dims of lead are those of ``at``."""
    lead, tail = part.shape[: -event - 1] if event else part.shape[:-1], part.shape[part.dim() - event :]
    index = at.expand(lead + at.shape[-1:]).reshape(lead + at.shape[-1:] + (1,) * event)
    return part.gather(len(lead), index.expand(lead + at.shape[-1:] + tail))
