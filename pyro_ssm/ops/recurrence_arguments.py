"""The arguments of a linear recurrence, checked before any kernel sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.operator import check_devices

__all__ = ["arranged"]


def arranged(
    kind: Any, a: Tensor, b: Tensor, initial: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments with equally many dims and one dtype; nothing is expanded.

    Raises:
        ValueError: too few dims, sizes that do not broadcast, a reset with another number of steps, another device.
        TypeError: a reset that is not boolean, or integers.

    >>> import torch
    >>> from pyro_ssm.ops.recurrence_arguments import arranged
    >>> from pyro_ssm.ops.recurrence_torch import Diagonal
    >>> a, b, *_ = arranged(Diagonal, torch.zeros(1, 2), torch.zeros(3, 4, 2).double(), None, None)
    >>> a.shape, a.dtype
    (torch.Size([1, 1, 2]), torch.float64)
    """
    name, (first, second), event = kind.name, kind.arguments, kind.event
    check_devices(name, **{second: b, first: a, "initial": initial, "reset": reset})
    pair = "" if event == 1 else ", 2"
    forms = {first: f"(..., time, channels{pair}{pair})", second: f"(..., time, channels{pair})"}
    for key, x in ((first, a), (second, b)):
        inner = 0 if event == 1 else 2 if x is a else 1
        if x.dim() < 2 + inner or x.shape[x.dim() - inner :] != (2,) * inner:
            raise ValueError(f"{name}: `{key}` must be {forms[key]}, got shape {tuple(x.shape)}")
    if initial is not None and initial.dim() < event:
        raise ValueError(f"{name}: `initial` must be (..., channels{pair}), got shape {tuple(initial.shape)}")
    shapes = [a.shape[: a.dim() - event + 1], b.shape]
    steps = {shape[-1 - event] for shape in shapes}
    count = max(steps) if 0 not in steps else 0
    if reset is not None:
        if reset.dtype != torch.bool:
            raise TypeError(f"{name}: `reset` must be boolean, got {reset.dtype}")
        if reset.dim() < 1 or reset.shape[-1] != count:
            raise ValueError(
                f"{name}: `reset` must be (..., time) with {count} step(s), got shape {tuple(reset.shape)}"
            )
        shapes.append(reset.shape + (1,) * event)
    if initial is not None:
        shapes.append(initial.shape[:-event] + (1,) + initial.shape[initial.dim() - event :])
    try:
        dims = len(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        given = {first: a, second: b, "initial": initial, "reset": reset}
        found = ", ".join(f"`{key}` {tuple(x.shape)}" for key, x in given.items() if x is not None)
        raise ValueError(
            f"{name}: `{first}` {forms[first]}, `{second}` {forms[second]}, `initial` (..., channels{pair}) and "
            f"`reset` (..., time) must have sizes that broadcast, got {found}"
        ) from None
    dtype = b.dtype
    for x in (a, initial):
        dtype = dtype if x is None or x.dtype == dtype else torch.promote_types(dtype, x.dtype)
    if not (dtype.is_floating_point or (dtype.is_complex and event == 1)):
        wanted = "floating-point numbers" + (", real or complex" if event == 1 else "")
        raise TypeError(f"{name}: `{first}` and `{second}` must be {wanted}, got {dtype}")
    initial = None if initial is None else _padded(initial.to(dtype), dims - 1)
    reset = None if reset is None else _padded(reset, dims - event)
    return _padded(a.to(dtype), dims + event - 1), _padded(b.to(dtype), dims), initial, reset


def _padded(x: Tensor, dims: int) -> Tensor:
    return x if x.dim() == dims else x[(None,) * (dims - x.dim())]
