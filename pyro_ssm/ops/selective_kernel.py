"""``torch.ops.pyro_ssm.selective_scan`` and its gradient: the kernels of ``csrc/selective_scan.h``, or torch.

One operator serves :func:`~pyro_ssm.ops.selective_scan` (a head is a channel) and :func:`~pyro_ssm.ops.ssd` (channels of
a head share a step and one decay). Its arguments stand in one shape, with one batch dim; a size of 1 stands for all.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.ops.compiled import library
from pyro_ssm.ops.composite import composite_backward
from pyro_ssm.ops.operator import Way, address, define

__all__ = ["Scan", "compiled", "run"]

CHUNK = 16  # of csrc/selective_scan.h: steps between the states that are kept
FIELDS = 58  # eight-byte fields of SelectiveArgs
DIFFERENTIABLE = ("u", "dt", "A", "B", "C", "D", "z", "bias", "gap", "initial")


class Scan(NamedTuple):
    """Arguments of the operator; ``batch or 1`` in front of each.

    >>> from pyro_ssm.ops.selective_kernel import Scan
    >>> Scan._fields[:3]
    ('u', 'dt', 'A')
    """

    u: Tensor  # (time, channels)
    dt: Tensor  # (time, heads); heads divide channels
    A: Tensor  # (heads, N), or (heads, 1): one decay for all states of a channel
    B: Tensor  # (time, groups * N); groups divide heads
    C: Tensor  # (time, groups * N)
    D: Tensor | None  # (heads)
    z: Tensor | None  # (time, channels)
    bias: Tensor | None  # (heads)
    gap: Tensor | None  # (time)
    mask: Tensor | None  # bool (time)
    reset: Tensor | None  # bool (time)
    initial: Tensor | None  # (channels, N)
    softplus: bool
    groups: int

    @property
    def batch(self) -> int:
        """How many rows there are."""
        sizes = {x.shape[0] for x in self[:12] if x is not None} - {1}  # type: ignore[union-attr]
        return sizes.pop() if sizes else 1
