"""`particle_smoother`: the law of the whole path given all data, by one of seven methods."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.infer.smc.backward import (
    BackwardKernel,
    Uniforms,
    backward_indices,
    look_back,
    metropolis_indices,
    rejection_indices,
    require_backward,
)
from pyro_ssm.infer.smc.collectors.genealogy import Ancestry, Genealogy
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.filter import particle_filter
from pyro_ssm.infer.smc.marginal_smoother import marginal_weights
from pyro_ssm.infer.smc.noise import Noise, PseudoRandom
from pyro_ssm.infer.smc.resample import Resampling
from pyro_ssm.infer.smc.stepper import Cloud
from pyro_ssm.infer.smc.two_filter import two_filter_marginals
from pyro_ssm.infer.smc.two_filter_linear import two_filter_linear
from pyro_ssm.ops.resampling import at_unsorted_points

__all__ = ["ParticleSmoothed", "particle_smoother"]

_PATHS = ("genealogy", "backward", "rejection", "mcmc")
_MARGINALS = ("marginal", "two_filter", "two_filter_linear")


class ParticleSmoothed(NamedTuple):
    """What :func:`particle_smoother` returns: weighted states at each time, joined to paths where the method does so.

    >>> import torch
    >>> from pyro_ssm.infer import ParticleSmoothed
    >>> found = ParticleSmoothed(torch.zeros(3), torch.ones(10, 3, 2), torch.full((10, 3), 0.1), True)
    >>> found.mean.shape, found.variance.shape, found.paths.shape
    (torch.Size([3, 2]), torch.Size([3, 2]), torch.Size([10, 3, 2]))
    """

    log_likelihood: Tensor  # (*batch, time)  of the filter, as in ParticleFiltered
    states: Tensor  # (M, *batch, time, state)
    weights: Tensor  # (M, *batch, time), sum to 1 over the first dim
    joint: bool  # whether states[m] is a path

    @property
    def paths(self) -> Tensor:
        """Equally weighted draws of the path, ``(M, *batch, time, state)``.

        Raises:
            ValueError: the method gives marginal laws only.
        """
        if not self.joint:
            raise ValueError(
                f"methods {_MARGINALS} give the law of each state, and no paths. Use particle_smoother(..., "
                "method='backward')"
            )
        return self.states

    @property
    def mean(self) -> Tensor:
        """:math:`E[x_k \\mid y_{1:T}]`, ``(*batch, time, state)``."""
        return (self.weights.unsqueeze(-1) * self.states).sum(0)

    @property
    def covariance(self) -> Tensor:
        """``(*batch, time, state, state)``."""
        centred = self.states - self.mean
        return torch.einsum("m...i,m...j->...ij", self.weights.unsqueeze(-1) * centred, centred)

    @property
    def variance(self) -> Tensor:
        """``(*batch, time, state)``."""
        return (self.weights.unsqueeze(-1) * (self.states - self.mean).square()).sum(0)

    @property
    def ess(self) -> Tensor:
        """Effective number of different states at each time, ``(*batch, time)``: copies of one state count as one.

        It shows where a genealogy has degenerated.
        """
        order = self.states.new_zeros(self.weights.shape)
        for coordinate in self.states.unbind(-1):  # equal states have equal keys
            order = order * 1.6180339887 + coordinate
        order, index = order.sort(0)
        cumulative = self.weights.gather(0, index).cumsum(0, dtype=torch.float64)
        last = torch.cat([order[1:] != order[:-1], torch.ones_like(order[:1], dtype=torch.bool)])
        upto = torch.where(last, cumulative, 0.0).cummax(0).values
        share = torch.where(last, upto - torch.cat([torch.zeros_like(upto[:1]), upto[:-1]]), 0.0)
        return share.square().sum(0).reciprocal().to(self.weights)


def particle_smoother(
    fk: FeynmanKac,
    num_particles: int,
    *,
    method: str = "backward",
    num_paths: int | None = None,
    resampling: str | Resampling = "systematic",
    ess_threshold: float = 0.5,
    log_bound: float | Callable[[int], Tensor | float] | None = None,
    trials: int = 100,
    num_steps: int = 1,
    noise: Noise | None = None,
) -> ParticleSmoothed:
    """Smooth: a particle filter forward over all series together, then one of seven ways to look back.

    .. math:: p(x_{0:T} \\mid y_{0:T}) = p(x_T \\mid y_{0:T}) \\prod_{k < T} p(x_k \\mid x_{k+1}, y_{0:k}), \\qquad
        p(x_k \\mid x_{k+1}, y_{0:k}) \\approx \\sum_i \\frac{W_k^i m(x_k^i, x_{k+1})}{\\sum_j W_k^j m(x_k^j, x_{k+1})}
        \\delta_{x_k^i}

    =======================  ==================================================================  ==================
    ``method``               what it does                                                        cost of a step
    =======================  ==================================================================  ==================
    ``"genealogy"``          ancestral lines of the filter; early states of all paths coincide   M
    ``"backward"``           backward simulation, exact draws of the kernel above (FFBS)         N M
    ``"rejection"``          the same draws by rejection: needs ``log_bound``                    M times the trials
    ``"mcmc"``               ``num_steps`` Metropolis steps from the ancestor                    M
    ``"marginal"``           smoothed weights of all filter particles; no paths                  N\\ :sup:`2`
    ``"two_filter"``         weights of a second filter, which runs backward; no paths           N\\ :sup:`2`
    ``"two_filter_linear"``  new states between pairs of both filters' particles; no paths       N
    =======================  ==================================================================  ==================

    ``"backward"``, ``"rejection"`` and ``"marginal"`` have the same law of the index; their error is that of the
    filter's clouds, of order :math:`N^{-1/2}`, and does not grow with time as that of the genealogy does. ``"mcmc"``
    starts at the ancestor, which has nearly that law already (exactly, with multinomial resampling at every step), and
    stays consistent as N grows. ``"two_filter"`` places particles anew, and so is not confined to the states that the
    filter visited; ``"two_filter_linear"`` does so for many particles, with more uneven weights. A series that has
    ended keeps its last state. Pairs are weighed in blocks: memory stays bounded.

    Args:
        fk: the process; all methods but the genealogy need ``fk.log_backward`` (no memory, a density), and
            those of two filters need ``fk.log_step`` and ``fk.extend`` too. Builders give all of them where they exist.
        num_particles: N.
        method: see above.
        num_paths: M; default N. Without meaning for methods without paths.
        resampling: of the filter, as for :func:`~pyro_ssm.infer.particle_filter`.
        ess_threshold: of the filter.
        log_bound: for ``"rejection"``: an upper bound of ``fk.log_backward`` (the log transition density), or a
            function of the step that gives one, broadcastable to ``(*batch)``. Default ``fk.log_bound``, known where
            the transition is ``AffineGaussian`` or ``FiniteState``.
        trials: proposals before ``"rejection"`` weighs every pair for what is left, so that it stays exact.
        num_steps: of ``"mcmc"``.
        noise: what to draw from, forward and (as steps T, T + 1, ...) backward; default torch's global generator.

    Returns:
        :class:`ParticleSmoothed`.

    Raises:
        ValueError: an unknown method; a process that lacks what the method needs; ``log_bound`` missing or too small;
            numbers out of range; and as :func:`~pyro_ssm.infer.particle_filter`.

    Gradients: none. Randomness: torch's global generator, or ``noise``.

    Source: Godsill, Doucet and West (2004) (backward simulation); Douc, Garivier, Moulines and Olsson (2011)
    (rejection); Bunch and Godsill (2013), Dau and Chopin (2023) (Metropolis steps); Doucet, Godsill and Andrieu (2000)
    (marginal weights); Briers, Doucet and Maskell (2010), Fearnhead, Wyncoll and Tawn (2010) (two filters).

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> found = ssm.infer.particle_smoother(ssm.infer.bootstrap(model, data), 100, num_paths=20)
    >>> found.paths.shape, found.mean.shape
    (torch.Size([20, 3, 4, 2]), torch.Size([3, 4, 2]))
    """
    num_paths = _check(fk, num_particles, method, num_paths, trials, num_steps)
    bound = _bound(fk, log_bound) if method == "rejection" else None
    noise = PseudoRandom() if noise is None else noise
    with torch.no_grad():
        run = particle_filter(
            fk,
            num_particles,
            resampling=resampling,
            ess_threshold=ess_threshold,
            collectors=[Genealogy()],
            noise=noise,
        )
        ancestry: Ancestry = run.collected["genealogy"]
        if method == "marginal":
            states, weights = ancestry.states.movedim(0, -2), marginal_weights(fk, ancestry.clouds)
            return ParticleSmoothed(run.log_likelihood, states, weights, False)
        if method in _MARGINALS:
            smooth = two_filter_marginals if method == "two_filter" else two_filter_linear
            return ParticleSmoothed(run.log_likelihood, *smooth(fk, ancestry, noise), False)
        last = _last(ancestry, num_paths, noise, fk.num_times)
        if method == "genealogy":
            paths = ancestry.trace(last)
        else:
            paths = look_back(fk, ancestry, last, _kernel(fk, ancestry, method, bound, trials, num_steps, noise))
        weights = paths.new_full((), 1 / num_paths).expand(paths.shape[:-1])
        return ParticleSmoothed(run.log_likelihood, paths, weights, True)


def _kernel(
    fk: FeynmanKac, ancestry: Ancestry, method: str, bound: Any, trials: int, num_steps: int, noise: Noise
) -> BackwardKernel:
    """How one step back is drawn."""

    def uniforms(k: int, index: Tensor) -> Uniforms:
        return partial(_uniforms, noise, fk.num_times + k, index.device)

    def exact(previous: Cloud, late: Any, k: int, index: Tensor) -> Tensor:
        return backward_indices(fk, previous, late, k, 1, uniforms(k, index)(index.shape).unsqueeze(0))[0]

    def rejection(previous: Cloud, late: Any, k: int, index: Tensor) -> Tensor:
        return rejection_indices(fk, previous, late, k, bound(k), trials, uniforms(k, index))

    def metropolis(previous: Cloud, late: Any, k: int, index: Tensor) -> Tensor:
        ancestors = ancestry.ancestors[k]
        start = index if ancestors is None else ancestors.gather(0, index)
        return metropolis_indices(fk, previous, late, k, start, num_steps, uniforms(k, index))

    return {"backward": exact, "rejection": rejection, "mcmc": metropolis}[method]


def _last(ancestry: Ancestry, num_paths: int, noise: Noise, k: int) -> Tensor:
    """Particles of the last cloud: one point in each of M strata, dealt in random order so that all have its law."""
    weights = ancestry.clouds[-1].weights
    shape = torch.Size((num_paths,)) + weights.shape[1:]
    strata = noise.uniforms(k, shape, weights.device).argsort(0)
    return at_unsorted_points(weights, (strata + noise.uniforms(k, shape, weights.device)) / num_paths)


def _uniforms(noise: Noise, k: int, device: torch.device, shape: torch.Size) -> Tensor:
    return noise.uniforms(k, shape, device)


def _bound(fk: FeynmanKac, log_bound: Any) -> Callable[[int], Tensor | float]:
    found = fk.log_bound if log_bound is None else log_bound
    if found is None:
        raise ValueError(
            "method 'rejection' needs `log_bound`, an upper bound of the log transition density, and this process "
            "knows none. Give one, or use method 'backward' or 'mcmc'"
        )
    return found if callable(found) else lambda k: found


def _check(fk: FeynmanKac, num_particles: int, method: str, num_paths: int | None, trials: int, num_steps: int) -> int:
    if method not in _PATHS + _MARGINALS:
        raise ValueError(f"`method` must be one of {_PATHS + _MARGINALS}, got {method!r}")
    if method != "genealogy":
        require_backward(fk, f"method {method!r}", "method 'genealogy', or conditional_smc")
    for name, number in (("trials", trials), ("num_steps", num_steps)):
        if number < 0:
            raise ValueError(f"`{name}` must not be negative, got {number}")
    if num_paths is None:
        return num_particles
    if method in _MARGINALS:
        raise ValueError(f"method {method!r} gives no paths: leave `num_paths` out, or use method 'backward'")
    if num_paths < 1:
        raise ValueError(f"`num_paths` must be at least 1, got {num_paths}")
    return num_paths
