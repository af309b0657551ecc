"""The law of a path of a linear-Gaussian chain, with everything that is known of it in closed form."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from pyro.distributions import MultivariateNormal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.kl import register_kl

from pyro_ssm.components import Affine
from pyro_ssm.distributions.markov_path import MarkovPath
from pyro_ssm.ops.associative_scan import affine_scan
from pyro_ssm.ops.kalman import matvec
from pyro_ssm.ops.kalman_parallel import affine_laws

__all__ = ["LinearGaussianPath", "PathMarginals"]


class PathMarginals(NamedTuple):
    """The law of each state of a path, and its covariance with the next.

    >>> from pyro_ssm.distributions import PathMarginals
    >>> PathMarginals._fields
    ('mean', 'scale_tril', 'lag_one_covariance')
    """

    mean: Tensor  # (*batch, time, n)
    scale_tril: Tensor  # (*batch, time, n, n)
    lag_one_covariance: Tensor  # (*batch, time - 1, n, n)  Cov(z_k, z_{k+1})


def check_parts(
    mean: Tensor, scale_tril: Tensor, law: Affine, name: str, rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of an affine law, each with a time axis, or an error that names the one whose shape is wrong."""
    n = mean.shape[-1]
    if scale_tril.shape[-2:] != (n, n):
        raise ValueError(f"`scale_tril` has shape {tuple(scale_tril.shape)}, but (..., {n}, {n}) is wanted, as `mean`")
    rows = law.matrix.shape[-2] if rows is None else rows
    fields = zip(("matrix", "offset", "scale_tril"), law, ((rows, n), (rows,), (rows, rows)), strict=True)
    parts = []
    for field, part, event in fields:
        if tuple(part.shape[-len(event) :]) != event:
            wanted = ", ".join(map(str, event))
            raise ValueError(f"`{name}.{field}` has shape {tuple(part.shape)}, but (..., time, {wanted}) is wanted")
        parts.append(part if part.dim() > len(event) else part.unsqueeze(0))
    for label, root in (("scale_tril", scale_tril), (f"{name}.scale_tril", parts[2])):
        if bool((root.triu(1) != 0).any()):
            raise ValueError(
                f"`{label}` must be lower triangular, and it is not. Of a covariance take torch.linalg.cholesky(...)"
            )
    return parts[0], parts[1], parts[2]


def steps_of(parts: tuple[Tensor, Tensor, Tensor], wanted: int | None, name: str) -> int:
    """The number of steps of time-varying parts, which must agree; ``wanted`` where none of them varies."""
    sizes = {part.shape[-event] for part, event in zip(parts, (3, 2, 3), strict=True)} - {1}
    if wanted is not None:
        sizes |= {wanted} - ({1} if sizes else set())
    if len(sizes) > 1:
        raise ValueError(
            f"the time sizes of `{name}` do not agree (with each other or with `num_times`): {sorted(sizes)}"
        )
    return sizes.pop() if sizes else 1


