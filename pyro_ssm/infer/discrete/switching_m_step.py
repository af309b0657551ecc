"""Closed-form maximisation for the parts of a switching linear model, given q(x) and q(regimes).

Each regime's law is a weighted linear regression on expected moments; regimes that share one object are pooled. What
``fixed`` names, or has ``requires_grad`` off, stays, also single blocks of a regression.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.dynamics import LinearNormal, MarkovChain, NormalInitial
from pyro_ssm.emissions import LinearNormal as LinearEmission
from pyro_ssm.infer.discrete.m_step import assign, free_parameters, maximise
from pyro_ssm.infer.discrete.mean_field import MeanField, RegimePosterior, curvature
from pyro_ssm.ops.block_tridiagonal import PathMoments

__all__ = ["check_closed_forms", "check_recurrent", "switching_m_step"]

CLOSED = (NormalInitial, LinearNormal, LinearEmission)


def check_closed_forms(model: Any, data: Any, fixed: Collection[str]) -> None:
    """Raise unless every free part has a closed form."""
    for part in ("initial", "transition", "emission"):
        for regime, ks, free in _grouped(model, part, fixed):
            if free and not isinstance(regime, CLOSED):
                _refuse(f"{part}.regimes.{ks[-1]}, a {type(regime).__name__} with free {sorted(free)}")
            if free and isinstance(regime, NormalInitial) and regime.input_dim:
                _refuse(f"{part}.regimes.{ks[-1]}, a NormalInitial with inputs")
            partly = data.mask.any(-1) != data.mask.all(-1)
            if part == "emission" and "scale_tril" in free and bool(partly.any()):
                _refuse("a full covariance of observations that are partly missing (use covariance='diagonal')")


def check_recurrent(model: Any) -> None:
    """Raise unless a recurrent model's chain is one that the quadratic bound covers."""
    chain = model.transition.chain
    if model.transition.recurrent:
        n = model.transition.state_dim - 1
        if not isinstance(chain, MarkovChain) or chain.input_dim != n or bool((chain.matrix == 0).any()):
            raise TypeError(
                f"the variational treatment of a recurrent model needs its chain to be MarkovChain(K, input_dim={n}) "
                "without zeros; use particle filters for others"
            )


def _refuse(what: str) -> None:
    raise TypeError(
        f"switching_em has no closed form for {what}. Name its parameters in `fixed`, or fit with "
        "infer.Marginal(model, filter=kim_filter) by SVI or NUTS"
    )


def switching_m_step(
    model: Any, field: MeanField, regimes: RegimePosterior, path: PathMoments, fixed: Collection[str]
) -> None:
    """Move every free parameter of ``model`` to the maximum of the lower bound."""
    weights = regimes.probs
    K, n = field.K, field.n
    data = field.system.data
    first = weights[..., 0, :].reshape(-1, K)
    m, C = path.mean, path.covariance
    for regime, ks, free in _grouped(model, "initial", fixed):
        _initial(regime, first[:, ks].sum(-1), m[..., 0, :].reshape(-1, n), C[..., 0, :, :].reshape(-1, n, n), free)
    chain_free = free_parameters(model.initial.chain, fixed, "initial.chain")
    maximise(model.initial.chain, first.sum(0), chain_free)
    if field.T > 1:
        _transitions(model, field, regimes, path, fixed)
    at = slice(None) if data.observed_index is None else data.observed_index
    inputs = None if data.inputs is None else data.inputs[..., at, :]
    x, X = m[..., at, :], C[..., at, :, :]
    lead = x.shape[:-1]
    z, Z = _design(x, X, inputs, model.emission.regimes[0])
    y = field.system.values.expand(lead + field.system.values.shape[-1:])
    mask = field.system.mask.expand(y.shape).to(y.dtype)
    w = weights[..., at, :]
    for regime, ks, free in _grouped(model, "emission", fixed):
        each = w[..., ks].sum(-1)
        if not free:
            continue
        if regime.covariance == "full":
            each = each * mask.amin(-1)
            moments = (_sum(each, y.unsqueeze(-1) * y.unsqueeze(-2)), _sum(each, y.unsqueeze(-1) * z.unsqueeze(-2)))
            _regress(regime, *moments, _sum(each, Z), each.sum(), free)
        else:
            _regress_rows(regime, each.unsqueeze(-1) * mask, y, z, Z, free)


