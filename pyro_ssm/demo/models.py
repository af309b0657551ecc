"""The three models of the demo: a deep Markov model, an exact linear-Gaussian one, and the season before."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.distributions import Normal
from torch import Tensor

from pyro_ssm import dynamics, emissions, guides, infer, predict
from pyro_ssm.demo.series import Task
from pyro_ssm.models import StateSpaceModel

__all__ = ["Outcome", "deep", "linear", "seasonal_naive"]


class Outcome(NamedTuple):
    """A fitted model and what it said of the held-out span.

    ``draws`` are ``(S, forecasts, season, 1)`` and ``log_scores`` ``(forecasts, season, 1)``, both in the units of the
    models (:class:`~pyro_ssm.demo.series.Task`).

    >>> from pyro_ssm.demo.models import Outcome
    >>> Outcome._fields[:3]
    ('name', 'bound', 'draws')
    """

    name: str
    bound: float  # nats per observation of the training windows; NaN where there is none
    draws: Tensor
    log_scores: Tensor
    seconds: float
    model: StateSpaceModel | None = None
    guide: guides.Guide | None = None


def deep(task: Task, *, num_steps: int = 900, num_samples: int = 500, seed: int = 0, progress: bool = True) -> Outcome:
    """A deep Markov model: neural motion and neural emission, fitted with a guide.

    .. math:: z_{k+1} \\sim N(z_k + f(z_k, u_k), \\sigma^2(z_k, u_k)), \\qquad y_k \\sim N(g(z_k, u_k), s^2(z_k, u_k))

    with g affine, s constant and a Gaussian chain as guide where the level wanders; else the guide is structured.
    Windows overlap, which is as if the series were seen more often; the reported bound is over windows that do not.

    >>> from pyro_ssm.demo import deep, sunspots
    >>> outcome = deep(sunspots(), num_steps=2, num_samples=10, progress=False)
    >>> outcome.draws.shape
    torch.Size([10, 50, 11, 1])
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    state_dim, inputs = 4, task.data.input_dim
    model = StateSpaceModel(
        dynamics.NormalInitial(state_dim),
        dynamics.MLPTransition(state_dim, (16,), input_dim=inputs, activation="tanh"),
        _emission(task, state_dim),
    )
    if task.anchored:
        with torch.no_grad():  # a level that wanders moves little in a step: noise of 0.1 to begin with
            model.transition.network.layers[-1].bias[state_dim:] = -2.25
    family = guides.GaussianMarkov if task.anchored else guides.Structured
    guide = family(model, hidden_dim=32, direction="both", input_dim=inputs)
    infer.fit(
        model,
        guide,
        task.windows(),
        optimizer=partial(torch.optim.AdamW, weight_decay=0.01),
        lr=5e-3,
        num_steps=num_steps,
        batch_size=32,
        schedule=infer.warmup_cosine(num_steps, num_steps // 20),
        annealing=infer.linear_annealing(0.1, num_steps // 3 + 1),
        progress=progress,
    )
    windows = task.windows(stride=task.window)
    bound = infer.evidence_lower_bound(model, guide, windows, num_samples=20).total / windows.mask.sum()
    return Outcome(
        "deep Markov", bound.item(), *_forecasts(task, model, guide, num_samples), _since(start), model, guide
    )


def linear(
    task: Task, *, num_steps: int = 250, num_samples: int = 500, seed: int = 0, progress: bool = True
) -> Outcome:
    """The linear-Gaussian model with as many states and the same inputs, by exact maximum likelihood (Kalman filter).

    It starts from a good guess: for a level that wanders, level and slope and two shocks that fade; else damped
    rotations with the period of the season and of half of it.

    >>> from pyro_ssm.demo import linear, sunspots
    >>> outcome = linear(sunspots(), num_steps=2, num_samples=10, progress=False)
    >>> outcome.log_scores.shape
    torch.Size([50, 11, 1])
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    inputs = task.data.input_dim
    first_guess, loading = (
        (_wandering(), (1.0, 0.0, 0.5, 0.5)) if task.anchored else (_rotations(task.season), (1.0, 0.5) * 2)
    )
    model = StateSpaceModel(
        dynamics.NormalInitial(4, covariance="full", scale=0.3),
        dynamics.LinearNormal(4, input_dim=inputs, covariance="full", matrix=first_guess, scale=0.1),
        emissions.LinearNormal(4, 1, input_dim=inputs, matrix=torch.tensor([loading]), scale=0.2),
    )
    windows = task.windows(stride=task.window)
    infer.fit(
        infer.Marginal(model, filter=infer.kalman_filter),
        None,
        windows,
        lr=2e-2,
        num_steps=num_steps,
        schedule=infer.warmup_cosine(num_steps, num_steps // 20),
        progress=progress,
    )
    with torch.no_grad():
        bound = infer.kalman_filter(model, windows).log_likelihood.sum() / windows.mask.sum()
    return Outcome("linear-Gaussian", bound.item(), *_forecasts(task, model, None, num_samples), _since(start), model)


def seasonal_naive(task: Task, *, num_samples: int = 500, seed: int = 0) -> Outcome:
    """The season before, moved by the mean change over a season, with the spread that such changes had in training.

    Where that entry is missing, the same season of an earlier cycle takes its place, with the changes over as many
    seasons.

    >>> from pyro_ssm.demo import seasonal_naive, sunspots
    >>> seasonal_naive(sunspots(), num_samples=10).draws.shape
    torch.Size([10, 50, 11, 1])
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    histories, (values, mask) = task.histories(), _training(task)
    law = None
    for lag in reversed(range(task.season, task.window, task.season)):
        changes = (values[lag:] - values[:-lag])[mask[lag:] & mask[:-lag]]
        before = slice(task.window - lag, task.window - lag + task.season)
        loc, scale = histories.values[:, before] + changes.mean(), changes.std().expand(len(histories), task.season, 1)
        if law is not None:
            seen = histories.mask[:, before]
            loc, scale = torch.where(seen, loc, law.loc), torch.where(seen, scale, law.scale)
        law = Normal(loc, scale)
    log_scores = law.log_prob(task.futures().values)
    return Outcome("seasonal naive", math.nan, law.sample((num_samples,)), log_scores, _since(start))


def _training(task: Task) -> tuple[Tensor, Tensor]:
    """The training span without trend, in the units of the models: a difference over a lag needs no level."""
    before = slice(0, task.num_training)
    return (task.data.values[before] - task.trend[before]) / task.scale, task.data.mask[before]


def _emission(task: Task, state_dim: int) -> emissions.Normal:
    """Neural mean and scale; affine, with one scale, where the level wanders: no network knows levels not yet seen."""
    if task.anchored:
        return emissions.Normal(state_dim, 1, input_dim=task.data.input_dim, scale=0.1)
    return emissions.Normal(
        state_dim, 1, (16,), input_dim=task.data.input_dim, activation="tanh", network_scale=True, floor=0.02
    )


def _forecasts(task: Task, model: StateSpaceModel, posterior: Any, num_samples: int) -> tuple[Tensor, Tensor]:
    histories, futures = task.histories(), task.futures()
    drawn = predict.forecast(model, posterior, histories, futures.times, num_samples, inputs=futures.inputs)
    return drawn.values, predict.heldout_log_score(model, posterior, histories, futures, num_samples)


def _wandering() -> Tensor:
    """Level and slope, and two shocks that fade ``(4, 4)``."""
    matrix = torch.diag(torch.tensor([1.0, 0.95, 0.6, 0.3]))
    matrix[0, 1] = 1.0
    return matrix


def _rotations(period: int) -> Tensor:
    """Two damped rotations ``(4, 4)``: once and twice around in a period."""
    blocks = []
    for turns, damping in ((1, 0.97), (2, 0.8)):
        angle = torch.tensor(2 * math.pi * turns / period)
        blocks.append(damping * torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2))
    return torch.block_diag(*blocks)


def _since(start: float) -> float:
    return time.perf_counter() - start