class LinearGaussianPath(TorchDistribution):
    """The law of a path of a linear-Gaussian Markov chain, event ``(time, state)``.

    .. math:: z_1 \\sim N(m, L L^T), \\qquad z_{k+1} \\sim N(F_k z_k + b_k,\\; Q_k Q_k^T)

    Draws, log density, entropy, marginals and the divergence from another such law are exact and linear in the number
    of times. Draws are reparametrised: one affine scan over noise (a loop on CPU, logarithmically many steps on CUDA).

    Args:
        mean: ``(*batch, n)``; scale_tril: ``(*batch, n, n)`` lower triangular, of the first state.
        transition: ``matrix`` F ``(*batch, time - 1, n, n)``, ``offset`` b ``(*batch, time - 1, n)`` and ``scale_tril``
            Q ``(*batch, time - 1, n, n)`` lower triangular, acting on columns; a time axis of 1, or none, stands for
            all moves.
        num_times: wanted where no part of ``transition`` varies in time.
        step_mask: bool ``(*batch, time)``, False on padding, which repeats the last state and adds exactly 0.

    Raises:
        ValueError: shapes do not fit, or a factor is not lower triangular.

    ``log_prob``, ``entropy`` and divergences need regular factors; draws and marginals do not.

    >>> import torch
    >>> from pyro_ssm.components import Affine
    >>> from pyro_ssm.distributions import LinearGaussianPath
    >>> eye = torch.eye(2)
    >>> path = LinearGaussianPath(torch.zeros(2), eye, Affine(0.9 * eye, torch.zeros(2), 0.5 * eye), num_times=5)
    >>> z = path.rsample((3,))
    >>> z.shape, path.log_prob(z).shape, path.marginals.scale_tril.shape
    (torch.Size([3, 5, 2]), torch.Size([3]), torch.Size([5, 2, 2]))
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = True

    def __init__(
        self,
        mean: Tensor,
        scale_tril: Tensor,
        transition: Affine,
        num_times: int | None = None,
        *,
        step_mask: Tensor | None = None,
    ) -> None:
        n = mean.shape[-1]
        parts = check_parts(mean, scale_tril, transition, "transition", n)
        if num_times is None:
            num_times = steps_of(parts, None, "transition") + 1
        elif num_times < 1:
            raise ValueError(f"`num_times` must be at least 1, got {num_times}")
        elif num_times > 1:
            steps_of(parts, num_times - 1, "transition")
        moves = num_times - 1
        F, b, Q = (
            (part if part.shape[-event] == moves else part.narrow(-event, 0, min(1, moves)))
            for part, event in zip(parts, (3, 2, 3), strict=True)
        )
        self.initial_mean, self.initial_scale_tril, self.transition = mean, scale_tril, Affine(F, b, Q)
        self._step_mask = step_mask
        if step_mask is not None:
            real, eye = step_mask[..., 1:], torch.eye(n, dtype=F.dtype, device=F.device)
            self.transition = Affine(
                torch.where(real[..., None, None], F, eye),
                torch.where(real[..., None], b, b.new_zeros(())),
                torch.where(real[..., None, None], Q, Q.new_zeros(())),
            )
        lead = [mean.shape[:-1], scale_tril.shape[:-2], F.shape[:-3], b.shape[:-2], Q.shape[:-3]]
        lead += [] if step_mask is None else [step_mask.shape[:-1]]
        self._set(MarkovPath.over(self._step, num_times, n, step_mask=step_mask), torch.broadcast_shapes(*lead))

    def _set(self, path: MarkovPath, batch_shape: torch.Size) -> None:
        self._path = path
        TorchDistribution.__init__(self, batch_shape, path.event_shape, validate_args=False)

    def _step(self, state: Tensor | None, k: slice, summary: Tensor | None) -> MultivariateNormal:
        """The law of the states ``k`` given the ones before, as :class:`MarkovPath` asks for it."""
        if state is None:
            loc, root = self.initial_mean.unsqueeze(-2), self.initial_scale_tril.unsqueeze(-3)
        else:
            F, b, Q = self._regular()
            loc, root = matvec(F, state) + b, Q
        return MultivariateNormal(loc, scale_tril=root, validate_args=False)

    def _regular(self) -> Affine:
        """The transition with noise also on padding, where its terms are hidden and its gradient must not be NaN."""
        F, b, Q = self.transition
        if self._step_mask is None:
            return self.transition
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        return Affine(F, b, torch.where(self._step_mask[..., 1:, None, None], Q, eye))

    def expand(self, batch_shape: Any, _instance: Any = None) -> LinearGaussianPath:
        path = LinearGaussianPath.__new__(LinearGaussianPath)
        for name in ("initial_mean", "initial_scale_tril", "transition", "_step_mask"):
            setattr(path, name, getattr(self, name))
        own = MarkovPath.over(path._step, *self.event_shape, step_mask=self._step_mask)
        path._set(own, torch.Size(batch_shape))
        return path

    @property
    def support(self) -> Any:  # type: ignore[override]
        """Real paths; refused for series of unequal lengths, as :class:`MarkovPath`'s."""
        return constraints.independent(constraints.real, 2) if self._step_mask is None else self._path.support

    # --------------------------------------------------------------------------------------------- draws and density

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        m, L = self.initial_mean, self.initial_scale_tril
        noise = torch.randn(shape, dtype=m.dtype, device=m.device)
        F, b, Q = self.transition
        first = m + matvec(L, noise[..., 0, :])
        return affine_scan(F, b + matvec(Q, noise[..., 1:, :]), first)

    def log_prob_steps(self, value: Tensor) -> Tensor:
        """The terms of ``log_prob``: :math:`\\log p(z_1)` and :math:`\\log p(z_{k+1} | z_k)`, ``(*batch, time)``."""
        terms = self._path.log_prob_steps(value)
        return terms.expand(torch.broadcast_shapes(terms.shape[:-1], self.batch_shape) + terms.shape[-1:])

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_prob_steps(value).sum(-1)

    # ------------------------------------------------------------------------------------------------- closed forms

    @property
    def marginals(self) -> PathMarginals:
        """The law of every state, and lag-one covariances."""
        F, b, Q = self.transition
        moves = self.event_shape[0] - 1
        F, b, Q = (
            part.expand(part.shape[:-e] + (moves,) + part.shape[part.dim() - e + 1 :])
            for part, e in ((F, 3), (b, 2), (Q, 3))
        )
        mean, root = affine_laws(F, b, Q, self.initial_mean, self.initial_scale_tril)
        before = root[..., :-1, :, :]
        lag = before @ before.mT @ F.mT
        whole = [part.expand(self.batch_shape + part.shape[-e:]) for part, e in ((mean, 2), (root, 3), (lag, 3))]
        return PathMarginals(*whole)

    @property
    def mean(self) -> Tensor:
        """``(*batch, time, state)``."""
        return self.marginals.mean

    @property
    def variance(self) -> Tensor:
        """``(*batch, time, state)``."""
        return self.marginals.scale_tril.square().sum(-1)

    def _log_volumes(self) -> Tensor:
        """:math:`\\log |\\det|` of the factor of each step, ``(*batch, time)``; 0 on padding."""
        moves = self.event_shape[0] - 1
        roots = (self.initial_scale_tril.unsqueeze(-3), self._regular().scale_tril)
        first, rest = (root.diagonal(dim1=-2, dim2=-1).log().sum(-1) for root in roots)
        rest = rest.expand(rest.shape[:-1] + (moves,))
        lead = torch.broadcast_shapes(self.batch_shape, first.shape[:-1], rest.shape[:-1])
        return torch.cat([part.expand(lead + part.shape[-1:]) for part in (first, rest)], -1)

    def _num_real(self) -> int | Tensor:
        return self.event_shape[0] if self._step_mask is None else self._step_mask.sum(-1)

    def entropy(self) -> Tensor:
        """:math:`\\sum_k \\tfrac{n}{2} (1 + \\log 2 \\pi) + \\log |\\det Q_k|`, ``(*batch,)``."""
        constant = 0.5 * self.event_shape[1] * (1 + math.log(2 * math.pi))
        return self._log_volumes().sum(-1) + constant * self._num_real()


