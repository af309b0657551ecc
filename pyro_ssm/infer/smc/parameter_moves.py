"""Markov moves of a parameter vector, several chains at once, that tune themselves while they may."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["HamiltonianMove", "LogDensity", "ParameterMove", "RandomWalkMove"]

#: ``vectors (chains, dim) -> (chains,)``
LogDensity = Callable[[Tensor], Tensor]


class ParameterMove:
    """A move of vectors ``(chains, dim)`` that leaves a density invariant; every chain tunes its own.

    A subclass defines ``_propose`` and ``_target``, the acceptance to tune for. What is tuned: a scale, and the moments
    of the draws so far. It stops with ``adapt=False``, after which the move is a fixed kernel.

    Attributes:
        state: everything that changes, as tensors.

    >>> import torch
    >>> from pyro_ssm.infer.smc.parameter_moves import RandomWalkMove
    >>> move, u = RandomWalkMove(), torch.zeros(3, 2, dtype=torch.float64)
    >>> u, acceptance = move(lambda u: -0.5 * u.square().sum(-1), u, adapt=True)
    >>> u.shape, acceptance.shape
    (torch.Size([3, 2]), torch.Size([3]))
    """

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def __call__(self, log_density: LogDensity, u: Tensor, adapt: bool) -> tuple[Tensor, Tensor]:
        """The next vectors, and the probability with which each proposal was accepted, ``(chains,)``."""
        if not self.state:
            eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
            self.state = {
                "count": torch.zeros((), dtype=u.dtype, device=u.device),
                "log_scale": u.new_full(u.shape[:1], self._first_log_scale(u.shape[-1])),
                "mean": u.clone(),
                "covariance": eye.expand(u.shape[:1] + eye.shape).clone(),
            }
        proposed, log_ratio = self._propose(log_density, u)
        acceptance = log_ratio.nan_to_num(nan=-math.inf).clamp(max=0).exp()
        accepted = torch.rand_like(acceptance) < acceptance
        u = torch.where(accepted.unsqueeze(-1), proposed, u)
        if adapt:
            self._adapt(u, acceptance)
        return u, acceptance

    def _adapt(self, u: Tensor, acceptance: Tensor) -> None:
        """Robbins-Monro: the scale towards the target acceptance, the moments towards those of the draws."""
        state = self.state
        state["count"] = state["count"] + 1
        target = self._target(u.shape[-1])
        surplus = (acceptance - target) / (target * (1 - target))  # of unit size on either side
        state["log_scale"] = state["log_scale"] + surplus / state["count"] ** 0.6
        rate = 1 / (state["count"] + 10) ** 0.7
        centred = u - state["mean"]
        state["mean"] = state["mean"] + rate * centred
        outer = centred.unsqueeze(-1) * centred.unsqueeze(-2)
        state["covariance"] = state["covariance"] + rate * (outer - state["covariance"])

    def _propose(self, log_density: LogDensity, u: Tensor) -> tuple[Tensor, Tensor]:
        """A proposal and the log of its acceptance ratio."""
        raise NotImplementedError(f"{type(self).__name__} must define _propose(log_density, u)")

    @staticmethod
    def _target(dim: int) -> float:
        raise NotImplementedError("a ParameterMove must define _target(dim)")

    @staticmethod
    def _first_log_scale(dim: int) -> float:
        raise NotImplementedError("a ParameterMove must define _first_log_scale(dim)")


class RandomWalkMove(ParameterMove):
    """Adaptive random-walk Metropolis: no gradient is needed.

    .. math:: u' \\sim N(u, \\lambda^2 \\Sigma)

    with :math:`\\Sigma` the covariance of the chain's draws so far and the scale tuned to an acceptance of 0.44 in one
    dimension and 0.27 in more.

    Source: Haario, Saksman and Tamminen (2001), "An adaptive Metropolis algorithm"; Andrieu and Thoms (2008), "A
    tutorial on adaptive MCMC", algorithm 4.

    >>> from pyro_ssm.infer.smc.parameter_moves import RandomWalkMove
    >>> RandomWalkMove().state
    {}
    """

    def _propose(self, log_density: LogDensity, u: Tensor) -> tuple[Tensor, Tensor]:
        jitter = 1e-8 * torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
        root = torch.linalg.cholesky(self.state["covariance"] + jitter)
        step = (root @ torch.randn_like(u).unsqueeze(-1)).squeeze(-1)
        proposed = u + self.state["log_scale"].exp().unsqueeze(-1) * step
        with torch.no_grad():
            return proposed, log_density(proposed) - log_density(u)

    @staticmethod
    def _target(dim: int) -> float:
        return 0.44 if dim == 1 else 0.27

    @staticmethod
    def _first_log_scale(dim: int) -> float:
        return math.log(2.38 / math.sqrt(dim)) - 1.5


class HamiltonianMove(ParameterMove):
    """Hamiltonian Monte Carlo with a few leapfrog steps and diagonal mass; one step is MALA.

    The step size is tuned to an acceptance of 0.8 (0.57 with one step) and drawn within 20 % of it at each move.

    Args:
        num_leapfrog: gradients of a move.

    Raises:
        ValueError: fewer than one step.

    Source: Duane et al. (1987), "Hybrid Monte Carlo"; Neal (2011), "MCMC using Hamiltonian dynamics".

    >>> import torch
    >>> from pyro_ssm.infer.smc.parameter_moves import HamiltonianMove
    >>> move, u = HamiltonianMove(), torch.zeros(3, 2, dtype=torch.float64)
    >>> move(lambda u: -0.5 * u.square().sum(-1), u, adapt=True)[0].shape
    torch.Size([3, 2])
    """

    def __init__(self, num_leapfrog: int = 5) -> None:
        if num_leapfrog < 1:
            raise ValueError(f"`num_leapfrog` must be at least 1, got {num_leapfrog}")
        super().__init__()
        self.num_leapfrog = num_leapfrog

    def _propose(self, log_density: LogDensity, u: Tensor) -> tuple[Tensor, Tensor]:
        deviation = self.state["covariance"].diagonal(dim1=-2, dim2=-1).clamp(min=1e-16).sqrt()
        size = self.state["log_scale"].exp() * (0.8 + 0.4 * torch.rand_like(self.state["log_scale"]))
        step = size.unsqueeze(-1) * deviation
        momentum = torch.randn_like(u)  # in units of 1 / deviation
        kinetic = 0.5 * momentum.square().sum(-1)
        density, gradient = self._gradient(log_density, u)
        log_ratio, x = kinetic - density, u
        lost = torch.zeros_like(density, dtype=torch.bool)
        for _ in range(self.num_leapfrog):
            momentum = momentum + 0.5 * step * gradient
            x = x + step * momentum
            # a trajectory that has left for infinity goes on from where it began, and is not accepted
            lost = lost | ~torch.isfinite(x).all(-1)
            x = torch.where(lost.unsqueeze(-1), u, x)
            density, gradient = self._gradient(log_density, x)
            lost = lost | ~torch.isfinite(density) | ~torch.isfinite(gradient).all(-1)
            momentum = momentum + 0.5 * step * gradient.nan_to_num()
        log_ratio = log_ratio + density - 0.5 * momentum.square().sum(-1)
        return x, torch.where(lost, -math.inf, log_ratio)

    @staticmethod
    def _gradient(log_density: LogDensity, u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            density = log_density(leaf)
            (gradient,) = torch.autograd.grad(density.sum(), leaf)
        return density.detach(), gradient

    def _target(self, dim: int) -> float:  # type: ignore[override]
        return 0.8 if self.num_leapfrog > 1 else 0.57

    @staticmethod
    def _first_log_scale(dim: int) -> float:
        return math.log(0.3)
