"""A model with finite states as log-weights: what forward-backward reads off a bound model and its data."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import FiniteState, require
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import masked
from pyro_ssm.emissions import StateTable
from pyro_ssm.models.laws import batch_shape
from pyro_ssm.ops.finite import log_identity

__all__ = ["FiniteSystem", "check_observed", "emission_table", "finite_system", "held_inputs", "seen_steps"]

INSTEAD = "kalman_filter for linear-Gaussian models, SVI with a guide (infer.fit), or a particle filter"


class FiniteSystem(NamedTuple):
    """The log-weights of a hidden Markov model over one data set.

    >>> from pyro_ssm.infer.discrete.system import FiniteSystem
    >>> FiniteSystem._fields
    ('log_initial', 'log_matrix', 'log_emission', 'seen')
    """

    log_initial: Tensor  # (..., K)
    log_matrix: Tensor  # (..., time - 1 or 1, K, K)  the identity into a padded step
    log_emission: Tensor  # (*batch, time, K)  log p(y_k | z_k = j); 0 where nothing is seen
    seen: Tensor  # bool (*batch, time)  whether anything is


def finite_system(model: Any, data: TimeSeries, method: str) -> tuple[Any, FiniteSystem]:
    """Bind the model, check what ``method`` needs, and evaluate its log-weights at the times of ``data``.

    Returns:
        The bound model and its log-weights, in the widest dtype among them.

    Raises:
        TypeError: initial law or transition is not ``FiniteState``, or the model has a memory.
        ValueError: the data has no values, or the parts have different numbers of states.

    >>> from pyro_ssm.infer.discrete.system import finite_system
    >>> finite_system.__name__
    'finite_system'
    """
    require(model.initial, FiniteState, method, INSTEAD)
    require(model.transition, FiniteState, method, INSTEAD)
    check_observed(model, data, method)
    K = model.transition.num_states
    for name in ("initial", "emission"):
        found = getattr(getattr(model, name), "num_states", K)
        if found != K:
            raise ValueError(f"the model's transition has {K} states, its {name} {found}. Build them with the same K")
    bound = model.bind()
    times, inputs = data.times, data.inputs
    log_initial = bound.initial.log_weights(times[..., :1], held_inputs(inputs, slice(0, 1)))[..., 0, :]
    table = emission_table(bound, data, K, bound.emission.state_dim)
    if data.num_times > 1:
        log_matrix = bound.transition.log_matrix(times[..., :-1], times[..., 1:], held_inputs(inputs, slice(0, -1)))
    else:
        log_matrix = table.new_zeros(1, K, K)
    dtype = torch.promote_types(torch.promote_types(log_initial.dtype, log_matrix.dtype), table.dtype)
    log_initial, log_matrix, table = log_initial.to(dtype), log_matrix.to(dtype), table.to(dtype)
    if data.is_ragged:
        real = data.step_mask[..., 1:, None, None]
        log_matrix = torch.where(real, log_matrix, log_identity(K, log_matrix))
    return bound, FiniteSystem(log_initial, log_matrix, table, seen_steps(data))


def check_observed(model: Any, data: TimeSeries, method: str) -> None:
    """Raise unless the model has no memory and the data has the values that ``method`` needs."""
    if model.memory is not None:
        raise TypeError(
            f"{method} integrates the states out, but this model's memory ({type(model.memory).__name__}) follows the "
            "path that was drawn. Give past observations as inputs instead, or use SVI or a particle filter"
        )
    if data.values is None or data.mask is None:
        raise ValueError(f"{method} needs observations, but `data` has no values. Give TimeSeries(times, values)")
    if data.values.shape[-1] != model.emission.obs_dim:
        raise ValueError(
            f"`data.values` has {data.values.shape[-1]} columns, but the emission has obs_dim={model.emission.obs_dim}"
        )


def held_inputs(inputs: Tensor | None, k: slice) -> Tensor | None:
    """The inputs of the steps ``k``."""
    return None if inputs is None else inputs[..., k, :]


def seen_steps(data: TimeSeries) -> Tensor:
    """Where anything is observed, bool ``(*batch, time)`` at the latent times."""
    seen = data.mask.any(-1)
    if data.observed_index is None:
        return seen
    return seen.new_zeros(seen.shape[:-1] + (data.num_times,)).index_copy(-1, data.observed_index, seen)


def emission_table(bound: Any, data: TimeSeries, num_states: int, state_dim: int = 1) -> Tensor:
    """:math:`\\log p(y_k \\mid j)` for every index j, ``(*batch, time, K)``; 0 where nothing is seen or padded.

    The emission is called with each index as the first coordinate of the state, the others 0. A missing entry adds
    exactly 0; on a refined grid so does a time without observations.
    """
    lead = batch_shape(bound, data)
    steps = 1 if isinstance(bound.emission, StateTable) else data.num_observed_times  # tables do not vary over time
    index = torch.arange(num_states, dtype=data.values.dtype, device=data.values.device)
    state = index.reshape((num_states,) + (1,) * (len(lead) + 2))
    state = torch.nn.functional.pad(state, (0, state_dim - 1)).expand((num_states,) + (1,) * len(lead) + (steps, -1))
    inputs = data.inputs
    if inputs is not None and data.observed_index is not None:
        inputs = inputs[..., data.observed_index, :]
    law = bound.emission(state, data.observed_times, inputs)
    seen = law if bool(data.mask.all()) else masked(law, data.mask)
    terms = seen.log_prob(data.values)
    terms = terms.expand((num_states,) + lead + (data.num_observed_times,)).movedim(0, -1)
    if data.observed_index is None:
        return terms
    return terms.new_zeros(lead + (data.num_times, num_states)).index_copy(-2, data.observed_index, terms)
