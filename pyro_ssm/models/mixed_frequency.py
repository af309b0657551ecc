"""Dynamic factor models of series that are seen at different frequencies."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.dynamics import Parts
from pyro_ssm.dynamics.structural import AR, Aggregate, Aggregated, Aggregation, Design, ParallelAR
from pyro_ssm.emissions import DesignNormal
from pyro_ssm.models.state_space import StateSpaceModel
from pyro_ssm.models.unobserved_components import aggregated_start

__all__ = ["mixed_frequency_factor"]


def mixed_frequency_factor(
    obs_dim: int,
    low_frequency: Mapping[int, Aggregate | str],
    *,
    factors: int = 1,
    factor_order: int = 1,
    offset: float | Tensor | None = 0.0,
    noise: float | Tensor | None = None,
) -> StateSpaceModel:
    """A dynamic factor model in which some series are sums, means or growth rates over periods,

    .. math::
        x_{i,k} &= \\sum_f \\lambda_{if} g_{f,k} + e_{i,k}, \\qquad
        g_{f,k+1} = \\phi_{f,1} g_{f,k} + \\dots + \\eta_{f,k}, \\quad \\eta \\sim N(0, 1), \\\\
        e_{i,k+1} &= \\psi_i e_{i,k} + s_i \\varepsilon_{i,k}, \\qquad
        y_{i,k} = d_i + \\begin{cases} x_{i,k} & \\text{high frequency} \\\\
        \\text{aggregate of } x_i & \\text{low frequency, dated at the end of its period.} \\end{cases}

    Give ``times`` at the high frequency and mask (NaN) what was not seen; a nowcast is the smoothed or filtered value
    of a low-frequency column before it is published. The factors' innovations have scale 1 (which identifies the
    loadings up to sign and rotation). ``times`` one apart with the first at 0, and ``Aggregate(..., origin=0)``, mean
    that the record begins with a period.

    Args:
        obs_dim: number of series.
        low_frequency: column -> :class:`~pyro_ssm.dynamics.structural.Aggregate` or its kind (``"sum"``, ``"mean"``,
            ``"last"``, ``"growth"``: Mariano-Murasawa weights, for growth rates; three steps a period).
        factors: how many.
        factor_order: p of each factor's autoregression.
        offset: first value of ``offset`` d; None: none (standardised series).
        noise: first value of a further white observation noise; None: none.

    Parameters: ``emission.loadings`` ``(obs, factors)``, ``emission.offset`` ``(obs,)``, ``emission.scale`` ``(obs,)``,
    ``transition.factor.partial`` ``(factor_order,)`` (``factor_2`` ...), ``transition.own.coefficient`` ``(obs,)``,
    ``transition.own.scale`` ``(obs,)``. Everything starts in its stationary law.

    Raises:
        ValueError: a column or a size is wrong.

    Sources: Mariano and Murasawa (2003), "A new coincident index of business cycles based on monthly and quarterly
    series"; Banbura and Modugno (2014), "Maximum likelihood estimation of factor models on datasets with arbitrary
    pattern of missing data".

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.models.mixed_frequency_factor(3, {2: "growth"})
    >>> values = torch.randn(12, 3)
    >>> values[torch.arange(12) % 3 != 2, 2] = float("nan")  # a quarterly series, dated at the quarter's last month
    >>> ssm.infer.kalman_filter(model, ssm.TimeSeries(torch.arange(12.0), values)).log_likelihood.shape
    torch.Size([12])
    """
    check_size("obs_dim", obs_dim)
    check_size("factors", factors)
    for column in low_frequency:
        if not 0 <= column < obs_dim:
            raise ValueError(f"`low_frequency` names column {column}, but `obs_dim` is {obs_dim}, counted from 0")
    own = [_aggregate(low_frequency.get(column, "last")) for column in range(obs_dim)]
    kinds = list(dict.fromkeys(own))  # each kind of aggregate of the factors is carried once

    names = ["factor" if f == 0 else f"factor_{f + 1}" for f in range(factors)]
    parts = {name: AR(factor_order).named(name) for name in names} | {"own": ParallelAR(obs_dim)}
    for name in names:
        parts[name].get_parameter("scale_unconstrained").requires_grad_(False)

    state = factors * factor_order + obs_dim
    own_rows = torch.eye(state)[factors * factor_order :]
    factor_rows = torch.eye(state)[[f * factor_order for f in range(factors)]]
    design = Design(torch.cat([own_rows] + [factor_rows] * len(kinds)))
    aggregation = Aggregation(design, own + [kind for kind in kinds for _ in range(factors)])
    transition = Aggregated(parts, aggregation)
    which = torch.tensor([[obs_dim + kinds.index(kind) * factors + f for f in range(factors)] for kind in own])
    emission = DesignNormal(aggregation, transition.state_dim, obs_dim, factor_rows=which, offset=offset, scale=noise)
    return StateSpaceModel(aggregated_start(Parts(parts), transition), transition, emission)


def _aggregate(kind: Aggregate | str) -> Aggregate:
    return Aggregate(kind) if isinstance(kind, str) else kind