@register_kl(LinearGaussianPath, LinearGaussianPath)
def _kl_paths(p: LinearGaussianPath, q: LinearGaussianPath) -> Tensor:
    """The divergence of the first states, and the expected ones of each next state given the last."""
    if p.event_shape != q.event_shape:
        raise ValueError(f"paths of different shapes: {tuple(p.event_shape)} and {tuple(q.event_shape)}")
    if (p._step_mask is None) != (q._step_mask is None) or not (
        p._step_mask is None or torch.equal(*torch.broadcast_tensors(p._step_mask, q._step_mask))
    ):
        raise ValueError("paths of different lengths: give both laws the same `step_mask`")
    n = p.event_shape[1]
    at = p.marginals
    m, L = at.mean[..., :-1, :], at.scale_tril[..., :-1, :, :]
    F, b, Q = (mine - other for mine, other in zip(p._regular(), q._regular(), strict=True))
    first = _expected(q.initial_scale_tril, p.initial_scale_tril, p.initial_mean - q.initial_mean)
    root = q._regular().scale_tril
    moved = _expected(root, p._regular().scale_tril, matvec(F, m) + b) + _half_square(root, F @ L)
    volumes = (q._log_volumes() - p._log_volumes()).sum(-1)
    return first + moved.sum(-1) + volumes - 0.5 * n * p.event_shape[0]  # a padded step adds n / 2 - n / 2


def _expected(root: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    """:math:`\\tfrac12 E |S^{-1} (s + A \\epsilon)|^2` for the root S, the factor A and the shift s."""
    return _half_square(root, factor) + _half_square(root, shift.unsqueeze(-1))


def _half_square(root: Tensor, columns: Tensor) -> Tensor:
    lead = torch.broadcast_shapes(root.shape[:-2], columns.shape[:-2])
    white = torch.linalg.solve_triangular(
        root.expand(lead + root.shape[-2:]), columns.expand(lead + columns.shape[-2:]), upper=False
    )
    return 0.5 * white.square().sum((-2, -1))
