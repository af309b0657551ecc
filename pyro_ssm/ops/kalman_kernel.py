"""The kernels of ``torch.ops.pyro_ssm.kalman_forward`` and ``kalman_backward``: the compiled library, or torch.

They take arguments in one shape, float64 (:mod:`pyro_ssm.ops.kalman_problem` brings them there): series
i of group g, where a group shares one covariance recursion; a size of 1 stands for all groups, series or times.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.ops import kalman_torch_kernel
from pyro_ssm.ops.compiled import library
from pyro_ssm.ops.kalman_torch import singular
from pyro_ssm.ops.kalman_torch_kernel import MEANS, ROOTS, TAPE
from pyro_ssm.ops.operator import address, in_memory, solid

__all__ = ["MEANS", "ROOTS", "TAPE", "call", "empty_results", "kalman_backward", "kalman_forward", "tape_size"]

FIELDS = 65  # eight-byte fields of KalmanArgs
KEPT_EVERY = 32  # STEPS of csrc/context.h
NEAR = 2**20  # doubles that are fetched as fast as they are computed


def tape_size(groups: int, series: int, times: int, n: int, p: int) -> int:
    """Doubles that the compiled forward pass leaves for the backward pass (``Context::tape_size`` in ``csrc``).

    >>> from pyro_ssm.ops.kalman_kernel import tape_size
    >>> tape_size(1, 1, 1, 1, 1)
    34
    """
    ld = 4 if n <= 4 else 8 if n <= 8 else (n + 7) // 8 * 8
    lanes = 1 if series == 1 else 8
    record = (n * ld + p * ld + p * p + 2 + 8) // 8 * 8 + (n * ld + 7) // 8 * 8
    kept_means = times if lanes == 1 else (times + KEPT_EVERY - 1) // KEPT_EVERY
    tile = (kept_means * n + times * p) * lanes
    return groups * (8 + times * record + (series + lanes - 1) // lanes * tile)


def _strides(tensor: Tensor, dims: int) -> list[int]:
    """Strides of the first dims, 0 where the size is 1."""
    shape, stride = tensor.shape, tensor.stride()
    return [stride[i] if shape[i] > 1 else 0 for i in range(dims)]


def _problem(
    y: Tensor,
    mask: Tensor | None,
    move: Tensor | None,
    lengths: Tensor | None,
    at: Tensor | None,
    m: Tensor,
    L: Tensor,
    F: Tensor,
    b: Tensor,
    Q: Tensor,
    H: Tensor,
    d: Tensor,
    R: Tensor,
    times: int,
) -> tuple[list[int], list[Tensor | None]]:
    """The first fields of KalmanArgs, and the tensors whose memory they point to."""
    groups, series, seen, p = y.shape
    n = m.shape[-1]
    y, m, b, d = (solid(x, 1) for x in (y, m, b, d))
    L, F, Q, H, R = (solid(x, 2) for x in (L, F, Q, H, R))
    mask, move, lengths = (None if x is None else x.contiguous() for x in (mask, move, lengths))
    fields = [groups, series, times, seen, n, p, y.data_ptr()]
    y_t, b_t, d_t = y.stride(2), b.stride(2) if b.shape[2] > 1 else 0, d.stride(2) if d.shape[2] > 1 else 0
    fields += [*_strides(y, 2), y_t]
    fields += [address(mask), 0 if mask is None or mask.shape[0] == 1 else seen * p]
    fields += [address(move), 0 if move is None or move.shape[0] == 1 else times]
    fields += [address(lengths), address(at), m.data_ptr(), *_strides(m, 2), L.data_ptr(), *_strides(L, 1)]
    fields += [F.data_ptr(), *_strides(F, 2), b.data_ptr(), *_strides(b, 2), b_t, Q.data_ptr(), *_strides(Q, 2)]
    fields += [H.data_ptr(), *_strides(H, 2), d.data_ptr(), *_strides(d, 2), d_t, R.data_ptr(), *_strides(R, 2)]
    return fields, [y, mask, move, lengths, at, m, L, F, b, Q, H, d, R]


def call(function: Any, fields: Sequence[int], failed: Sequence[int]) -> None:
    """Call the library with the first fields of KalmanArgs; the others are 0.

    Raises:
        MemoryError: the library found no memory.
        torch.linalg.LinAlgError: the innovation covariance of a step is singular; ``failed`` says of which.

    >>> from pyro_ssm.ops.kalman_kernel import call
    >>> call(lambda address: 0, [1, 2, 3], (0, 0))
    """
    whole = array("q", fields)
    whole.frombytes(bytes(8 * (FIELDS - len(whole))))
    status = function(whole.buffer_info()[0])
    if status == 2:
        raise MemoryError("kalman_filter: not enough memory for the covariances of all times")
    if status:
        raise torch.linalg.LinAlgError(singular(failed[1], failed[0]))


def kalman_forward(
    y: Tensor,
    mask: Tensor | None,
    move: Tensor | None,
    lengths: Tensor | None,
    at: Tensor | None,
    m: Tensor,
    L: Tensor,
    F: Tensor,
    b: Tensor,
    Q: Tensor,
    H: Tensor,
    d: Tensor,
    R: Tensor,
    times: int,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The filter; what ``keep`` does not name comes back empty.

    Args:
        y: ``(groups, series, seen, p)``, float64 as all numbers here.
        mask: bool ``(groups or 1, seen, p)``; None = everything is observed.
        move: bool ``(groups or 1, times)``, False where the state does not move into that time; None = always.
        lengths: int64 ``(groups, series)``: from that time on a series stands still and sees nothing; None = never.
        at: int64 ``(seen,)``, ascending times of the observations; None = all times.
        m: ``(groups or 1, series or 1, n)``.
        L: ``(groups or 1, n, n)``; F, Q: ``(groups or 1, times - 1 or 1, n, n)``.
        H: ``(groups or 1, seen or 1, p, n)``; R: ``(groups or 1, seen or 1, p, p)``.
        b: ``(groups or 1, series or 1, times - 1 or 1, n)``; d: ``(groups or 1, series or 1, seen or 1, p)``.
        times: number of times.
        keep: sum of MEANS, ROOTS, TAPE.

    Returns:
        log-likelihood ``(groups, series, times)``; filtered and predicted mean ``(groups, series, times, n)``; filtered
        and predicted square root ``(groups, times, n, n)``; the tape of the backward pass (empty where that
        does without).

    >>> from pyro_ssm.ops.kalman_kernel import kalman_forward
    >>> kalman_forward.__name__
    'kalman_forward'
    """
    arguments = (y, mask, move, lengths, at, m, L, F, b, Q, H, d, R, times)
    out = empty_results(y, m, times, keep)
    if not y.shape[0] * y.shape[1] * times:
        return out
    functions, _, _, parallel_for = library()
    if functions is None or y.device.type != "cpu":
        kalman_torch_kernel.forward(*arguments, keep, out)
        return out
    fields, alive = _problem(*arguments)
    failed = array("q", (0, 0))
    fields += [*(address(x) if x.numel() else 0 for x in out), failed.buffer_info()[0], parallel_for]
    call(functions.pyro_ssm_kalman_forward, fields, failed)
    del alive
    return out


