"""What every compiled operator needs: its registration with torch, the way a call takes, and the rows of its arguments.

An operator is a schema of ``torch.ops.pyro_ssm`` with a kernel (compiled, or torch), a shape rule, a derivative and a
batching rule (:func:`define`). The Python function that users call asks :func:`way_of` which of four ways its arguments
can go; the dispatcher costs several times as much as a short kernel, so plain tensors do without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyro_ssm.ops.composite import transformed

__all__ = [
    "MAX_DIMS",
    "Way",
    "address",
    "check_devices",
    "define",
    "has_tangent",
    "in_memory",
    "rows_of",
    "solid",
    "unbatched",
    "way_of",
]

MAX_DIMS = 6  # of csrc/rows.h: leading dims that cannot be merged

_LIBRARY = torch.library.Library("pyro_ssm", "FRAGMENT")
_HALVES = (torch.float16, torch.bfloat16)


class Way(Enum):
    """Which way a call goes.

    >>> from pyro_ssm.ops.operator import Way
    >>> [way.name for way in Way]
    ['KERNEL', 'GRADIENT', 'OPERATOR', 'TRANSFORM']
    """

    KERNEL = 0  # plain tensors and no gradient is wanted: call the kernel
    GRADIENT = 1  # plain tensors: an autograd function whose backward pass calls kernels
    OPERATOR = 2  # torch.compile, export, a tensor subclass or a dispatch mode: torch.ops.pyro_ssm
    TRANSFORM = 3  # torch.func, forward mode, torch.jit.trace: a function that these can look into


def way_of(*tensors: Tensor | None) -> Way:
    """The way that a call with these arguments goes.

    >>> import torch
    >>> from pyro_ssm.ops.operator import way_of
    >>> way_of(torch.zeros(2), None), way_of(torch.zeros(2, requires_grad=True))
    (<Way.KERNEL: 0>, <Way.GRADIENT: 1>)
    """
    found = [x for x in tensors if x is not None]
    if torch.compiler.is_compiling():
        return Way.TRANSFORM if _transforms() or has_tangent(*found) else Way.OPERATOR
    if any(transformed(x) for x in found if type(x) in _PLAIN) or torch.jit.is_tracing():
        return Way.TRANSFORM
    if any(type(x) not in _PLAIN for x in found) or _dispatch_modes():
        return Way.OPERATOR
    if torch.is_grad_enabled() and any(x.requires_grad for x in found):
        return Way.GRADIENT
    return Way.KERNEL


_PLAIN = (Tensor, torch.nn.Parameter)


def _dispatch_modes() -> int:
    """How many dispatch modes look on (they must see an operator); where torch does not tell, as if there were one."""
    count = getattr(torch._C, "_len_torch_dispatch_stack", None)
    return 1 if count is None else count()


def _transforms() -> bool:
    """Whether a transform of ``torch.func`` is at work: all that can be asked inside a graph that is being compiled."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and active()


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether a tensor carries a forward-mode tangent.

    >>> import torch
    >>> from pyro_ssm.ops.operator import has_tangent
    >>> has_tangent(torch.zeros(2), None)
    False
    """
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def define(
    name: str,
    arguments: str,
    results: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    batch: Callable[..., Any] | None = None,
) -> Any:
    """Register an operator ``torch.ops.pyro_ssm.NAME``, and return it.

    Under autocast its floating-point arguments are brought to their widest dtype, and nothing is narrowed.

    Args:
        name: of the operator.
        arguments: of its schema, ``"Tensor a, Tensor? mask, bool reverse"``.
        results: of its schema, ``"Tensor"``.
        kernel: for plain tensors of every device.
        fake: the results for tensors without data.
        setup: ``setup(ctx, inputs, output)`` keeps what the derivative needs.
        backward: ``backward(ctx, *grads)``, differentiable itself where ``torch.is_grad_enabled()``, or raises there.
        batch: ``batch(info, in_dims, *arguments) -> (results, dims)``, the rule of ``torch.func.vmap``.

    >>> import torch
    >>> from pyro_ssm.ops.operator import define
    >>> define.__name__
    'define'
    """
    _LIBRARY.define(f"{name}({arguments}) -> {results}")
    operator = getattr(torch.ops.pyro_ssm, name)
    qualified = f"pyro_ssm::{name}"
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, _without_tangents(name, kernel), device)
        _LIBRARY.impl(name, _autocast(operator, device.lower()), f"Autocast{device}")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup, lib=_LIBRARY)
    if batch is not None:
        torch.library.register_vmap(qualified, batch, lib=_LIBRARY)
    return operator


def _without_tangents(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    # torch.library knows no rule of forward mode: tangents would be dropped without a word, and under torch.func.jvp
    # the kernel does not see that there were any
    def run(*arguments: Any) -> Any:
        if getattr(forward_ad, "_current_level", -1) >= 0:
            raise NotImplementedError(
                f"torch.ops.pyro_ssm.{name} has no forward-mode derivative; the function of pyro_ssm.ops that calls it "
                "has one"
            )
        return kernel(*arguments)

    return run


def _autocast(operator: Any, device: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        dtypes = [x.dtype for x in arguments if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]
        widest = dtypes[0]
        for dtype in dtypes[1:]:
            widest = torch.promote_types(widest, dtype)
        with torch.autocast(device, enabled=False):
            return operator(*(x.to(widest) if isinstance(x, Tensor) and x.dtype in _HALVES else x for x in arguments))

    return run


def check_devices(name: str, **tensors: Tensor | None) -> None:
    """Raise unless all tensors are on one device.

    Raises:
        ValueError: names the argument that is elsewhere.

    >>> import torch
    >>> from pyro_ssm.ops.operator import check_devices
    >>> check_devices("scan", a=torch.zeros(1), b=None)
    """
    found = {key: x.device for key, x in tensors.items() if x is not None}
    if len(set(found.values())) > 1:
        first, device = next(iter(found.items()))
        other = next(key for key in found if found[key] != device)
        raise ValueError(
            f"{name}: `{other}` is on {found[other]} and `{first}` on {device}; move them to one device with .to(...)"
        )


def address(tensor: Tensor | None) -> int:
    """Where a tensor's numbers begin; 0 for None.

    >>> from pyro_ssm.ops.operator import address
    >>> address(None)
    0
    """
    return 0 if tensor is None else tensor.data_ptr()


def in_memory(x: Tensor) -> Tensor:
    """``x`` with its numbers in memory as they are: no pending conjugate or sign, no zeros without memory.

    >>> import torch
    >>> from pyro_ssm.ops.operator import in_memory
    >>> in_memory(torch.tensor([1j]).conj()).is_conj()
    False
    """
    if x.is_conj() or x.is_neg():
        return x.resolve_conj().resolve_neg()
    if x.data_ptr() == 0 and x.numel():
        return x.new_zeros(x.shape)
    return x


def solid(x: Tensor, event: int) -> Tensor:
    """``x`` with its last dims contiguous.

    >>> import torch
    >>> from pyro_ssm.ops.operator import solid
    >>> solid(torch.zeros(2, 3, 4).mT, 1).stride()
    (12, 3, 1)
    """
    expected, shape, stride = 1, x.shape, x.stride()
    for i in range(1, event + 1):
        if shape[-i] > 1 and stride[-i] != expected:
            return x.contiguous()
        expected *= shape[-i]
    return x


def rows_of(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]] | None:
    """Leading dims in the form of ``csrc/rows.h``, neighbours merged wherever that is possible for every tensor.

    Args:
        sizes: of the leading dims.
        strides: for each tensor, its strides over them; 0 where it is repeated.

    Returns:
        The sizes, and for each tensor its strides, all of length ``MAX_DIMS``; None where more dims are left.

    >>> from pyro_ssm.ops.operator import rows_of
    >>> rows_of([3, 2], [[20, 10], [0, 0]])
    ([6, 1, 1, 1, 1, 1], [[10, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    """
    merged: list[int] = []
    kept: list[list[int]] = [[] for _ in strides]
    for i in reversed(range(len(sizes))):  # the last dim first
        if sizes[i] == 1:
            continue
        if merged and all(of[i] == k[-1] * merged[-1] for of, k in zip(strides, kept, strict=True)):
            merged[-1] *= sizes[i]
            continue
        merged.append(sizes[i])
        for of, k in zip(strides, kept, strict=True):
            k.append(of[i])
    if len(merged) > MAX_DIMS:
        return None
    more = MAX_DIMS - len(merged)
    return merged + [1] * more, [k + [0] * more for k in kept]


def unbatched(info: Any, in_dims: Sequence[int | None], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Arguments of a batching rule with the batch in front: a size of 1 where an argument has none.

    >>> import torch
    >>> from pyro_ssm.ops.operator import unbatched
    >>> [tuple(x.shape) for x in unbatched(None, (1, None), [torch.zeros(2, 5), torch.zeros(3)])]
    [(5, 2), (1, 3)]
    """
    return [
        x if x is None else x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims, strict=True)
    ]
