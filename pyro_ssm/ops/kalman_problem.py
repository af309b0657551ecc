"""The arguments of a Kalman filter in one shape: groups of series that share one covariance recursion.

Covariances do not depend on the data. Leading dims along which neither a covariance's parameters nor the pattern of
missing entries vary are *series* dims, the others *group* dims: the recursion runs once a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Layout", "Problem", "problem"]

EVENTS = {"y": 2, "m": 1, "L": 2, "F": 3, "b": 2, "Q": 3, "H": 3, "d": 2, "R": 3}  # with the time dim
OF_SERIES = ("y", "m", "b", "d")  # the others are arguments of the covariances


class Layout(NamedTuple):
    """Which leading dims are groups, which are series.

    >>> import torch
    >>> from pyro_ssm.ops.kalman_problem import Layout
    >>> layout = Layout(torch.Size([2, 3]), (0,), (1,))
    >>> layout.groups, layout.series, layout.of_group(torch.zeros(2, 1, 5), 1).shape
    (2, 3, torch.Size([2, 5]))
    """

    lead: torch.Size
    group_dims: tuple[int, ...]
    series_dims: tuple[int, ...]

    @property
    def groups(self) -> int:
        """Number of groups."""
        return torch.Size([self.lead[i] for i in self.group_dims]).numel()

    @property
    def series(self) -> int:
        """Number of series in a group."""
        return torch.Size([self.lead[i] for i in self.series_dims]).numel()

    def of_group(self, x: Tensor, event: int) -> Tensor:
        """``(*lead, *event)`` of an argument of the covariances -> ``(groups or 1, *event)``."""
        if x.dim() == event:
            return x.unsqueeze(0)
        shape = x.shape[x.dim() - event :]
        if x.shape[: x.dim() - event].numel() == 1:
            return x.reshape((1,) + shape)
        return self._moved(x, event, self.group_dims).reshape((self.groups,) + shape)

    def of_series(self, x: Tensor, event: int, whole: bool = False) -> Tensor:
        """``(*lead, *event)`` of an argument of the means -> ``(groups or 1, series or 1, *event)``."""
        if not self.lead and x.dim() == event:
            return x[None, None]
        shape = x.shape[x.dim() - event :]
        if not self.lead or (not whole and x.shape[: x.dim() - event].numel() == 1):
            return x.reshape((1, 1) + shape)
        moved = self._moved(x, event, self.group_dims + self.series_dims)
        return moved.reshape((self.groups, self.series) + shape)

    def _moved(self, x: Tensor, event: int, dims: tuple[int, ...]) -> Tensor:
        """Expanded along ``dims``, which come first in that order; the other leading dims, of size 1, are dropped."""
        depth = len(self.lead)
        x = x.reshape((1,) * (depth - (x.dim() - event)) + tuple(x.shape))
        shape = tuple(self.lead[i] if i in dims else 1 for i in range(depth)) + tuple(x.shape[depth:])
        rest = [i for i in range(depth) if i not in dims]
        return x.expand(shape).permute(*dims, *rest, *range(depth, depth + event))

    def from_series(self, x: Tensor, event: int) -> Tensor:
        """``(groups, series, *event)`` -> ``(*lead, *event)``."""
        if not self.lead:
            return x.view(x.shape[2:])
        return self._back(x.flatten(0, 1), event, self.group_dims + self.series_dims)

    def from_group(self, x: Tensor, event: int) -> Tensor:
        """``(groups, *event)`` -> ``(*lead, *event)`` with series dims of size 1."""
        if not self.lead:
            return x.view(x.shape[1:])
        return self._back(x, event, self.group_dims)

    def _back(self, x: Tensor, event: int, dims: tuple[int, ...]) -> Tensor:
        depth = len(self.lead)
        rest = [i for i in range(depth) if i not in dims]
        shape = x.shape[1:]
        x = x.reshape(tuple(self.lead[i] for i in dims) + (1,) * len(rest) + tuple(shape))
        order = list(dims) + rest
        return x.permute(*(order.index(i) for i in range(depth)), *range(depth, depth + event))

    def gradient(self, grad: Tensor, like: Tensor, event: int, of_series: bool) -> Tensor:
        """The gradient of an argument in its own shape and dtype."""
        if not self.lead:
            grad = grad.reshape(like.shape)
            return grad if grad.dtype == like.dtype else grad.to(like.dtype)
        if of_series:
            whole = grad.shape[0] * grad.shape[1] == self.groups * self.series
            back = self.from_series(grad, event) if whole else grad
        else:
            back = self.from_group(grad, event) if grad.shape[0] == self.groups else grad
        if back.numel() == like.numel():
            return back.reshape(like.shape).to(like.dtype)
        return back.sum_to_size(like.shape).to(like.dtype)


ALONE = Layout(torch.Size(), (), ())  # one series


class Problem(NamedTuple):
    """Arguments of :func:`pyro_ssm.ops.kalman_kernel.kalman_forward`, and the way back to the caller's shapes.

    >>> from pyro_ssm.ops.kalman_problem import Problem
    >>> Problem._fields
    ('arguments', 'layout', 'lengths')
    """

    arguments: tuple  # y, mask, move, lengths, at, m, L, F, b, Q, H, d, R, times
    layout: Layout
    lengths: Tensor | None  # (*lead): series of one group that end at different times


def problem(
    y: Tensor,
    mask: Tensor,
    m: Tensor,
    L: Tensor,
    F: Tensor,
    b: Tensor,
    Q: Tensor,
    H: Tensor,
    d: Tensor,
    R: Tensor,
    num_times: int,
    observed_index: Sequence[int] | None,
    step_mask: Tensor | None,
    look: bool = True,
) -> Problem:
    """Bring the arguments of :func:`~pyro_ssm.ops.kalman_filter` into the shape of the kernels, in float64.

    Args:
        look: read the masks: what is nowhere missing, or missing at the same entries in every series, need not split
            series into groups. Without it (under ``torch.compile``) the shapes of the masks decide.

    >>> import torch
    >>> from pyro_ssm.ops.kalman_problem import problem
    >>> one = torch.ones(1, 1, 1)
    >>> y = torch.zeros(5, 7, 1)
    >>> found = problem(y, y == y, one[0, 0], one[0], one, one[0], one, one, one[0], one, 7, None, None)
    >>> found.arguments[0].shape, found.arguments[1]
    (torch.Size([1, 5, 7, 1]), None)
    """
    values = {"y": y, "m": m, "L": L, "F": F, "b": b, "Q": Q, "H": H, "d": d, "R": R}
    seen: Tensor | None = mask
    moved = step_mask
    lengths: Tensor | None = None
    if look:
        seen = None if _all(mask) else mask
        moved = None if step_mask is None or _all(step_mask) else step_mask
        if seen is not None and seen.dim() > 2:
            seen, moved, lengths = _shared_pattern(seen, moved, observed_index)
    masks = [(x, event) for x, event in ((seen, 2), (moved, 1)) if x is not None]
    if all(x.dim() == EVENTS[name] for name, x in values.items()) and all(x.dim() == event for x, event in masks):
        layout = ALONE
    else:
        leads = {name: x.shape[: x.dim() - EVENTS[name]] for name, x in values.items()}
        of_covariance = [leads[name] for name in ("L", "F", "Q", "H", "R")]
        of_covariance += [x.shape[: x.dim() - event] for x, event in masks]
        covariance = torch.broadcast_shapes(*of_covariance)
        lead = torch.broadcast_shapes(covariance, *leads.values(), mask.shape[:-2])
        split = (1,) * (len(lead) - len(covariance)) + tuple(covariance)
        layout = Layout(
            lead,
            tuple(i for i, size in enumerate(split) if size != 1),
            tuple(i for i, size in enumerate(split) if size == 1),
        )
    double = {name: x if x.dtype == torch.float64 else x.to(torch.float64) for name, x in values.items()}
    shaped = {
        name: layout.of_series(x, EVENTS[name], whole=name == "y") if name in OF_SERIES
        else layout.of_group(x, EVENTS[name])
        for name, x in double.items()
    }  # fmt: skip
    if shaped["y"].shape[2] != 0 and observed_index is None and shaped["y"].shape[2] == 1 < num_times:
        shaped["y"] = shaped["y"].expand(-1, -1, num_times, -1)
    at = None if observed_index is None else torch.as_tensor(list(observed_index), device=y.device)
    seen = None if seen is None else layout.of_group(seen, 2).contiguous()
    moved = None if moved is None else layout.of_group(moved, 1).contiguous()
    ends = None if lengths is None else layout.of_series(lengths.expand(layout.lead), 0, whole=True).contiguous()
    order = (shaped[name] for name in ("m", "L", "F", "b", "Q", "H", "d", "R"))
    return Problem((shaped["y"], seen, moved, ends, at, *order, num_times), layout, lengths)


def _all(mask: Tensor) -> bool:
    """``mask.all()``, which takes torch sixty times as long as the least of the bytes."""
    return mask.numel() == 0 or bool(mask.view(torch.uint8).amin())


def _shared_pattern(
    mask: Tensor, step_mask: Tensor | None, observed_index: Sequence[int] | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Masks that all series share, with the times at which series end; or the masks as they are."""
    p = mask.shape[-1]
    flat = mask.reshape(-1, *mask.shape[-2:])
    pattern = flat.any(0)
    if step_mask is None:
        if bool((flat == pattern).all()):
            return (None if _all(pattern) else pattern), None, None
        return mask, None, None
    lengths = step_mask.sum(-1)
    times = torch.arange(step_mask.shape[-1], device=mask.device)
    if bool((step_mask == (times < lengths.unsqueeze(-1))).all()) and bool(lengths.min() > 0):
        alive = step_mask if observed_index is None else step_mask[..., list(observed_index)]
        shared = (alive.unsqueeze(-1) & pattern).expand(torch.broadcast_shapes(mask.shape, alive.shape + (p,)))
        if bool((shared == mask).all()):
            return (None if _all(pattern) else pattern), None, lengths
    return mask, step_mask, None
