"""The softplus, whose slope is known from its value."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.compiled import library
from pyro_ssm.ops.operator import Way, way_of

__all__ = ["softplus", "softplus_", "through_softplus_"]

_SOFTPLUS, _GRADIENT = 2, 3  # of csrc/elementwise.h
_LEAST = 256  # numbers from which a call of the library pays


def softplus(x: Tensor) -> Tensor:
    """:math:`y = \\log(1 + e^x)`, elementwise.

    As ``torch.nn.functional.softplus``, with another backward pass: the slope is :math:`1 - e^{-y}`, so that nothing
    but the result is kept, which the next operation keeps anyway. Compiled for contiguous float32 and float64 on a CPU.

    Args:
        x: any shape, floating point.

    Returns:
        The same shape; differentiable any number of times. Transforms of ``torch.func``, ``torch.compile`` and forward
        mode get torch's own function.

    >>> import torch
    >>> from pyro_ssm.ops import softplus
    >>> softplus(torch.tensor([-200.0, 0.0, 200.0]))
    tensor([  0.0000,   0.6931, 200.0000])
    """
    way = way_of(x)
    if way is Way.GRADIENT:
        return _Softplus.apply(x)
    return _value(x) if way is Way.KERNEL else torch.nn.functional.softplus(x)


def softplus_(x: Tensor) -> Tensor:
    """The same in place, for tensors outside any graph.

    >>> import torch
    >>> from pyro_ssm.ops.softplus import softplus_
    >>> softplus_(torch.zeros(2))
    tensor([0.6931, 0.6931])
    """
    return x if _compiled(_SOFTPLUS, x, x, x) else x.copy_(torch.nn.functional.softplus(x))


def through_softplus_(grad: Tensor, y: Tensor) -> Tensor:
    """``grad`` of a softplus whose result was ``y`` becomes, in place, that of its argument.

    >>> import torch
    >>> from pyro_ssm.ops.softplus import through_softplus_
    >>> through_softplus_(torch.ones(1), torch.tensor([2.0]).log())
    tensor([0.5000])
    """
    return grad if _compiled(_GRADIENT, y, grad, grad) else grad.mul_(torch.expm1(-y)).neg_()


def _value(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    return y if _compiled(_SOFTPLUS, x, x, y) else torch.nn.functional.softplus(x)


def _compiled(what: int, x: Tensor, other: Tensor, out: Tensor) -> bool:
    """Call the library, if it knows this case."""
    found = library()
    if found.functions is None or x.dtype not in (torch.float32, torch.float64) or x.numel() < _LEAST:
        return False
    for tensor in (x, other, out):
        if tensor.device.type != "cpu" or tensor.dtype != x.dtype or tensor.is_neg() or not tensor.is_contiguous():
            return False
    parallel = found.parallel_for if torch.get_num_threads() > 1 else 0
    fields = [x.dtype == torch.float64, what, x.numel(), parallel, x.data_ptr(), other.data_ptr(), out.data_ptr()]
    return found.functions.pyro_ssm_elementwise(ctypes.byref(_Fields(*fields))) == 0


_Fields = ctypes.c_int64 * 7  # of csrc/elementwise.h


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = _value(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        if way_of(grad, y) is not Way.KERNEL:
            return -grad * torch.expm1(-y)
        out = torch.empty_like(y)
        return out if _compiled(_GRADIENT, y, grad, out) else -grad * torch.expm1(-y)
