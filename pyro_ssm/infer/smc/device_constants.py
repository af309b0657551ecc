"""Numbers written in Python, made on the device: a copy from the CPU cannot be captured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["DeviceConstants"]

_MOST = 64  # numbers, each of which is a kernel


class DeviceConstants(TorchFunctionMode):
    """``torch.tensor(0.5, device="cuda")`` and its kin fill memory on the device, instead of copying to it.

    Laws do this with each number that they are given: ``Normal(loc, 1.0)``. Lists of up to 64 numbers are filled one by
    one.

    >>> import torch
    >>> from pyro_ssm.infer.smc.device_constants import DeviceConstants
    >>> with DeviceConstants():
    ...     torch.tensor([[1, 2], [3, 4]], device="meta"), torch.tensor([0.5, 2])
    (tensor(..., device='meta', size=(2, 2), dtype=torch.int64), tensor([0.5000, 2.0000]))
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor or func is torch.as_tensor:
            made = _filled(args[0] if args else kwargs.get("data"), kwargs.get("dtype"), kwargs.get("device"))
        elif func is Tensor.new_tensor and len(args) == 2:
            like = args[0]
            made = _filled(args[1], kwargs.get("dtype", like.dtype), kwargs.get("device", like.device))
        else:
            made = None
        return func(*args, **kwargs) if made is None else made


def _filled(data: Any, dtype: torch.dtype | None, device: Any) -> Tensor | None:
    """The tensor of a number or of a nested list of a few; None where there is nothing to do."""
    if device is None or torch.device(device).type == "cpu":
        return None
    if not isinstance(data, (bool, int, float, list, tuple)):
        return None
    if any(isinstance(x, Tensor) for x in (data if isinstance(data, (list, tuple)) else ())):
        return None
    here = torch.tensor(data, dtype=dtype)
    if here.numel() > _MOST:
        return None
    numbers = [torch.full((), x, dtype=here.dtype, device=device) for x in here.flatten().tolist()]
    return torch.stack(numbers).reshape(here.shape) if numbers else here.to(device)
