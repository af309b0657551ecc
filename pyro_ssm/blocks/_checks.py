"""Checks of constructor arguments that several components share."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["check_choice", "check_positive", "check_size", "hidden_sizes"]


def check_size(name: str, value: int, least: int = 1) -> int:
    """``value`` if it is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}")
    return value


def check_positive(name: str, value: float) -> float:
    """``value`` if it is a positive, finite number."""
    if not 0 < value < float("inf"):
        raise ValueError(f"`{name}` must be positive and finite, got {value}")
    return float(value)


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """``value`` if it is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def hidden_sizes(hidden: int | Sequence[int]) -> tuple[int, ...]:
    """The sizes of hidden layers from one number or a sequence of them."""
    sizes = (hidden,) if isinstance(hidden, int) else tuple(hidden)
    return tuple(check_size("hidden", size) for size in sizes)
