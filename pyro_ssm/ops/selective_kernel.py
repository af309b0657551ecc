"""``torch.ops.pyro_ssm.selective_scan``: the kernels of ``csrc/selective_scan.h``.

One operator serves :func:`~pyro_ssm.ops.selective_scan` (a head is a channel) and :func:`~pyro_ssm.ops.ssd` (the
channels of a head share a step and one decay).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_ssm.ops.batched_operator import Argument, BatchedOperator
from pyro_ssm.ops.selective_torch import RULES, selective_composite

__all__ = ["SELECTIVE_SCAN", "rule_of"]

CHUNK = 16  # of csrc/selective_scan.h: steps between the states that are kept


def rule_of(method: str) -> int:
    """The number of a method.

    Raises:
        ValueError: there is no such method.

    >>> from pyro_ssm.ops.selective_kernel import rule_of
    >>> rule_of("zoh")
    1
    """
    if method not in RULES:
        raise ValueError(f"selective_scan: `method` must be 'euler', 'zoh' or 'bilinear', got {method!r}")
    return RULES.index(method)


def _sizes(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[int, ...]:
    *_, softplus, groups, rule = rest
    return (*u.shape, dt.shape[2], groups, B.shape[2] // groups, A.shape[2], int(softplus), rule)


def _shapes(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[tuple[int, ...], ...]:
    batch, times, channels = u.shape
    n = B.shape[2] // rest[-2]
    kept = (batch, (times - 1) // CHUNK, n, channels) if times > CHUNK else (0,)
    return (batch, times, channels), (batch, channels, n), kept


#: of the arguments of :func:`~pyro_ssm.ops.selective_torch.selective_composite`
SELECTIVE_SCAN = BatchedOperator(
    "selective_scan",
    [
        Argument("u", 2, timed=True),
        Argument("dt", 2, timed=True),
        Argument("A", 2, solid=2),
        Argument("B", 2, timed=True),
        Argument("C", 2, timed=True),
        Argument("D", 1, optional=True),
        Argument("z", 2, timed=True, optional=True),
        Argument("bias", 1, optional=True),
        Argument("gap", 1, timed=True, solid=0, optional=True),
        Argument("mask", 1, differentiable=False, optional=True),
        Argument("reset", 1, differentiable=False, optional=True),
        Argument("initial", 2, solid=2, optional=True),
    ],
    "bool softplus, int groups, int rule",
    selective_composite,
    _sizes,
    _shapes,
    ("pyro_ssm_selective_forward", "pyro_ssm_selective_backward"),
    keeps=True,
    on_cuda=lambda softplus, groups, rule: rule == 0,
)
