"""Normal laws of particles with independent coordinates: draws of an affine motion, and densities, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops.compiled import library
from pyro_ssm.ops.composite import transformed
from pyro_ssm.ops.kalman import HALF_LOG_2PI

__all__ = ["affine_draw", "affine_draw_reference", "normal_density", "normal_density_reference", "operands", "part"]


def affine_draw(state: Tensor, matrix: Tensor, offset: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """Move particles by an affine Gaussian law with independent noise: :func:`affine_draw_reference`, fast.

    .. math:: z' = A z + b + s \\odot \\epsilon

    Args:
        state: ``(..., n)``.
        matrix: ``(..., n, n)``, one for each state or broadcast.
        offset: ``(..., n)``.
        scale: ``(..., n)``.
        noise: ``(..., n)``, standard normals.

    Gradients: by the plain form; the compiled one serves where none are wanted and ``matrix``, ``offset`` and ``scale``
    are shared by all states.

    >>> import torch
    >>> from pyro_ssm.ops.gaussian_particles import affine_draw
    >>> affine_draw(torch.ones(3, 1), torch.full((1, 1), 0.5), torch.ones(1), torch.ones(1), torch.zeros(3, 1))[0]
    tensor([1.5000])
    """
    n = state.shape[-1]
    if state.shape == noise.shape and matrix.numel() == n * n and offset.numel() == scale.numel() == n:
        args = (state, noise, matrix, offset, scale)
        functions = _functions(*args)
        if functions is not None:
            out = torch.empty_like(state)
            single = state.dtype is torch.float32
            call = functions.pyro_ssm_affine_draw_f32 if single else functions.pyro_ssm_affine_draw_f64
            call(*[x.data_ptr() for x in args], state.numel() // n, n, out.data_ptr())
            return out
    return affine_draw_reference(state, matrix, offset, scale, noise)


def affine_draw_reference(state: Tensor, matrix: Tensor, offset: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """:func:`affine_draw` in two lines of torch.

    .. math:: z' = A z + b + s \\odot \\epsilon

    >>> import torch
    >>> from pyro_ssm.ops.gaussian_particles import affine_draw_reference
    >>> affine_draw_reference(torch.ones(1), torch.ones(1, 1), torch.ones(1), torch.ones(1), torch.ones(1))
    tensor([3.])
    """
    if state.shape[-1] == 1:  # a product of numbers
        loc = torch.addcmul(offset, matrix.squeeze(-1), state)
    else:
        loc = (matrix @ state.unsqueeze(-1)).squeeze(-1) + offset
    return torch.addcmul(loc, scale, noise)


def normal_density(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The log density of a normal law with independent coordinates: :func:`normal_density_reference`, fast.

    .. math:: \\sum_i \\log N(x_i; m_i, s_i^2)

    Args:
        value: ``(..., 1, n)``; loc: ``(..., 1, n)``; scale: ``(..., 1, n)``; each may lack leading dims, or have a size
            of 1 there. The dim before the last is time, of size 1.

    Returns:
        ``(...)``, without the time.

    Gradients: by the plain form; the compiled one serves where none are wanted.

    >>> import torch
    >>> from pyro_ssm.ops.gaussian_particles import normal_density
    >>> normal_density(torch.zeros(1, 2), torch.zeros(5, 1, 2), torch.ones(2))[0]
    tensor(-1.8379)
    """
    functions = _functions(value, loc, scale)
    if functions is None:
        return normal_density_reference(value, loc, scale)
    shape = loc.shape if loc.numel() > scale.numel() else scale.shape
    shape = shape if shape.numel() >= value.numel() else value.shape
    if len(shape) < max(3, value.dim(), loc.dim(), scale.dim()) or shape[-2] != 1:
        return normal_density_reference(value, loc, scale)
    parts = (part(value, shape), part(loc, shape), part(scale, shape))
    if None in parts or (scale.dtype is torch.float64 and parts[2][1]):  # torch has the faster double logarithm
        return normal_density_reference(value, loc, scale)
    n, dim = shape[0], shape[-1]
    # a number for a size is parsed several times faster than a shape
    out = torch.empty(n, dtype=value.dtype) if len(shape) == 3 else torch.empty(shape[:-2], dtype=value.dtype)
    width = shape.numel() // n
    single = value.dtype is torch.float32
    call = functions.pyro_ssm_normal_density_f32 if single else functions.pyro_ssm_normal_density_f64
    (v, a), (m, b), (s, c) = parts
    if call(v.data_ptr(), a, m.data_ptr(), b, s.data_ptr(), c, n, width, dim, out.data_ptr()):
        raise MemoryError("normal_density: not enough memory for a tile")
    return out


