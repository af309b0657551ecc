"""How far the noise coordinates of a bridge move in a gap of the latent grid: quadrature over the gap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_ssm.components import gap
from pyro_ssm.dynamics import NeuralSDE
from pyro_ssm.guides.marginals import DiagonalMarginal, FullMarginal, SinhArcsinhMarginal

__all__ = ["diffusion_and_slope", "full_moves", "noise_moves", "thermal_decay"]

#: ``(context, times) -> marginal``
At = Callable[[Any, Tensor], Any]


def thermal_decay(at: At, context: Any, last: slice) -> Tensor:
    """:math:`\\tfrac12 \\int g^2 / s^2\\, dt` over the gaps after the steps ``last``, ``(..., gaps, state)``."""
    times, inputs, weights = _nodes(context, last, 8)
    marginal = at(context, times)
    g = context.sde.diffusion_at(marginal.loc, times, inputs)
    return _integral(0.5 * (g / marginal.scale).square(), weights)


def full_moves(at: At, context: Any, last: slice) -> tuple[Tensor, Tensor]:
    """:math:`\\Psi` and a root of :math:`I - \\Psi \\Psi^T` for whitened states :math:`\\xi' = \\Psi \\xi + \\dots`.

    .. math:: \\Psi = \\exp \\int W - \\tfrac12 L^{-1} G G^T L^{-T}\\, dt,

    the first term of Magnus' series: a contraction, so that the marginals stay exact; the correlation over a gap is of
    second order where the integrand does not commute with itself.
    """
    times, inputs, weights = _nodes(context, last, 8)
    marginal: FullMarginal = at(context, times)
    g = context.sde.diffusion_at(marginal.loc, times, inputs)
    if context.sde.noise == "diagonal":
        g = g.diag_embed()
    root = marginal.scale_tril
    white = torch.linalg.solve_triangular(root, g.expand(root.shape[:-1] + g.shape[-1:]), upper=False)
    rate = marginal.spin - 0.5 * white @ white.mT
    exponent = _integral(rate.flatten(-2), weights).unflatten(-1, root.shape[-2:]).double()
    turn = torch.linalg.matrix_exp(exponent)
    eye = torch.eye(turn.shape[-1], dtype=turn.dtype, device=turn.device)
    return turn.to(root), torch.linalg.cholesky(eye - turn @ turn.mT).to(root)


def noise_moves(at: At, context: Any, last: slice, before: Any, state: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the next noise :math:`\\varepsilon' = F^{-1}(z')` given states ``(..., gaps, state)``.

    In these coordinates the equation is :math:`d\\varepsilon = (-\\kappa \\varepsilon + \\kappa')\\, dt + \\sqrt{2
    \\kappa}\\, dW` with :math:`\\kappa(\\varepsilon) = \\tfrac12 (g / F')^2`; one exponential Euler step, with
    :math:`\\kappa` averaged over the gap at fixed noise: stable for any gap.
    """
    times, inputs, weights = _nodes(context, last, 4)
    marginal: DiagonalMarginal | SinhArcsinhMarginal = at(context, times)
    sde, count = context.sde, weights.shape[-1]
    length = weights.sum(-1, keepdim=True)

    def rate(noise: Tensor) -> Tensor:
        each = noise.repeat_interleave(count, -2)
        g = sde.diffusion_at(marginal.state(each), times, inputs)
        return _integral(0.5 * (g / marginal.slope(each)).square(), weights) / length

    noise = before.noise_of(state)
    free = bool(getattr(sde.diffusion, "state_free", False) or getattr(sde.diffusion, "elementwise", False))
    kappa, slope = own_slope(rate, noise, free)
    lost = -torch.expm1(-kappa * length)
    return noise * (1 - lost) + slope * lost / kappa, (-torch.expm1(-2 * kappa * length)).sqrt()


def diffusion_and_slope(
    sde: NeuralSDE, state: Tensor, times: Tensor, inputs: Tensor | None
) -> tuple[Tensor, Tensor | float]:
    """g and, for diagonal noise, :math:`\\partial_i g_i^2` of each coordinate."""
    if getattr(sde.diffusion, "state_free", False):
        return sde.diffusion_at(state, times, inputs), 0.0
    elementwise = bool(getattr(sde.diffusion, "elementwise", False))
    g, slope = own_slope(lambda z: sde.diffusion_at(z, times, inputs), state, elementwise)
    return g, 2 * g * slope


def own_slope(field: Callable[[Tensor], Tensor], x: Tensor, elementwise: bool) -> tuple[Tensor, Tensor]:
    """A field and :math:`\\partial_i f_i`: one derivative where :math:`f_i` depends on :math:`x_i` alone, else one for
    each coordinate. Differentiable again.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        point = x if x.requires_grad else x.detach().requires_grad_()
        value = field(point).expand(x.shape)
        if not value.requires_grad:
            return value, torch.zeros_like(value)
        how: dict[str, Any] = {"create_graph": again, "retain_graph": True, "allow_unused": True}
        how["materialize_grads"] = True
        if elementwise:
            slope = torch.autograd.grad(value.sum(), point, **how)[0]
        else:
            each = [torch.autograd.grad(part.sum(), point, **how)[0] for part in value.unbind(-1)]
            slope = torch.stack([gradient[..., i] for i, gradient in enumerate(each)], -1)
    return (value, slope) if again else (value.detach(), slope)


def _nodes(context: Any, last: slice, count: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gauss-Legendre times ``(..., gaps * count)``, inputs there, and weights ``(..., gaps, count)``."""
    start, stop = context.times[..., last], context.times[..., last.start + 1 : last.stop + 1]
    x, w = (torch.as_tensor(part).to(start) for part in np.polynomial.legendre.leggauss(count))
    times = (start.unsqueeze(-1) + (stop - start).unsqueeze(-1) * (0.5 + 0.5 * x)).flatten(-2)
    inputs = None if context.inputs is None else context.inputs[..., last, :].repeat_interleave(count, -2)
    return times, inputs, gap(start, stop, context.ends) * (0.5 * w).to(context.ends)


def _integral(rates: Tensor, weights: Tensor) -> Tensor:
    """Rates ``(..., gaps * count, c)`` summed with weights ``(..., gaps, count)``: ``(..., gaps, c)``."""
    return (rates.unflatten(-2, weights.shape[-2:]) * weights.unsqueeze(-1)).sum(-2)
