"""The compiled recursions back over time (``csrc/smoother.h``), for tensors with any leading dims; float64 inside."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_ssm.ops.compiled import library
from pyro_ssm.ops.composite import transformed

__all__ = ["applies", "conditionals", "recurrence", "roots"]

FIELDS = 19  # eight-byte fields of BackwardArgs
LAWS, ROOTS, MEANS = 0, 1, 2
SINGULAR, NO_MEMORY = 1, 2


def applies(*tensors: Tensor) -> bool:
    """Whether the compiled code can take these tensors: real, on the CPU, with memory, in eager mode.

    >>> import torch
    >>> from pyro_ssm.ops.compiled import library
    >>> from pyro_ssm.ops.kalman_smoother_kernel import applies
    >>> applies(torch.zeros(2)) == (library().functions is not None), applies(torch.zeros(2, dtype=torch.int64))
    (True, False)
    """
    if torch.compiler.is_compiling() or library().functions is None:
        return False
    return all(
        x.device.type == "cpu" and x.dtype in (torch.float64, torch.float32) and not transformed(x) for x in tensors
    )


def conditionals(F: Tensor, Q: Tensor, L: Tensor) -> tuple[Tensor, Tensor] | None:
    """G and D of :func:`pyro_ssm.ops.kalman_smoother.backward_conditionals`; None where some S is singular.

    >>> from pyro_ssm.ops.kalman_smoother_kernel import conditionals
    >>> conditionals.__name__
    'conditionals'
    """
    lead = torch.broadcast_shapes(F.shape[:-3], Q.shape[:-3], L.shape[:-3])
    shape = lead + L.shape[-3:]
    G, D = (torch.empty(shape, dtype=torch.float64) for _ in range(2))
    if not _call(LAWS, lead, L.shape[-3], L.shape[-1], ((F, 3), (Q, 3), (L, 3)), (G, D)):
        return None
    return G, D


def roots(G: Tensor, D: Tensor, L: Tensor) -> Tensor:
    """Square roots of the smoothed covariances ``(..., time, n, n)``, back from the last one, L ``(..., n, n)``.

    >>> from pyro_ssm.ops.kalman_smoother_kernel import roots
    >>> roots.__name__
    'roots'
    """
    lead = torch.broadcast_shapes(G.shape[:-3], D.shape[:-3], L.shape[:-2])
    moves, n = G.shape[-3], G.shape[-1]
    out = torch.empty(lead + (moves + 1, n, n), dtype=torch.float64)
    _call(ROOTS, lead, moves, n, ((G, 3), (D, 3), (L.unsqueeze(-3), 3)), (out,))
    return out


def recurrence(G: Tensor, c: Tensor, last: Tensor) -> Tensor:
    """:math:`x_k = G_k x_{k+1} + c_k`, ``(..., time, n)``, back from the last one ``(..., n)``.

    >>> from pyro_ssm.ops.kalman_smoother_kernel import recurrence
    >>> recurrence.__name__
    'recurrence'
    """
    lead = torch.broadcast_shapes(G.shape[:-3], c.shape[:-2], last.shape[:-1])
    moves, n = G.shape[-3], G.shape[-1]
    out = torch.empty(lead + (moves + 1, n), dtype=torch.float64)
    _call(MEANS, lead, moves, n, ((G, 3), (c, 2), (last.unsqueeze(-2), 2)), (out,))
    return out


def _call(
    what: int, lead: torch.Size, moves: int, n: int, parts: Sequence[tuple[Tensor, int]], out: Sequence[Tensor]
) -> bool:
    """Run on every row of ``lead``; False where a matrix that must be regular is not."""
    rows = lead.numel()
    if not rows:
        return True
    functions, _, _, parallel_for = library()
    fields, alive = [what, rows, moves, n], []
    for x, event in parts:
        own = x.shape[: x.dim() - event]
        flat = x.detach().to(torch.float64).reshape((-1,) + x.shape[x.dim() - event :]).contiguous()
        of = torch.arange(flat.shape[0]).reshape(own).expand(lead).reshape(-1).contiguous()
        size = flat[0, 0].numel() if moves else 0
        step = size if flat.shape[1] > 1 else 0
        fields += [flat.data_ptr(), of.data_ptr(), flat[0].numel(), step]
        alive += [flat, of]
    fields += [out[0].data_ptr(), out[1].data_ptr() if len(out) > 1 else 0, parallel_for]
    status = functions.pyro_ssm_kalman_backwards((ctypes.c_int64 * FIELDS)(*fields))  # type: ignore[union-attr]
    del alive
    if status == NO_MEMORY:
        raise MemoryError("kalman_smoother: not enough memory")
    return bool(status != SINGULAR)
