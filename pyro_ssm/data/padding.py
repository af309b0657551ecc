"""Padding: series of unequal length in one rectangular tensor.

A padded step is not a missing observation. A missing entry has a state behind it; a padded step has none, and must add
nothing to any term. `lengths` tells the two apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["continue_times", "pad_sequences", "step_mask", "unpad_sequences"]


def step_mask(lengths: Tensor, num_times: int) -> Tensor:
    """Tells real steps from padding: True at step k exactly when k < length.

    Args:
        lengths: number of real steps, `(*batch,)` integers.
        num_times: size of the time axis.

    Returns:
        Booleans `(*batch, time)`.

    Example:
        >>> import torch
        >>> from pyro_ssm.data import step_mask
        >>> step_mask(torch.tensor([1, 3]), 3).int()
        tensor([[1, 0, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    return torch.arange(num_times, device=lengths.device) < lengths.unsqueeze(-1)


def pad_sequences(sequences: Sequence[Tensor], fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """Stacks sequences of unequal length, filling up at the end.

    Args:
        sequences: tensors `(time_i, *rest)` of one dtype and one `rest`.
        fill: the value of padded entries.

    Returns:
        The padded tensor `(series, max time, *rest)` and the lengths `(series,)`.

    Raises:
        ValueError: if there is no sequence, or the sequences differ in more than their first dimension.

    Example:
        >>> import torch
        >>> from pyro_ssm.data import pad_sequences
        >>> padded, lengths = pad_sequences([torch.ones(1, 2), torch.ones(3, 2)])
        >>> padded[..., 0].tolist(), lengths.tolist()
        ([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]], [1, 3])
    """
    if len(sequences) == 0:
        raise ValueError("`sequences` is empty; pad_sequences needs at least one sequence.")
    rest = sequences[0].shape[1:]
    for number, sequence in enumerate(sequences):
        if sequence.dim() == 0 or sequence.shape[1:] != rest:
            raise ValueError(
                f"`sequences[{number}]` has shape {tuple(sequence.shape)}, but the first has "
                f"{tuple(sequences[0].shape)}: "
                "all dimensions after the first (time) must be equal."
            )
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=sequences[0].device)
    return torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=fill), lengths


def unpad_sequences(padded: Tensor, lengths: Tensor) -> list[Tensor]:
    """Undoes `pad_sequences`.

    Args:
        padded: `(series, time, *rest)`.
        lengths: `(series,)`.

    Returns:
        One tensor `(length, *rest)` (a view) per series.

    Example:
        >>> import torch
        >>> from pyro_ssm.data import unpad_sequences
        >>> [x.tolist() for x in unpad_sequences(torch.tensor([[1, 0], [1, 2]]), torch.tensor([1, 2]))]
        [[1], [1, 2]]
    """
    return [sequence[:length] for sequence, length in zip(padded, lengths.tolist(), strict=True)]


def continue_times(times: Tensor, lengths: Tensor) -> Tensor:
    """Overwrites padded times so that they go on increasing, by repeating each series' last real gap.

    For a series of length L: t[L - 1 + j] = t[L - 1] + j (t[L - 1] - t[L - 2]), with a gap of 1 if L = 1. Padded steps
    so have positive gaps, and no law that divides by a gap, or takes its root, meets a zero there.

    Args:
        times: `(time,)` or `(*batch, time)`; a shared grid is continued after the longest series.
        lengths: `(*batch,)`.

    Returns:
        Times of the same shape.

    Example:
        >>> import torch
        >>> from pyro_ssm.data import continue_times
        >>> continue_times(torch.tensor([[0.0, 2.0, 0.0, 0.0]]), torch.tensor([2]))
        tensor([[0., 2., 4., 6.]])
    """
    if times.dim() == 1:
        lengths = lengths.max()
    last = (lengths - 1).unsqueeze(-1)
    last_time = times.gather(-1, last)
    gap = last_time - times.gather(-1, (last - 1).clamp(min=0))
    gap = torch.where(last > 0, gap, torch.ones_like(gap))
    steps = torch.arange(times.shape[-1], device=times.device) - last
    return torch.where(steps > 0, last_time + steps * gap, times)
