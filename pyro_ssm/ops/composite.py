"""The way out of a hand-written pass: where it must be differentiated itself, or met by a transform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["composite_backward", "transformed"]


def transformed(x: Tensor) -> bool:
    """Whether a tensor is inside a ``torch.func`` transform (it has no memory of its own) or carries a tangent.

    >>> import torch
    >>> from pyro_ssm.ops.composite import transformed
    >>> found = []
    >>> y = torch.func.vmap(lambda x: found.append(transformed(x)) or x)(torch.zeros(3))
    >>> found, transformed(y)
    ([True], False)
    """
    try:
        x.data_ptr()
    except RuntimeError:
        return True
    return torch.autograd.forward_ad.unpack_dual(x).tangent is not None


def composite_backward(
    reference: Callable[..., Any], args: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of a plain reference, themselves differentiable where a graph is asked for.

    A hand-written backward that is itself differentiated gives silently wrong second derivatives; under
    ``create_graph=True`` (``torch.is_grad_enabled()`` in the backward) an op goes this way instead.

    Args:
        reference: the plain form of the op, of all ``args``.
        args: the op's arguments, tensors and others.
        needed: ``ctx.needs_input_grad``.
        grads: gradients of the outputs, None where there is none.

    >>> import torch
    >>> from pyro_ssm.ops.composite import composite_backward
    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> composite_backward(lambda x, n: x**n, (x, 3), (True, False), [torch.tensor(1.0)])[0].detach()
    tensor(12.)
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # views: one argument may depend on another, and what goes through that one is its own gradient's
        args = [arg.view_as(arg) if wanted else arg for arg, wanted in zip(args, needed, strict=True)]
        outputs = reference(*args)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        pairs = [(x, g) for x, g in zip(outputs, grads, strict=True) if g is not None and x.requires_grad]
        inputs = [arg for arg, wanted in zip(args, needed, strict=True) if wanted]
        if not pairs:
            return tuple(None for _ in needed)
        outputs, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=create_graph, allow_unused=True))
    return tuple(next(found) if wanted else None for wanted in needed)
