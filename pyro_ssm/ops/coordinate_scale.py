"""The scale of each coordinate's noise as a small network of that coordinate, along a path and with its gradient."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.ops.block_diagonal import block_rows
from pyro_ssm.ops.compiled import library
from pyro_ssm.ops.operator import in_memory
from pyro_ssm.ops.softplus import softplus_, through_softplus_

__all__ = ["CoordinateScale", "ScaleAlongPath"]


class CoordinateScale(NamedTuple):
    """The scale of each coordinate's noise, a small network of that coordinate,

    .. math:: g_i(z_i) = \\text{floor} + r(v_i^T \\operatorname{softplus}(w_i z_i + b_i) + c_i),

    where r is a softplus, or ``span`` times a sigmoid.

    >>> from pyro_ssm.ops import CoordinateScale
    >>> CoordinateScale._fields
    ('slope', 'shift', 'weight', 'bias', 'floor', 'span')
    """

    slope: Tensor  # (state, hidden)
    shift: Tensor  # (state, hidden)
    weight: Tensor  # (state, hidden)
    bias: Tensor  # (state,)
    floor: float
    span: float | None

    def at(self, state: Tensor) -> Tensor:
        """:math:`g`, ``(..., state)``."""
        hidden = torch.nn.functional.softplus(torch.addcmul(self.shift, state.unsqueeze(-1), self.slope))
        raw = torch.linalg.vecdot(hidden, self.weight) + self.bias
        if self.span is None:
            return self.floor + torch.nn.functional.softplus(raw)
        return self.floor + self.span * torch.sigmoid(raw)


class ScaleAlongPath:
    """The scales along a path outside any graph, and their gradient.

    Hidden units are computed again for the gradient, which costs less than their memory. The compiled library keeps
    them in registers; without it they are products with block-diagonal matrices.

    Args:
        tensors: the constant scales ``(state,)`` alone, or the four of :class:`CoordinateScale`.
        how: its floor and span.

    >>> import torch
    >>> from pyro_ssm.ops.coordinate_scale import ScaleAlongPath
    >>> ScaleAlongPath((torch.tensor([2.0]),), (0.0, None)).above(torch.zeros(3, 1)).flatten()
    tensor([2., 2., 2.])
    """

    def __init__(self, tensors: tuple[Tensor, ...], how: tuple[float, float | None]) -> None:
        self.constant = len(tensors) == 1
        self.tensors, (self.floor, self.span) = tensors, how
        self.compiled = not self.constant and _has_kernel(*tensors)
        if self.compiled:
            self.tensors = tuple(in_memory(x).contiguous() for x in tensors)
        elif not self.constant:
            slope, shift, weight, self.bias = tensors
            # networks side by side as products with block-diagonal matrices
            self.spread, self.shift, self.gather = block_rows(slope), shift.flatten(), block_rows(weight)

    def above(self, state: Tensor) -> Tensor:
        """:math:`g - \\text{floor}` at states ``(rows, state)``."""
        if self.constant:
            return self.tensors[0].expand(state.shape)
        raw = self._raw(state)
        return softplus_(raw) if self.span is None else raw.sigmoid_().mul_(self.span)

    def pull(self, grad_state: Tensor, grad: Tensor, state: Tensor, above: Tensor) -> None:
        """Add to the gradient of the state what comes through g, and gather what the parameters get; ``above`` is
        what :meth:`above` gave. ``grad`` is used up.
        """
        if self.constant:
            self.sums[0].add_(grad.sum(0))
            return
        if self.span is None:
            grad = through_softplus_(grad, above)
        else:
            grad = grad.mul_(above).mul_(1 - above / self.span)
        if self.compiled:
            sizes, arrays = _sizes(state, self.tensors[0]), (state, *self.tensors)
            fields = [*sizes, *(x.data_ptr() for x in (*arrays, grad, grad, grad_state, *self.sums))]
            _functions().pyro_ssm_coordinate_backward(ctypes.byref(_Fields(*fields)))
            return
        hidden = self._hidden(state)
        self.sums[3].add_(grad.sum(0))
        self.sums[2].addmm_(grad.t(), hidden)
        grad_hidden = through_softplus_(grad @ self.gather, hidden)
        self.sums[0].addmm_(state.t(), grad_hidden)
        self.sums[1].add_(grad_hidden.sum(0))
        grad_state.addmm_(grad_hidden, self.spread.t())

    def start_sums(self) -> None:
        """Zeros for what :meth:`pull` gathers."""
        whole = self.constant or self.compiled
        of = self.tensors if whole else (self.spread, self.shift, self.gather, self.bias)
        self.sums = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in of]

    def gradients(self) -> tuple[Tensor, ...]:
        """Of the tensors of the diffusion."""
        if self.constant or self.compiled:
            return tuple(self.sums)
        slope, shift, weight, bias = self.sums
        shape = self.tensors[0].shape
        return _diagonal(slope, shape), shift.reshape(shape), _diagonal(weight, shape), bias

    def _hidden(self, state: Tensor) -> Tensor:
        return softplus_(torch.addmm(self.shift, state, self.spread))

    def _raw(self, state: Tensor) -> Tensor:
        if not self.compiled:
            return torch.addmm(self.bias, self._hidden(state), self.gather.t())
        raw, state = torch.empty_like(state, memory_format=torch.contiguous_format), state.contiguous()
        fields = [*_sizes(state, self.tensors[0]), *(x.data_ptr() for x in (state, *self.tensors, raw)), *[0] * 6]
        _functions().pyro_ssm_coordinate_forward(ctypes.byref(_Fields(*fields)))
        return raw


_Fields = ctypes.c_int64 * 17  # of csrc/coordinate.h


def _functions() -> ctypes.CDLL:
    found = library().functions
    if found is None:
        raise RuntimeError("the compiled library is not in use")  # _has_kernel is asked before
    return found


def _has_kernel(*tensors: Tensor) -> bool:
    dtype = tensors[0].dtype
    known = dtype in (torch.float32, torch.float64) and all(x.is_cpu and x.dtype == dtype for x in tensors)
    return known and library().functions is not None


def _sizes(state: Tensor, slope: Tensor) -> tuple[int, ...]:
    threads = library().parallel_for if torch.get_num_threads() > 1 else 0
    return int(state.dtype == torch.float64), state.shape[0], *slope.shape, threads


def _diagonal(blocks: Tensor, shape: torch.Size) -> Tensor:
    """The diagonal blocks of ``(n, n * hidden)``, as rows."""
    return blocks.reshape(shape[:1] + shape).diagonal(dim1=0, dim2=1).t()
