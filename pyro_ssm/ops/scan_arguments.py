"""What scans ask of their arguments, told before a kernel runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = ["Asked", "check_arguments", "check_leads", "check_together", "in_float32", "untimed"]

_HALVES = (torch.float16, torch.bfloat16)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Asked(NamedTuple):
    """An argument, and what is asked of it (see :func:`check_arguments`).

    >>> import torch
    >>> from pyro_ssm.ops.scan_arguments import Asked
    >>> Asked(torch.zeros(5, 3), "time D").kind
    'real'
    """

    given: Tensor | None
    dims: str  # names of the last dims: one name, one size; "name|1" may also have a size of 1
    kind: str = "real"  # "real", "complex", "number" (either) or "bool"
    timeless: bool = False  # with leading dims it has a size of 1 where others have time


def check_arguments(name: str, **asked: Asked) -> None:
    """Raise unless dtypes, devices and sizes fit together; leading dims must broadcast.

    Args:
        name: of the function, for the message.
        asked: of each argument, in order; the first that has a dim of some name sets its size.

    Raises:
        TypeError: not a tensor, or numbers of another kind.
        ValueError: another size, device or number of dims, or leading dims that do not broadcast.

    >>> import torch
    >>> from pyro_ssm.ops.scan_arguments import Asked, check_arguments
    >>> u, B = torch.zeros(7, 3), torch.zeros(4, 2)
    >>> check_arguments("scan", u=Asked(u, "time D"), B=Asked(B, "D N"))
    Traceback (most recent call last):
        ...
    ValueError: scan: `B` must be (..., D, N) with D = 3, as `u` has it, got shape (4, 2)
    """
    sizes: dict[str, tuple[int, str]] = {}
    leads: dict[str, torch.Size] = {}
    device = None
    for argument, (given, dims, kind, timeless) in asked.items():
        if given is None:
            continue
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: `{argument}` must be a tensor, got {type(given).__name__}")
        if not _is(kind, given.dtype):
            raise TypeError(f"{name}: `{argument}` must be {_KINDS[kind]}, got {given.dtype}")
        if device is not None and given.device != device:
            raise ValueError(f"{name}: `{argument}` is on {given.device}, and others on {device}; use .to(...)")
        device = given.device
        names = dims.split()
        wanted = f"{name}: `{argument}` must be (..., {', '.join(dim.removesuffix('|1') for dim in names)})"
        if given.dim() < len(names):
            raise ValueError(f"{wanted}, got shape {tuple(given.shape)}")
        for dim, size in zip(names, given.shape[given.dim() - len(names) :], strict=True):
            dim, _, one = dim.partition("|")
            set_to, by = sizes.setdefault(dim, (size, argument))
            if size != set_to and not (one and size == 1):
                also = " (or 1)" if one else ""
                raise ValueError(
                    f"{wanted} with {dim} = {set_to}{also}, as `{by}` has it, got shape {tuple(given.shape)}"
                )
        if timeless:
            given = untimed(name, argument, given, len(names))
        leads[argument] = given.shape[: given.dim() - len(names)]
    check_leads(name, **leads)


_KINDS = {
    "real": "real floating-point numbers",
    "complex": "complex",
    "number": "floating-point or complex numbers",
    "bool": "boolean",
}


def _is(kind: str, dtype: torch.dtype) -> bool:
    if kind == "bool":
        return dtype is torch.bool
    return (kind != "complex" and dtype.is_floating_point) or (kind != "real" and dtype.is_complex)


def check_leads(name: str, **leads: Sequence[int]) -> None:
    """Raise unless leading dims broadcast.

    Raises:
        ValueError: names the first argument that does not fit, and those before it that it does not fit.

    >>> from pyro_ssm.ops.scan_arguments import check_leads
    >>> check_leads("scan", u=(2, 3), B=(3,), C=(2, 4))
    Traceback (most recent call last):
        ...
    ValueError: scan: the leading dims (2, 4) of `C` do not broadcast against (2, 3), those of `u`
    """
    so_far: tuple[int, ...] = ()
    for argument, lead in leads.items():
        try:
            so_far = tuple(torch.broadcast_shapes(so_far, lead))
        except RuntimeError:
            other = next((other for other in leads if not _broadcast(leads[other], lead)), "arguments before it")
            raise ValueError(
                f"{name}: the leading dims {tuple(lead)} of `{argument}` do not broadcast against "
                f"{tuple(leads.get(other, so_far))}, those of `{other}`"
            ) from None


def _broadcast(x: Sequence[int], y: Sequence[int]) -> bool:
    return all(i == j or 1 in (i, j) for i, j in zip(reversed(x), reversed(y), strict=False))


def in_float32(function: _Function) -> _Function:
    """A scan ``(u, ...) -> y`` or ``(y, ...)`` that computes halves in float32, autocast or not; y is of u's dtype.

    >>> import torch
    >>> from pyro_ssm.ops.scan_arguments import in_float32
    >>> doubled = in_float32(lambda u, by: (u * by.sqrt(), by))
    >>> [x.dtype for x in doubled(torch.ones(1).bfloat16(), torch.full((1,), 4.0))]
    [torch.bfloat16, torch.float32]
    """

    @functools.wraps(function)
    def run(u: Tensor, *arguments: Any, **named: Any) -> Any:
        if not isinstance(u, Tensor):
            return function(u, *arguments, **named)
        halves = u.dtype in _HALVES or any(_is_half(x) for x in (*arguments, *named.values()))
        device = u.device.type
        if not torch.amp.is_autocast_available(device) or not (halves or torch.is_autocast_enabled(device)):
            return function(u, *arguments, **named)
        wide = [x.float() if _is_half(x) else x for x in arguments]
        with torch.autocast(device, enabled=False):
            found = function(
                u.float() if u.dtype in _HALVES else u,
                *wide,
                **{key: x.float() if _is_half(x) else x for key, x in named.items()},
            )
        return (found[0].to(u.dtype), *found[1:]) if isinstance(found, tuple) else found.to(u.dtype)

    return run  # type: ignore[return-value]


def _is_half(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in _HALVES


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
