"""The compiled side of resampling: ancestors from weights, and the particles that they choose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.compiled import library
from pyro_ssm.ops.composite import transformed

__all__ = ["POINTS", "STRATIFIED", "SYSTEMATIC", "compiled_ancestors", "compiled_of_counts", "compiled_take"]

SYSTEMATIC, STRATIFIED, POINTS = 0, 1, 2  # of csrc/resampling.h


def compiled_ancestors(scheme: int, weights: Tensor, uniforms: Tensor, need: Tensor | None = None) -> Tensor | None:
    """The ancestors by the compiled operator, or None where it does not serve.

    Args:
        scheme: SYSTEMATIC, STRATIFIED or POINTS (ascending points in [0, 1), one a particle).
        weights: ``(N, *batch)``.
        uniforms: float64 ``(rows, *batch)``, of systematic resampling 1 row, otherwise at least N.
        need: bool ``(*batch)``; where it is False, particles are their own ancestors. None for all.

    >>> from pyro_ssm.ops.compiled import library
    >>> from pyro_ssm.ops.resampling_kernel import SYSTEMATIC, compiled_ancestors
    >>> found = compiled_ancestors(SYSTEMATIC, torch.tensor([0.25, 0.75]), torch.tensor([0.6], dtype=torch.float64))
    >>> found is None if library().functions is None else found.tolist() == [0, 1]
    True
    """
    functions = _functions(weights, uniforms)
    if functions is None or weights.dtype not in (torch.float32, torch.float64) or not weights.numel():
        return None
    num, batch = weights.shape[0], weights.shape[1:]
    rows = 1 if scheme == SYSTEMATIC else num
    if uniforms.shape[1:] != batch or uniforms.shape[0] < rows or uniforms.dtype is not torch.float64:
        return None
    weights, uniforms = weights.contiguous(), uniforms.contiguous()
    need = None if need is None else need.expand(batch).contiguous()
    out = torch.empty(weights.shape, dtype=torch.int64)
    call = functions.pyro_ssm_ancestors_f32 if weights.dtype is torch.float32 else functions.pyro_ssm_ancestors_f64
    at = (0 if need is None else need.data_ptr(), num, weights.numel() // num, out.data_ptr())
    if call(scheme, weights.data_ptr(), uniforms.data_ptr(), *at):
        raise MemoryError(f"resampling: not enough memory for {num} ancestors a series")
    return out


def compiled_of_counts(upto: Tensor) -> Tensor | None:
    """As ``resampling._ancestors`` of ascending counts ``(series, N)``, or None where the library does not serve.

    >>> import torch
    >>> from pyro_ssm.ops.compiled import library
    >>> from pyro_ssm.ops.resampling_kernel import compiled_of_counts
    >>> found = compiled_of_counts(torch.tensor([[2, 2, 3]]))
    >>> found is None if library().functions is None else found.tolist() == [[0, 0, 2]]
    True
    """
    functions = _functions(upto)
    if functions is None or not upto.numel():
        return None
    upto = upto.contiguous()
    out = torch.empty_like(upto)
    functions.pyro_ssm_ancestors_of_counts(upto.data_ptr(), upto.shape[1], upto.shape[0], out.data_ptr())
    return out


def compiled_take(x: Tensor, ancestors: Tensor, series: int) -> Tensor | None:
    """``x[ancestors[m, s], s]`` of ``x`` ``(N, series, ...)``, or None where the library does not serve.

    Args:
        x: contiguous, of which no gradient is wanted.
        ancestors: int64, contiguous, ``(M, series)`` in any shape.
        series: their number.

    Raises:
        IndexError: an ancestor is out of range.

    >>> import torch
    >>> from pyro_ssm.ops.compiled import library
    >>> from pyro_ssm.ops.resampling_kernel import compiled_take
    >>> found = compiled_take(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1, 0]]), 2)
    >>> found is None if library().functions is None else found.flatten().tolist() == [3.0, 2.0]
    True
    """
    functions = _functions(x, ancestors)
    if functions is None or not x.numel() or not x.is_contiguous() or not ancestors.is_contiguous():
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return None
    rows, num = ancestors.numel() // series, x.numel() // (x.shape[0] * series)
    out = torch.empty((rows, series, num), dtype=x.dtype)
    arguments = (x.data_ptr(), ancestors.data_ptr(), x.shape[0], rows, series, num * x.element_size(), out.data_ptr())
    if functions.pyro_ssm_take(*arguments):
        raise IndexError(f"ancestors must lie in [0, {x.shape[0]}), the number of particles")
    return out


def _functions(*args: Tensor) -> Any:
    """The library, for plain tensors on a CPU."""
    functions = library().functions
    if functions is None or torch.compiler.is_compiling() or not all(x.is_cpu and not transformed(x) for x in args):
        return None
    return functions
