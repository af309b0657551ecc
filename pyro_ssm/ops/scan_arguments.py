"""What scans ask of their arguments, told before a kernel runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_shape", "check_together", "untimed"]

_HALVES = (torch.float16, torch.bfloat16)


def check_shape(name: str, argument: str, given: Tensor | None, wanted: Sequence[int]) -> None:
    """Raise unless the last dims are those that are wanted.

    Raises:
        ValueError: another shape.

    >>> import torch
    >>> from pyro_ssm.ops.scan_arguments import check_shape
    >>> check_shape("scan", "B", torch.zeros(7, 3, 2), (3, 2))
    """
    if given is not None and given.shape[-len(wanted) :] != tuple(wanted):
        raise ValueError(
            f"{name}: `{argument}` must be (..., {', '.join(map(str, wanted))}), got shape {tuple(given.shape)}"
        )


def check_together(name: str, **given: Tensor | None) -> None:
    """Raise unless all are on one device, and of one floating-point dtype; float16 and bfloat16 go with float32.

    Raises:
        TypeError: names the argument of another dtype.
        ValueError: names the argument on another device.

    >>> import torch
    >>> from pyro_ssm.ops.scan_arguments import check_together
    >>> check_together("scan", u=torch.zeros(1), dt=torch.zeros(1, dtype=torch.bfloat16), D=None)
    """
    (first, like), *others = ((key, x) for key, x in given.items() if x is not None)
    if not like.is_floating_point():
        raise TypeError(f"{name}: `{first}` must be real floating-point numbers, got {like.dtype}")
    for argument, x in others:
        if x.dtype is not like.dtype and x.dtype is not torch.bool:
            low = [torch.float32 if d in _HALVES else d for d in (x.dtype, like.dtype)]
            if low[0] != low[1]:
                raise TypeError(f"{name}: `{argument}` is {x.dtype} and `{first}` is {like.dtype}; give them one dtype")
        if x.device != like.device:
            raise ValueError(
                f"{name}: `{argument}` is on {x.device} and `{first}` on {like.device}; "
                "move them to one device with .to(...)"
            )


def untimed(name: str, argument: str, given: Tensor, event: int) -> Tensor:
    """A parameter ``(*event)`` or ``(..., 1, *event)``, which has a size of 1 where others have time, without that dim.

    Raises:
        ValueError: another size there.

    >>> import torch
    >>> from pyro_ssm.ops.scan_arguments import untimed
    >>> untimed("scan", "D", torch.zeros(5, 1, 3), 1).shape
    torch.Size([5, 3])
    """
    if given.dim() == event:
        return given
    if given.shape[-event - 1] != 1:
        raise ValueError(
            f"{name}: `{argument}` with leading dims has a size of 1 for time before its last {event} dim(s), "
            f"got shape {tuple(given.shape)}"
        )
    return given.squeeze(-event - 1)
