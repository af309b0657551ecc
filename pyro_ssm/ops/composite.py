"""The differentiable way out of a hand-written backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["composite_backward"]


def composite_backward(
    reference: Callable[..., Any], args: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of a plain reference, themselves differentiable.

    A hand-written backward that is itself differentiated gives silently wrong second derivatives; under
    ``create_graph=True`` (``torch.is_grad_enabled()`` in the backward) an op goes this way instead.

    Args:
        reference: the plain form of the op, of all ``args``.
        args: the op's arguments, tensors and others.
        needed: ``ctx.needs_input_grad``.
        grads: gradients of the outputs.

    >>> import torch
    >>> from pyro_ssm.ops.composite import composite_backward
    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> composite_backward(lambda x, n: x**n, (x, 3), (True, False), [torch.tensor(1.0)])[0].detach()
    tensor(12.)
    """
    outputs = reference(*args)
    inputs = [arg for arg, wanted in zip(args, needed, strict=True) if wanted]
    found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=True, allow_unused=True))
    return tuple(next(found) if wanted else None for wanted in needed)
