"""Resampling by a diffusion that is run backward: particles move instead of being chosen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_ssm.infer.smc.resample import Resampled, Resampling, Weighted
from pyro_ssm.infer.smc.tree import tree_mix, tree_where

__all__ = ["DiffusionResampling"]

_MOST_NOISE = 5.0  # in units of the cloud's spread: with so much of it the cloud is its Gaussian, but for a 26th
_FEWEST_ROWS = 64
_RIDGE = 1e-6  # on correlations: a cloud may be flat in some direction


class DiffusionResampling(Resampling):
    """New particles are draws of the cloud's Gaussian, carried to the cloud by the reverse of a diffusion.

    .. math::
        \\frac{d v}{d \\rho} = \\frac{v - \\bar u_\\rho(v)}{\\rho}, \\qquad
        \\bar u_\\rho(v) = \\sum_i r_i u_i, \\qquad
        r_i \\propto W_i \\exp\\left(-\\frac{\\|v - u_i\\|^2}{2 \\rho^2}\\right)

    with :math:`u_i` the particles in coordinates where the weighted cloud has mean 0 and covariance 1. Noise of size
    :math:`\\rho` turns the cloud into a mixture of Gaussians, whose score is known; this is its probability flow, from
    much noise, where the mixture is nearly :math:`N(0, 1 + \\rho^2)` and is drawn as such, down to the bandwidth. There
    each new particle is :math:`\\bar u_\\rho(v)`, an average of old ones, and its other parts (a memory) are averaged
    alike. For a Gaussian cloud the flow does nothing but scale.

    The draws are points of a randomly shifted Sobol' sequence: each is uniform by itself, together they are even. The
    new cloud has equal weights; it is consistent as N and ``num_steps`` grow and the bandwidth shrinks, and unbiased
    for *nothing*, so that the estimated likelihood is biased: averages within the bandwidth lose its square of a
    variance of 1 (a hundredth by default), the steps of the flow less. The cost is N times N, ``num_steps`` times, a
    series. States must be vectors of real numbers.

    Gradient: exact for the value that is computed, so that it is the gradient of :math:`\\log \\hat Z` for fixed noise,
    hence *unbiased* for that of :math:`E \\log \\hat Z` of *this* filter, if every step resamples
    (``ess_threshold=1``); for the gradient of :math:`\\log p(y)` it is as biased as the filter itself. A narrow
    bandwidth makes the flow steep between particles and the gradient variable, a wide one smooths both.

    Args:
        bandwidth: the least noise, in units of the cloud's spread.
        num_steps: of the flow, of second order, at noises in geometric progression.

    Raises:
        ValueError: ``bandwidth`` is not in (0, 5), or fewer than 2 steps; in a run, more state dimensions than
            particles (and than 64).
        TypeError: in a run, a part of a particle is not a floating-point tensor.

    Randomness: as many uniforms a series as there are state dimensions, from the filter's noise (which provides N, but
    at least 64).

    Source: J. R. Andersson, Z. Zhao (2025), "Diffusion differentiable resampling", arXiv:2512.10401 (a stochastic
    reversal; here the deterministic one of Song et al. 2021, "Score-based generative modeling through stochastic
    differential equations", section 4.3); for the steps C. Lu et al. (2022), "DPM-Solver++", algorithm 2.

    >>> import torch
    >>> from pyro_ssm.infer.smc import DiffusionResampling, Weighted
    >>> x, weights = torch.linspace(-3.0, 3.0, 200).unsqueeze(-1), torch.linspace(0.0, 0.01, 200)
    >>> cloud = Weighted(x, lambda: x, weights.log(), weights, None)
    >>> moved = DiffusionResampling()(cloud, torch.full((200,), 0.5, dtype=torch.float64))
    >>> bool((moved.particles.mean() - weights @ x[:, 0]).abs() < 0.03)
    True
    """

    smooth = True

    def __init__(self, bandwidth: float = 0.1, num_steps: int = 16) -> None:
        if not 0 < bandwidth < _MOST_NOISE:
            raise ValueError(f"`bandwidth` must be in (0, {_MOST_NOISE:g}), got {bandwidth}")
        if num_steps < 2:
            raise ValueError(f"`num_steps` must be at least 2, got {num_steps}")
        self.bandwidth, self.num_steps = bandwidth, num_steps
        self._nets: dict[tuple[int, int, torch.device], Tensor] = {}

    def rows(self, num_particles: int) -> int:
        return max(num_particles, _FEWEST_ROWS)

    def __call__(self, weighted: Weighted, uniforms: Tensor) -> Resampled:
        batch, num = weighted.weights.shape[1:], len(weighted.weights)
        u = _standardised(weighted.states().movedim(0, -2), weighted.weights.movedim(0, -1))
        start = self._normals(num, u.shape[-1], uniforms).to(u)
        mixing = self._flow(u, weighted.log_weights.movedim(0, -1), start)
        particles = tree_mix(weighted.particles, mixing, batch, type(self).__name__)
        log_weights = torch.full_like(weighted.log_weights, -math.log(num))
        if weighted.need is not None:
            particles = tree_where(weighted.need, particles, weighted.particles, len(batch))
            log_weights = torch.where(weighted.need, log_weights, weighted.log_weights)
        return Resampled(particles, log_weights, None)

    def _normals(self, num: int, dim: int, uniforms: Tensor) -> Tensor:
        """``(*batch, N, d)``: a Sobol' sequence, shifted by d uniforms of each series, as standard normals."""
        if dim > len(uniforms):
            raise ValueError(
                f"DiffusionResampling needs at least as many particles as state dimensions, got {num} for {dim}. Use "
                'more particles, or resample by ancestors (resampling="systematic")'
            )
        key = num, dim, uniforms.device
        if key not in self._nets:  # once a run, and not a copy to the device at every step
            net = torch.quasirandom.SobolEngine(dim).draw(num, dtype=torch.float64)
            self._nets[key] = net.to(uniforms.device)
        shift = uniforms[:dim].movedim(0, -1).unsqueeze(-2)
        tiny = torch.finfo(torch.float32).eps
        return torch.special.ndtri((self._nets[key] + shift).frac().clamp(tiny, 1 - tiny))

    def _flow(self, u: Tensor, log_weights: Tensor, start: Tensor) -> Tensor:
        """From standard normals to responsibilities ``(*batch, N, N)`` of the old particles, rows summing to 1."""
        ratio = (self.bandwidth / _MOST_NOISE) ** (1 / (self.num_steps - 1))
        half_square = 0.5 * u.square().sum(-1)
        v, before = start * math.sqrt(1 + _MOST_NOISE**2), None
        for step in range(self.num_steps):
            precision = (_MOST_NOISE * ratio**step) ** -2
            exponent = precision * (v @ u.mT - half_square.unsqueeze(-2))
            responsibility = (log_weights.unsqueeze(-2) + exponent).softmax(-1)
            if step == self.num_steps - 1:
                break
            mean = responsibility @ u
            ahead = mean if before is None else 1.5 * mean - 0.5 * before
            v, before = ratio * v + (1 - ratio) * ahead, mean
        return responsibility


def _standardised(x: Tensor, weights: Tensor) -> Tensor:
    """``(*batch, N, d)`` in coordinates where the weighted cloud has mean 0 and covariance 1, but for a ridge."""
    centred = x - weights.unsqueeze(-2) @ x
    # a cloud whose weight is on one particle has no spread of its own; one of copies of a particle has none at all
    rounding = torch.finfo(x.dtype).eps * (1 + x.detach().abs().amax(-2, keepdim=True))
    least = 1e-6 * centred.square().mean(-2, keepdim=True) + rounding.square()
    deviation = (weights.unsqueeze(-2) @ centred.square() + least).sqrt()
    scaled = centred / deviation
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    correlation = scaled.mT @ (weights.unsqueeze(-1) * scaled)
    root, _ = torch.linalg.cholesky_ex(correlation + (_RIDGE + 100 * torch.finfo(x.dtype).eps) * eye)
    return torch.linalg.solve_triangular(root, scaled.mT, upper=False).mT
