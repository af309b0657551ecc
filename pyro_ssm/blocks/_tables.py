"""Parameters with one row a state: looked up by an index, and on the simplex."""

from __future__ import annotations

from typing import Any

import torch
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyro_ssm.blocks.parameters import CholeskyAbove, SoftplusAbove

__all__ = [
    "cholesky_table",
    "log_of_probability",
    "pick",
    "positive_table",
    "simplex_parameter",
    "state_index",
    "table_of",
]


def state_index(state: Tensor) -> Tensor:
    """The index ``(..., time)`` that the first coordinate of a state holds."""
    return state[..., 0].round().long()


def pick(table: Tensor, index: Tensor, event_dims: int) -> Tensor:
    """Row ``index`` of a table: ``(..., time or 1, K, *event)`` or ``(K, *event)`` at ``(..., time)``.

    Returns ``(..., time, *event)``, leading dims broadcast.
    """
    if table.dim() == event_dims + 1:
        return table[index]
    event = table.shape[table.dim() - event_dims :]
    lead = torch.broadcast_shapes(table.shape[: -1 - event_dims], index.shape)
    where = index.expand(lead).reshape(lead + (1,) * (event_dims + 1)).expand(lead + (1,) + event)
    rows = table.expand(lead + table.shape[-1 - event_dims :]).gather(-1 - event_dims, where)
    return rows.squeeze(-1 - event_dims)


def table_of(name: str, init: Any, shape: tuple[int, ...]) -> Tensor:
    """``init`` as a table of ``shape``; fewer dims are read from the left, as one value a state."""
    value = torch.as_tensor(init, dtype=torch.get_default_dtype()).detach()
    if 0 < value.dim() < len(shape) and value.shape == shape[: value.dim()]:
        value = value.reshape(value.shape + (1,) * (len(shape) - value.dim()))
    try:
        return value.expand(shape).clone()
    except RuntimeError:
        raise ValueError(
            f"`{name}` must broadcast to shape {shape} (states first), got shape {tuple(value.shape)}"
        ) from None


def positive_table(name: str, init: Any, shape: tuple[int, ...], floor: float) -> Any:
    """A learnable table above ``floor``."""
    value = _above(name, table_of(name, init, shape), floor)
    return PyroParam(value, constraint=SoftplusAbove(floor), event_dim=len(shape))


def cholesky_table(name: str, init: Any, shape: tuple[int, ...], floor: float) -> Any:
    """Learnable lower triangular factors ``(*shape, shape[-1])``, from their diagonals, which stay above ``floor``."""
    value = _above(name, table_of(name, init, shape), floor)
    return PyroParam(torch.diag_embed(value), constraint=CholeskyAbove(floor), event_dim=len(shape) + 1)


def _above(name: str, value: Tensor, floor: float) -> Tensor:
    if not bool((value > floor).all()):
        raise ValueError(f"`{name}` must lie above its floor {floor}, got {value.tolist()}")
    return value


def simplex_parameter(name: str, value: Tensor) -> Any:
    """A learnable parameter whose last dim is a probability vector; zeros are structural: they stay zero."""
    if bool((value < 0).any()) or not torch.allclose(value.sum(-1), torch.ones(()), atol=1e-4):
        raise ValueError(f"`{name}` must hold probabilities that sum to 1 along the last dim, got {value.tolist()}")
    value = value / value.sum(-1, keepdim=True)
    return PyroParam(value, constraint=constraints.simplex, event_dim=value.dim())


def log_of_probability(p: Tensor) -> Tensor:
    """log p, -inf with a gradient of 0 where p is 0: what cannot happen stays so."""
    tiny = torch.finfo(p.dtype).tiny
    return torch.where(p > 0, p.clamp_min(tiny).log(), torch.full((), -torch.inf, dtype=p.dtype, device=p.device))
