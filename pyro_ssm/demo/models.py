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


def deep(
    task: Task,
    start: Outcome | None = None,
    *,
    num_steps: int | None = None,
    num_samples: int = 500,
    seed: int = 0,
    progress: bool = True,
) -> Outcome:
    """A deep Markov model, fitted with a guide.

    Where the level wanders, it contains the linear-Gaussian model: its motion is the linear one, whose noise a network
    f, g shifts and scales, and its guide is the posterior of the linear model, which an encoder corrects; both begin
    where the linear model's exact fit has ended, and learn what that model lacks:

    .. math:: z_{k+1} = A z_k + b + L e_k, \\qquad e_k \\sim N(f(z_k, u_k), g^2(z_k, u_k)), \\qquad
        y_k \\sim N(C z_k + D u_k + d, s^2)

    Else it is a neural motion and a neural emission from random first values, with a structured guide:

    .. math:: z_{k+1} \\sim N(z_k + f(z_k, u_k), g^2(z_k, u_k)), \\qquad y_k \\sim N(h(z_k, u_k), s^2(z_k, u_k))

    The reported bound is over windows that do not overlap; wall time includes that of ``start``, where it is used.

    Args:
        task: the series.
        start: the fitted linear model; by default it is fitted here.
        num_steps: of the optimiser.
        num_samples: draws of each forecast.
        seed: of torch's generator.
        progress: whether to show a progress bar.

    >>> from pyro_ssm.demo import deep, sunspots
    >>> outcome = deep(sunspots(), num_steps=2, num_samples=10, progress=False)
    >>> outcome.draws.shape
    torch.Size([10, 50, 11, 1])
    """
    began = time.perf_counter()
    torch.manual_seed(seed)
    if task.anchored:
        if start is None:
            start = linear(task, num_steps=num_steps or 250, num_samples=2, seed=seed, progress=progress)
        else:
            began -= start.seconds
        model, guide = _around(start.model, task)
        steps, annealing = num_steps or 200, None
    else:
        model, guide = _from_scratch(task)
        steps = num_steps or 900
        annealing = infer.linear_annealing(0.1, steps // 3 + 1)
    infer.fit(
        model,
        guide,
        task.windows(),
        optimizer=partial(torch.optim.AdamW, weight_decay=0.01),
        lr=5e-3,
        num_steps=steps,
        batch_size=32,
        schedule=infer.warmup_cosine(steps, steps // 20),
        annealing=annealing,
        progress=progress,
    )
    windows = task.windows(stride=task.window)
    bound = infer.evidence_lower_bound(model, guide, windows, num_samples=20).total / windows.mask.sum()
    return Outcome(
        "deep Markov", bound.item(), *_forecasts(task, model, guide, num_samples), _since(began), model, guide
    )


def linear(
    task: Task, *, num_steps: int = 250, num_samples: int = 500, seed: int = 0, progress: bool = True
) -> Outcome:
    """The linear-Gaussian model with as many states and the same inputs, by exact maximum likelihood (Kalman filter).

    The season enters what is seen, and where a window starts; forecasts before 1998 were better without it in the
    motion. It starts from a good guess: for a level that wanders, level and slope and two shocks that fade; else damped
    rotations with the period of the season and of half of it.

    >>> from pyro_ssm.demo import linear, sunspots
    >>> outcome = linear(sunspots(), num_steps=2, num_samples=10, progress=False)
    >>> outcome.log_scores.shape
    torch.Size([50, 11, 1])
    """
    began = time.perf_counter()
    torch.manual_seed(seed)
    model = _linear_gaussian(task)
    infer.fit(
        infer.Marginal(model, filter=infer.kalman_filter),
        None,
        task.windows(),
        lr=2e-2,
        num_steps=num_steps,
        batch_size=32,
        schedule=infer.warmup_cosine(num_steps, num_steps // 20),
        progress=progress,
    )
    windows = task.windows(stride=task.window)
    with torch.no_grad():
        bound = infer.kalman_filter(model, windows).log_likelihood.sum() / windows.mask.sum()
    return Outcome("linear-Gaussian", bound.item(), *_forecasts(task, model, None, num_samples), _since(began), model)


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


def _linear_gaussian(task: Task) -> StateSpaceModel:
    """The linear model with its first values; the season enters the first state and what is seen."""
    inputs = task.data.input_dim
    first_guess, loading = (
        (_wandering(), (1.0, 0.0, 0.5, 0.5)) if task.anchored else (_rotations(task.season), (1.0, 0.5) * 2)
    )
    return StateSpaceModel(
        dynamics.NormalInitial(4, input_dim=inputs, covariance="full", scale=0.3),
        dynamics.LinearNormal(4, covariance="full", matrix=first_guess, scale=0.1),
        emissions.LinearNormal(4, 1, input_dim=inputs, matrix=torch.tensor([loading]), scale=0.2),
    )


def _around(fitted: StateSpaceModel, task: Task) -> tuple[StateSpaceModel, guides.Guide]:
    """A deep model that is the fitted linear one so far, and a guide that is its exact posterior so far.

    The emission stays affine: no network knows levels not yet seen.
    """
    inner, core = _linear_gaussian(task), _linear_gaussian(task)
    for copy in (inner, core):
        copy.load_state_dict(fitted.state_dict())
    inputs = task.data.input_dim
    motion = dynamics.CorrectedTransition(inner.transition, (16,), input_dim=inputs)
    model = StateSpaceModel(inner.initial, motion, inner.emission)
    return model, guides.LinearGaussian(model, core, hidden_dim=32, input_dim=inputs)


def _from_scratch(task: Task) -> tuple[StateSpaceModel, guides.Guide]:
    inputs = task.data.input_dim
    model = StateSpaceModel(
        dynamics.NormalInitial(4),
        dynamics.MLPTransition(4, (16,), input_dim=inputs, activation="tanh"),
        emissions.Normal(4, 1, (16,), input_dim=inputs, activation="tanh", network_scale=True, floor=0.02),
    )
    return model, guides.Structured(model, hidden_dim=32, direction="both", input_dim=inputs)


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
