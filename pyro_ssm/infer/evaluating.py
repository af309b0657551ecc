"""Models and guides as they are used, not as they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(*programs: Any) -> Iterator[None]:
    """Switch off dropout and the like for a while; each submodule gets its own mode back. Other callables are ignored.

    >>> from torch import nn
    >>> from pyro_ssm.infer import evaluating
    >>> layer = nn.Dropout(0.5)
    >>> with evaluating(layer):
    ...     print(layer.training)
    False
    >>> layer.training
    True
    """
    modules = [module for program in programs if isinstance(program, nn.Module) for module in program.modules()]
    modes = [(module, module.training) for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
