"""The law of an Euler chain with diagonal noise, which shares the diffusion of a guide's draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import kl_divergence, register_kl

from pyro_ssm.distributions.markov_kl import _kl_markov_markov
from pyro_ssm.distributions.markov_path import Draw, MarkovPath, Step

__all__ = ["EulerDraw", "EulerPath"]


class EulerDraw(NamedTuple):
    """What a guide computed while it drew a path: its steps, and the scales of the prior's; each ``(..., time - 1,
    state)``.

    >>> from pyro_ssm.distributions.euler_path import EulerDraw
    >>> EulerDraw._fields
    ('key', 'loc', 'scale', 'prior_scale')
    """

    key: tuple[Any, ...]  # what the prior's scales were computed from, compared by identity
    loc: Tensor
    scale: Tensor
    prior_scale: Tensor


class EulerPath(MarkovPath):
    """A :class:`MarkovPath` whose steps are :math:`N(z_k + f \\Delta_k, \\text{diag}(g^2) \\Delta_k)`.

    The guide of a stochastic differential equation has the diffusion of the prior, and evaluates it at every step of a
    draw. Where the prior's diffusion has the same parameters, times and inputs (``key``, by identity), the density of
    that draw takes the scales from there and evaluates the drift alone, once on the whole path. Any other path is
    evaluated in full; values and gradients are the same.

    Args:
        step: as in :meth:`MarkovPath.over`.
        first: the law of the first state.
        mean: the path without its last state to the means of the next states.
        key: identifies the diffusion; None shares nothing.
        num_times: length of a path.
        state_dim: size of the state.
        step_mask: bool ``(*batch, time)``, False on padding.
        batch_shape: leading dims of a draw.
        draw: draws whole paths, as in :meth:`MarkovPath.over`.

    >>> import torch, pyro_ssm as ssm
    >>> sde = ssm.dynamics.NeuralSDE(ssm.dynamics.MLPDrift(2), ssm.dynamics.ElementwiseDiffusion(2))
    >>> model = ssm.StateSpaceModel(ssm.dynamics.NormalInitial(2), sde, ssm.emissions.LinearNormal(2, 1))
    >>> type(ssm.models.path_law(model.bind(), ssm.TimeSeries(torch.arange(4.0), torch.ones(4, 1)))).__name__
    'EulerPath'
    """

    def __init__(
        self,
        step: Step,
        first: Any,
        mean: Callable[[Tensor], Tensor],
        key: tuple[Any, ...] | None,
        num_times: int,
        state_dim: int,
        step_mask: Tensor | None,
        batch_shape: torch.Size | tuple[int, ...],
        draw: Draw | None = None,
    ) -> None:
        self._parts = (first, mean, key)
        self._set(step, num_times, state_dim, None, step_mask, torch.Size(batch_shape), draw, False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> EulerPath:
        first, mean, key = self._parts
        num_times, state_dim = self.event_shape
        shape = torch.Size(batch_shape)
        return EulerPath(self._step, first, mean, key, num_times, state_dim, self._step_mask, shape, self._draw)

    def log_prob_steps(self, value: Tensor) -> Tensor:
        if self._fresh is not None and self._fresh[0] is value:
            return self._fresh[1]
        if (drawn := self._shared(value)) is None:
            return super().log_prob_steps(value)
        first, mean, _ = self._parts
        noise = (value[..., 1:, :] - mean(value[..., :-1, :])) / drawn.prior_scale
        terms = -0.5 * noise.square().sum(-1) - drawn.prior_scale.log().sum(-1)
        terms = terms - 0.5 * math.log(2 * math.pi) * value.shape[-1]
        return self._with_first(first.log_prob(value[..., :1, :]), terms)

    def kl_steps(self, prior: EulerPath, path: Tensor) -> Tensor | None:
        """The terms of the divergence from ``prior`` on a draw of this law; None where nothing is shared."""
        if (drawn := prior._shared(path)) is None:
            return None
        ratio = drawn.scale / drawn.prior_scale
        shift = (drawn.loc - prior._parts[1](path[..., :-1, :])) / drawn.prior_scale
        terms = 0.5 * (ratio.square() + shift.square() - 1).sum(-1) - ratio.log().sum(-1)
        return self._with_first(kl_divergence(self._parts[0], prior._parts[0]), terms)

    def _shared(self, value: Tensor) -> EulerDraw | None:
        drawn: EulerDraw | None = getattr(value, "euler_draw", None)
        key = self._parts[2]
        if drawn is None or key is None or len(key) != len(drawn.key):
            return None
        return drawn if all(a is b for a, b in zip(key, drawn.key, strict=True)) else None

    def _with_first(self, first: Tensor, rest: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(first.shape[:-1], rest.shape[:-1], self.batch_shape)
        return self._hide_padding(torch.cat([term.expand(shape + term.shape[-1:]) for term in (first, rest)], -1))


@register_kl(EulerPath, EulerPath)
def _kl_euler_euler(q: EulerPath, p: EulerPath) -> Tensor:
    terms = None if q._fresh is None else q.kl_steps(p, q._fresh[0])
    return _kl_markov_markov(q, p) if terms is None else terms.sum(-1)
