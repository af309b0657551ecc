"""The noise that drives a path, as the random variable itself: non-centred, and right for every fixed-step scheme."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl

__all__ = ["DrivenNoise"]

#: path -> the mean of each standardised increment, ``(*lead, time - 1, noise)``
Control = Callable[[Tensor], Tensor]


class DrivenNoise(TorchDistribution):
    """The law of the standardised increments :math:`\\varepsilon_k` of a path, event ``(time - 1, noise)``.

    .. math:: \\varepsilon_k \\sim N(m_k(z_{1:k}), I), \\qquad z_{k+1} = \\Phi_k(z_k, \\sqrt{\\Delta_k}\\,
        \\varepsilon_k)

    A model has m = 0: white noise. A guide has :math:`m_k = u_k \\sqrt{\\Delta_k}`, with a control u that reads the
    path so far: that is the equation with :math:`f + g u` as drift, in the scheme of the model. The density is on the
    increments, so nothing is asked of the scheme or of the rank of g.

    Args:
        num_steps: time - 1.
        noise_dim: size of one increment.
        batch_shape: leading dims.
        like: a tensor of the dtype and device of the noise.
        control: path to means, vectorised over time; None for white noise.
        solve: increments :math:`\\varepsilon` to the path ``(*lead, time, state)``.
        draw: white noise ``(*lead, time - 1, noise)`` to the increments and their means (one pass through time).
        step_mask: bool ``(*batch, time - 1)``, False on padding; None means no padding.

    Draws are differentiable; the terms of a fresh draw are cached, keyed by ``value is cached``.

    Source: the non-centred form of Roberts and Stramer (2001), "On inference for partially observed nonlinear diffusion
    models", Biometrika 88, for a discretised equation.

    >>> import torch
    >>> from pyro_ssm.distributions import DrivenNoise
    >>> law = DrivenNoise(4, 2, (3,), torch.zeros(1))
    >>> law.log_prob(torch.zeros(3, 4, 2)).shape
    torch.Size([3])
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = True

    def __init__(
        self,
        num_steps: int,
        noise_dim: int,
        batch_shape: torch.Size | tuple[int, ...],
        like: Tensor,
        control: Control | None = None,
        solve: Callable[[Tensor], Tensor] | None = None,
        draw: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        step_mask: Tensor | None = None,
    ) -> None:
        self._parts = (like, control, solve, draw, step_mask)
        self._fresh: tuple[Tensor, Tensor, Tensor | None] | None = None  # value, white noise, means
        super().__init__(torch.Size(batch_shape), torch.Size([num_steps, noise_dim]), validate_args=False)

    @property
    def support(self) -> Any:  # type: ignore[override]
        """Real increments; what asks for it (NUTS, automatic guides) walks over every coordinate."""
        step_mask = self._parts[4]
        if step_mask is not None and not bool(step_mask.all()):
            raise ValueError(
                "series of unequal lengths: the increments of padded steps have no density, so NUTS and automatic "
                "guides are improper. Run the series one by one, use a guide of pyro_ssm.guides, or integrate states "
                "out with infer.Marginal and dynamics.discretize"
            )
        return constraints.independent(constraints.real, 2)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DrivenNoise:
        like, control, solve, draw, step_mask = self._parts
        num_steps, noise_dim = self.event_shape
        return DrivenNoise(num_steps, noise_dim, torch.Size(batch_shape), like, control, solve, draw, step_mask)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        like, control, _, draw, _ = self._parts
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        white = torch.randn(shape, dtype=like.dtype, device=like.device)
        if control is None or draw is None:
            self._fresh = (white, white, None)
            return white
        value, means = draw(white)
        self._fresh = (value, white, means)
        return value

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        with torch.no_grad():
            value = self.rsample(sample_shape)
        self._fresh = None  # its terms carry no gradient
        return value

    def log_prob_steps(self, value: Tensor) -> Tensor:
        """The terms of ``log_prob`` ``(*batch, time - 1)``, exactly 0 at padding."""
        _, control, solve, _, _ = self._parts
        if self._fresh is not None and self._fresh[0] is value:
            white = self._fresh[1]
        elif control is None or solve is None:
            white = value
        else:
            white = value - control(solve(value)[..., :-1, :])
        terms = -0.5 * white.square().sum(-1) - 0.5 * math.log(2 * math.pi) * white.shape[-1]
        return self._hide_padding(terms.expand(torch.broadcast_shapes(terms.shape, self.batch_shape + (1,))))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_prob_steps(value).sum(-1)

    def _hide_padding(self, terms: Tensor) -> Tensor:
        step_mask = self._parts[4]
        return terms if step_mask is None else torch.where(step_mask, terms, torch.zeros_like(terms))


@register_kl(DrivenNoise, DrivenNoise)
def _kl_driven_white(q: DrivenNoise, p: DrivenNoise) -> Tensor:
    """:math:`\\tfrac12 \\sum_k |m_k|^2` on the fresh draw of q, where p is white."""
    if q._fresh is None or p._parts[1] is not None:
        raise NotImplementedError("the divergence is taken on a fresh draw of a driven law from white noise")
    value, _, means = q._fresh
    terms = value.new_zeros(value.shape[:-1]) if means is None else 0.5 * means.square().sum(-1)
    return q._hide_padding(terms).sum(-1)
