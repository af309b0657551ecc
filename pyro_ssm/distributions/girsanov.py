"""Laws of paths of a continuous-time solver, which have densities with respect to each other only (Girsanov)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import kl_divergence, register_kl

from pyro_ssm.distributions.singular_normal import SingularNormal
from pyro_ssm.ops.brownian import BrownianPath
from pyro_ssm.ops.sde import check_path

__all__ = ["GirsanovPath"]

_NO_DENSITY = (
    "the path of an adaptive or adjoint solver has no density of its own, only the ratio that belongs to its own noise "
    "(Girsanov). Use a fixed-step method of NeuralSDE (`method='euler'`, or `site='noise'`), or dynamics.discretize"
)


class GirsanovPath(TorchDistribution):
    """The law of a path by any solver, written relative to the law of the model's equation.

    .. math:: \\log\\frac{dQ}{dP}(z) = \\log\\frac{q(z_1)}{p(z_1)} + \\sum_k u_k \\cdot \\Delta W_k +
        \\tfrac12 |u_k|^2 \\Delta_k, \\qquad g(z_k)\\, u_k = f_q(z_k) - f_p(z_k)

    The model's law (``control=None``) is the reference: its ``log_prob`` is :math:`\\log p(z_1)`, and it takes only
    paths that it or a guide's law has drawn. The guide's ``log_prob`` is :math:`\\log q(z_1)` with the two sums, *the
    Itô term included*: without it the sum is a valid term of an ELBO and an invalid weight. Because :math:`u_k` is
    taken at the left end of each gap, the weights have the expectation 1 on any grid.

    Args:
        first: the law of the first state, batch ``(..., 1)``, event ``(state,)``.
        solve: start ``(*lead, 1, state)`` and noise to the path.
        times: ``(time,)`` or ``(*batch, time)``.
        noise_dim: of the Brownian motion.
        batch_shape: leading dims.
        like: a tensor of the dtype and device of the path.
        control: path without its last state to u ``(*lead, time - 1, noise)``; None for the reference.
        step_mask: bool ``(*batch, time)``, False on padding.

    Raises:
        NotImplementedError: ``log_prob`` of a path that was not drawn by such a law.
        ValueError: NUTS or an automatic guide asks for the support.

    Gradients: through the draw (reparameterised); those of a solver with adjoint are its own. A draw made without
    gradient has none in its terms, and asking for them raises.

    Source: Li, Wong, Chen and Duvenaud (2020), "Scalable gradients for stochastic differential equations", section 5;
    Øksendal (2003), theorem 8.6.8.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.distributions import GirsanovPath
    >>> first, times = dist.Normal(torch.zeros(1, 1), 1.0).to_event(1), torch.arange(4.0).double()
    >>> law = GirsanovPath(first, lambda z, w: z + w.values, times, 1, (), torch.zeros(1))
    >>> z = law.rsample()
    >>> torch.allclose(law.log_prob(z), first.log_prob(z[:1]).sum())
    True
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = True

    def __init__(
        self,
        first: Any,
        solve: Callable[[Tensor, BrownianPath], Tensor],
        times: Tensor,
        noise_dim: int,
        batch_shape: torch.Size | tuple[int, ...],
        like: Tensor,
        control: Callable[[Tensor], Tensor] | None = None,
        step_mask: Tensor | None = None,
    ) -> None:
        self._parts = (first, solve, times, noise_dim, like, control, step_mask)
        self._fresh: tuple[Tensor, Tensor, Tensor, bool] | None = None  # path, terms, 1/2 |u|^2 dt, with gradient
        event = torch.Size([times.shape[-1], *first.event_shape])
        super().__init__(torch.Size(batch_shape), event, validate_args=False)

    @property
    def support(self) -> Any:  # type: ignore[override]
        """There is none to walk over: raises."""
        raise ValueError(f"NUTS and automatic guides cannot walk over the path: {_NO_DENSITY}")

    def expand(self, batch_shape: Any, _instance: Any = None) -> GirsanovPath:
        first, solve, times, noise_dim, like, control, step_mask = self._parts
        return GirsanovPath(first, solve, times, noise_dim, torch.Size(batch_shape), like, control, step_mask)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        first, solve, times, noise_dim, like, control, _ = self._parts
        shape = torch.Size(sample_shape) + self.batch_shape
        start = first.expand(shape + (1,)).rsample()
        noise = BrownianPath.draw(times, noise_dim, shape, dtype=like.dtype, device=like.device)
        path = check_path(solve(start, noise), times, "the path of the solver")
        rest = path.new_zeros(shape + (times.shape[-1] - 1,))
        divergence = rest
        if control is not None and times.shape[-1] > 1:
            u = control(path[..., :-1, :])
            gaps = times.diff(dim=-1).to(u)
            divergence = 0.5 * u.square().sum(-1) * gaps
            rest = (u * noise.increments).sum(-1) + divergence
        terms = torch.cat([_log_start(first, start).expand(shape + (1,)), rest], -1)
        path.drawn_by_girsanov = True  # type: ignore[attr-defined]  # the reference takes no other path
        self._fresh = (path, self._hide_padding(terms), divergence, torch.is_grad_enabled())
        return path

    def log_prob_steps(self, value: Tensor) -> Tensor:
        """The terms of ``log_prob`` ``(*batch, time)``, exactly 0 at padding."""
        first, _, _, _, _, control, _ = self._parts
        if self._fresh is not None and self._fresh[0] is value:
            if torch.is_grad_enabled() and not self._fresh[3] and control is not None:
                raise NotImplementedError(
                    "the path was drawn without gradient, so its density has none (reweighted wake-sleep asks for it). "
                    f"Use Trace_ELBO, TraceMeanField_ELBO or IWAE; {_NO_DENSITY}"
                )
            return self._fresh[1]
        if control is not None or not getattr(value, "drawn_by_girsanov", False):
            raise NotImplementedError(_NO_DENSITY)
        start = _log_start(first, value[..., :1, :])
        shape = torch.broadcast_shapes(value.shape[:-2], self.batch_shape)
        zero = start.new_zeros(shape + (value.shape[-2] - 1,))
        return self._hide_padding(torch.cat([start.expand(shape + (1,)), zero], -1))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_prob_steps(value).sum(-1)

    def _hide_padding(self, terms: Tensor) -> Tensor:
        step_mask = self._parts[6]
        return terms if step_mask is None else torch.where(step_mask, terms, torch.zeros_like(terms))


def _is_point(law: Any) -> bool:
    return isinstance(law, SingularNormal) and not bool(law._unbroadcasted_scale_tril.any())


def _log_start(first: Any, start: Tensor) -> Tensor:
    """log p(z_1); relative to itself where the start is known, in the model and in its guide."""
    return start.new_zeros(start.shape[:-1]) if _is_point(first) else first.log_prob(start)


@register_kl(GirsanovPath, GirsanovPath)
def _kl_girsanov(q: GirsanovPath, p: GirsanovPath) -> Tensor:
    """:math:`KL(q(z_1) \\| p(z_1)) + \\tfrac12 \\sum_k |u_k|^2 \\Delta_k` on the fresh draw of q."""
    if q._fresh is None or p._parts[5] is not None:
        raise NotImplementedError("the divergence is taken on a fresh draw from a guide's law")
    path, _, divergence, _ = q._fresh
    start = path[..., :1, :]
    first = _log_start(q._parts[0], start) if _is_point(q._parts[0]) else kl_divergence(q._parts[0], p._parts[0])
    first = first.expand(path.shape[:-2] + (1,))
    return q._hide_padding(torch.cat([first, divergence], -1)).sum(-1)