def _transitions(
    model: Any, field: MeanField, regimes: RegimePosterior, path: PathMoments, fixed: Collection[str]
) -> None:
    data, K = field.system.data, field.K
    m, C, lag = path.mean, path.covariance, path.lag_one
    inputs = None if data.inputs is None else data.inputs[..., :-1, :]
    arriving = regimes.pairwise.sum(-2)  # weight of each move into a regime, 0 into padding
    z, Z = _design(m[..., :-1, :], C[..., :-1, :, :], inputs, model.transition.regimes[0])
    y = m[..., 1:, :]
    yy = C[..., 1:, :, :] + y.unsqueeze(-1) * y.unsqueeze(-2)
    wide = torch.nn.functional.pad(lag.mT, (0, z.shape[-1] - lag.shape[-1]))  # Cov(y, z): inputs and 1 are known
    yz = wide + y.unsqueeze(-1) * z.unsqueeze(-2)
    for regime, ks, free in _grouped(model, "transition", fixed):
        each = arriving[..., ks].sum(-1)
        if free:
            _regress(regime, _sum(each, yy), _sum(each, yz), _sum(each, Z), each.sum(), free)
    chain, free = model.transition.chain, free_parameters(model.transition.chain, fixed, "transition.chain")
    if field.logits is None:
        maximise(chain, regimes.pairwise.reshape(-1, K, K).sum(0), free)
    elif free:
        _recurrent(chain, field, regimes, m[..., :-1, :], C[..., :-1, :, :], free)


def _grouped(model: Any, part: str, fixed: Collection[str]) -> list[tuple[Any, list[int], set[str]]]:
    """Each different object among the regimes, those that share it, and its free parameters.

    A shared object has the name of the last regime that holds it, as in ``bind``.
    """
    shared: dict[int, tuple[Any, list[int]]] = {}
    for k, regime in enumerate(getattr(model, part).regimes):
        shared.setdefault(id(regime), (regime, []))[1].append(k)
    return [(regime, ks, free_parameters(regime, fixed, f"{part}.regimes.{ks[-1]}")) for regime, ks in shared.values()]


def _sum(weights: Tensor, value: Tensor) -> Tensor:
    """The weighted sum over series and times of ``(..., time, a, b)``."""
    return (weights[..., None, None] * value).flatten(0, -3).sum(0)


def _design(x: Tensor, X: Tensor, inputs: Tensor | None, like: Any) -> tuple[Tensor, Tensor]:
    """E[z] and E[z z^T] of the regressors z = (x, inputs, 1)."""
    parts = [x]
    if getattr(like, "input_dim", 0):
        parts.append(inputs.to(x.dtype).expand(x.shape[:-1] + inputs.shape[-1:]))
    parts.append(x.new_ones(x.shape[:-1] + (1,)))
    z = torch.cat(parts, -1)
    more = z.shape[-1] - x.shape[-1]
    return z, torch.nn.functional.pad(X, (0, more, 0, more)) + z.unsqueeze(-1) * z.unsqueeze(-2)


def _blocks(regime: Any) -> list[tuple[str, int]]:
    blocks = [("matrix", regime.matrix.shape[-1])]
    if regime.input_dim:
        blocks.append(("input_matrix", regime.input_dim))
    return [*blocks, ("offset", 1)]


def _coefficients(regime: Any, free: Collection[str]) -> tuple[Tensor, Tensor]:
    """The present coefficients [A B b], and which columns are free."""
    parts = [getattr(regime, name).detach().reshape(-1, width) for name, width in _blocks(regime)]
    moves = [torch.full((width,), name in free, device=parts[0].device) for name, width in _blocks(regime)]
    return torch.cat(parts, -1), torch.cat(moves)


def _solve(W: Tensor, moves: Tensor, yz: Tensor, zz: Tensor) -> Tensor:
    """The free columns of W that minimise the expected squares, the others as they are."""
    if not bool(moves.any()):
        return W
    W = W.to(zz.dtype).clone()
    rest = yz[..., moves] - W[..., ~moves] @ zz[..., ~moves, :][..., moves]
    inner = zz[..., moves, :][..., moves]
    W[..., moves] = torch.linalg.lstsq(inner.mT, rest.mT, driver="gelsd").solution.mT
    return W


def _write(regime: Any, W: Tensor, free: Collection[str]) -> None:
    start = 0
    for name, width in _blocks(regime):
        if name in free:
            assign(regime, name, W[:, start : start + width].reshape(getattr(regime, name).shape))
        start += width


