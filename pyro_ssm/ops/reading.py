"""Looks at values: a check may take one where a look costs little, and must not where a run is being captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

__all__ = ["may_read", "no_reading"]

_ALLOWED: ContextVar[bool] = ContextVar("pyro_ssm_reading_allowed", default=True)


def may_read() -> bool:
    """Whether Python may look at the value of a tensor: not in a captured or compiled run, which is replayed.

    What is guarded by it is a check or a shortcut: the numbers are the same without it.

    >>> from pyro_ssm.ops.reading import may_read
    >>> may_read()
    True
    """
    return not torch.compiler.is_compiling() and _ALLOWED.get()


@contextmanager
def no_reading() -> Iterator[None]:
    """A piece of code that is, or could be, captured: :func:`may_read` is False in it.

    >>> from pyro_ssm.ops.reading import may_read, no_reading
    >>> with no_reading():
    ...     may_read()
    False
    """
    before = _ALLOWED.set(False)
    try:
        yield
    finally:
        _ALLOWED.reset(before)
