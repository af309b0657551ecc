"""Markov moves of a parameter vector, several chains at once, that tune themselves while they may."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.infer.smc.moves import AdaptiveWalk, best_acceptance

__all__ = ["HamiltonianMove", "LogDensity", "ParameterMove", "RandomWalkMove"]

#: ``vectors (chains, dim) -> (chains,)``
LogDensity = Callable[[Tensor], Tensor]


class ParameterMove:
    """A move of vectors ``(chains, dim)`` that leaves a density invariant and tunes itself while it may.

    A subclass defines ``_begin``, ``_propose``, ``_learn`` and ``_target``, the acceptance to tune for. Tuning stops
    with ``adapt=False``, after which the move is a fixed kernel.

    Attributes:
        state: everything that changes: numbers, tensors, and lists of them by name.

    >>> import torch
    >>> from pyro_ssm.infer.smc.parameter_moves import RandomWalkMove
    >>> move, u = RandomWalkMove(), torch.zeros(3, 2, dtype=torch.float64)
    >>> u, acceptance = move(lambda u: -0.5 * u.square().sum(-1), u, adapt=True)
    >>> u.shape, acceptance.shape
    (torch.Size([3, 2]), torch.Size([3]))
    """

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def __call__(self, log_density: LogDensity, u: Tensor, adapt: bool) -> tuple[Tensor, Tensor]:
        """The next vectors, and the probability with which each proposal was accepted, ``(chains,)``."""
        if not self.state:
            self.state = self._begin(u)
        proposed, log_ratio = self._propose(log_density, u)
        acceptance = log_ratio.nan_to_num(nan=-math.inf).clamp(max=0).exp()
        accepted = torch.rand_like(acceptance) < acceptance
        u = torch.where(accepted.unsqueeze(-1), proposed, u)
        if adapt:
            self._learn(u, acceptance)
        return u, acceptance

    def _begin(self, u: Tensor) -> dict[str, Any]:
        """The first state."""
        raise NotImplementedError(f"{type(self).__name__} must define _begin(u)")

    def _propose(self, log_density: LogDensity, u: Tensor) -> tuple[Tensor, Tensor]:
        """A proposal and the log of its acceptance ratio."""
        raise NotImplementedError(f"{type(self).__name__} must define _propose(log_density, u)")

    def _learn(self, u: Tensor, acceptance: Tensor) -> None:
        """Take account of where a proposal led, and of its probability of acceptance."""
        raise NotImplementedError(f"{type(self).__name__} must define _learn(u, acceptance)")

    def _target(self, dim: int) -> float:
        raise NotImplementedError(f"{type(self).__name__} must define _target(dim)")


class RandomWalkMove(ParameterMove):
    """Adaptive random-walk Metropolis, the walk of :func:`~pyro_ssm.infer.pmmh`: no gradient is needed.

    .. math:: u' \\sim N(u, S S^\\top)

    with S learnt from the acceptance of each proposal, for a rate of 0.44 in one dimension and 0.234 in more, and
    fitted from time to time to the covariance of what all chains have visited.

    Source: Vihola (2012), "Robust adaptive Metropolis algorithm with coerced acceptance rate"; Haario, Saksman and
    Tamminen (2001), "An adaptive Metropolis algorithm".

    >>> from pyro_ssm.infer.smc.parameter_moves import RandomWalkMove
    >>> RandomWalkMove().state
    {}
    """

    def _begin(self, u: Tensor) -> dict[str, Any]:
        size = 0.22 * 2.38 / math.sqrt(u.shape[-1])  # short first steps: they are accepted, and soon longer
        eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
        return self._walk_of((size * eye).expand(u.shape[:1] + eye.shape)).state

    def _propose(self, log_density: LogDensity, u: Tensor) -> tuple[Tensor, Tensor]:
        self._noise = torch.randn_like(u)
        proposed = u + self._walk_of(**self.state).step(self._noise)
        with torch.no_grad():
            return proposed, log_density(proposed) - log_density(u)

    def _learn(self, u: Tensor, acceptance: Tensor) -> None:
        walk = self._walk_of(**self.state)
        walk.learn(self._noise, acceptance)
        walk.visit(u)
        self.state = walk.state

    def _walk_of(self, root: Tensor, count: int = 0, visited: Sequence[Tensor] = ()) -> AdaptiveWalk:
        return AdaptiveWalk(root, self._target(root.shape[-1]), count, visited)

    def _target(self, dim: int) -> float:
        return best_acceptance(dim)


class HamiltonianMove(ParameterMove):
    """Hamiltonian Monte Carlo with a few leapfrog steps and diagonal mass; one step is MALA.

    The step size of each chain is tuned to an acceptance of 0.8 (0.57 with one step), and drawn within 20 % of it at
    each move; the mass is that of the chain's draws so far.

    Args:
        num_leapfrog: gradients of a move.

    Raises:
        ValueError: fewer than one step.

    Source: Duane et al. (1987), "Hybrid Monte Carlo"; Neal (2011), "MCMC using Hamiltonian dynamics"; Andrieu and Thoms
    (2008), "A tutorial on adaptive MCMC", algorithm 4, for the tuning.

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

    def _begin(self, u: Tensor) -> dict[str, Any]:
        return {
            "count": 0,
            "log_scale": u.new_full(u.shape[:1], math.log(0.3)),
            "mean": u.clone(),
            "variance": torch.ones_like(u),
        }

    def _learn(self, u: Tensor, acceptance: Tensor) -> None:
        """Robbins-Monro: the scale towards the target acceptance, the moments towards those of the draws."""
        state = self.state
        state["count"] += 1
        target = self._target(u.shape[-1])
        surplus = (acceptance - target) / (target * (1 - target))  # of unit size on either side
        state["log_scale"] = state["log_scale"] + surplus / state["count"] ** 0.6
        rate = 1 / (state["count"] + 10) ** 0.7
        centred = u - state["mean"]
        state["mean"] = state["mean"] + rate * centred
        state["variance"] = state["variance"] + rate * (centred.square() - state["variance"])

    def _propose(self, log_density: LogDensity, u: Tensor) -> tuple[Tensor, Tensor]:
        deviation = self.state["variance"].clamp(min=1e-16).sqrt()
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

    def _target(self, dim: int) -> float:
        return 0.8 if self.num_leapfrog > 1 else 0.57
