"""``kalman_forward`` and ``kalman_backward`` of :mod:`pyro_ssm.ops.kalman_kernel` in plain torch.

The gradient is the compiled one's (``csrc/backward.h`` has the formulas): the adjoint of the means is a linear
recurrence back in time, that of the covariances another, and everything else one batched operation over all steps. From
the time on at which the covariance stands still, the adjoints of all covariances enter by their sum only, which solves
a Stein equation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_ssm.ops.kalman_torch import Gains, System, gains, means, over_time, predicted_roots, recurrence, system
from pyro_ssm.ops.linalg import tria

__all__ = ["backward", "forward", "tape_size"]

MEANS, ROOTS, TAPE = 1, 2, 4


def forward(
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
    out: tuple[Tensor, ...],
) -> None:
    """Fill ``out`` as :func:`pyro_ssm.ops.kalman_kernel.kalman_forward` returns it.

    >>> from pyro_ssm.ops.kalman_torch_kernel import forward
    >>> forward.__name__
    'forward'
    """
    s = system(y, mask, move, at, m, L, F, b, Q, H, d, R, times)
    root, innovation = predicted_roots(s)
    steps = root.shape[1]
    g = gains(s, root, innovation)
    mean = means(s, g)
    v = s.y - over_time(mean, s.H.mT)
    constant = (
        g.constant if steps == times else torch.cat([g.constant, g.constant[:, -1:].expand(-1, times - steps)], 1)
    )
    terms = constant.unsqueeze(1) - 0.5 * over_time(v, g.whiten.mT).square().sum(-1)
    alive = None if lengths is None else torch.arange(times, device=y.device) < lengths.unsqueeze(-1)
    if s.seen is not None:
        terms = torch.where(s.seen.any(-1).unsqueeze(1), terms, torch.zeros_like(terms))
    out[0].copy_(terms if alive is None else torch.where(alive, terms, torch.zeros_like(terms)))
    if keep & MEANS:
        mean, filtered = _held(s, mean, mean + over_time(v, g.gain), 2)
        if alive is not None:
            last = (lengths - 1).clamp(min=0)[..., None, None].expand(*filtered.shape[:2], 1, filtered.shape[3])
            stands = filtered.gather(2, last)
            filtered = torch.where(alive.unsqueeze(-1), filtered, stands)
            out[2].copy_(torch.where(alive.unsqueeze(-1), mean, stands))
        else:
            out[2].copy_(mean)
        out[1].copy_(filtered)
    if keep & ROOTS:
        _roots(s, g, out[3], out[4])
    if keep & TAPE:
        parts = torch.cat([root.new_tensor([steps]), *(x.flatten() for x in (*g, mean))])
        out[5][: parts.numel()] = parts


def _held(s: System, predicted: Tensor, filtered: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Laws that nothing changes, bit for bit: unmoved since the time before, or with nothing seen."""
    if s.seen is None and s.moves is None:
        return predicted, filtered
    groups, times = predicted.shape[0], predicted.shape[dim]
    fresh = torch.ones(groups, times, 2, dtype=torch.bool, device=predicted.device)
    if s.moves is not None:
        fresh[:, 1:, 0] = s.moves
    if s.seen is not None:
        fresh[..., 1] = s.seen.any(-1)
    fresh = fresh.flatten(1)
    last = torch.where(fresh, torch.arange(2 * times, device=fresh.device), 0).cummax(1).values
    both = torch.stack([predicted, filtered], dim + 1).flatten(dim, dim + 1)
    index = last.reshape((groups,) + (1,) * (dim - 1) + (-1,) + (1,) * (both.dim() - dim - 1)).expand(both.shape)
    predicted, filtered = both.gather(dim, index).unflatten(dim, (times, 2)).unbind(dim + 1)
    return predicted, filtered


def _roots(s: System, g: Gains, filtered_out: Tensor, predicted_out: Tensor) -> None:
    """Square roots of the filtered and predicted covariances."""
    steps, p = g.root.shape[1], s.y.shape[-1]
    H, R = s.H[:, :steps], s.R[:, :steps]
    upper = torch.cat([(H @ g.root), R.expand(g.root.shape[:2] + R.shape[2:])], -1)
    lower = torch.cat([g.root, g.root.new_zeros(g.root.shape[:-1] + (p,))], -1)
    predicted, filtered = tria(g.root), tria(torch.cat([upper, lower], -2))[..., p:, p:]
    predicted[:, 0] = s.L
    predicted, filtered = _held(s, predicted, filtered, 1)
    for out, roots in ((filtered_out, filtered), (predicted_out, predicted)):
        out[:, :steps] = roots
        out[:, steps:] = roots[:, -1:]


