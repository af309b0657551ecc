"""What structured blocks ask of a sequence and of a state, told before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.diagonal_scan import check_steps

__all__ = ["check_sequence", "complex_dtype", "leaves", "wide"]

_HALVES = (torch.float16, torch.bfloat16)


def leaves(state: Any) -> list[Tensor]:
    """The tensors of a state, a tensor or a nested tuple of tensors."""
    return [state] if isinstance(state, Tensor) else [leaf for part in state for leaf in leaves(part)]


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 where it is of half precision: what has complex states computes in float32."""
    return x.float() if x.dtype in _HALVES else x


def complex_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of complex states beside parameters of ``dtype``."""
    return torch.complex128 if dtype == torch.float64 else torch.complex64  # graphs know no `dtype.to_complex`


def check_sequence(
    name: str, u: Tensor, form: Any, state: Any, event: int | None, **of_steps: Tensor | None
) -> torch.Size:
    """The common leading dims of a call's arguments.

    Args:
        name: of the block.
        u: ``(..., time, features)``.
        form: what the block's state is like, without leading dims; its dtype and device are those of the block.
        state: that was given, or None.
        event: how many last dims of each leaf of a state must have their sizes; None: all that ``form`` has.
        of_steps: ``dt``, ``mask`` and ``reset``, ``(..., time)``.

    Raises:
        TypeError: a dtype that is of no use, or a state that is not built as ``form``.
        ValueError: another shape, precision or device.
    """
    like = leaves(form)[0]
    if not u.is_floating_point():
        raise TypeError(f"{name}: `u` must be real floating-point numbers, got {u.dtype}")
    if torch.float64 in (u.dtype, wide(like).real.dtype) and wide(like).real.dtype != u.dtype:
        raise ValueError(
            f"{name} of {like.real.dtype} got `u` of {u.dtype}. Give data and networks one precision: "
            "data.to(dtype=torch.float32), or model.double() and guide.double()"
        )
    check_steps(name, u, **of_steps)
    leads = {"u": u.shape[:-2]}
    leads |= {key: x.shape[:-1] for key, x in of_steps.items() if x is not None}
    devices = {"u": u.device} | {key: x.device for key, x in of_steps.items() if x is not None}
    if state is not None:
        leads["state"] = _check_state(name, form, state, event)
        devices["state"] = leaves(state)[0].device
    for key, device in devices.items():
        if device != like.device:
            raise ValueError(
                f"{name} is on {like.device} and `{key}` on {device}; move them to one device with .to(...)"
            )
    if len(set(leads.values())) == 1:
        return leads["u"]
    try:
        return torch.broadcast_shapes(*leads.values())
    except RuntimeError:
        found = ", ".join(f"`{key}` {tuple(shape)}" for key, shape in leads.items())
        raise ValueError(f"{name}: the leading dims of its arguments must broadcast, got {found}") from None


def _check_state(name: str, form: Any, state: Any, event: int | None) -> torch.Size:
    """The leading dims of a state that is built as ``form``."""
    way_out = "; take what `forward` or `step` returned, or `.start(shape)`"
    if isinstance(form, Tensor):
        if not isinstance(state, Tensor):
            raise TypeError(
                f"{name}: a state is a tensor (...{_sizes(form.shape)}), got {type(state).__name__}{way_out}"
            )
        dims = form.dim() if event is None else event
        sizes = form.shape[form.dim() - dims :]
        if state.dim() < dims or state.shape[state.dim() - dims :] != sizes:
            raise ValueError(f"{name}: `state` must be (...{_sizes(sizes)}), got shape {tuple(state.shape)}{way_out}")
        return state.shape[: state.dim() - dims]
    if not isinstance(state, tuple | list) or len(state) != len(form):
        got = f"{len(state)} parts" if isinstance(state, tuple | list) else type(state).__name__
        raise TypeError(f"{name}: a state is a tuple of {len(form)} parts, got {got}{way_out}")
    leads = [_check_state(name, part, given, event) for part, given in zip(form, state, strict=True)]
    try:
        return torch.broadcast_shapes(*leads)
    except RuntimeError:
        raise ValueError(
            f"{name}: the leading dims of the parts of `state` must broadcast, got {list(map(tuple, leads))}"
        ) from None


def _sizes(shape: torch.Size) -> str:
    return "".join(f", {size}" for size in shape)
