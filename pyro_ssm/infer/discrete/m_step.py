"""Closed-form maximisation for the parts of a hidden Markov model, given posterior probabilities of its states.

Each function changes a component in place and leaves alone what ``free`` does not name. A state that is never visited
keeps its parameters.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.binding import parameter_names
from pyro_ssm.components import Component
from pyro_ssm.dynamics import CategoricalInitial, MarkovChain
from pyro_ssm.emissions import CategoricalTable, NormalTable, PoissonTable, StudentTTable

__all__ = ["Seen", "assign", "free_parameters", "maximise", "maximise_emission"]


class Seen:
    """Observations flattened over series and time, with posterior weights: values and mask ``(M, obs)``, ``(M, K)``."""

    def __init__(self, values: Tensor, mask: Tensor, weights: Tensor) -> None:
        self.values, self.mask, self.weights = values.flatten(0, -2), mask.flatten(0, -2), weights.flatten(0, -2)

    def sum(self, of: Tensor, extra: Tensor | None = None) -> Tensor:
        """Weighted sums over observed entries, ``(K, obs)``; of ``(M, obs)``, or ``(M, K, obs)``."""
        w = self.weights.unsqueeze(-1) * self.mask.unsqueeze(-2).to(of.dtype)
        w = w if extra is None else w * extra
        return (w * (of.unsqueeze(-2) if of.dim() == 2 else of)).sum(0)

    @property
    def total(self) -> Tensor:
        """Weight of each state and entry, ``(K, obs)``."""
        return self.sum(torch.ones_like(self.values))


def free_parameters(root: Component, fixed: Collection[str], prefix: str) -> set[str]:
    """The parameters of a part that may move: not in ``fixed`` (dotted names), and with ``requires_grad``."""
    names = set()
    for name in parameter_names(root):
        path, _, attribute = name.rpartition(".")
        owner = root.get_submodule(path)
        held = owner._parameters.get(f"{attribute}_unconstrained", owner._parameters.get(attribute))
        if f"{prefix}.{name}" not in fixed and (held is None or held.requires_grad):
            names.add(name)
    return names


def assign(component: Component, name: str, value: Tensor) -> None:
    """Set a parameter, constrained or not, in its own dtype."""
    with torch.no_grad():
        if name in component.__dict__.get("_pyro_params", {}):
            setattr(component, name, value.to(getattr(component, name).dtype))
        else:
            getattr(component, name).copy_(value)


def _where_visited(total: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` where a state has weight, else ``old``."""
    visited = total > torch.finfo(total.dtype).tiny
    return torch.where(visited.reshape(visited.shape + (1,) * (new.dim() - visited.dim())), new, old)


def _refuse(component: Component, free: Collection[str]) -> None:
    if free:
        raise TypeError(
            f"baum_welch has no closed form for {type(component).__name__} with free parameters {sorted(free)}. Name "
            "them in `fixed`, or fit with infer.Marginal(model, filter=hmm_filter) by SVI or NUTS"
        )


@singledispatch
def maximise(component: Any, weights: Tensor, free: set[str]) -> None:
    """Move an initial law (weights ``(K,)``) or a transition (expected moves ``(K, K)``) to its maximum."""
    _refuse(component, free)


@maximise.register
def _initial(component: CategoricalInitial, weights: Tensor, free: set[str]) -> None:
    _refuse(component, free if component.input_dim else free - {"probs"})
    if "probs" in free:
        assign(component, "probs", weights / weights.sum())


@maximise.register
def _chain(component: MarkovChain, weights: Tensor, free: set[str]) -> None:
    _refuse(component, free if component.input_dim else free - {"matrix"})
    if "matrix" in free:
        total = weights.sum(-1)
        new = weights / total.unsqueeze(-1).clamp_min(torch.finfo(total.dtype).tiny)
        assign(component, "matrix", _where_visited(total, new, component.matrix))


@singledispatch
def maximise_emission(component: Any, seen: Seen, free: set[str]) -> None:
    """Move a table emission to its maximum."""
    _refuse(component, free)


@maximise_emission.register
def _poisson(component: PoissonTable, seen: Seen, free: set[str]) -> None:
    if "rate" in free:
        total = seen.total
        rate = (seen.sum(seen.values) / total).clamp_min(_above(component.floor))
        assign(component, "rate", _where_visited(total, rate, component.rate))


