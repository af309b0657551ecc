"""Short calls of a compiled operator again: what was found out about arguments of these shapes is not found out anew.

For a single step, checking and arranging the arguments costs several times as much as the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["PLAIN", "Plan", "like", "looked_at", "signature_of"]

PLAIN = (Tensor, torch.nn.Parameter)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)


def looked_at() -> bool:
    """Whether a dispatch mode, forward mode or a tracer may look at what plain tensors do.

    >>> from pyro_ssm.ops.call_plan import looked_at
    >>> looked_at()
    False
    """
    return _modes is None or _modes() > 0 or getattr(forward_ad, "_current_level", 0) >= 0 or torch.jit.is_tracing()


class Plan(NamedTuple):
    """A call of the forward kernel, but for the addresses.

    >>> from pyro_ssm.ops.call_plan import Plan
    >>> Plan._fields[0]
    'struct'
    """

    struct: Any
    places: Sequence[int]  # of the addresses of tensors
    result: int  # of the address of y, before that of the final state
    y: torch.Size
    final: torch.Size
    like_y: int  # the tensor, of those given, that is made like y: to allocate by it is quicker; -1 where there is none
    like_final: int


def signature_of(arguments: Sequence[Any]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """All that a plan depends on, but for the addresses and signs of the numbers; and the tensors among the arguments.

    >>> import torch
    >>> from pyro_ssm.ops.call_plan import signature_of
    >>> signature_of((torch.zeros(3), None))[0]
    (torch.Size([3]), (1,), torch.float32, True, None)
    """
    key: list[Any] = []
    tensors: list[Tensor] = []
    for x in arguments:
        if type(x) in PLAIN:
            tensors.append(x)
            key += (x.shape, x.stride(), x.dtype, x.is_cpu)
        else:
            key.append(x)
    return tuple(key), tensors


def like(out: Tensor, given: Sequence[Tensor]) -> int:
    """The place of the first of the tensors with shape, strides and dtype of a contiguous result; -1 where none is.

    >>> import torch
    >>> from pyro_ssm.ops.call_plan import like
    >>> like(torch.zeros(2), [torch.zeros(3), torch.ones(2)])
    1
    """
    for i, x in enumerate(given):
        if x.shape == out.shape and x.dtype == out.dtype and x.is_contiguous():
            return i
    return -1
