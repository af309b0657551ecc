"""The two halves of the structured mean field for switching linear models: q(path of x) and q(path of regimes)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import Affine
from pyro_ssm.dynamics import MarkovChain
from pyro_ssm.infer.discrete.hmm import smooth
from pyro_ssm.infer.discrete.switching_system import SwitchingSystem
from pyro_ssm.infer.discrete.system import FiniteSystem
from pyro_ssm.ops.block_tridiagonal import PathMoments, block_tridiagonal_moments
from pyro_ssm.ops.finite import log_identity
from pyro_ssm.ops.kalman import hide_rows

__all__ = ["MeanField", "RegimePosterior", "curvature", "recurrent_logits"]

LOG_2PI = math.log(2 * math.pi)


class RegimePosterior(NamedTuple):
    """q(regimes): marginal and pairwise probabilities, 0 into padding.

    >>> from pyro_ssm.infer.discrete.mean_field import RegimePosterior
    >>> RegimePosterior._fields
    ('probs', 'pairwise')
    """

    probs: Tensor  # (*batch, time, K)
    pairwise: Tensor  # (*batch, time - 1, K, K)


def curvature(num: int, like: Tensor) -> Tensor:
    """Bohning's bound on the second derivative of logsumexp: (I - 1 1^T / K) / 2."""
    eye = torch.eye(num, dtype=like.dtype, device=like.device)
    return 0.5 * (eye - 1 / num)


