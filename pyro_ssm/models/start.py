"""The first state as a random variable of its own, where a path is a function of it (and of noise)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.distributions import MarkovPath, SingularNormal

__all__ = ["known_start", "refuse_memory", "start_law"]


def start_law(first: Any, shape: torch.Size) -> MarkovPath:
    """The law of the first state as a path of one step: event ``(1, state)``.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.models.start import start_law
    >>> start_law(ssm.dynamics.NormalInitial(2)(torch.zeros(1), None), torch.Size([3])).sample().shape
    torch.Size([3, 1, 2])
    """
    return MarkovPath.over(lambda state, k, summary: first, 1, first.event_shape[0], batch_shape=shape)


def known_start(law: MarkovPath) -> Tensor | None:
    """The first state, where its law is a point; else None."""
    first = law._step(None, slice(0, 1), None)
    if isinstance(first, SingularNormal) and not bool(first._unbroadcasted_scale_tril.any()):
        return first.mean.expand(law.batch_shape + law.event_shape)
    return None


def refuse_memory(model: Any) -> None:
    """Raise for a model with memory, whose path is no function of its start and its noise alone.

    >>> import pyro_ssm as ssm
    >>> from pyro_ssm.models.start import refuse_memory
    >>> refuse_memory(ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1)))
    """
    if model.memory is not None:
        raise NotImplementedError(
            "a memory needs a path that is stepped: use NeuralSDE(..., method='euler', site='path'), a discretize(...) "
            "of the equation, or leave the memory out"
        )
