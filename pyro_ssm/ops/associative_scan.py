"""All prefixes of an associative product in logarithmically many steps, in plain torch.

Written out in ordinary indexing rather than with torch's own ``associative_scan``, whose compiled gradients are wrong
for some leaves and which is not public.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["affine_scan", "associative_scan"]

Elements = tuple[Tensor, ...]


def associative_scan(
    combine: Callable[[Elements, Elements], Elements],
    elements: Sequence[Tensor],
    event_dims: Sequence[int],
    *,
    reverse: bool = False,
) -> Elements:
    """All prefixes (or suffixes) of an associative product over time.

    .. math:: s_k = a_1 \\otimes \\dots \\otimes a_k \\qquad \\text{(reverse: } s_k = a_k \\otimes \\dots \\otimes a_T)

    Odd and even: neighbours are combined, the half as long product is scanned in the same way, and the other half
    follows by one more combination: :math:`2 T` products in :math:`2 \\log_2 T` vectorised steps. Differentiable
    through ``combine``.

    Args:
        combine: ``(earlier, later) -> both``, for parts ``(..., time, *event)`` of any equal time size; the leading
            dims of what it returns are those of what it gets.
        elements: the parts of the elements, each ``(..., time, *event)``.
        event_dims: how many dims of each part stand after time.
        reverse: take suffixes; ``combine`` still gets the earlier one first.

    Returns:
        The parts of all prefixes, shapes as ``elements``.

    Source: Blelloch (1990), "Prefix sums and their applications".

    >>> import torch
    >>> from pyro_ssm.ops import associative_scan
    >>> associative_scan(lambda one, two: (one[0] * two[0],), [torch.tensor([1.0, 2.0, 3.0])], [0])[0]
    tensor([1., 2., 6.])
    """
    dims = [-event - 1 for event in event_dims]
    if reverse:
        flipped = [part.flip(dim) for part, dim in zip(elements, dims, strict=True)]
        found = _prefixes(lambda later, earlier: combine(earlier, later), tuple(flipped), dims)
        return tuple(part.flip(dim) for part, dim in zip(found, dims, strict=True))
    return _prefixes(combine, tuple(elements), dims)


def _prefixes(combine: Callable[[Elements, Elements], Elements], elements: Elements, dims: Sequence[int]) -> Elements:
    size = elements[0].shape[dims[0]]
    if size < 2:
        return elements

    def pick(parts: Elements, start: int, stop: int, step: int) -> Elements:
        index = [(..., slice(start, stop, step)) + (slice(None),) * (-dim - 1) for dim in dims]
        return tuple(part[at] for part, at in zip(parts, index, strict=True))

    pairs = combine(pick(elements, 0, size - 1, 2), pick(elements, 1, size, 2))
    odd = _prefixes(combine, pairs, dims)  # those that end at positions 1, 3, 5 ...
    whole = (size - 1) // 2
    even = pick(elements, 0, 1, 1)
    if whole:
        later = combine(pick(odd, 0, whole, 1), pick(elements, 2, size, 2))
        even = tuple(torch.cat([a, b], dim) for a, b, dim in zip(even, later, dims, strict=True))
    return tuple(_interleave(a, b, dim) for a, b, dim in zip(even, odd, dims, strict=True))


def _interleave(even: Tensor, odd: Tensor, dim: int) -> Tensor:
    """even[0], odd[0], even[1], ...; ``even`` may be longer by one."""
    size = odd.shape[dim]
    pairs = torch.stack([even.narrow(dim, 0, size), odd], dim).flatten(dim - 1, dim)
    return pairs if even.shape[dim] == size else torch.cat([pairs, even.narrow(dim, size, 1)], dim)


def affine_scan(
    A: Tensor, b: Tensor, initial: Tensor, *, reverse: bool = False, parallel: bool | None = None
) -> Tensor:
    """The linear recurrence of vectors, one matrix a step.

    .. math:: x_1 = \\text{initial}, \\quad x_{k+1} = A_k x_k + b_k \\qquad
        \\text{(reverse: } x_T = \\text{initial}, \\; x_k = A_k x_{k+1} + b_k)

    A loop, or logarithmically many steps (see :func:`associative_scan`), which do n times the work. Differentiable to
    any order.

    Args:
        A: ``(..., time - 1, n, n)``; b: ``(..., time - 1, n)``; a time size of 1 stands for all in one of them.
        initial: ``(..., n)``.
        reverse: run from the last time to the first.
        parallel: None: in parallel on a GPU, a loop on a CPU.

    Returns:
        All states ``(..., time, n)``.

    >>> import torch
    >>> from pyro_ssm.ops import affine_scan
    >>> affine_scan(torch.full((1, 1, 1), 0.5), torch.ones(2, 1), torch.tensor([4.0])).squeeze(-1)
    tensor([4.0000, 3.0000, 2.5000])
    """
    moves = torch.broadcast_shapes(A.shape[-3:-2], b.shape[-2:-1])[0]
    A = A.expand(A.shape[:-3] + (moves,) + A.shape[-2:])
    lead = torch.broadcast_shapes(A.shape[:-3], b.shape[:-2], initial.shape[:-1])
    b, initial = b.expand(lead + (moves,) + b.shape[-1:]), initial.expand(lead + initial.shape[-1:])
    if parallel is None:
        parallel = b.is_cuda
    if not parallel:
        states, steps = [initial], list(zip(A.unbind(-3), b.unbind(-2), strict=True))
        for A_k, b_k in reversed(steps) if reverse else steps:
            states.append((A_k @ states[-1].unsqueeze(-1)).squeeze(-1) + b_k)
        return torch.stack(states[::-1] if reverse else states, -2)
    last = [initial.unsqueeze(-2), b] if not reverse else [b, initial.unsqueeze(-2)]
    zero = torch.zeros_like(A[..., :1, :, :]) if moves else A.new_zeros(A.shape[:-3] + (1,) + A.shape[-2:])
    whole = [zero, A] if not reverse else [A, zero]

    def compose(inner: Elements, outer: Elements) -> Elements:
        return outer[0] @ inner[0], (outer[0] @ inner[1].unsqueeze(-1)).squeeze(-1) + outer[1]

    def combine(earlier: Elements, later: Elements) -> Elements:
        return compose(later, earlier) if reverse else compose(earlier, later)

    return associative_scan(combine, (torch.cat(whole, -3), torch.cat(last, -2)), (2, 1), reverse=reverse)[1]
