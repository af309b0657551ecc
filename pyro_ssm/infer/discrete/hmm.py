"""Exact inference in hidden Markov models: filter, smoother, best path and posterior paths.

Pure functions of a model and its data. The model's initial law and transition are ``FiniteState``; its emission may be
any law of the index. Missing entries, irregular and own time grids, inputs, ragged batches and batches of parameters go
through the same call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.discrete.system import FiniteSystem, finite_system
from pyro_ssm.ops.finite import (
    FiniteSteps,
    backward_kernels,
    best_path,
    finite_filter,
    finite_smoother,
    log_sum,
    sample_path,
)

__all__ = ["BestPath", "HMMFiltered", "HMMSmoothed", "hmm_filter", "hmm_smoother", "sample_posterior_states", "viterbi"]


class HMMFiltered(NamedTuple):
    """What :func:`hmm_filter` returns; ``*batch`` is ``(*draws, *batch)`` of parameters and data together.

    >>> from pyro_ssm.infer.discrete import HMMFiltered
    >>> HMMFiltered._fields
    ('log_likelihood', 'log_filtered', 'log_predicted')
    """

    log_likelihood: Tensor  # (*batch, time)  log p(y_k | y_<k); exactly 0 where nothing is observed
    log_filtered: Tensor  # (*batch, time, K)  log P(z_k = j | y_<=k)
    log_predicted: Tensor  # (*batch, time, K)  log P(z_k = j | y_<k)

    @property
    def exact(self) -> bool:
        """True: the likelihood and the laws are the model's own, not an approximation."""
        return True


class HMMSmoothed(NamedTuple):
    """What :func:`hmm_smoother` returns.

    >>> from pyro_ssm.infer.discrete import HMMSmoothed
    >>> HMMSmoothed._fields
    ('probs', 'pairwise', 'log_likelihood')
    """

    probs: Tensor  # (*batch, time, K)  P(z_k = j | y)
    pairwise: Tensor  # (*batch, time - 1, K, K)  P(z_k = i, z_{k+1} = j | y)
    log_likelihood: Tensor  # (*batch, time)  log p(y_k | y_<k)

    @property
    def exact(self) -> bool:
        """True: the likelihood and the laws are the model's own, not an approximation."""
        return True


class BestPath(NamedTuple):
    """What :func:`viterbi` returns.

    >>> from pyro_ssm.infer.discrete import BestPath
    >>> BestPath._fields
    ('states', 'log_prob')
    """

    states: Tensor  # (*batch, time)  whole numbers
    log_prob: Tensor  # (*batch,)  log p(path, y)


def hmm_filter(model: Any, data: TimeSeries, *, parallel: bool | None = None) -> HMMFiltered:
    """The forward recursion: exact laws of each state given the data up to it.

    .. math:: P(z_k = j \\mid y_{\\le k}), \\qquad \\log p(y) = \\sum_k \\log p(y_k \\mid y_{<k})

    In logarithms throughout: right in float32 for series of any length. A missing entry is integrated out; a padded
    step adds exactly 0 and carries the last law. On a refined grid the results live at the latent times.

    Args:
        model: a :class:`~pyro_ssm.models.StateSpaceModel`, bound, or unbound and without random parameters (inside a
            Pyro trace its random parameters are drawn). Parameters with sample dims give results with sample dims.
        data: with values.
        parallel: run over blocks of time side by side; None chooses by size and device.

    Returns:
        Differentiable with respect to parameters and values, by a hand-derived backward pass; second order too.

    Raises:
        TypeError: initial law or transition is not ``FiniteState``, or the model has a memory.
        ValueError: the data has no values, or the parts have different numbers of states.

    Source: Rabiner (1989), "A tutorial on hidden Markov models and selected applications in speech recognition".

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.CategoricalInitial(3), ssm.dynamics.MarkovChain(3), ssm.emissions.NormalTable(3, 2))
    >>> result = ssm.infer.hmm_filter(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(5, 4, 2)))
    >>> result.log_likelihood.shape, result.log_filtered.shape
    (torch.Size([5, 4]), torch.Size([5, 4, 3]))
    """
    _, system = finite_system(model, data, "hmm_filter")
    steps = forward(system, parallel)
    log_initial = system.log_initial.unsqueeze(-2).expand(steps.log_filtered[..., :1, :].shape)
    moved = log_sum(steps.log_filtered[..., :-1, :].unsqueeze(-1) + system.log_matrix, -2)
    return HMMFiltered(*steps, torch.cat([log_initial, moved], -2))


