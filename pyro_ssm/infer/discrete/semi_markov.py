"""Exact inference in hidden semi-Markov models: filter, smoother, best path and posterior paths."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.dynamics import SemiMarkov, SemiMarkovInitial
from pyro_ssm.infer.discrete.system import check_observed, emission_table, seen_steps
from pyro_ssm.ops.semi_markov import (
    SemiMarkovSteps,
    SemiMarkovWeights,
    semi_markov_best_path,
    semi_markov_filter,
    semi_markov_sample,
    semi_markov_smoother,
)

__all__ = [
    "HSMMFiltered",
    "HSMMSmoothed",
    "SegmentPath",
    "hsmm_filter",
    "hsmm_smoother",
    "hsmm_viterbi",
    "sample_posterior_segments",
]


class HSMMFiltered(NamedTuple):
    """What :func:`hsmm_filter` returns; ``*batch`` is that of parameters and data together.

    >>> from pyro_ssm.infer.discrete import HSMMFiltered
    >>> HSMMFiltered._fields
    ('log_likelihood', 'log_filtered', 'log_remaining')
    """

    log_likelihood: Tensor  # (*batch, time)  log p(y_k | y_<k); exactly 0 where nothing is observed
    log_filtered: Tensor  # (*batch, time, K)  log P(z_k = j | y_<=k)
    log_remaining: Tensor  # (*batch, time, K, D)  log P(z_k = j, r steps remain | y_<=k)

    @property
    def exact(self) -> bool:
        """True: the likelihood and the laws are the model's own, not an approximation."""
        return True


class HSMMSmoothed(NamedTuple):
    """What :func:`hsmm_smoother` returns.

    >>> from pyro_ssm.infer.discrete import HSMMSmoothed
    >>> HSMMSmoothed._fields
    ('probs', 'starts', 'remaining', 'log_likelihood')
    """

    probs: Tensor  # (*batch, time, K)  P(z_k = j | y)
    starts: Tensor  # (*batch, time, K)  P(a segment of j starts at k | y)
    remaining: Tensor  # (*batch, time, K, D)  P(z_k = j, r steps remain | y)
    log_likelihood: Tensor  # (*batch, time)

    @property
    def exact(self) -> bool:
        """True: the likelihood and the laws are the model's own, not an approximation."""
        return True


class SegmentPath(NamedTuple):
    """What :func:`hsmm_viterbi` returns.

    >>> from pyro_ssm.infer.discrete import SegmentPath
    >>> SegmentPath._fields
    ('states', 'remaining', 'log_prob')
    """

    states: Tensor  # (*batch, time)  whole numbers
    remaining: Tensor  # (*batch, time)  steps that remain of the segment, this one included
    log_prob: Tensor  # (*batch,)  log p(path, y)


def hsmm_filter(model: Any, data: TimeSeries) -> HSMMFiltered:
    """The forward recursion of a hidden semi-Markov model, over pairs of state and remaining duration.

    .. math:: P(z_k = j, r_k = r \\mid y_{\\le k}), \\qquad \\log p(y) = \\sum_k \\log p(y_k \\mid y_{<k})

    K D + K^2 operations a step. The first segment starts at the first time; the last may go on beyond the data. A
    missing entry is integrated out; a padded step adds exactly 0 and carries the last law. With
    ``infer.Marginal(model, filter=hsmm_filter)`` parameters go through NUTS and SVI.

    Args:
        model: a :class:`~pyro_ssm.models.StateSpaceModel` of ``SemiMarkovInitial``, ``SemiMarkov`` and an emission with
            ``state_dim=2`` that reads the index alone (a table); bound, or without random parameters.
        data: with values.

    Returns:
        Differentiable in parameters and values.

    Raises:
        TypeError: the model is not semi-Markov, or has a memory.
        ValueError: the data has no values, or the parts have different numbers of states.

    Source: Yu (2010), "Hidden semi-Markov models", section 2.3 and 3.

    >>> import torch, pyro_ssm as ssm
    >>> transition = ssm.dynamics.SemiMarkov(3, ssm.dynamics.PoissonDuration(3, 20))
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.SemiMarkovInitial(transition), transition, ssm.emissions.NormalTable(3, 2, state_dim=2))
    >>> result = ssm.infer.hsmm_filter(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(5, 4, 2)))
    >>> result.log_likelihood.shape, result.log_filtered.shape, result.log_remaining.shape
    (torch.Size([5, 4]), torch.Size([5, 4, 3]), torch.Size([5, 4, 3, 20]))
    """
    weights, steps = _filtered(model, data, "hsmm_filter")
    return HSMMFiltered(steps.log_likelihood, steps.log_filtered.logsumexp(-1), steps.log_filtered)


