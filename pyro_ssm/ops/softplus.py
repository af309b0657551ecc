"""The softplus, whose slope is known from its value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.composite import transformed

__all__ = ["softplus", "softplus_"]


def softplus(x: Tensor) -> Tensor:
    """:math:`y = \\log(1 + e^x)`, elementwise.

    As ``torch.nn.functional.softplus``, with another backward pass: the slope is :math:`1 - e^{-y}`, so that nothing
    but the result is kept, which the next operation keeps anyway.

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
    if not (torch.is_grad_enabled() and x.requires_grad):
        return torch.nn.functional.softplus(x)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor or transformed(x):
        return torch.nn.functional.softplus(x)
    return _Softplus.apply(x)


def softplus_(x: Tensor) -> Tensor:
    """The same in place, for tensors outside any graph.

    >>> import torch
    >>> from pyro_ssm.ops.softplus import softplus_
    >>> softplus_(torch.zeros(2))
    tensor([0.6931, 0.6931])
    """
    return x.copy_(torch.nn.functional.softplus(x))


def through_softplus_(grad: Tensor, y: Tensor) -> Tensor:
    """``grad`` of a softplus whose result was ``y`` becomes, in place, that of its argument.

    >>> import torch
    >>> from pyro_ssm.ops.softplus import through_softplus_
    >>> through_softplus_(torch.ones(1), torch.tensor([2.0]).log())
    tensor([0.5000])
    """
    return grad.mul_(torch.expm1(-y)).neg_()


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.nn.functional.softplus(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return -grad * torch.expm1(-y)