def operands(value: Tensor, loc: Tensor, scale: Tensor, lead: torch.Size) -> Any:
    """The arguments of :func:`normal_density` as the compiled step takes them, or None where it does not.

    Args:
        lead: ``(N, *batch)``, the shape of the result.

    Returns:
        The three, each with 1 if it is whole, 0 if it is one row for all particles; and the size of the event.

    >>> import torch
    >>> from pyro_ssm.ops.compiled import library
    >>> from pyro_ssm.ops.gaussian_particles import operands
    >>> found = operands(torch.zeros(1, 2), torch.zeros(5, 1, 2), torch.ones(2), torch.Size([5]))
    >>> found is None if library().functions is None else [found[0][0][1], found[0][1][1], found[1]] == [0, 1, 2]
    True
    """
    if _functions(value, loc, scale) is None:
        return None
    shape = lead + (1,) + value.shape[-1:]
    parts = (part(value, shape), part(loc, shape), part(scale, shape))
    return None if None in parts else (parts, shape[-1])


def part(x: Tensor, shape: torch.Size) -> tuple[Tensor, int] | None:
    """x and 1 if it has a number for each of ``shape``; one row for all of dim 0, and 0; None if neither holds.

    >>> import torch
    >>> from pyro_ssm.ops.gaussian_particles import part
    >>> part(torch.ones(1), torch.Size([100, 3, 1, 1]))[0].shape
    torch.Size([1, 3, 1, 1])
    """
    if x.shape == shape:
        return x, 1
    if x.dim() == len(shape) and x.shape[0] != 1:
        return None
    row = shape[1:]
    if x.shape != row and _without_ones(x.shape) != _without_ones(row):
        try:
            x = x.expand((1,) + row).contiguous()
        except RuntimeError:  # the whole is larger than any of the three
            return None
    return x, 0


def _without_ones(shape: torch.Size) -> torch.Size:
    """The shape without leading dims of 1."""
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape


def normal_density_reference(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """:func:`normal_density` in a few lines of torch.

    .. math:: \\sum_i \\log N(x_i; m_i, s_i^2)

    >>> import torch
    >>> from pyro_ssm.ops.gaussian_particles import normal_density_reference
    >>> normal_density_reference(torch.zeros(1, 1), torch.zeros(5, 1, 1), torch.ones(1)).shape
    torch.Size([5])
    """
    white = (value - loc) / scale
    terms = -HALF_LOG_2PI - torch.addcmul(scale.log(), white, white, value=0.5)
    return terms.squeeze((-1, -2)) if terms.shape[-1] == 1 else terms.sum(-1).squeeze(-1)


def _functions(*args: Tensor) -> Any:
    """The library, for plain contiguous tensors of one dtype on a CPU, of which no gradient is wanted."""
    functions = library().functions
    if functions is None or torch.compiler.is_compiling():
        return None
    dtype, grad = args[0].dtype, torch.is_grad_enabled()
    if dtype is not torch.float32 and dtype is not torch.float64:
        return None
    for x in args:
        if x.dtype is not dtype or not x.is_cpu or not x.is_contiguous() or (grad and x.requires_grad):
            return None
        if not x.numel() or transformed(x):
            return None
    return functions
