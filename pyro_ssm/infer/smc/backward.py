"""The backward kernel of a particle cloud: which earlier particle a later one came from, given both.

.. math:: P(J = i \\mid x_k) \\propto W_{k-1}^i\\, M_k G_k(x_{k-1}^i, x_k)

Three ways to draw from it: exactly (every pair is weighed), by rejection (exact too, cheap where a bound of the density
is tight), and by independent Metropolis-Hastings steps (approximate, always cheap).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.infer.smc.collectors.genealogy import Ancestry
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.stepper import Cloud
from pyro_ssm.infer.smc.tree import leaves, take, tree_map
from pyro_ssm.ops.resampling import at_unsorted_points

__all__ = [
    "BackwardKernel",
    "Uniforms",
    "backward_indices",
    "backward_log_weights",
    "look_back",
    "metropolis_indices",
    "rejection_indices",
    "require_backward",
    "uniforms_like",
]

#: ``shape -> float64 uniforms in [0, 1)``
Uniforms = Callable[[torch.Size], Tensor]

#: ``(cloud at k - 1, particles at k, k, their indices in the cloud at k) -> indices in the cloud at k - 1``
BackwardKernel = Callable[[Cloud, Any, int, Tensor], Tensor]

_PAIRS = 2**22  # pairs of particles weighed at a time


def require_backward(fk: FeynmanKac, who: str, instead: str) -> None:
    """Refuse a process without a backward kernel.

    >>> from pyro_ssm.infer.smc import FeynmanKac
    >>> from pyro_ssm.infer.smc.backward import require_backward
    >>> require_backward(FeynmanKac(None, None, None, 2), "FFBS", "the genealogy")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: FFBS needs a backward kernel, and this process has none (a memory, ...). Use the genealogy
    """
    if fk.log_backward is None:
        raise ValueError(
            f"{who} needs a backward kernel, and this process has none (a memory, a SampleOnly transition, or an "
            f"integrated part). Use {instead}"
        )


def uniforms_like(tensor: Tensor) -> Uniforms:
    """Uniforms of torch's global generator, on the device of ``tensor``.

    >>> import torch
    >>> from pyro_ssm.infer.smc.backward import uniforms_like
    >>> uniforms_like(torch.zeros(1))(torch.Size([3])).dtype
    torch.float64
    """
    return lambda shape: torch.rand(shape, dtype=torch.float64, device=tensor.device)


def backward_log_weights(fk: FeynmanKac, previous: Cloud, particles: Any, k: int) -> Iterator[tuple[slice, Tensor]]:
    """Log-weights of all pairs of an earlier and a later particle, in blocks of later ones that bound memory.

    .. math:: \\log W_{k-1}^i + \\log M_k G_k(x_{k-1}^i, x_k^n)

    up to a constant of each later particle.

    Args:
        fk: with ``log_backward``.
        previous: the cloud after step k - 1, of N particles.
        particles: at k, leaves ``(M, *batch, ...)``.
        k: the step.

    Returns:
        Blocks of the M later particles, each a slice and log-weights ``(N, block, *batch)``.

    >>> import torch
    >>> from pyro_ssm.infer.smc import Cloud, FeynmanKac
    >>> from pyro_ssm.infer.smc.backward import backward_log_weights
    >>> walk = FeynmanKac(None, None, None, 2, log_backward=lambda k, x, y: -0.5 * (y - x) ** 2)
    >>> cloud = Cloud(torch.zeros(3), torch.zeros(3), 0)
    >>> [(block, pairs.shape) for block, pairs in backward_log_weights(walk, cloud, torch.ones(2), 1)]
    [(slice(0, 2, None), torch.Size([3, 2]))]
    """
    num = len(next(leaves(particles)))
    block = max(1, _PAIRS // max(previous.log_weights.numel(), 1))
    early = tree_map(lambda x: x.unsqueeze(1), previous.particles)
    for start in range(0, num, block):
        at = slice(start, min(start + block, num))
        late = tree_map(lambda x, at=at: x[at].unsqueeze(0), particles)
        yield at, previous.log_weights.unsqueeze(1) + fk.log_backward(k, early, late)


def backward_indices(
    fk: FeynmanKac, previous: Cloud, particles: Any, k: int, num_draws: int, points: Tensor | None = None
) -> Tensor:
    """Exact draws from the backward kernel: for each particle at k, indices into the cloud before.

    .. math:: P(J_n = i) \\propto W_{k-1}^i\\, M_k G_k(x_{k-1}^i, x_k^n)

    Every pair is weighed, in blocks: N times M a series.

    Args:
        fk: with ``log_backward``.
        previous: the cloud after step k - 1, of N particles.
        particles: at k, leaves ``(M, *batch, ...)``.
        k: the step.
        num_draws: independent draws for each particle.
        points: uniforms to draw by, float64 ``(num_draws, M, *batch)``; default torch's global generator.

    Returns:
        int64 ``(num_draws, M, *batch)``.

    Raises:
        ValueError: the process has no ``log_backward``.

    Source: Godsill, Doucet and West (2004), "Monte Carlo smoothing for nonlinear time series".

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.smc import Cloud, StateParticles, backward_indices
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.LinearNormal(1), ssm.emissions.LinearNormal(1, 1))
    >>> fk = ssm.infer.bootstrap(model, ssm.TimeSeries(torch.arange(2.0), torch.zeros(2, 1)))
    >>> x = StateParticles(torch.randn(5, 1, 1), None, None)
    >>> backward_indices(fk, Cloud(x, torch.zeros(5), 0), x, 1, num_draws=2).shape
    torch.Size([2, 5])
    """
    require_backward(fk, "backward_indices", "the genealogy")
    num, batch = previous.num_particles, previous.log_weights.shape[1:]
    if points is None:
        points = uniforms_like(previous.log_weights)((num_draws, len(next(leaves(particles)))) + batch)
    found = []
    for at, pairs in backward_log_weights(fk, previous, particles, k):
        cumulative = (pairs - pairs.amax(0)).exp().movedim(0, -1).cumsum(-1, dtype=torch.float64)
        point = points[:, at].movedim(0, -1) * cumulative[..., -1:]
        index = torch.searchsorted(cumulative, point.contiguous(), right=True).clamp(max=num - 1)
        found.append(index.movedim(-1, 0))
    return torch.cat(found, 1)


def rejection_indices(
    fk: FeynmanKac,
    previous: Cloud,
    particles: Any,
    k: int,
    log_bound: Tensor | float,
    trials: int,
    uniforms: Uniforms | None = None,
) -> Tensor:
    """One exact draw for each particle by rejection; what is left after some trials is weighed pair by pair.

    J is proposed with probability :math:`W_J` and accepted with probability :math:`m(x^J, x) / c`, where m is the
    density and c its bound.

    Args:
        fk: with ``log_backward``.
        previous: the cloud after step k - 1, of N particles.
        particles: at k, leaves ``(M, *batch, ...)``.
        k: the step.
        log_bound: an upper bound of ``fk.log_backward``, broadcastable to ``(*batch)``.
        trials: proposals for each particle before the exact draw.
        uniforms: default torch's global generator.

    Returns:
        int64 ``(M, *batch)``.

    Raises:
        ValueError: a density exceeds the bound.

    Source: Douc, Garivier, Moulines and Olsson (2011), "Sequential Monte Carlo smoothing for general state space
    hidden Markov models".

    >>> import torch
    >>> from pyro_ssm.infer.smc import Cloud, FeynmanKac
    >>> from pyro_ssm.infer.smc.backward import rejection_indices
    >>> walk = FeynmanKac(None, None, None, 2, log_backward=lambda k, x, y: -0.5 * (y - x) ** 2)
    >>> cloud = Cloud(torch.tensor([0.0, 50.0]), torch.zeros(2), 0)
    >>> rejection_indices(walk, cloud, torch.tensor([50.0, 50.5, 1.0]), 1, 0.0, trials=100)
    tensor([1, 1, 0])
    """
    batch = previous.log_weights.shape[1:]
    shape = torch.Size((len(next(leaves(particles))),)) + batch
    uniforms = uniforms_like(previous.log_weights) if uniforms is None else uniforms
    last_resort = uniforms(shape)
    found = torch.zeros(shape, dtype=torch.int64, device=previous.log_weights.device)
    open_ = torch.ones_like(found, dtype=torch.bool)
    if fk.step_mask is not None:  # a series that has ended draws nothing
        open_ = open_ & fk.step_mask[..., k]
    left = torch.arange(shape[0], device=found.device)  # particles with a series still open
    for _ in range(trials):
        trial = at_unsorted_points(previous.weights, uniforms(shape)[left])
        late = tree_map(lambda x, left=left: x[left], particles)
        log_ratio = fk.log_backward(k, take(previous.particles, trial, batch), late) - log_bound
        if bool(((log_ratio > 1e-3) & open_[left]).any()):
            raise ValueError(
                f"`log_bound` is no upper bound of the log transition density: at step {k} a density exceeds it by "
                f"{float(log_ratio.max()):.4g}. Give a larger one, or weigh every pair (method 'backward'; no "
                "`log_bound`)"
            )
        accepted = open_[left] & (uniforms(shape)[left].log() < log_ratio)
        found[left] = torch.where(accepted, trial, found[left])
        open_[left] &= ~accepted
        left = open_.reshape(shape[0], -1).any(1).nonzero()[:, 0]
        if not len(left):
            return found
    late = tree_map(lambda x: x[left], particles)
    rest = backward_indices(fk, previous, late, k, 1, last_resort[left].unsqueeze(0))[0]
    found[left] = torch.where(open_[left], rest, found[left])
    return found


def metropolis_indices(
    fk: FeynmanKac,
    previous: Cloud,
    particles: Any,
    k: int,
    start: Tensor,
    num_steps: int,
    uniforms: Uniforms | None = None,
) -> Tensor:
    """Independent Metropolis-Hastings steps that leave the backward kernel invariant, from a given start.

    J' is proposed with probability :math:`W_{J'}` and accepted with probability
    :math:`\\min(1, m(x^{J'}, x) / m(x^J, x))`.

    Args:
        fk: with ``log_backward``.
        previous: the cloud after step k - 1, of N particles.
        particles: at k, leaves ``(M, *batch, ...)``.
        k: the step.
        start: int64 ``(M, *batch)``, the particles' ancestors.
        num_steps: steps.
        uniforms: default torch's global generator.

    Returns:
        int64 ``(M, *batch)``.

    Source: Bunch and Godsill (2013), "Improved particle approximations to the joint smoothing distribution using Markov
    chain Monte Carlo"; Dau and Chopin (2023), "On backward smoothing algorithms".

    >>> import torch
    >>> from pyro_ssm.infer.smc import Cloud, FeynmanKac
    >>> from pyro_ssm.infer.smc.backward import metropolis_indices
    >>> walk = FeynmanKac(None, None, None, 2, log_backward=lambda k, x, y: -0.5 * (y - x) ** 2)
    >>> cloud = Cloud(torch.tensor([0.0, 50.0]), torch.zeros(2), 0)
    >>> metropolis_indices(walk, cloud, torch.tensor([50.0, 1.0]), 1, torch.tensor([0, 0]), num_steps=50)
    tensor([1, 0])
    """
    batch = previous.log_weights.shape[1:]
    uniforms = uniforms_like(previous.log_weights) if uniforms is None else uniforms
    index = start
    density = fk.log_backward(k, take(previous.particles, index, batch), particles)
    for _ in range(num_steps):
        trial = at_unsorted_points(previous.weights, uniforms(start.shape))
        proposed = fk.log_backward(k, take(previous.particles, trial, batch), particles)
        accepted = uniforms(start.shape).log() < proposed - density
        index = torch.where(accepted, trial, index)
        density = torch.where(accepted, proposed, density)
    return index


def look_back(fk: FeynmanKac, ancestry: Ancestry, index: Tensor, kernel: BackwardKernel) -> Tensor:
    """Paths from given particles of the last cloud back to the first.

    Args:
        fk: the process.
        ancestry: of a filter over all steps.
        index: int64 ``(M, *batch)``, into the last cloud.
        kernel: how one step back is drawn.

    Returns:
        ``(M, *batch, time, state)``.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.smc.backward import backward_indices, look_back
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> fk = ssm.infer.bootstrap(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(4, 1)))
    >>> found = ssm.infer.particle_filter(fk, 10, collectors=[ssm.infer.smc.Genealogy()]).collected["genealogy"]
    >>> kernel = lambda previous, late, k, index: backward_indices(fk, previous, late, k, 1)[0]
    >>> look_back(fk, found, torch.tensor([0, 3]), kernel).shape
    torch.Size([2, 4, 2])
    """
    clouds, batch = ancestry.clouds, fk.batch_shape
    late = take(clouds[-1].particles, index, batch)
    path = [fk.state(late)]
    for k in range(len(clouds) - 1, 0, -1):
        before = kernel(clouds[k - 1], late, k, index)
        # a series that has ended by then has the same cloud at both steps
        index = before if fk.step_mask is None else torch.where(fk.step_mask[..., k], before, index)
        late = take(clouds[k - 1].particles, index, batch)
        path.append(fk.state(late))
    return torch.stack(path[::-1], -2)
