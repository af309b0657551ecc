"""Particles as trees: nested tuples, named tuples, lists and dicts of tensors ``(N, *batch, ...)`` and None."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.resampling import chosen_particles

__all__ = ["leaves", "take", "tree_map", "tree_mix", "tree_where"]


def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """``function`` of each leaf (and of those of ``others`` at its place); None stays None.

    >>> import torch
    >>> from pyro_ssm.infer.smc.tree import tree_map
    >>> tree_map(lambda x: x + 1, {"state": torch.tensor(1.0), "carry": (None, torch.tensor(2.0))})
    {'state': tensor(2.), 'carry': (None, tensor(3.))}
    """
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if isinstance(tree, dict):
        return {key: tree_map(function, value, *(other[key] for other in others)) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [tree_map(function, *row) for row in zip(tree, *others, strict=True)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    raise TypeError(
        f"particles are tensors in nested tuples, lists and dicts, got {type(tree).__name__}. "
        "Keep what is not a tensor outside the particles"
    )


def leaves(tree: Any) -> Iterator[Tensor]:
    """The tensors of a tree.

    >>> import torch
    >>> from pyro_ssm.infer.smc.tree import leaves
    >>> [leaf.item() for leaf in leaves((torch.tensor(1), [None, torch.tensor(2)]))]
    [1, 2]
    """
    if isinstance(tree, Tensor):
        yield tree
    elif tree is not None:
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(part)


def take(tree: Any, ancestors: Tensor, batch: torch.Size) -> Any:
    """The particles ``ancestors``, series by series: one gather a leaf.

    Args:
        tree: leaves ``(N, *batch, ...)``.
        ancestors: int64 ``(M, *batch)``.
        batch: the shape of the series.

    Returns:
        A tree with leaves ``(M, *batch, ...)``; differentiable in the leaves.

    >>> import torch
    >>> from pyro_ssm.infer.smc.tree import take
    >>> take(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1, 0], [1, 1]]), torch.Size([2]))
    tensor([[3., 2.],
            [3., 4.]])
    """
    return tree_map(lambda x: chosen_particles(x, ancestors, batch), tree)


def tree_mix(tree: Any, mixing: Tensor, batch: torch.Size, by: str) -> Any:
    """Averages of particles, series by series.

    Args:
        tree: leaves ``(N, *batch, ...)``.
        mixing: ``(*batch, M, N)``, rows that sum to 1.
        batch: the shape of the series.
        by: who averages, for the error.

    Returns:
        A tree with leaves ``(M, *batch, ...)``; differentiable in the leaves and in ``mixing``.

    Raises:
        TypeError: a leaf is not a floating-point tensor.

    >>> import torch
    >>> from pyro_ssm.infer.smc.tree import tree_mix
    >>> tree_mix(torch.tensor([1.0, 3.0]), torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.Size(), "this")
    tensor([2., 1.])
    """
    lead = 1 + len(batch)

    def leaf(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(
                f"{by} averages particles, and a part of them is {x.dtype}. Keep such parts out of the "
                'particles, or resample by ancestors (resampling="systematic")'
            )
        flat = x.expand(x.shape[:1] + batch + x.shape[lead:]).reshape(x.shape[:1] + batch + (-1,))
        mixed = (mixing.to(x.dtype) @ flat.movedim(0, -2)).movedim(-2, 0)
        return mixed.reshape(mixed.shape[:lead] + x.shape[lead:])

    return tree_map(leaf, tree)


def tree_where(condition: Tensor, new: Any, old: Any, batch_dims: int) -> Any:
    """``new`` in the series where ``condition`` ``(*batch)`` holds, ``old`` in the others.

    >>> import torch
    >>> from pyro_ssm.infer.smc.tree import tree_where
    >>> tree_where(torch.tensor([True, False]), torch.ones(3, 2, 1), torch.zeros(3, 2, 1), 1).sum(0)
    tensor([[3.],
            [0.]])
    """

    def leaf(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition.reshape(condition.shape + (1,) * (a.dim() - 1 - batch_dims)), a, b)

    return tree_map(leaf, new, old)