def hmm_smoother(model: Any, data: TimeSeries, *, parallel: bool | None = None) -> HMMSmoothed:
    """Exact marginal and pairwise probabilities of the states given all data.

    .. math:: P(z_k = j \\mid y), \\qquad P(z_k = i, z_{k+1} = j \\mid y)

    Arguments, missing entries, padding (a padded step repeats the last state), gradients and errors as
    :func:`hmm_filter`.

    Source: Kitagawa (1987), "Non-Gaussian state-space modeling of nonstationary time series".

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.CategoricalInitial(3), ssm.dynamics.MarkovChain(3), ssm.emissions.NormalTable(3, 2))
    >>> result = ssm.infer.hmm_smoother(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(5, 4, 2)))
    >>> result.probs.shape, result.pairwise.shape
    (torch.Size([5, 4, 3]), torch.Size([5, 3, 3, 3]))
    """
    _, system = finite_system(model, data, "hmm_smoother")
    return smooth(system, parallel)


def forward(system: FiniteSystem, parallel: bool | None = None) -> FiniteSteps:
    """The forward recursion, with terms of exactly 0 (not to rounding) where nothing is seen."""
    steps = finite_filter(*system[:3], parallel=parallel)
    zero = torch.zeros((), dtype=steps.log_likelihood.dtype, device=steps.log_likelihood.device)
    return steps._replace(log_likelihood=torch.where(system.seen, steps.log_likelihood, zero))


def smooth(system: FiniteSystem, parallel: bool | None = None) -> HMMSmoothed:
    """Forward-backward on log-weights."""
    steps = forward(system, parallel)
    kernels = backward_kernels(steps.log_filtered, system.log_matrix)
    kernels = kernels[..., : steps.log_filtered.shape[-2] - 1, :, :]
    probs = finite_smoother(steps.log_filtered, kernels, parallel=parallel)
    return HMMSmoothed(probs, kernels * probs[..., 1:, None, :], steps.log_likelihood)


def viterbi(model: Any, data: TimeSeries, *, parallel: bool | None = None) -> BestPath:
    """The most probable path given all data, and its log-probability together with the data.

    .. math:: \\operatorname{argmax}_{z_{1:T}} p(z_{1:T}, y_{1:T})

    Arguments, missing entries, padding (a padded step repeats the last state) and errors as :func:`hmm_filter`. Not
    differentiable.

    Source: Viterbi (1967), "Error bounds for convolutional codes and an asymptotically optimum decoding algorithm".

    >>> import torch, pyro_ssm as ssm
    >>> emission = ssm.emissions.NormalTable(2, 1, loc=torch.tensor([-1.0, 1.0]), scale=0.1)
    >>> model = ssm.StateSpaceModel(ssm.dynamics.CategoricalInitial(2), ssm.dynamics.MarkovChain(2), emission)
    >>> ssm.infer.viterbi(model, ssm.TimeSeries([0.0, 1.0, 2.0], [[-1.0], [0.9], [1.1]])).states
    tensor([0, 1, 1])
    """
    _, system = finite_system(model, data, "viterbi")
    return BestPath(*best_path(*system[:3], parallel=parallel))


def sample_posterior_states(
    model: Any, data: TimeSeries, sample_shape: torch.Size | tuple[int, ...] = (), *, parallel: bool | None = None
) -> Tensor:
    """Draws of the whole path given all data: filter forwards, sample backwards.

    .. math:: z_T \\sim p(z_T \\mid y_{1:T}), \\qquad z_k \\sim p(z_k \\mid z_{k+1}, y_{\\le k})

    Arguments, missing entries and errors as :func:`hmm_filter`; a padded step repeats the last state. Draws come from
    torch's global generator and are not differentiable.

    Returns:
        States as the model has them, ``(*sample_shape, *batch, time, 1)``, in its dtype.

    Source: Scott (2002), "Bayesian methods for hidden Markov models: recursive computing in the 21st century".

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.CategoricalInitial(3), ssm.dynamics.MarkovChain(3), ssm.emissions.NormalTable(3, 2))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(5, 4, 2))
    >>> ssm.infer.sample_posterior_states(model, data, (10,)).shape
    torch.Size([10, 5, 4, 1])
    """
    _, system = finite_system(model, data, "sample_posterior_states")
    with torch.no_grad():
        log_filtered = forward(system, parallel).log_filtered
        path = sample_path(log_filtered, backward_kernels(log_filtered, system.log_matrix), sample_shape)
    return path.unsqueeze(-1).to(log_filtered.dtype)