def empty_results(y: Tensor, m: Tensor, times: int, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What :func:`kalman_forward` fills.

    >>> import torch
    >>> from pyro_ssm.ops.kalman_kernel import empty_results
    >>> [tuple(x.shape) for x in empty_results(torch.zeros(2, 3, 5, 1), torch.zeros(1, 1, 4), 5, 0)[:2]]
    [(2, 3, 5), (0,)]
    """
    groups, series, _, p = y.shape
    n = m.shape[-1]
    means = (groups, series, times, n) if keep & MEANS else (0,)
    roots = (groups, times, n, n) if keep & ROOTS else (0,)
    tape = (_tape_size(groups, series, times, n, p, y.device.type) if keep & TAPE else 0,)
    new = y.new_empty
    return new((groups, series, times)), new(means), new(means), new(roots), new(roots), new(tape)


def _tape_size(groups: int, series: int, times: int, n: int, p: int, device: str) -> int:
    if library().functions is None or device != "cpu":
        return kalman_torch_kernel.tape_size(groups, series, times, n, p)
    size = tape_size(groups, series, times, n, p)
    # the backward pass filters again, a group at a time: that takes less time than fetching a long tape
    return 0 if groups > 1 and size > NEAR else size


def kalman_backward(
    y: Tensor,
    mask: Tensor | None,
    move: Tensor | None,
    lengths: Tensor | None,
    at: Tensor | None,
    m: Tensor,
    L: Tensor,
    F: Tensor,
    b: Tensor,
    Q: Tensor,
    H: Tensor,
    d: Tensor,
    R: Tensor,
    times: int,
    tape: Tensor,
    grad_log_likelihood: Tensor | None,
    grad_filtered_mean: Tensor | None,
    grad_predicted_mean: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of the log-likelihoods and means with respect to y, m, L, F, b, Q, H, d and R.

    Args:
        wanted: of each of the nine; what is not wanted comes back empty.

    Returns:
        Nine tensors in the shapes of the arguments of :func:`kalman_forward`.

    >>> from pyro_ssm.ops.kalman_kernel import kalman_backward
    >>> kalman_backward.__name__
    'kalman_backward'
    """
    arguments = (y, mask, move, lengths, at, m, L, F, b, Q, H, d, R, times)
    inputs = (y, m, L, F, b, Q, H, d, R)
    none = y.new_empty(0)
    if not y.shape[0] * y.shape[1] * times:
        return tuple(torch.zeros_like(x) if want else none for x, want in zip(inputs, wanted, strict=True))
    functions, _, _, parallel_for = library()
    if functions is None or y.device.type != "cpu":
        outer = (grad_log_likelihood, grad_filtered_mean, grad_predicted_mean)
        found = kalman_torch_kernel.backward(*arguments, tape, *outer)
        return tuple(grad.contiguous() if want else none for grad, want in zip(found, wanted, strict=True))
    fields, alive = _problem(*arguments)
    groups, series, seen, p = y.shape
    n = m.shape[-1]
    still_b, still_d = b.shape[2] == 1, d.shape[2] == 1  # over time
    new = y.new_zeros
    want_y, want_m, want_L, want_F, want_b, want_Q, want_H, want_d, want_R = wanted
    grad_y = new((groups, series, seen, p)) if want_y or (want_d and not still_d) else None
    grad_m = new((groups, series, n)) if want_m else None
    grad_L, grad_F, grad_Q, grad_H, grad_R = (
        new(x.shape) if want else None for x, want in ((L, want_L), (F, want_F), (Q, want_Q), (H, want_H), (R, want_R))
    )
    grad_b = new((groups, series, max(times - 1, 0), n)) if want_b and not still_b else None
    grad_b_sum = new((groups, series, 1, n)) if want_b and still_b else None
    grad_d_sum = new((groups, series, 1, p)) if want_d and still_d else None
    terms = None if grad_log_likelihood is None else in_memory(grad_log_likelihood)
    of_means = [None if g is None else g.contiguous() for g in (grad_filtered_mean, grad_predicted_mean)]
    fields += [0, 0, 0, 0, 0, tape.data_ptr(), 0, parallel_for]
    fields += [0, 0, 0, 0] if terms is None else [terms.data_ptr(), *terms.stride()]
    fields += [address(g) for g in of_means]
    fields += [address(x) for x in (grad_y, grad_m, grad_L, grad_F, grad_b, grad_b_sum, grad_Q, grad_H, grad_d_sum)]
    fields += [address(grad_R)]
    call(functions.pyro_ssm_kalman_backward, fields, (0, 0))
    del alive
    found_b = _reduce(grad_b if grad_b_sum is None else grad_b_sum, b)
    if grad_d_sum is not None:
        found_d = _reduce(grad_d_sum, d)
    else:
        found_d = None if not want_d else -_reduce(grad_y, d)
    results = (
        grad_y if want_y else None, _reduce(grad_m, m), grad_L, grad_F, found_b, grad_Q, grad_H, found_d, grad_R
    )  # fmt: skip
    return tuple(none if x is None else x for x in results)


def _reduce(grad: Tensor | None, like: Tensor) -> Tensor | None:
    if grad is None or grad.shape == like.shape:
        return grad
    if grad.numel() == 0:
        return torch.zeros_like(like)
    return grad.sum_to_size(like.shape)
