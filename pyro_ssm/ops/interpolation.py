"""Values between the times at which they are given, as polynomials of each interval."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "fill_forward",
    "fill_linear",
    "interpolate",
    "interpolation_coefficients",
    "interpolation_slope",
    "rectilinear_path",
]

#: kind -> coefficients of each interval
NUM_COEFFICIENTS = {"held": 1, "rectilinear": 1, "linear": 2, "cubic": 4}


def interpolation_coefficients(times: Tensor, values: Tensor, kind: str = "cubic") -> Tensor:
    """Coefficients of a piecewise polynomial through given values, one row for each interval.

    .. math:: u(t) = \\sum_j c_{kj}\\, (t - t_k)^j, \\qquad t \\in [t_k, t_{k+1})

    * ``"held"``: :math:`c_{k0} = u_k`. In time, ``"rectilinear"`` is the same: it holds, and jumps when the next value
      comes; what sets it apart is its path with the time beside it (:func:`rectilinear_path`).
    * ``"linear"``: :math:`c_{k1} = v_k = (u_{k+1} - u_k) / \\Delta_k`.
    * ``"cubic"``: Hermite's polynomial with backward differences, the slope :math:`v_{k-1}` at :math:`t_k` and
      :math:`v_k` at :math:`t_{k+1}`,

      .. math:: c_{k1} = v_{k-1}, \\quad c_{k2} = 2 (v_k - v_{k-1}) / \\Delta_k, \\quad
          c_{k3} = (v_{k-1} - v_k) / \\Delta_k^2, \\qquad v_{-1} = v_0.

      It has a continuous slope, and does not change up to :math:`t_k` when values after :math:`t_k` are added.

    After the last time the last value is held.

    Args:
        times: ``(time,)`` or ``(*batch, time)`` float64, increasing.
        values: ``(*batch, time, features)`` without missing entries (:func:`fill_forward`, :func:`fill_linear`).
        kind: see above.

    Returns:
        ``(*batch, time, degree + 1, features)`` flattened to ``(*batch, time, (degree + 1) * features)``, powers
        ascending, in units of the value over time to the power; differentiable in the values. The first ``features``
        columns are the values themselves.

    Raises:
        ValueError: an unknown kind.

    Source: Morrill, Kidger, Yang and Lyons (2021), "Neural controlled differential equations for online prediction
    tasks", section 3.

    >>> import torch
    >>> from pyro_ssm.ops import interpolation_coefficients
    >>> times, values = torch.tensor([0.0, 1.0, 3.0]).double(), torch.tensor([[0.0], [2.0], [4.0]])
    >>> interpolation_coefficients(times, values, "linear")
    tensor([[0., 2.],
            [2., 1.],
            [4., 0.]])
    """
    if kind not in NUM_COEFFICIENTS:
        raise ValueError(f"`kind` must be one of {', '.join(map(repr, NUM_COEFFICIENTS))}, got {kind!r}")
    size = NUM_COEFFICIENTS[kind]
    shape = torch.broadcast_shapes(values.shape[:-1], times.shape) + values.shape[-1:]
    values = values.expand(shape)
    if size == 1 or shape[-2] == 1:
        return torch.cat([values, values.new_zeros(shape[:-1] + ((size - 1) * shape[-1],))], -1)
    gap = times.diff(dim=-1).to(values).unsqueeze(-1)
    slope = values.diff(dim=-2) / gap
    columns = [slope]
    if kind == "cubic":
        before = torch.cat([slope[..., :1, :], slope[..., :-1, :]], -2)
        columns = [before, 2 * (slope - before) / gap, (before - slope) / gap.square()]
    rest = torch.cat(columns, -1)
    return torch.cat([values, torch.cat([rest, torch.zeros_like(rest[..., :1, :])], -2)], -1)


def interpolate(coefficients: Tensor, elapsed: Tensor, features: int) -> Tensor:
    """The value of each interval's polynomial, :math:`\\sum_j c_j\\, \\tau^j`.

    Args:
        coefficients: ``(..., (degree + 1) * features)`` of :func:`interpolation_coefficients`.
        elapsed: :math:`\\tau = t - t_k`, ``(..., 1)``, broadcasting.
        features: width of a value.

    Returns:
        ``(..., features)``; differentiable in both.

    >>> import torch
    >>> from pyro_ssm.ops import interpolate
    >>> interpolate(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0]), features=1)   # 1 + 2 * 2 + 3 * 4
    tensor([17.])
    """
    *lower, value = coefficients.split(features, -1)
    for c in reversed(lower):
        value = c + elapsed * value
    return value if lower else value.expand(torch.broadcast_shapes(value.shape, elapsed.shape[:-1] + (features,)))


def interpolation_slope(coefficients: Tensor, elapsed: Tensor, features: int) -> Tensor:
    """The derivative of each interval's polynomial, :math:`\\sum_j j\\, c_j\\, \\tau^{j-1}`; as :func:`interpolate`.

    >>> import torch
    >>> from pyro_ssm.ops import interpolation_slope
    >>> interpolation_slope(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0]), features=1)   # 2 + 2 * 3 * 2
    tensor([14.])
    """
    parts = coefficients.split(features, -1)
    if len(parts) == 1:
        return torch.zeros_like(interpolate(coefficients, elapsed, features))
    slopes = torch.cat([j * c for j, c in enumerate(parts)][1:], -1)
    return interpolate(slopes, elapsed, features)


def rectilinear_path(times: Tensor, values: Tensor) -> Tensor:
    """The knots of the rectilinear path: first the time goes on while the value is held, then the value jumps.

    .. math:: (t_1, u_1) \\to (t_2, u_1) \\to (t_2, u_2) \\to (t_3, u_2) \\to \\dots \\to (t_T, u_T)

    A controlled differential equation that is driven by it (linearly from knot to knot, in any clock) has seen at knot
    2 k the values up to :math:`t_{k+1}` and none after.

    Args:
        times: ``(time,)`` or ``(*batch, time)`` float64.
        values: ``(*batch, time, features)``.

    Returns:
        ``(*batch, 2 time - 1, 1 + features)``, the time since the first in the leading column.

    Source: Morrill et al. (2021), section 3.2.

    >>> import torch
    >>> from pyro_ssm.ops import rectilinear_path
    >>> rectilinear_path(torch.tensor([5.0, 6.0]).double(), torch.tensor([[3.0], [4.0]]))
    tensor([[0., 3.],
            [1., 3.],
            [1., 4.]])
    """
    shape = torch.broadcast_shapes(values.shape[:-1], times.shape)
    clock = (times - times[..., :1]).to(values).unsqueeze(-1).expand(shape + (1,))
    values = values.expand(shape + values.shape[-1:])
    twice = torch.cat([clock.repeat_interleave(2, -2)[..., 1:, :], values.repeat_interleave(2, -2)[..., :-1, :]], -1)
    return twice


def fill_forward(values: Tensor, mask: Tensor) -> Tensor:
    """Missing entries take the last observed value before them; 0 where there is none.

    Args:
        values: ``(*batch, time, features)``.
        mask: as ``values``, True where observed.

    Returns:
        As ``values``; differentiable.

    >>> import torch
    >>> from pyro_ssm.ops import fill_forward
    >>> fill_forward(torch.tensor([[0.0], [2.0], [0.0]]), torch.tensor([[False], [True], [False]])).squeeze(-1)
    tensor([0., 2., 2.])
    """
    found = values.gather(-2, _last_seen(mask).clamp_min(0))
    return torch.where(_last_seen(mask) >= 0, found, torch.zeros_like(found))


def fill_linear(times: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Missing entries lie on the line between the observed neighbours; before the first and after the last they hold.

    Args:
        times: ``(time,)`` or ``(*batch, time)`` float64.
        values: ``(*batch, time, features)``.
        mask: as ``values``, True where observed; a feature that is never observed is 0.

    Returns:
        As ``values``; differentiable.

    >>> import torch
    >>> from pyro_ssm.ops import fill_linear
    >>> times, seen = torch.tensor([0.0, 1.0, 4.0]).double(), torch.tensor([[True], [False], [True]])
    >>> fill_linear(times, torch.tensor([[0.0], [0.0], [8.0]]), seen).squeeze(-1)
    tensor([0., 2., 8.])
    """
    num_times = values.shape[-2]
    last = _last_seen(mask)
    coming = num_times - 1 - _last_seen(mask.flip(-2)).flip(-2)  # num_times where there is none
    has_last, has_next = last >= 0, coming < num_times
    left = torch.where(has_last, last, coming.clamp_max(num_times - 1))
    right = torch.where(has_next, coming, last.clamp_min(0))
    clock = times.unsqueeze(-1).expand(values.shape)
    t0, t1 = clock.gather(-2, left), clock.gather(-2, right)
    part = ((clock - t0) / torch.where(t1 > t0, t1 - t0, torch.ones_like(t0))).clamp(0, 1).to(values.dtype)
    line = torch.lerp(values.gather(-2, left), values.gather(-2, right), part)
    return torch.where(has_last | has_next, line, torch.zeros_like(line))


def _last_seen(mask: Tensor) -> Tensor:
    """The position of the last True at or before each step, -1 where there is none."""
    steps = torch.arange(mask.shape[-2], device=mask.device).unsqueeze(-1)
    return torch.where(mask, steps, torch.full_like(steps, -1)).cummax(-2).values
