"""What networks of a component see: the state, the inputs, the memory and the time gap, side by side.

And what a user's own function of the state and the inputs gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["StateFunction", "check_function", "check_state", "concatenate", "function_value", "inputs_of"]

StateFunction = Callable[[Tensor, Tensor | None], Tensor]  # f(state, inputs)

_SHORTEST_GAP = 1e-6  # the logarithm of a gap of zero, as padding may have, would be a NaN in the gradient


def check_state(component: Any, state: Tensor) -> None:
    """Raise unless the last dimension of ``state`` is the component's ``state_dim``."""
    if state.shape[-1] != component.state_dim:
        raise ValueError(
            f"{_name(component)} has state_dim={component.state_dim}, got a state of shape {tuple(state.shape)}; "
            "the last dimension must be the state"
        )


def inputs_of(component: Any, inputs: Tensor | None, like: Tensor) -> Tensor | None:
    """The inputs in the dtype of ``like``, or None for a component of ``input_dim=0``, which ignores them."""
    if component.input_dim == 0:
        return None
    return _given(component, "inputs", "input_dim", inputs, component.input_dim).to(like.dtype)


def concatenate(
    component: Any, state: Tensor, inputs: Tensor | None, memory: Tensor | None, gap: Tensor | None = None
) -> Tensor:
    """``(..., time, state + input_dim + memory_dim (+ 1))``: what a network sees; a gap enters as its logarithm."""
    check_state(component, state)
    parts = [state]
    if (given := inputs_of(component, inputs, state)) is not None:
        parts.append(given)
    if component.memory_dim:
        parts.append(_given(component, "memory", "memory_dim", memory, component.memory_dim))
    if gap is not None:
        parts.append(gap.clamp(min=_SHORTEST_GAP).log())
    if len(parts) == 1:
        return state
    lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(lead + part.shape[-1:]) for part in parts], -1)


def check_function(function: Any) -> StateFunction:
    """``function`` if it can be called."""
    if not callable(function):
        raise TypeError(f"`function` must be callable as f(state, inputs), got {function!r}")
    return function


def function_value(component: Any, state: Tensor, inputs: Tensor | None, size: int, meaning: str) -> Tensor:
    """``component.function(state, inputs)``, which must have shape ``(..., time, size)``."""
    check_state(component, state)
    value = component.function(state, inputs)
    if value.shape[-2:] != (state.shape[-2], size):
        raise ValueError(
            f"`function` must return {meaning} of shape (..., {state.shape[-2]}, {size}), "
            f"got {tuple(value.shape)} for a state of shape {tuple(state.shape)}"
        )
    return value


def _given(component: Any, name: str, size_name: str, value: Tensor | None, size: int) -> Tensor:
    if value is None:
        raise ValueError(
            f"{_name(component)} has {size_name}={size}, so it needs `{name}` of shape (..., time, {size}), got None. "
            f"Give the data (or the model) its {name}, or build the component with {size_name}=0"
        )
    if value.shape[-1] != size:
        raise ValueError(
            f"{_name(component)} has {size_name}={size}, got `{name}` of shape {tuple(value.shape)}; "
            f"its last dimension must be {size}"
        )
    return value


def _name(component: Any) -> str:
    return type(component).__name__.removeprefix("Bound")
