"""Batched block-diagonal matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["block_diagonal", "block_rows"]


def block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """The block-diagonal matrix of some blocks, leading dims broadcast.

    .. math:: \\text{diag}(B_1, B_2, \\dots)

    Args:
        blocks: each ``(..., rows, columns)``; any numbers of rows and columns.

    Returns:
        ``(..., sum of rows, sum of columns)``, differentiable.

    >>> import torch
    >>> from pyro_ssm.ops import block_diagonal
    >>> block_diagonal([torch.ones(3, 1, 1), torch.ones(2, 2)])[0]
    tensor([[1., 0., 0.],
            [0., 1., 1.],
            [0., 1., 1.]])
    """
    lead = torch.broadcast_shapes(*(block.shape[:-2] for block in blocks))
    widths = [block.shape[-1] for block in blocks]
    rows, left = [], 0
    for block, width in zip(blocks, widths, strict=True):
        padded = pad(block, (left, sum(widths) - left - width))
        rows.append(padded.expand(lead + padded.shape[-2:]))
        left += width
    return torch.cat(rows, -2)


def block_rows(rows: Tensor) -> Tensor:
    """``(n, hidden)`` to the block-diagonal matrix ``(n, n * hidden)`` with the rows as blocks.

    >>> import torch
    >>> from pyro_ssm.ops.block_diagonal import block_rows
    >>> block_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[1., 2., 0., 0.],
            [0., 0., 3., 4.]])
    """
    eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return (eye.unsqueeze(-1) * rows).flatten(1)
