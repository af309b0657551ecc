"""The index of a step, on the host or on the device, and what lies at it."""

from __future__ import annotations

from torch import Tensor

__all__ = ["Rows", "StepIndex", "row", "same_step", "steps_of"]

#: a step's index; in a captured run an int64 tensor ``(1,)`` on the device, which Python never reads
StepIndex = int | Tensor


def row(whole: Tensor, k: StepIndex, dim: int = -1) -> Tensor:
    """Slice k of a tensor along ``dim``, which is then gone.

    >>> import torch
    >>> from pyro_ssm.infer.smc.step_index import row
    >>> x = torch.tensor([[1, 2, 3], [4, 5, 6]])
    >>> row(x, 1), row(x, torch.tensor([1]))
    (tensor([2, 5]), tensor([2, 5]))
    """
    return whole.index_select(dim, k).squeeze(dim) if isinstance(k, Tensor) else whole.select(dim, k)


def same_step(a: StepIndex, b: StepIndex) -> bool:
    """Whether two indices are known to be of one step, without a look at tensors: these are compared by identity.

    >>> import torch
    >>> from pyro_ssm.infer.smc.step_index import same_step
    >>> same_step(3, 3), same_step(torch.tensor([3]), torch.tensor([3]))
    (True, False)
    """
    return a is b or (isinstance(a, int) and isinstance(b, int) and a == b)


def steps_of(k: StepIndex) -> slice | Tensor:
    """What selects step k of ``x[..., k, :]`` and leaves its axis: a slice, or the index on the device itself.

    >>> import torch
    >>> from pyro_ssm.infer.smc.step_index import steps_of
    >>> x = torch.tensor([[1, 2], [3, 4], [5, 6]])
    >>> x[steps_of(1), :], x[steps_of(torch.tensor([1])), :]
    (tensor([[3, 4]]), tensor([[3, 4]]))
    """
    return k if isinstance(k, Tensor) else slice(k, k + 1)


class Rows:
    """The slices of size 1 of a tensor along time, cut once; by an index on the device, one selected there.

    Args:
        whole: the tensor.
        dim: of time.

    >>> import torch
    >>> from pyro_ssm.infer.smc.step_index import Rows
    >>> rows = Rows(torch.tensor([[1, 2, 3], [4, 5, 6]]), -1)
    >>> rows[0].tolist(), rows[torch.tensor([2])].tolist()
    ([[1], [4]], [[3], [6]])
    """

    def __init__(self, whole: Tensor, dim: int) -> None:
        self._whole, self._dim, self._rows = whole, dim, whole.split(1, dim)

    def __getitem__(self, k: StepIndex) -> Tensor:
        return self._rows[k] if isinstance(k, int) else self._whole.index_select(self._dim, k)
