"""Forecasts: the model run on, step by step, from draws of its last state."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.predict.future import Future, future_of
from pyro_ssm.predict.posterior import PosteriorDraws, draw_chunks
from pyro_ssm.predict.remember import remember

__all__ = ["Forecast", "forecast"]


class Forecast(NamedTuple):
    """Draws of the future, sample dims leftmost.

    >>> from pyro_ssm.predict import Forecast
    >>> Forecast._fields
    ('values', 'states', 'times')
    """

    values: Tensor  # (S, *batch, H, obs)
    states: Tensor  # (S, *batch, H, state)
    times: Tensor  # (H,) or (*batch, H), float64


def forecast(
    model: StateSpaceModel,
    posterior: Any,
    data: TimeSeries,
    times: Any,
    num_samples: int | None = None,
    *,
    inputs: Any = None,
    chunk: int | None = None,
) -> Forecast:
    """Draws of states and observations at future times, observation noise included.

    .. math::
        \\theta, z_{1:T} \\sim p(\\theta, z \\mid y_{1:T}), \\qquad
        z_{T+h} \\sim p(z_{T+h} \\mid z_{T+h-1}, \\theta), \\qquad y_{T+h} \\sim p(y_{T+h} \\mid z_{T+h}, \\theta)

    Each series goes on from its own last time (``data.lengths``), with the true gap to the first new one. ``inputs[k]``
    holds on ``[t_k, t_{k+1})``: the last input of ``data`` drives the first step, and those given here the following
    ones. A memory has seen the path and the data, and then sees the draws. On a grid refined n times, each new gap is
    crossed in n steps too, and only the states at ``times`` are returned.

    Args:
        model: the state-space model.
        posterior: what :func:`~pyro_ssm.predict.posterior_draws` takes.
        data: what the posterior was given.
        times: ``(H,)`` or ``(*batch, H)``, later than the last time of each series, increasing; or dates, where the
            times of ``data`` count dates.
        num_samples: S; default: all draws that there are, 200 for guides and None.
        inputs: ``(H, input)`` or ``(*batch, H, input)``; wanted exactly if the data has inputs.
        chunk: draws at a time; bounds the memory that whole paths take.

    Returns:
        :class:`Forecast`; not differentiable; draws come from torch's global generator.

    Raises:
        ValueError: times that are not later, inputs that are missing or too many; and as ``posterior_draws``.
        TypeError: as ``posterior_draws``.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.predict import forecast
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> forecast(model, None, data, times=[4.0, 5.0, 7.5], num_samples=10).values.shape
    torch.Size([10, 3, 3, 1])
    """
    future = future_of(data, times, inputs)
    values, states = [], []
    for draws in draw_chunks(model, posterior, data, num_samples, chunk):
        steps = list(rollout(model, draws, data, future))
        values.append(torch.cat([step.values for step in steps], -2))
        states.append(torch.cat([step.states for step in steps], -2))
    return Forecast(torch.cat(values), torch.cat(states), future.times)


class Step(NamedTuple):
    """One or more future times together: states, the law of y given them, and the draw of y that a memory sees."""

    states: Tensor  # (S, *batch, n, state)
    law: Any  # batch (S, *batch, n), event (obs,)
    values: Tensor  # (S, *batch, n, obs)


@torch.no_grad()
def rollout(model: StateSpaceModel, draws: PosteriorDraws, data: TimeSeries, future: Future) -> list[Step]:
    """Run the model through the future; without memory the emission is called once, for all times."""
    bound = model.bind(draws.parameters or None)
    state = future.last(draws.states)
    past = remember(bound, draws.states, data)
    if past is None:
        path = [state := _move(bound, state, future, h, None) for h in range(future.num_times)]
        return [_emit(bound, torch.cat(path, -2), future, slice(0, future.num_times), None)]
    steps: list[Step] = []
    for h in range(future.num_times):
        state = _move(bound, state, future, h, past.summary)
        now = slice(h, h + 1)
        after = past.see_state(state, future.memory_gap(h, state), future.inputs_at(now))
        steps.append(_emit(bound, state, future, now, after))
        past.see_observation(steps[-1].values)
    return steps


def _move(bound: StateSpaceModel, state: Tensor, future: Future, h: int, summary: Tensor | None) -> Tensor:
    for time, next_time in future.legs(h):
        law = bound.transition(state, time, next_time, future.input_before(h), memory=summary)
        state = _over(law, state).sample()
    return state


def _emit(bound: StateSpaceModel, states: Tensor, future: Future, at: slice, summary: Tensor | None) -> Step:
    law = bound.emission(states, future.times[..., at], future.inputs_at(at), memory=summary)
    law = _over(law, states)
    return Step(states, law, law.sample())


def _over(law: Any, states: Tensor) -> Any:
    """The law expanded to all draws and series, which a law that ignores the state does not know."""
    return law if law.batch_shape == states.shape[:-1] else law.expand(states.shape[:-1])
