"""The Kalman operators in plain torch, on any device: no autograd graph, little work a step.

Only the square root of the predicted covariance is advanced step by step, by one orthogonal transformation
(Kailath, Sayed and Hassibi 2000, section 12.3),

.. math::
    \\begin{pmatrix} R & H L^- & 0 \\\\ 0 & F L^- & Q \\end{pmatrix} \\to
    \\begin{pmatrix} S^{1/2} & 0 & 0 \\\\ \\cdot & L^-_{k+1} & 0 \\end{pmatrix}

and no longer than until it stands still. All that hangs on it (gains, innovations, roots) is then one batched operation
over time; the means are a linear recurrence, run by doubling where its matrix is constant.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.ops.kalman import HALF_LOG_2PI
from pyro_ssm.ops.kalman_doubling import predicted_covariances
from pyro_ssm.ops.linalg import tria

__all__ = ["Gains", "System", "gains", "means", "predicted_roots", "singular", "system"]

SETTLED = 1e-12  # as in csrc/covariance.h
LOOK = 8  # steps between two looks at whether the covariance stands still


def singular(step: int, group: int) -> str:
    """The sentence that names a step at which there is no density.

    >>> from pyro_ssm.ops.kalman_torch import singular
    >>> singular(3, 0).split(":")[0]
    'kalman_filter'
    """
    return (
        f"kalman_filter: the innovation covariance H P H' + R R' of step {step} (parameters {group}) is singular or "
        "not finite, so the observation has no density. Give the observation some noise (R), or leave out rows that "
        "others determine"
    )


class System(NamedTuple):
    """A problem in which every time is alike in form: a missing row sees nothing, a step that is off is the identity.

    >>> from pyro_ssm.ops.kalman_torch import System
    >>> System._fields[:3]
    ('y', 'seen', 'moves')
    """

    y: Tensor  # (G, M, T, p), d taken off
    seen: Tensor | None  # bool (G or 1, T, p); None = all
    moves: Tensor | None  # bool (G or 1, T - 1); None = all
    m: Tensor  # (G, M, n)
    L: Tensor  # (G, n, n)
    F: Tensor  # (G, T - 1 or 1, n, n)
    b: Tensor  # (G or 1, M or 1, T - 1 or 1, n)
    Q: Tensor  # (G, T - 1 or 1, n, n)
    H: Tensor  # (G, T or 1, p, n)
    R: Tensor  # (G, T or 1, p, p)

    @property
    def varies(self) -> bool:
        """Whether two steps may differ."""
        return max(x.shape[1] for x in (self.F, self.Q, self.H, self.R)) > 1 and self.y.shape[2] > 1


def system(
    y: Tensor,
    mask: Tensor | None,
    move: Tensor | None,
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
) -> System:
    """Arguments of :func:`pyro_ssm.ops.kalman_kernel.kalman_forward` as a :class:`System`.

    >>> from pyro_ssm.ops.kalman_torch import system
    >>> system.__name__
    'system'
    """
    groups, series, seen_times, p = y.shape
    n = m.shape[-1]
    zero = torch.zeros((), dtype=y.dtype, device=y.device)
    if mask is not None:
        y = torch.where(mask.unsqueeze(1), y, zero)
        d = torch.where(mask.unsqueeze(1), d, zero)
    y = y - d
    if at is not None:
        known = mask if mask is not None else torch.ones(1, seen_times, p, dtype=torch.bool, device=y.device)
        mask = known.new_zeros(known.shape[0], times, p).index_copy(1, at, known)
        y = y.new_zeros(groups, series, times, p).index_copy(2, at, y)
        H, R = (
            x if x.shape[1] == 1 else x.new_zeros(x.shape[0], times, *x.shape[2:]).index_copy(1, at, x) for x in (H, R)
        )
    if mask is not None:
        rows = mask.unsqueeze(-1)
        H = torch.where(rows, H, zero)
        R = torch.where(rows, R, zero)
        fill = torch.diag_embed((~mask).to(R.dtype)).expand(R.shape)
        R = tria(torch.cat([R, fill], -1))
    moves = None if move is None else move[:, 1:]
    if moves is not None:
        on = moves[..., None, None]
        F, Q = torch.where(on, F, torch.eye(n, dtype=F.dtype, device=F.device)), torch.where(on, Q, zero)
        b = torch.where(moves[:, None, :, None], b, zero)
    if times == 1:
        F, Q, b = F.new_zeros(1, 1, n, n), F.new_zeros(1, 1, n, n), F.new_zeros(1, 1, 1, n)

    def whole(x: Tensor) -> Tensor:
        return x.expand((groups,) + x.shape[1:])

    m = m.expand(groups, series, n)
    return System(y, mask, moves, m, whole(L), whole(F), b, whole(Q), whole(H), whole(R))


def at_time(x: Tensor, t: int) -> Tensor:
    """``x[:, t]``, where a time size of 1 stands for all."""
    return x[:, min(t, x.shape[1] - 1)]


def predicted_roots(s: System) -> tuple[Tensor, Tensor]:
    """Square roots of P- ``(G, steps, n, n)`` and S ``(G, steps, p, p)``, up to the time from which they stand still.

    >>> from pyro_ssm.ops.kalman_torch import predicted_roots
    >>> predicted_roots.__name__
    'predicted_roots'
    """
    groups, n, p, times = s.L.shape[0], s.L.shape[-1], s.y.shape[-1], s.y.shape[2]
    if not s.varies and times > LOOK:
        found = _together(s)
        if found is not None:
            return found
    array = s.L.new_zeros(groups, n + p, p + 2 * n)
    middle = array[..., p : p + n]
    root, roots, innovations = s.L, [s.L], []
    last = before = None
    for t in range(times - 1):
        H, F = at_time(s.H, t), at_time(s.F, t)
        if t == 0 or s.varies:
            array[..., :p, :p] = at_time(s.R, t)
            array[..., p:, p + n :] = at_time(s.Q, t)
            both = torch.cat([H, F], -2)
        middle.copy_(both @ root)
        lower = torch.linalg.qr(array.mT, mode="r")[1].mT
        root = lower[..., p:, p:]
        roots.append(root)
        innovations.append(lower[..., :p, :p])
        if not s.varies and t % LOOK >= LOOK - 2:
            now = root @ root.mT
            if t % LOOK == LOOK - 1:
                scale = now.diagonal(dim1=-2, dim2=-1).sqrt()
                scale = torch.where(scale > 0, scale, torch.ones_like(scale))
                change = ((now - before).abs() / scale.unsqueeze(-1) / scale.unsqueeze(-2)).amax().item()
                ratio = change / last if last else 2.0
                last = change
                if change == 0 or (ratio < 1 and LOOK * change / (1 - ratio) <= SETTLED):
                    break
            before = now
    end = len(roots) - 1
    innovations.append(tria(torch.cat([at_time(s.R, end), at_time(s.H, end) @ root], -1)))
    return torch.stack(roots, 1), torch.stack(innovations, 1)


def _together(s: System) -> tuple[Tensor, Tensor] | None:
    """The same at once, where the system is far enough from singular."""
    H, R = s.H[:, 0], s.R[:, 0]
    P = predicted_covariances(s.L, s.F[:, 0], s.Q[:, 0], H, R, s.y.shape[2])
    if P is None:
        return None
    H = H.unsqueeze(1)
    root, failed = torch.linalg.cholesky_ex(P)
    innovation, singular = torch.linalg.cholesky_ex(H @ P @ H.mT + (R @ R.mT).unsqueeze(1))
    if bool(failed.any() | singular.any()):
        return None
    root[:, 0] = s.L
    return root, innovation


class Gains(NamedTuple):
    """What hangs on the predicted covariances, for each step.

    >>> from pyro_ssm.ops.kalman_torch import Gains
    >>> Gains._fields
    ('root', 'whiten', 'gain', 'loop', 'constant')
    """

    root: Tensor  # (G, N, n, n)  of P-
    whiten: Tensor  # (G, N, p, p)  S^{-1/2}
    gain: Tensor  # (G, N, p, n)  K'
    loop: Tensor  # (G, N, n, n)  F (I - K H)
    constant: Tensor  # (G, N)  the constant of the density


def gains(s: System, root: Tensor, S: Tensor) -> Gains:
    """Gains from the roots of the predicted covariances and of those of the innovations.

    Raises:
        torch.linalg.LinAlgError: an innovation covariance is singular or not finite; names the step.

    >>> from pyro_ssm.ops.kalman_torch import gains
    >>> gains.__name__
    'gains'
    """
    steps, p = root.shape[1], s.y.shape[-1]

    def first(x: Tensor) -> Tensor:
        return x[:, :steps]

    H, R, F = first(s.H), first(s.R), first(s.F)
    if s.F.shape[1] > 1:  # one move fewer than times; what follows the last time is never used
        F = torch.cat([F, F[:, -1:]], 1)[:, :steps]
    HL = H @ root
    pivot = S.diagonal(dim1=-2, dim2=-1).abs()
    deviation = (R.square().sum(-1) + HL.square().sum(-1)).sqrt()
    smallest = torch.finfo(S.dtype).eps * (p + HL.shape[-1]) * deviation
    bad = ~((pivot > smallest) & (pivot < torch.inf)).all(-1)
    if bool(bad.any()):
        group, step = bad.nonzero()[0].tolist()
        raise torch.linalg.LinAlgError(singular(step, group))
    eye = torch.eye(p, dtype=S.dtype, device=S.device)
    W = torch.linalg.solve_triangular(S, eye.expand(S.shape), upper=False)
    gain = W.mT @ (W @ (HL @ root.mT))
    constant = -pivot.log() - HALF_LOG_2PI
    if s.seen is not None:
        constant = torch.where(s.seen[:, :steps], constant, torch.zeros_like(constant))
    return Gains(root, W, gain, F - (gain @ F.mT).mT @ H, constant.sum(-1))


def over_time(x: Tensor, matrices: Tensor) -> Tensor:
    """Rows of ``x`` ``(G, M, T, a)`` times matrices ``(G, N, a, b)``, the last of which stands for all later times."""
    steps = matrices.shape[1]
    if steps == 1:
        return x @ matrices
    head = (x[:, :, :steps].transpose(1, 2) @ matrices).transpose(1, 2)
    if steps >= x.shape[2]:
        return head
    return torch.cat([head, x[:, :, steps:] @ matrices[:, -1:]], 2)


def recurrence(x: Tensor, matrices: Tensor, start: int, reverse: bool = False) -> Tensor:
    """v_k = v_{k-1} A_{k-1} + x_k along time for rows ``x`` ``(G, M, T, n)``, the first of which is v_0.

    A is ``(G, N, n, n)``; from ``start`` on it is constant, and the recurrence is run by doubling. With ``reverse``,
    v_k = v_{k+1} A_k + x_k.
    """
    total = x.shape[2]
    out = x.clone()
    if reverse:
        if total - start > 1:
            out[:, :, start:] = _doubling(x[:, :, start:].flip(2), matrices[:, -1]).flip(2)
        for k in range(min(start, total - 1) - 1, -1, -1):
            torch.baddbmm(x[:, :, k], out[:, :, k + 1], matrices[:, k], out=out[:, :, k])
        return out
    for k in range(min(start, total - 1)):
        torch.baddbmm(x[:, :, k + 1], out[:, :, k], matrices[:, k], out=out[:, :, k + 1])
    if total - start > 1:
        out[:, :, start:] = _doubling(
            torch.cat([out[:, :, start : start + 1], x[:, :, start + 1 :]], 2), matrices[:, -1]
        )
    return out


def _doubling(v: Tensor, A: Tensor) -> Tensor:
    """v_k = v_{k-1} A + v_k for a constant A ``(G, n, n)``, in log2(T) products."""
    shift, power = 1, A.unsqueeze(1)
    while shift < v.shape[2]:
        v = torch.cat([v[:, :, :shift], v[:, :, shift:] + v[:, :, :-shift] @ power], 2)
        if float(power.abs().amax()) < 1e-40:
            break
        shift, power = 2 * shift, power @ power
    return v


def means(s: System, g: Gains) -> Tensor:
    """Predicted means ``(G, M, T, n)``.

    >>> from pyro_ssm.ops.kalman_torch import means
    >>> means.__name__
    'means'
    """
    times = s.y.shape[2]
    if times == 1:
        return s.m.unsqueeze(2)
    steps = g.gain.shape[1]
    F = s.F if s.F.shape[1] > 1 else s.F.expand(-1, steps, -1, -1)
    moved = min(steps, times - 1)
    given = over_time(s.y[:, :, : times - 1], g.gain[:, :moved] @ F[:, :moved].mT) + s.b
    x = torch.cat([s.m.unsqueeze(2), given], 2)
    return recurrence(x, g.loop.mT, steps - 1)
