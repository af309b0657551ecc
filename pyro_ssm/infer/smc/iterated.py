"""`iterated_csmc`: a chain of paths, each drawn from conditional SMC around the last."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_ssm.infer.smc.conditional import conditional_smc
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.smoother import particle_smoother

__all__ = ["SampledPaths", "iterated_csmc"]


class SampledPaths(NamedTuple):
    """What :func:`iterated_csmc` returns.

    >>> from pyro_ssm.infer import SampledPaths
    >>> SampledPaths._fields
    ('states', 'update_rate', 'log_likelihood')
    """

    states: Tensor  # (sweeps / thin, *batch, time, state), draws of p(z | y) once the chain has forgotten its start
    update_rate: Tensor  # (*batch, time), the fraction of sweeps that gave a new state; 0 where a series has ended
    log_likelihood: Tensor  # (sweeps / thin, *batch), of the filters that contain the kept path


def iterated_csmc(
    fk: FeynmanKac,
    start: Tensor | None,
    num_sweeps: int,
    num_particles: int,
    *,
    thin: int = 1,
    progress: bool = True,
    **options: Any,
) -> SampledPaths:
    """A Markov chain of paths whose law tends to the smoothing law, for any number of particles.

    .. math:: z^{(s)} \\sim K_N(z^{(s - 1)}, \\cdot), \\qquad p(z \\mid y)\\, K_N = p(z \\mid y)

    To go on, give the last path: ``start=found.states[-1]``. Watch ``update_rate``: where it is near 0 for early
    states, use ancestor sampling, more particles, or a proposal that sees the observation.

    Args:
        fk: the process.
        start: ``(*batch, time, state)``; None draws a line of a particle filter.
        num_sweeps: sweeps of conditional SMC.
        num_particles: N of each sweep.
        thin: keep every this many sweeps.
        progress: show a bar.
        **options: of :func:`~pyro_ssm.infer.conditional_smc`.

    Returns:
        :class:`SampledPaths`.

    Raises:
        ValueError: numbers below 1; and as :func:`~pyro_ssm.infer.conditional_smc`.

    Randomness: torch's global generator. Source: Andrieu, Lee and Vihola (2018), "Uniform ergodicity of the iterated
    conditional SMC and geometric ergodicity of particle Gibbs samplers".

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> fk = ssm.infer.bootstrap(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> found = ssm.infer.iterated_csmc(fk, None, num_sweeps=20, num_particles=10, thin=2, progress=False)
    >>> found.states.shape, found.update_rate.shape
    (torch.Size([10, 3, 4, 2]), torch.Size([3, 4]))
    """
    if num_sweeps < 1 or thin < 1 or num_sweeps < thin:
        raise ValueError(f"`num_sweeps` must be at least `thin`, and both at least 1, got {num_sweeps} and {thin}")
    if start is None:
        start = particle_smoother(fk, num_particles, method="genealogy", num_paths=1).paths[0]
    path, moved, states, totals = start, torch.zeros(()), [], []
    for sweep in tqdm(range(1, num_sweeps + 1), desc="conditional SMC", disable=not progress, dynamic_ncols=True):
        found = conditional_smc(fk, path, num_particles, **options)
        path, moved = found.path, moved.to(path) + found.moved
        if sweep % thin == 0:
            states.append(path)
            totals.append(found.log_likelihood.sum(-1))
    return SampledPaths(torch.stack(states), moved / num_sweeps, torch.stack(totals))
