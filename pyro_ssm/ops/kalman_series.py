"""One series straight to the compiled library: no glue but pointers.

A short series costs the library less than a handful of torch calls. So where the arguments already are what the library
reads (no leading dims, float64, contiguous, on the CPU), :func:`pyro_ssm.ops.kalman_filter` hands over their addresses
and nothing else.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.ops.compiled import library
from pyro_ssm.ops.kalman_kernel import MEANS, TAPE, call, tape_size

__all__ = ["Series", "backward", "forward", "series"]

_DIMS = (2, 1, 2, 3, 2, 3, 3, 2, 3)  # of y, m, L, F, b, Q, H, d, R


class Series(NamedTuple):
    """Sizes of a problem, and the first fields of ``KalmanArgs``.

    >>> from pyro_ssm.ops.kalman_series import Series
    >>> Series._fields[:4]
    ('times', 'seen', 'n', 'p')
    """

    times: int
    seen: int
    n: int
    p: int
    fields: list[int]
    alive: tuple[Tensor | None, ...]  # what the fields point to, besides the arguments


def series(
    args: Sequence[Tensor],
    mask: Tensor,
    num_times: int,
    observed_index: Sequence[int] | None,
    step_mask: Tensor | None,
) -> Series | None:
    """The problem of one series as the library reads it; None where the arguments are not in that shape.

    Args:
        args: y, m, L, F, b, Q, H, d, R.
        mask: as for :func:`pyro_ssm.ops.kalman_filter`, and so are num_times, observed_index and step_mask.

    >>> import torch
    >>> from pyro_ssm.ops.kalman_series import series
    >>> series([torch.ones(3, 2, 1)] * 9, torch.ones(3, 2, 1), 2, None, None) is None  # three series
    True
    """
    for x, dim in zip(args, _DIMS, strict=True):
        if x.dim() != dim or x.dtype is not torch.float64 or not x.is_contiguous() or not x.is_cpu:
            return None
    y, m, L, F, b, Q, H, d, R = args
    (seen, p), (n,) = y.shape, m.shape
    moves, sees = max(num_times - 1, 1), seen if observed_index is not None else num_times
    fits = seen == sees > 0 and mask.shape == y.shape and mask.is_contiguous() and L.shape == (n, n)
    for x, times, shape in ((F, moves, (n, n)), (b, moves, (n,)), (Q, moves, (n, n)), (H, seen, (p, n)),
                            (d, seen, (p,)), (R, seen, (p, p))):  # fmt: skip
        fits = fits and x.shape[1:] == shape and (x.shape[0] == 1 or x.shape[0] == times)
    move = step_mask
    if move is not None:
        fits = fits and move.shape == (num_times,) and move.is_contiguous()
    if not fits or library().functions is None:
        return None
    at = None if observed_index is None else torch.as_tensor(observed_index)
    F_t, b_t, Q_t, H_t, d_t, R_t = (x.shape[0] > 1 for x in (F, b, Q, H, d, R))
    fields = [1, 1, num_times, seen, n, p, y.data_ptr(), 0, 0, p, mask.data_ptr(), 0]
    fields += [0 if move is None else move.data_ptr(), 0, 0, 0 if at is None else at.data_ptr()]
    fields += [m.data_ptr(), 0, 0, L.data_ptr(), 0, F.data_ptr(), 0, F_t * n * n, b.data_ptr(), 0, 0, b_t * n]
    fields += [Q.data_ptr(), 0, Q_t * n * n, H.data_ptr(), 0, H_t * p * n, d.data_ptr(), 0, 0, d_t * p]
    fields += [R.data_ptr(), 0, R_t * p * p]
    return Series(num_times, seen, n, p, fields, (mask, move, at))


def forward(s: Series, like: Tensor, keep: int) -> tuple[list[Tensor], Tensor | None]:
    """The parts of FilterSteps (with means and square roots, or the first alone), and the tape where it names it.

    >>> from pyro_ssm.ops.kalman_series import forward
    >>> forward.__name__
    'forward'
    """
    times, n = s.times, s.n
    out = [like.new_empty(times)]
    pointers = [out[0].data_ptr(), 0, 0, 0, 0, 0]
    if keep & MEANS:
        out += [like.new_empty(shape) for shape in ((times, n), (times, n, n), (times, n), (times, n, n))]
        pointers[1:5] = [out[i].data_ptr() for i in (1, 3, 2, 4)]
    tape = None
    if keep & TAPE:
        tape = like.new_empty(tape_size(1, 1, times, n, s.p))
        pointers[5] = tape.data_ptr()
    functions, _, _, parallel_for = library()
    failed = array("q", (0, 0))
    call(functions.pyro_ssm_kalman_forward, [*s.fields, *pointers, failed.buffer_info()[0], parallel_for], failed)
    return out, tape


def backward(
    s: Series, args: Sequence[Tensor], tape: Tensor, grads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of y, m, L, F, b, Q, H, d and R, given those of the log-likelihoods and means.

    >>> from pyro_ssm.ops.kalman_series import backward
    >>> backward.__name__
    'backward'
    """
    y, b, d = args[0], args[4], args[7]
    found: list[Tensor | None] = [torch.zeros_like(x) if want else None for x, want in zip(args, wanted, strict=True)]
    d_in_time = found[7] is not None and d.shape[0] > 1
    grad_y = found[0] if found[0] is not None or not d_in_time else torch.zeros_like(y)
    pointers = [0 if x is None else x.data_ptr() for x in found]
    _, grad_m, grad_L, grad_F, grad_b, grad_Q, grad_H, grad_d, grad_R = pointers
    terms, *of_means = [None if g is None else g.contiguous() for g in grads]
    fields = [*s.fields, 0, 0, 0, 0, 0, tape.data_ptr(), 0, library().parallel_for]
    fields += [0 if terms is None else terms.data_ptr(), 0, 0, 1]
    fields += [0 if g is None else g.data_ptr() for g in of_means]
    fields += [0 if grad_y is None else grad_y.data_ptr(), grad_m, grad_L, grad_F]
    fields += [grad_b, 0] if b.shape[0] > 1 else [0, grad_b]
    fields += [grad_Q, grad_H, 0 if d.shape[0] > 1 else grad_d, grad_R]
    call(library().functions.pyro_ssm_kalman_backward, fields, (0, 0))
    if d_in_time:
        found[7] = -grad_y
    return found