def _regress(regime: Any, yy: Tensor, yz: Tensor, zz: Tensor, total: Tensor, free: Collection[str]) -> None:
    if not bool(total > 1e-8):
        return
    W, moves = _coefficients(regime, free)
    W = _solve(W.to(zz.dtype), moves, yz, zz)
    _write(regime, W, free)
    S = (yy - W @ yz.mT - yz @ W.mT + W @ zz @ W.mT) / total
    _noise(regime, S, free)


def _noise(regime: Any, S: Tensor, free: Collection[str]) -> None:
    if "scale" in free:
        floor = regime._pyro_params["scale"][0].lower_bound * 1.001
        assign(regime, "scale", S.diagonal().clamp_min(floor**2).sqrt())
    if "scale_tril" in free:
        floor = regime._pyro_params["scale_tril"][0].floor * 1.001
        values, vectors = torch.linalg.eigh((S + S.mT) / 2)
        assign(regime, "scale_tril", torch.linalg.cholesky((vectors * values.clamp_min(floor**2)) @ vectors.mT))


def _regress_rows(regime: Any, weights: Tensor, y: Tensor, z: Tensor, Z: Tensor, free: Collection[str]) -> None:
    """A regression for each entry of the observation, with its own missing values."""
    W, moves = _coefficients(regime, free)
    rows, variances = [], []
    scale = regime.scale.detach().to(z.dtype)
    for i, (w, row) in enumerate(zip(weights.unbind(-1), W.to(z.dtype))):
        if not bool(w.sum() > 1e-8):
            rows.append(row)
            variances.append(scale[i] ** 2)
            continue
        yz, zz = (w * y[..., i]).flatten() @ z.flatten(0, -2), _sum(w, Z)
        row = _solve(row.unsqueeze(0), moves, yz.unsqueeze(0), zz).squeeze(0)
        rows.append(row)
        square = (w * y[..., i].square()).sum() - 2 * row @ yz + row @ zz @ row
        variances.append(square / w.sum())
    _write(regime, torch.stack(rows), free)
    _noise(regime, torch.diag(torch.stack(variances)), free)


def _initial(regime: Any, w: Tensor, m: Tensor, C: Tensor, free: Collection[str]) -> None:
    total = w.sum()
    if not free or not bool(total > 1e-8):
        return
    if "loc" in free:
        assign(regime, "loc", (w.unsqueeze(-1) * m).sum(0) / total)
    away = m - regime.loc.detach()
    S = (w[:, None, None] * (C + away.unsqueeze(-1) * away.unsqueeze(-2))).sum(0) / total
    _noise(regime, S, free)


def _recurrent(
    chain: MarkovChain, field: MeanField, regimes: RegimePosterior, m: Tensor, C: Tensor, free: Collection[str]
) -> None:
    """The maximum of the quadratic bound at the present psi: a regression of the logits on (x, 1), regime by regime."""
    r, M = field.logits
    K, n = field.K, field.n
    A = curvature(K, r)
    z = torch.cat([m, m.new_ones(m.shape[:-1] + (1,))], -1)
    Z = torch.nn.functional.pad(C, (0, 1, 0, 1)) + z.unsqueeze(-1) * z.unsqueeze(-2)
    gamma = regimes.pairwise.sum(-1)
    pull = regimes.pairwise + gamma.unsqueeze(-1) * (field.psi @ A - field.psi.softmax(-1))
    new_r, new_M = r.clone(), M.clone()
    moves = torch.tensor([name in free for name in ["input_matrix"] * n + ["matrix"]], device=m.device)
    for i in range(K):
        zz = _sum(gamma[..., i], Z)
        if not bool(gamma[..., i].sum() > 1e-8):
            continue
        G = torch.einsum("...j,...d->jd", pull[..., i, :], z)
        now = torch.cat([M[i], r[i].unsqueeze(-1)], -1)
        now = now - now.mean(0)  # a constant added to all logits changes nothing
        W = _solve(now, moves, 2 * (G - G.mean(0)), zz)
        new_M[i], new_r[i] = W[:, :-1], W[:, -1]
    if "matrix" in free:
        assign(chain, "matrix", new_r.softmax(-1))
    if "input_matrix" in free:
        assign(chain, "input_matrix", new_M)
