"""Structural time series: models of parts that add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_ssm.components import Emission, Initial
from pyro_ssm.dynamics import KnownInitial, Part, Parts, Stacked, stack_initials
from pyro_ssm.dynamics.structural import Aggregate, Aggregated, Aggregation, RunInInitial, sum_design
from pyro_ssm.emissions import DesignNormal
from pyro_ssm.models.state_space import StateSpaceModel

__all__ = ["structural"]


def structural(
    parts: Part | Parts | Mapping[str, Part],
    noise: float | Tensor | None = 1.0,
    *,
    aggregate: Aggregate | Sequence[Aggregate] | None = None,
    floor: float = 1e-6,
) -> StateSpaceModel:
    """An unobserved-components model: parts that add up, seen with noise or without,

    .. math:: y_k = x_k + s\\, \\varepsilon_k, \\qquad x_k = \\sum_i h_{i,k}^T z_{i,k}, \\qquad
        z_{i,k+1} = A_i z_{i,k} + L_i \\eta_{i,k}.

    An ordinary model: its parameters have the names of the parts (``model.transition.level.scale =
    PyroSample(...)``), the noise is ``model.emission.scale``, and the start is that of each part: diffuse for levels,
    trends, seasonals and coefficients, stationary for autoregressions and damped cycles. ``predict.decompose`` reads
    the parts off the smoothed states.

    With a diffuse start the model is improper and cannot be simulated; ``kalman_filter``, ``kalman_smoother``,
    ``sample_posterior``, ``Marginal`` and what stands on them take it exactly. Most parts move in fewer directions than
    their state has, so a path has no density: fit with ``Marginal``.

    Args:
        parts: one part, a sum (``Level() + Seasonal(12)``), or a mapping of names.
        noise: first value of the observation's standard deviation; None: no noise.
        aggregate: what is seen instead of x at every step: sums, means ... over periods. A sequence gives one column
            of y each, all of the same signal: ``[Aggregate("last"), Aggregate("sum")]`` is steps and sums beside each
            other. The noise is that of the value seen; noise of each step that is summed up with the rest is a part
            (``structural.Irregular``).
        floor: lower bound of the learnable noise.

    Returns:
        A ``StateSpaceModel`` with ``obs_dim`` 1, or one a column of ``aggregate``.

    Raises:
        TypeError: ``parts`` are not parts; or an aggregate that needs lags meets a part without a stationary law.

    Source: Harvey (1989), "Forecasting, Structural Time Series Models and the Kalman Filter"; Durbin and Koopman
    (2012), "Time Series Analysis by State Space Methods", ch. 3.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.dynamics.structural import Level, Seasonal
    >>> model = ssm.models.structural(Level(scale=0.1) + Seasonal(4), noise=0.5)
    >>> sorted(name for name in ssm.binding.parameter_names(model))
    ['emission.scale', 'transition.level.scale', 'transition.seasonal.scale']
    >>> data = ssm.TimeSeries(torch.arange(8.0), torch.tensor([1.0, 2, 3, 4, 1, 2, 3, 4]).unsqueeze(-1))
    >>> ssm.infer.kalman_filter(model, data).log_likelihood.shape
    torch.Size([8])
    """
    parts = Parts.of(parts)
    if aggregate is None:
        design = sum_design(parts)
        transition = Stacked(dict(parts.items()))
        initial: Initial = stack_initials(starts(parts))
        emission: Emission = DesignNormal(design, transition.state_dim, 1, scale=noise, floor=floor)
        return StateSpaceModel(initial, transition, emission)
    aggregates = [aggregate] if isinstance(aggregate, Aggregate) else list(aggregate)
    aggregation = Aggregation(sum_design(parts, len(aggregates)), aggregates)
    transition = Aggregated(dict(parts.items()), aggregation)
    emission = DesignNormal(aggregation, transition.state_dim, len(aggregates), scale=noise, floor=floor)
    return StateSpaceModel(aggregated_start(parts, transition), transition, emission)


def starts(parts: Parts) -> dict[str, Initial]:
    """Each part's initial law by its name."""
    return {name: part.start() for name, part in parts.items()}


def aggregated_start(parts: Parts, transition: Aggregated) -> Initial:
    """The parts' starts with running sums at 0, or, where there are lags, the stationary run-in."""
    aggregation = transition.aggregation
    if aggregation.num_lags:
        return RunInInitial(transition)
    laws = starts(parts)
    if aggregation.num_states:
        laws["running_sums"] = KnownInitial(torch.zeros(aggregation.num_states))
    return stack_initials(laws)
