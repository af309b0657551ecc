"""Gradients against differences."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor


def assert_slope(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], step: float = 1e-5, rel: float = 1e-5, every: bool = False
) -> None:
    """The gradient along a random direction is the difference quotient; with ``every``, for each parameter by itself.

    ``loss`` gives the same number for the same float64 parameters (seed it).
    """
    slopes = torch.autograd.grad(loss(), parameters, materialize_grads=True)
    groups = [[i] for i in range(len(parameters))] if every else [range(len(parameters))]
    for group in groups:
        along = {i: torch.randn_like(parameters[i]) for i in group}

        def beside(size: float, along: dict[int, Tensor] = along) -> float:
            with torch.no_grad():
                before = {i: parameters[i].clone() for i in along}
                for i, direction in along.items():
                    parameters[i].add_(direction, alpha=size)
                value = float(loss())
                for i, kept in before.items():
                    parameters[i].copy_(kept)
            return value

        wanted = (beside(step) - beside(-step)) / (2 * step)
        found = sum(float((slopes[i] * direction).sum()) for i, direction in along.items())
        assert wanted != 0
        assert found == pytest.approx(wanted, rel=rel, abs=1e-6)