def recurrent_logits(chain: MarkovChain, like: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrent chain as logits ``r + B x``: ``(K, K)`` and ``(K, K, n)``, from the regime i to j."""
    return chain.matrix.log().to(like.dtype), chain.input_matrix.to(like.dtype)


class MeanField:
    """Coordinate ascent over q(x) q(s) for one model and data set.

    .. math::
        q(x) \\propto \\exp E_{q(s)}[\\log p(x, s, y)], \\qquad q(s) \\propto \\exp E_{q(x)}[\\log p(x, s, y)]

    q(x) is a Gaussian with a block-tridiagonal precision, q(s) a Markov chain by forward-backward. For a recurrent
    chain the logsumexp of its logits is replaced by Bohning's quadratic upper bound at psi = E[logits], which keeps a
    lower bound on the evidence and both halves in closed form.
    """

    def __init__(self, system: SwitchingSystem) -> None:
        self.system = system
        self.K, self.n, self.T = system.num_regimes, system.mean.shape[-1], system.num_times
        self.real = system.data.step_mask if system.data.is_ragged else None
        self.emission, self.values, self.mask = _hidden(system)
        self.at = system.data.observed_index
        chain = system.bound.transition.chain
        self.logits = recurrent_logits(chain, system.mean) if system.log_transition is None else None
        self.psi: Tensor | None = None  # (*batch, time - 1, i, K)

    # ------------------------------------------------------------------------------------------ q(x) given q(s)

    def path(self, regimes: RegimePosterior) -> PathMoments:
        """The Gaussian q(x), its entropy without padding."""
        probs, system, lead = regimes.probs, self.system, self.system.lead
        J = probs.new_zeros(lead + (self.T, self.n, self.n))
        B = probs.new_zeros(lead + (self.T - 1, self.n, self.n))
        h = probs.new_zeros(lead + (self.T, self.n))
        P = _precision(system.scale_tril)
        w = probs[..., 0, :]
        J[..., 0, :, :] += _mixed(w, P, 2)
        h[..., 0, :] += _mixed(w, _times(P, system.mean), 1)
        w = probs[..., 1:, :]
        if self.real is not None:
            w = w * self.real[..., 1:, None].to(w.dtype)
        F, b, Q = system.transition
        P = _precision(Q)
        J[..., 1:, :, :] += _mixed(w, P, 2)
        J[..., :-1, :, :] += _mixed(w, F.mT @ P @ F, 2)
        B -= _mixed(w, F.mT @ P, 2)
        h[..., 1:, :] += _mixed(w, _times(P, b), 1)
        h[..., :-1, :] -= _mixed(w, _times(F.mT @ P, b), 1)
        H, d, R = self.emission
        P = H.mT @ _precision(R)
        w = probs if self.at is None else probs[..., self.at, :]
        seen_J, seen_h = _mixed(w, P @ H, 2), _mixed(w, _times(P, self.values - d), 1)
        if self.at is None:
            J, h = J + seen_J, h + seen_h
        else:
            J, h = J.index_add(-3, self.at, seen_J), h.index_add(-2, self.at, seen_h)
        if self.logits is not None and self.T > 1:
            J, h = self._recurrent_terms(J, h, regimes)
        if self.real is not None:
            still = ~self.real[..., None]
            J = J + torch.diag_embed(still.to(J.dtype).expand(h.shape))
        moments = block_tridiagonal_moments(J, B, h)
        if self.real is None:
            return moments
        padded = (~self.real).sum(-1).to(J.dtype) * 0.5 * self.n * (1 + LOG_2PI)
        return moments._replace(entropy=moments.entropy - padded)

    def _recurrent_terms(self, J: Tensor, h: Tensor, regimes: RegimePosterior) -> tuple[Tensor, Tensor]:
        r, M = self.logits
        A = curvature(self.K, r)
        gamma = regimes.pairwise.sum(-1)  # of leaving, 0 into padding
        bend = (M.mT @ A @ M).flatten(-2)  # (i, n n)
        J = J.clone()
        J[..., :-1, :, :] += (gamma @ bend).unflatten(-1, (self.n, self.n))
        slope = regimes.pairwise + gamma.unsqueeze(-1) * ((self.psi - r) @ A - self.psi.softmax(-1))
        h = h.clone()
        h[..., :-1, :] += torch.einsum("...ij,ijn->...n", slope, M)
        return J, h

    # ------------------------------------------------------------------------------------------ q(s) given q(x)

    def expected_terms(self, path: PathMoments) -> Tensor:
        """:math:`E_{q(x)}` of the log densities of x_k and y_k in each regime, ``(*batch, time, K)``."""
        system, lead = self.system, self.system.lead
        away = path.mean[..., 0, None, :] - system.mean
        first = _expected_log_density(away, path.covariance[..., 0, None, :, :], system.scale_tril)
        table = first.new_zeros(lead + (self.T, self.K))
        table[..., 0, :] = first
        m, C = path.mean.unsqueeze(-2), path.covariance.unsqueeze(-3)
        moves = self._expected_moves(m, C, path.lag_one.unsqueeze(-3))
        if self.real is not None:
            moves = torch.where(self.real[..., 1:, None], moves, torch.zeros_like(moves))
        table[..., 1:, :] = moves
        H, d, R = self.emission
        at = slice(None) if self.at is None else self.at
        away = self.values - d - _times(H, m[..., at, :, :])
        spread = H @ C[..., at, :, :, :] @ H.mT
        seen = _expected_log_density(away, spread, R) + 0.5 * LOG_2PI * (~self.mask).sum(-1).to(away.dtype)
        seen = seen.expand(lead + seen.shape[-2:])
        return table + seen if self.at is None else table.index_add(-2, self.at, seen)

    def regimes(self, path: PathMoments) -> tuple[RegimePosterior, Tensor]:
        """The chain q(s), and the lower bound on the evidence, ``(*batch,)``."""
        table = self.expected_terms(path)
        log_initial = self.system.log_initial.expand(table[..., 0, :].shape)
        every = torch.ones_like(table[..., 0], dtype=torch.bool)
        smoothed = smooth(FiniteSystem(log_initial, self._log_matrix(path), table, every))
        pairwise = smoothed.pairwise
        if self.real is not None:
            pairwise = pairwise * self.real[..., 1:, None, None].to(pairwise.dtype)
        return RegimePosterior(smoothed.probs, pairwise), smoothed.log_likelihood.sum(-1) + path.entropy

    def _expected_moves(self, m: Tensor, C: Tensor, X: Tensor) -> Tensor:
        """E log N(x_{k+1}; F x_k + b, Q Q^T), ``(*batch, time - 1, K)``."""
        F, b, Q = self.system.transition
        away = m[..., 1:, :, :] - _times(F, m[..., :-1, :, :]) - b
        cross = F @ X
        spread = C[..., 1:, :, :, :] - cross - cross.mT + F @ C[..., :-1, :, :, :] @ F.mT
        return _expected_log_density(away, spread, Q)

    def _log_matrix(self, path: PathMoments) -> Tensor:
        if self.logits is None:
            return self.system.log_transition
        r, M = self.logits
        m, C = path.mean[..., :-1, :], path.covariance[..., :-1, :, :]
        self.psi = psi = torch.einsum("ijn,...n->...ij", M, m) + r
        bend = (M.mT @ curvature(self.K, r) @ M).flatten(-2)
        loss = psi.logsumexp(-1) + 0.5 * C.flatten(-2) @ bend.mT
        log_matrix = psi - loss.unsqueeze(-1)
        if self.real is None:
            return log_matrix
        return torch.where(self.real[..., 1:, None, None], log_matrix, log_identity(self.K, log_matrix))

    def start(self, probs: Tensor, pairwise: Tensor, mean: Tensor) -> RegimePosterior:
        """A first q(s), and the point of the quadratic bound from a first mean of x."""
        if self.real is not None:
            pairwise = pairwise * self.real[..., 1:, None, None].to(pairwise.dtype)
        if self.logits is not None:
            r, M = self.logits
            self.psi = torch.einsum("ijn,...n->...ij", M, mean[..., :-1, :]) + r
        return RegimePosterior(probs, pairwise)


def _hidden(system: SwitchingSystem) -> tuple[Affine, Tensor, Tensor]:
    """The emission without its missing entries, with a dim of regimes: laws, values, mask ``(..., time, K, obs)``."""
    H, d, R = system.emission
    values, mask = system.values.unsqueeze(-2), system.mask.unsqueeze(-2)
    lead = torch.broadcast_shapes(values.shape[:-1], H.shape[:-2], d.shape[:-1], R.shape[:-2])
    y, mask, d = (x.expand(lead + x.shape[-1:]) for x in (values, mask, d))
    y, H, d, R = hide_rows(mask, y, H.expand(lead + H.shape[-2:]), d, R.expand(lead + R.shape[-2:]))
    return Affine(H, d, R), y, mask


def _precision(root: Tensor) -> Tensor:
    """(L L^T)^{-1}."""
    eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    return torch.cholesky_solve(eye.expand(root.shape), root)


def _times(A: Tensor, x: Tensor) -> Tensor:
    return (A @ x.unsqueeze(-1)).squeeze(-1)


def _mixed(weights: Tensor, value: Tensor, event_dims: int) -> Tensor:
    """The sum over regimes of ``(..., K, *event)`` with weights ``(..., K)``."""
    return (weights[(...,) + (None,) * event_dims] * value).sum(-1 - event_dims)


def _expected_log_density(away: Tensor, spread: Tensor, root: Tensor) -> Tensor:
    """E log N(e; 0, L L^T) for e of mean ``away`` and covariance ``spread``."""
    second = spread + away.unsqueeze(-1) * away.unsqueeze(-2)
    trace = (_precision(root) * second).sum((-1, -2))
    return -0.5 * (trace + away.shape[-1] * LOG_2PI) - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
