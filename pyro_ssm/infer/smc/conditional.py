"""Conditional SMC: a particle filter around a path that it keeps, and a new path drawn from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.infer.smc.backward import backward_indices, look_back, require_backward
from pyro_ssm.infer.smc.check import check_evidence, check_fraction
from pyro_ssm.infer.smc.collectors.genealogy import Genealogy
from pyro_ssm.infer.smc.conditional_stepper import ConditionalResampling, ConditionalStepper, future_log_weights
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.noise import Noise, PseudoRandom
from pyro_ssm.infer.smc.stepper import Cloud
from pyro_ssm.ops.resampling import at_unsorted_points

__all__ = ["ConditionalPath", "conditional_smc"]


class ConditionalPath(NamedTuple):
    """What :func:`conditional_smc` returns.

    >>> from pyro_ssm.infer import ConditionalPath
    >>> ConditionalPath._fields
    ('path', 'moved', 'log_likelihood')
    """

    path: Tensor  # (*batch, time, state), the new path; a series that has ended keeps its last state
    moved: Tensor  # bool (*batch, time), whether the state is another than before; False where a series has ended
    log_likelihood: Tensor  # (*batch, time), increments of the filter that contains the kept path


def conditional_smc(
    fk: FeynmanKac,
    path: Tensor,
    num_particles: int,
    *,
    ancestor_sampling: bool | None = None,
    backward_sampling: bool = False,
    resampling: str | None = None,
    ess_threshold: float = 1.0,
    noise: Noise | None = None,
) -> ConditionalPath:
    """One move of a path, over all series of a batch together, that leaves the smoothing law invariant.

    .. math:: z \\sim p(z \\mid y),\\; z' \\sim K_N(z, \\cdot) \\;\\Longrightarrow\\; z' \\sim p(z \\mid y)
        \\qquad\\text{for every number of particles } N \\ge 2

    Particle 0 of a particle filter *is* the given path at every step; the others compete with it, and a path of the
    filter is drawn in the end. Three ways to do so:

    * plain (``ancestor_sampling=False``): a line of the genealogy. Early states move only if N is large against the
      number of steps, for lines coalesce with the path that is kept;
    * ancestor sampling: at each step the kept path draws its own past anew, :math:`P(a = i) \\propto W_{k-1}^i\\,
      p(z_k \\mid z_{k-1}^i)`, and so breaks up. All states move even with few particles. Without a backward kernel (a
      memory) each candidate past is scored by the whole rest of the path: T squared operations;
    * ``backward_sampling``: the path is drawn backward from the finished filter, state by state. About as good.

    Args:
        fk: the process, with ``extend``; ``log_backward`` (or, for ancestor sampling, ``log_step``) where it draws
            ancestors.
        path: ``(*batch, time, state)``, of positive density; what stands where a series has ended is not used.
        num_particles: N, the kept path among them; at least 2.
        ancestor_sampling: default where ``fk.log_backward`` exists and ``backward_sampling`` is off.
        backward_sampling: instead of it.
        resampling: ``"systematic"`` (default), ``"stratified"`` or ``"multinomial"`` (default and only choice with
            ``backward_sampling``, which needs independent ancestors), conditional on the kept path.
        ess_threshold: fraction of N below which a series is resampled (and the kept path draws its past anew); must be
            1 for ``backward_sampling``, which needs a choice of ancestors at each step.
        noise: what to draw from; default torch's global generator. A :class:`~pyro_ssm.infer.smc.FixedNoise` needs 2
            rows of uniforms for ``"systematic"``, else N + 1, at every step.

    Returns:
        :class:`ConditionalPath`.

    Raises:
        ValueError: fewer than two particles, a path of another shape or with NaN, a process that lacks what is needed,
            a resampling that would break invariance; and as :func:`~pyro_ssm.infer.particle_filter`.

    Gradients: none. Randomness: torch's global generator, or ``noise``.

    Source: Andrieu, Doucet and Holenstein (2010), "Particle Markov chain Monte Carlo methods"; Whiteley (2010), in the
    discussion of it (backward sampling); Lindsten, Jordan and Schon (2014), "Particle Gibbs with ancestor sampling";
    Chopin and Singh (2015), "On particle Gibbs sampling" (resampling).

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> found = ssm.infer.conditional_smc(ssm.infer.bootstrap(model, data), torch.zeros(3, 4, 2), num_particles=10)
    >>> found.path.shape, found.moved.shape
    (torch.Size([3, 4, 2]), torch.Size([3, 4]))
    """
    if ancestor_sampling is None:
        ancestor_sampling = fk.log_backward is not None and not backward_sampling
    resampling = resampling or ("multinomial" if backward_sampling else "systematic")
    _check(fk, path, num_particles, ancestor_sampling, backward_sampling, resampling, ess_threshold)
    noise = PseudoRandom() if noise is None else noise
    noise.restart()
    with torch.no_grad():
        log_weights = future_log_weights(fk, path) if ancestor_sampling else None
        scheme = ConditionalResampling(resampling)
        stepper = ConditionalStepper(fk, path, num_particles, scheme, ess_threshold, noise, log_weights)
        genealogy, increments = Genealogy(), []
        genealogy.start(fk, num_particles)
        step = stepper.init()
        for k in range(fk.num_times):
            step = stepper.step(step) if k else step
            increments.append(step.log_likelihood)
            genealogy.collect(step)
        log_likelihood = torch.stack(increments, -1)
        check_evidence(fk, log_likelihood)
        ancestry = genealogy.result()
        rows = torch.Size((scheme.rows(num_particles),)) + fk.batch_shape
        last = at_unsorted_points(step.weights, noise.uniforms(0, rows, step.weights.device)[:1])
        if backward_sampling:
            new = look_back(fk, ancestry, last, _backward_kernel(fk, noise))[0]
        else:
            new = ancestry.trace(last)[0]
        moved = (new != path).any(-1)
        return ConditionalPath(new, moved if fk.step_mask is None else moved & fk.step_mask, log_likelihood)


def _backward_kernel(fk: FeynmanKac, noise: Noise) -> Callable[[Cloud, Any, int, Tensor], Tensor]:
    def kernel(previous: Cloud, late: Any, k: int, index: Tensor) -> Tensor:
        points = noise.uniforms(fk.num_times + k, index.shape, index.device)
        return backward_indices(fk, previous, late, k, 1, points.unsqueeze(0))[0]

    return kernel


def _check(
    fk: FeynmanKac,
    path: Tensor,
    num_particles: int,
    ancestor_sampling: bool,
    backward_sampling: bool,
    resampling: str,
    ess_threshold: float,
) -> None:
    if num_particles < 2:
        raise ValueError(
            f"`num_particles` must be at least 2, got {num_particles}: one of them is the path that is kept, and alone "
            "it could never move"
        )
    if fk.extend is None:
        raise ValueError(
            "conditional SMC needs `extend` of the process: the particles of a given state. A process made by hand "
            "whose particles are the states has FeynmanKac(..., extend=lambda k, previous, state: state)"
        )
    wanted = tuple(fk.batch_shape) + (fk.num_times,)
    if tuple(path.shape[:-1]) != wanted:
        raise ValueError(f"`path` must be {wanted} and the state (*batch, time, state), got {tuple(path.shape)}")
    real = path if fk.step_mask is None else path[fk.step_mask]
    if bool(torch.isnan(real).any()):
        raise ValueError("`path` has NaN. Start from a draw of a smoother: particle_smoother(fk, N, num_paths=1)")
    if ancestor_sampling and backward_sampling:
        raise ValueError("`ancestor_sampling` and `backward_sampling` do the same work: choose one of them")
    if backward_sampling:
        require_backward(fk, "backward sampling", "ancestor_sampling=True, or plain conditional SMC")
        if resampling != "multinomial":
            raise ValueError(
                f"backward sampling needs independent ancestors: resampling='multinomial', got {resampling!r}. "
                "Ancestor sampling goes with all schemes"
            )
    check_fraction(ess_threshold)
    if ess_threshold < 1 and backward_sampling:
        raise ValueError(
            f"`ess_threshold` is {ess_threshold}, but backward sampling needs a choice of ancestors at each step: "
            "leave it at 1, or use ancestor sampling"
        )