@maximise_emission.register
def _categorical(component: CategoricalTable, seen: Seen, free: set[str]) -> None:
    if "probs" in free:
        hot = torch.nn.functional.one_hot(seen.values.long(), component.num_classes).to(seen.values.dtype)
        counts = torch.einsum("mk,mp,mpc->kpc", seen.weights, seen.mask.to(hot.dtype), hot)
        total = counts.sum(-1)
        assign(component, "probs", _where_visited(total, counts / total.unsqueeze(-1), component.probs))


@maximise_emission.register
def _normal(component: NormalTable, seen: Seen, free: set[str]) -> None:
    if component.covariance == "full":
        _normal_full(component, seen, free)
        return
    total = seen.total
    if "loc" in free:
        assign(component, "loc", _where_visited(total, seen.sum(seen.values) / total, component.loc))
    if "scale" in free:
        away = (seen.values.unsqueeze(-2) - component.loc).square()
        scale = (seen.sum(away) / total).sqrt().clamp_min(_above(component.floor))
        assign(component, "scale", _where_visited(total, scale, component.scale))


def _above(floor: float) -> float:
    return floor * (1 + 1e-3)


def _normal_full(component: NormalTable, seen: Seen, free: set[str]) -> None:
    """Missing entries are latent too: their conditional means and covariances enter (Little and Rubin 2002, 11.2)."""
    locs: list[Tensor] = []
    roots: list[Tensor] = []
    eye = torch.eye(component.obs_dim, dtype=seen.values.dtype, device=seen.values.device)
    shown, told = seen.mask, seen.mask.any(-1)
    both = shown.unsqueeze(-1) & shown.unsqueeze(-2)
    for loc, root, w in zip(component.loc, component.scale_tril, seen.weights.unbind(-1)):
        w = torch.where(told, w, torch.zeros_like(w))  # a step without any entry says nothing
        total = w.sum()
        if not bool(total > torch.finfo(total.dtype).tiny):
            locs.append(loc)
            roots.append(root)
            continue
        S = root @ root.mT
        cross = torch.where(shown.unsqueeze(-2), S, torch.zeros_like(S))  # columns of what is seen
        gain = torch.linalg.solve(torch.where(both, S, eye), cross, left=False)
        residual = torch.where(shown, seen.values - loc, torch.zeros_like(loc))
        y = torch.where(shown, seen.values, loc + (gain @ residual.unsqueeze(-1)).squeeze(-1))
        hidden = ~shown
        rest = S - gain @ cross.mT
        rest = torch.where(hidden.unsqueeze(-1) & hidden.unsqueeze(-2), rest, torch.zeros_like(rest))
        if "loc" in free:
            loc = (w.unsqueeze(-1) * y).sum(0) / total
        away = y - loc
        if "scale_tril" in free:
            S = (w[:, None, None] * (away.unsqueeze(-1) * away.unsqueeze(-2) + rest)).sum(0) / total
            values, vectors = torch.linalg.eigh(S)
            values = values.clamp_min(_above(component.floor) ** 2)
            root = torch.linalg.cholesky((vectors * values) @ vectors.mT)
        locs.append(loc)
        roots.append(root)
    if "loc" in free:
        assign(component, "loc", torch.stack(locs))
    if "scale_tril" in free:
        assign(component, "scale_tril", torch.stack(roots))


@maximise_emission.register
def _student(component: StudentTTable, seen: Seen, free: set[str]) -> None:
    """A Student law is a normal of random precision u: its conditional mean weighs the data (Lange et al. 1989)."""
    loc, scale, df = (table.detach().clone() for table in (component.loc, component.scale, component.df))
    total = seen.total
    y = seen.values.unsqueeze(-2)
    square = ((y - loc) / scale).square()
    u = (df + 1) / (df + square)
    if "loc" in free:
        new = seen.sum(seen.values, u) / seen.sum(torch.ones_like(seen.values), u)
        assign(component, "loc", _where_visited(total, new, loc))
    if "scale" in free:
        away = (y - component.loc).square()
        new = (seen.sum(away, u) / total).sqrt().clamp_min(_above(component.floor))
        assign(component, "scale", _where_visited(total, new, scale))
    if "df" in free:
        log_u = torch.digamma((df + 1) / 2) - ((df + square) / 2).log()
        assign(component, "df", _where_visited(total, _solve_df(-1 - seen.sum(log_u - u) / total), df))


def _solve_df(target: Tensor) -> Tensor:
    """The v with log(v / 2) - digamma(v / 2) = target, which falls in v, by bisection between 2 and 1e4."""
    low, high = torch.full_like(target, 2.002).log(), torch.full_like(target, 1e4).log()
    for _ in range(60):
        middle = (low + high) / 2
        half = middle.exp() / 2
        more = half.log() - torch.digamma(half) > target
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return ((low + high) / 2).exp()