def tape_size(groups: int, series: int, times: int, n: int, p: int) -> int:
    """Doubles that :func:`forward` leaves for :func:`backward`, at most.

    >>> from pyro_ssm.ops.kalman_torch_kernel import tape_size
    >>> tape_size(1, 1, 1, 1, 1)
    7
    """
    return 1 + groups * times * (2 * n * n + p * p + p * n + 1 + series * n)


def backward(
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
    grad_terms: Tensor | None,
    grad_filtered: Tensor | None,
    grad_predicted: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients with respect to y, m, L, F, b, Q, H, d and R, in the shapes of the arguments.

    >>> from pyro_ssm.ops.kalman_torch_kernel import backward
    >>> backward.__name__
    'backward'
    """
    s = system(y, mask, move, at, m, L, F, b, Q, H, d, R, times)
    groups, series, _, p = s.y.shape
    n = s.m.shape[-1]
    steps = int(tape[0])
    shapes = [(groups, steps, *last) for last in ((n, n), (p, p), (p, n), (n, n), ())] + [(groups, series, times, n)]
    sizes = [math.prod(shape) for shape in shapes]
    *kept, mean = (part.view(shape) for part, shape in zip(tape[1 : 1 + sum(sizes)].split(sizes), shapes, strict=True))
    g = Gains(*kept)
    root = g.root
    weight = s.y.new_zeros(groups, series, times) if grad_terms is None else grad_terms
    if s.seen is not None:
        weight = torch.where(s.seen.any(-1).unsqueeze(1), weight, torch.zeros_like(weight))
    if lengths is not None:
        weight, grad_filtered, grad_predicted = _stand_still(lengths, weight, grad_filtered, grad_predicted)
    # means
    v = s.y - over_time(mean, s.H.mT)
    u = over_time(over_time(v, g.whiten.mT), g.whiten)
    gu = weight.unsqueeze(-1) * u
    source = over_time(gu, s.H)
    if grad_filtered is not None:
        source = source + grad_filtered - over_time(over_time(grad_filtered, g.gain.mT), s.H)
    if grad_predicted is not None:
        source = source + grad_predicted
    lam_p = recurrence(source, g.loop, steps - 1, reverse=True)
    lam = over_time(lam_p[:, :, 1:], s.F) if times > 1 else lam_p[:, :, :0]
    lam = torch.cat([lam, torch.zeros_like(lam_p[:, :, :1])], 2)
    if grad_filtered is not None:
        lam = lam + grad_filtered
    w = over_time(lam, g.gain.mT) - gu
    filtered = mean + over_time(v, g.gain)
    # covariances: one entry a step, the last one for all later times
    sums = _Sums(s, g, u, gu, lam, weight)
    E, gamma, C, U, total = sums.adjoints()
    GS, Z = _update(g, s.H, gamma, C, U, total)
    HGS = GS @ s.H[:, : Z.shape[1]]
    gain_root = root if Z.shape[1] == steps else torch.cat([root, root[:, -1:]], 1)
    P = gain_root @ gain_root.mT
    GH = (Z + HGS) @ P
    BS = _extend(g.whiten @ (_first(s.H, steps) @ root) @ root.mT, Z.shape[1])
    P_filtered = P - BS.mT @ BS
    count = E.shape[1]  # moves
    GF = 2 * E @ _extend(_first(s.F, steps), count) @ P_filtered[:, :count] if count else E
    if Z.shape[1] > steps:  # the moves into the zone start from the covariance that stands still
        GF = torch.cat([GF[:, :-1], 2 * E[:, -1:] @ s.F[:, -1:] @ P_filtered[:, -1:]], 1)
    outer_F = _outer(lam_p[:, :, 1:], filtered[:, :, :-1], s.F.shape[1] > 1)
    outer_H = -_outer(w, mean, s.H.shape[1] > 1)
    GF = _sum_time(GF, s.F) + outer_F
    GH = _sum_time(GH, s.H) + outer_H
    GQ = 2 * _sum_time(E, s.Q) @ s.Q
    R_seen = s.R if s.seen is None else torch.where(s.seen.unsqueeze(-1), _from_times(R, at, times), 0.0)
    GR = 2 * _sum_time(GS, s.R) @ R_seen
    GL = 2 * sums.first @ s.L
    return _shaped(s, (y, m, L, F, b, Q, H, d, R), at, times, w, lam_p, (GL, GF, GQ, GH, GR))


def _first(x: Tensor, steps: int) -> Tensor:
    return x[:, :steps]


def _extend(x: Tensor, steps: int) -> Tensor:
    """``steps`` entries, the last one repeated."""
    if x.shape[1] == 1 or x.shape[1] >= steps:
        return x[:, :steps] if x.shape[1] > steps else x
    return torch.cat([x, x[:, -1:].expand(-1, steps - x.shape[1], *x.shape[2:])], 1)


def _from_times(R: Tensor, at: Tensor | None, times: int) -> Tensor:
    if at is None or R.shape[1] == 1:
        return R
    return R.new_zeros(R.shape[0], times, *R.shape[2:]).index_copy(1, at, R)


def _sum_time(x: Tensor, like: Tensor) -> Tensor:
    """``(G, steps, ., .)`` -> one entry a time, or their sum where one stands for all."""
    return x if like.shape[1] > 1 else x.sum(1, keepdim=True)


def _outer(x: Tensor, y: Tensor, each: bool) -> Tensor:
    """sum over series, and over time unless ``each``, of x y'."""
    if each:
        return torch.einsum("gmta,gmtb->gtab", x, y)
    return (x.flatten(1, 2).mT @ y.flatten(1, 2)).unsqueeze(1)


def _stand_still(
    lengths: Tensor, weight: Tensor, filtered: Tensor | None, predicted: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients after the end of a series belong to its last filtered mean."""
    alive = torch.arange(weight.shape[2], device=weight.device) < lengths.unsqueeze(-1)
    weight = torch.where(alive, weight, torch.zeros_like(weight))
    after = None
    for grad in (filtered, predicted):
        if grad is not None:
            late = torch.where(alive.unsqueeze(-1), torch.zeros_like(grad), grad).sum(2, keepdim=True)
            after = late if after is None else after + late
    if after is None:
        return weight, None, None
    kept = [
        None if x is None else torch.where(alive.unsqueeze(-1), x, torch.zeros_like(x)) for x in (filtered, predicted)
    ]
    base = torch.zeros_like(predicted) if kept[0] is None else kept[0]
    last = (lengths - 1).clamp(min=0)[..., None, None].expand(after.shape)
    return weight, base.scatter_add(2, last, after), kept[1]


def _symmetric(x: Tensor) -> Tensor:
    return 0.5 * (x + x.mT)


def _update(g: Gains, H: Tensor, gamma: Tensor | None, C: Tensor, U: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """G_S, the gradient of S, and Z with Gamma- = Gamma + sym(Z' H); entries beyond the steps repeat the last gain."""
    count = C.shape[1]
    gain, W = _extend(g.gain, count), _extend(g.whiten, count)
    GS = -_symmetric(gain @ C.mT) + 0.5 * (_symmetric(U) - total[..., None, None] * (W.mT @ W))
    Z = C
    if gamma is not None:
        KG = gain @ gamma
        GS, Z = GS + KG @ gain.mT, C - 2 * KG
    return GS, Z + GS @ _extend(H, count)


class _Sums:
    """What the means hand to the covariances, and the recursion of the covariances' adjoints."""

    def __init__(self, s: System, g: Gains, u: Tensor, gu: Tensor, lam: Tensor, weight: Tensor) -> None:
        self.s, self.g = s, g
        self.u, self.gu, self.lam, self.weight = u, gu, lam, weight
        self.steps, self.times = g.gain.shape[1], s.y.shape[2]

    def over(self, begin: int, end: int, together: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """sum u lambda', sum g u u' and sum g over series, for each time, or for all of them together."""
        part = slice(begin, end)
        u, gu, lam, weight = self.u[:, :, part], self.gu[:, :, part], self.lam[:, :, part], self.weight[:, :, part]
        if together:
            return _outer(u, lam, False), _outer(gu, u, False), weight.sum((1, 2)).unsqueeze(1)
        return _outer(u, lam, True), _outer(gu, u, True), weight.sum(1)

    def adjoints(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """E of each move, Gamma and the sums of each step; where the covariance stands still, one entry for the zone.

        Leaves the adjoint of the first predicted covariance in ``first``.
        """
        s, g, steps, times = self.s, self.g, self.steps, self.times
        C, U, total = self.over(0, steps)
        source = self.source(C, U, total)
        loop = g.loop
        zone_sum = zone_gamma = None
        if steps < times:
            F = s.F[:, -1]
            zone, zone_sum, zone_sums = self.zone()
            zone_gamma = F.mT @ (zone_sum - zone) @ F
            E = zone
            stack = [source[:, -1] + loop[:, -1].mT @ E @ loop[:, -1]]
        else:
            stack = [source[:, -1]]
        for t in range(steps - 2, -1, -1):
            A = loop[:, t]
            stack.append(torch.baddbmm(source[:, t], A.mT, stack[-1] @ A))
        adjoint = torch.stack(stack[::-1], 1)  # of P- at each step
        self.first = adjoint[:, 0]
        after = adjoint[:, 1:]
        F = s.F if s.F.shape[1] == 1 else s.F[:, : after.shape[1]]
        gamma = F.mT @ after @ F
        if zone_sum is None:
            return after, torch.cat([gamma, torch.zeros_like(source[:, :1])], 1), C, U, total
        last = s.F[:, -1].mT @ zone @ s.F[:, -1]
        gamma = torch.cat([gamma, last.unsqueeze(1), zone_gamma.unsqueeze(1)], 1)
        C, U, total = (torch.cat(pair, 1) for pair in zip((C, U, total), zone_sums, strict=True))
        return torch.cat([after, zone_sum.unsqueeze(1)], 1), gamma, C, U, total

    def source(self, C: Tensor, U: Tensor, total: Tensor, last: bool = False) -> Tensor:
        g = Gains(*(x[:, -1:] for x in self.g)) if last else self.g
        H = self.s.H[:, -1:] if last else self.s.H
        _, Z = _update(g, H, None, C, U, total)
        return _symmetric(Z.mT @ H[:, : Z.shape[1]])

    def zone(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The adjoint of the first P- of the zone, their sum over the zone, and the sums over series and the zone."""
        steps, times = self.steps, self.times
        A = self.g.loop[:, -1]
        powers, memory = [A], 1
        scale = self.g.root[:, -1].square().sum(-1).sqrt()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        while memory < times - steps:
            size = (powers[-1].abs() * scale.unsqueeze(-2) / scale.unsqueeze(-1)).amax()
            if float(size) < 1e-8:
                break
            powers.append(powers[-1] @ powers[-1])
            memory *= 2
        whole = self.over(steps, times, together=True)
        if memory >= times - steps:  # nothing is forgotten: every time by itself
            sources = self.source(*self.over(steps, times), last=True)
            E = total = sources[:, -1]
            for t in range(times - steps - 2, -1, -1):
                E = torch.baddbmm(sources[:, t], A.mT, E @ A)
                total = total + E
            return E, total, whole
        sources = self.source(*self.over(steps, steps + memory), last=True)
        E = sources[:, -1]
        for t in range(memory - 2, -1, -1):
            E = torch.baddbmm(sources[:, t], A.mT, E @ A)
        X = self.source(*whole, last=True)[:, 0] - A.mT @ E @ A
        for power in powers:
            X = X + power.mT @ X @ power
        return E, X, whole


def _shaped(
    s: System,
    args: tuple[Tensor, ...],
    at: Tensor | None,
    times: int,
    w: Tensor,
    lam: Tensor,
    matrices: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, ...]:
    """Gradients in the shapes of the arguments; 0 where nothing is seen or nothing moves."""
    y, m, L, F, b, Q, H, d, R = args
    GL, GF, GQ, GH, GR = matrices
    zero = torch.zeros((), dtype=y.dtype, device=y.device)
    moved = lam[:, :, 1:]
    if s.seen is not None:
        w = torch.where(s.seen.unsqueeze(1), w, zero)
        GH, GR = (torch.where(s.seen.unsqueeze(-1), x, zero) if x.shape[1] > 1 else x for x in (GH, GR))
    if s.moves is not None:
        on = s.moves[..., None, None]
        GF, GQ = (torch.where(on, x, zero) if x.shape[1] > 1 else x for x in (GF, GQ))
        moved = torch.where(s.moves[:, None, :, None], moved, zero)
    if at is not None:
        w = w[:, :, at]
        GH, GR = (x[:, at] if x.shape[1] > 1 else x for x in (GH, GR))
    if times == 1:
        GF, GQ, moved = (torch.zeros_like(x) for x in (F, Q, b))
    found = (w, lam[:, :, 0], GL, GF, moved, GQ, GH, -w, GR)
    return tuple(
        grad if grad.shape == x.shape else torch.zeros_like(x) if grad.numel() == 0 else grad.sum_to_size(x.shape)
        for grad, x in zip(found, args, strict=True)
    )