def hsmm_smoother(model: Any, data: TimeSeries) -> HSMMSmoothed:
    """Exact probabilities of states, starts of segments and remaining durations given all data.

    Arguments, missing entries, padding (a padded step repeats the last state), gradients and errors as
    :func:`hsmm_filter`.

    >>> import torch, pyro_ssm as ssm
    >>> transition = ssm.dynamics.SemiMarkov(3, ssm.dynamics.PoissonDuration(3, 20))
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.SemiMarkovInitial(transition), transition, ssm.emissions.NormalTable(3, 2, state_dim=2))
    >>> ssm.infer.hsmm_smoother(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(5, 4, 2))).starts.shape
    torch.Size([5, 4, 3])
    """
    weights, steps = _filtered(model, data, "hsmm_smoother")
    pairs, starts = semi_markov_smoother(weights, steps)
    return HSMMSmoothed(pairs.sum(-1), starts, pairs, steps.log_likelihood)


def hsmm_viterbi(model: Any, data: TimeSeries) -> SegmentPath:
    """The most probable path of states and remaining durations given all data.

    Arguments, missing entries, padding and errors as :func:`hsmm_filter`. Not differentiable.

    >>> import torch, pyro_ssm as ssm
    >>> transition = ssm.dynamics.SemiMarkov(2, ssm.dynamics.CategoricalDuration(2, 2))
    >>> emission = ssm.emissions.NormalTable(2, 1, loc=torch.tensor([-1.0, 1.0]), scale=0.1, state_dim=2)
    >>> model = ssm.StateSpaceModel(ssm.dynamics.SemiMarkovInitial(transition), transition, emission)
    >>> ssm.infer.hsmm_viterbi(model, ssm.TimeSeries([0.0, 1.0, 2.0], [[-1.0], [-1.0], [1.1]])).states
    tensor([0, 0, 1])
    """
    path, log_prob = semi_markov_best_path(_weights(model, data, "hsmm_viterbi"))
    return SegmentPath(path[..., 0], path[..., 1], log_prob)


def sample_posterior_segments(model: Any, data: TimeSeries, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
    """Draws of the whole path given all data: filter forwards, sample backwards.

    Arguments, missing entries, padding and errors as :func:`hsmm_filter`. Draws come from torch's global generator and
    are not differentiable.

    Returns:
        States as the model has them (index, remaining steps), ``(*sample_shape, *batch, time, 2)``, in its dtype.

    >>> import torch, pyro_ssm as ssm
    >>> transition = ssm.dynamics.SemiMarkov(3, ssm.dynamics.PoissonDuration(3, 20))
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.SemiMarkovInitial(transition), transition, ssm.emissions.NormalTable(3, 2, state_dim=2))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(5, 4, 2))
    >>> ssm.infer.sample_posterior_segments(model, data, (10,)).shape
    torch.Size([10, 5, 4, 2])
    """
    weights, steps = _filtered(model, data, "sample_posterior_segments")
    return semi_markov_sample(weights, steps, sample_shape).to(steps.log_filtered.dtype)


def _filtered(model: Any, data: TimeSeries, method: str) -> tuple[SemiMarkovWeights, SemiMarkovSteps]:
    weights = _weights(model, data, method)
    steps = semi_markov_filter(weights)
    zero = torch.zeros((), dtype=steps.log_likelihood.dtype, device=steps.log_likelihood.device)
    return weights, steps._replace(log_likelihood=torch.where(seen_steps(data), steps.log_likelihood, zero))


def _weights(model: Any, data: TimeSeries, method: str) -> SemiMarkovWeights:
    for name, kind in (("initial", SemiMarkovInitial), ("transition", SemiMarkov)):
        part = getattr(model, name)
        if not isinstance(part, kind):
            raise TypeError(
                f"{method} needs a semi-Markov model, got {name} {type(part).__name__.removeprefix('Bound')}. "
                f"Build it with dynamics.{kind.__name__}; or use hmm_filter (finite states without durations), "
                "kalman_filter, or a particle filter"
            )
    check_observed(model, data, method)
    K = model.transition.num_states
    for name in ("initial", "emission"):
        found = getattr(getattr(model, name), "num_states", K)
        if found != K:
            raise ValueError(f"the model's transition has {K} states, its {name} {found}. Build them with the same K")
    bound = model.bind()
    parts = (
        bound.initial.log_weights()[..., 0, :],
        bound.transition.log_matrix()[..., 0, :, :],
        bound.transition.duration.log_probs()[..., 0, :, :],
        emission_table(bound, data, K, bound.emission.state_dim),
    )
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    initial, matrix, duration, emission = (part.to(dtype) for part in parts)
    return SemiMarkovWeights(initial, matrix, duration, emission, data.step_mask if data.is_ragged else None)
