"""Components of one kind, one a regime, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_ssm.components import Affine, Component

__all__ = ["regime_list", "stack_affine", "stack_regimes"]


def regime_list(regimes: Sequence[Component], kind: type, capability: type) -> Any:
    """The regimes as a registered list that ``bind`` walks; raises unless all are of one kind and one size."""
    regimes = list(regimes)
    if not regimes:
        raise ValueError(f"`regimes` must hold at least one {kind.__name__}, got none")
    for k, part in enumerate(regimes):
        if not isinstance(part, kind) or not isinstance(part, capability):
            raise TypeError(
                f"`regimes[{k}]` must be a components.{kind.__name__} that is {capability.__name__}, "
                f"got {type(part).__name__}"
            )
    for size in ("state_dim", "obs_dim"):
        sizes = {getattr(part, size, None) for part in regimes}
        if len(sizes) > 1:
            raise ValueError(f"all `regimes` must have one {size}, got {sorted(sizes)}")
    registered: Any = PyroModule[nn.ModuleList]
    return registered(regimes)


def stack_regimes(parts: Sequence[Tensor], event_dims: int) -> Tensor:
    """Tensors ``(..., time or 1, *event)`` as one ``(..., time or 1, K, *event)``."""
    parts = [part.unsqueeze(0) if part.dim() == event_dims else part for part in parts]
    lead = torch.broadcast_shapes(*(part.shape[: part.dim() - event_dims] for part in parts))
    return torch.stack([part.expand(lead + part.shape[part.dim() - event_dims :]) for part in parts], -1 - event_dims)


def stack_affine(laws: Sequence[Affine]) -> Affine:
    """Affine laws, one a regime, with a dim K before their events."""
    return Affine(*(stack_regimes(parts, event) for parts, event in zip(zip(*laws), (2, 1, 2))))
