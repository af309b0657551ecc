"""Particle marginal Metropolis-Hastings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.smc.bootstrap import bootstrap
from pyro_ssm.infer.smc.metropolis_chains import MetropolisChains
from pyro_ssm.infer.smc.moves import best_acceptance
from pyro_ssm.infer.smc.parameter_likelihood import Filter, ParameterLikelihood
from pyro_ssm.infer.smc.posterior_draws import ParticleMCMCResult
from pyro_ssm.infer.smc.resample import Resampling
from pyro_ssm.infer.smc.resume import RunFile, run_settings

__all__ = ["pmmh"]


@torch.no_grad()
def pmmh(
    model: Any,
    data: TimeSeries,
    num_samples: int,
    num_particles: int = 100,
    *,
    num_chains: int = 4,
    num_warmup: int | None = None,
    thin: int = 1,
    filter: Filter = bootstrap,
    correlation: float = 0.0,
    screen: Filter | None = None,
    start: Mapping[str, Any] | None = None,
    target_acceptance: float | None = None,
    resampling: str | Resampling | None = None,
    ess_threshold: float = 0.5,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 200,
    resume: bool = True,
    progress: bool = True,
) -> ParticleMCMCResult:
    """Draw parameters and states from their posterior by particle marginal Metropolis-Hastings.

    .. math::
        \\theta' \\sim N(\\theta, S S^\\top), \\qquad
        \\alpha = \\min\\left(1, \\frac{p(\\theta')\\, \\hat p(y \\mid \\theta')}
        {p(\\theta)\\, \\hat p(y \\mid \\theta)}\\right)

    A particle filter estimates the likelihood of each proposal; since the estimate is unbiased, the draws are from the
    *exact* posterior, whatever the number of particles. Too few make the chain sticky: choose ``num_particles`` so that
    the log of the estimate varies with a standard deviation of about 1 to 1.8 at good parameters. With each draw comes
    one path, from the genealogy of its filter.

    The walk moves in the unconstrained space of the parameters. During warm-up its root S adapts to the acceptance
    (robust adaptive Metropolis) and from time to time to the covariance of what all chains have visited; then it is
    held. Chains run side by side, as one batch of filters.

    Args:
        model: an unbound :class:`~pyro_ssm.models.StateSpaceModel`; what has a prior (``PyroSample``) is sampled.
        data: with values; a batch of series shares the parameters.
        num_samples: draws that are kept of each chain.
        num_particles: N of each particle filter.
        num_chains: chains, run together.
        num_warmup: iterations before the first draw; default: ``num_samples // 2``, but at least 100.
        thin: iterations between draws.
        filter: of a bound model and data. A builder (``bootstrap``, ``locally_optimal``, ``lambda model, data:
            guided(model, guide, data)``) gives particle filters; a filter without particles (``kalman_filter``,
            ``hmm_filter``) gives marginal Metropolis-Hastings, exact as far as it is exact,
            with paths drawn afterwards by the simulation smoother.
        correlation: of the random numbers of a proposal's filter with those of the current one; 0 draws afresh. Near 1
            (0.99, say) the correlated pseudo-marginal method: for long series, where it saves particles. Needs Gaussian
            proposals of states; memory grows with the number of times and particles.
        screen: a cheap filter without particles that sees every proposal first; the particle filter runs only for those
            that it accepts, and corrects it: delayed acceptance. The posterior stays exact.
        start: values ``(num_chains, *event)`` or ``(*event)`` by dotted name to start from; default: the best of ten
            draws from the prior for each chain.
        target_acceptance: what the walk adapts to; default 0.44 for one parameter, else 0.234.
        resampling: as in :func:`particle_filter`; default ``"systematic"``, with ``correlation``
            ``"hilbert-systematic"``.
        ess_threshold: as in :func:`particle_filter`.
        checkpoint: path of a file with the whole state, written atomically.
        checkpoint_every: iterations between checkpoints; one is written at the end, too.
        resume: go on from ``checkpoint`` if it exists; ``num_samples`` may have grown (then give ``num_warmup``).
        progress: show a bar with the acceptance.

    Returns:
        :class:`ParticleMCMCResult`; ``to_inference_data`` gives it to ArviZ with R-hat and ESS.

    Raises:
        ValueError: numbers out of range; no prior draw explains the data; the checkpoint is of another run.
        TypeError: the model is bound or a prior discrete; with ``correlation`` a filter without particles, or one whose
            draws are not maps of standard normals.

    Randomness: torch's global generator. Not differentiable.

    Source: Andrieu, Doucet and Holenstein (2010), "Particle Markov chain Monte Carlo methods", J. R. Statist. Soc. B
    72, section 2.4.2; for the adaptation Haario, Saksman and Tamminen (2001), "An adaptive Metropolis algorithm", and
    Vihola (2012), "Robust adaptive Metropolis algorithm with coerced acceptance rate"; for ``correlation``
    Deligiannidis, Doucet and Pitt (2018), "The correlated pseudo-marginal method"; for ``screen`` Christen and Fox
    (2005), "Markov chain Monte Carlo using an approximation", and Golightly, Henderson and Sherlock (2015), "Delayed
    acceptance particle MCMC for exact inference in stochastic kinetic models".

    >>> import torch, pyro.distributions as dist, pyro_ssm as ssm
    >>> from pyro.nn import PyroSample
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.OrnsteinUhlenbeck(1), ssm.emissions.LinearNormal(1, 1))
    >>> model.transition.rate = PyroSample(dist.LogNormal(0.0, 1.0))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(4, 1))
    >>> found = ssm.infer.pmmh(model, data, num_samples=20, num_particles=20, num_warmup=10, progress=False)
    >>> found.parameters["transition.rate"].shape, found.states.shape
    (torch.Size([4, 20]), torch.Size([4, 20, 4, 1]))
    """
    num_warmup = max(100, num_samples // 2) if num_warmup is None else num_warmup
    for name, value, least in (
        ("num_samples", num_samples, 1),
        ("num_chains", num_chains, 1),
        ("thin", thin, 1),
        ("num_warmup", num_warmup, 0),
    ):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}")
    if not 0 <= correlation < 1:
        raise ValueError(f"`correlation` must be in [0, 1), got {correlation}")
    resampling = resampling or ("hilbert-systematic" if correlation else "systematic")
    likelihood = ParameterLikelihood(model, data, filter, num_particles, resampling, ess_threshold)
    if correlation and not likelihood.estimated:
        raise TypeError("`correlation` is of particle filters' random numbers, and `filter` has none: leave it out")
    if target_acceptance is not None and not 0 < target_acceptance < 1:
        raise ValueError(f"`target_acceptance` is a probability, in (0, 1), got {target_acceptance}")
    if target_acceptance is None:
        target_acceptance = best_acceptance(likelihood.parameters.dim)
    screening = None if screen is None else ParameterLikelihood(likelihood.parameters, data, screen)
    if screening is not None and screening.estimated:
        raise TypeError("`screen` must be a filter without particles, such as a Kalman filter")

    settings = run_settings(
        "pmmh",
        likelihood,
        num_chains=num_chains,
        num_warmup=num_warmup,
        thin=thin,
        correlation=correlation,
        screen=screen is not None,
        target_acceptance=target_acceptance,
    )
    file = RunFile(checkpoint, checkpoint_every, settings, resume, data.device)
    chains = MetropolisChains(likelihood, correlation, screening, target_acceptance)
    kept: dict[str, list[Tensor]] = {"vectors": [], "states": [], "log_likelihood": [], "acceptance": []}
    saved = file.load()
    if saved is None:
        chains.start(num_chains, start)
        begun = 0
    else:
        chains.load_state_dict(saved["chains"])
        begun = saved["done"]
        kept |= {name: list(x.unbind(1)) for name, x in saved["kept"].items()}

    last = num_warmup + num_samples * thin
    with tqdm(total=last, initial=begun, desc="pmmh", disable=not progress, dynamic_ncols=True) as bar:
        for done in range(begun + 1, last + 1):
            probability = chains.step(adapt=done <= num_warmup)
            if done > num_warmup and (done - num_warmup) % thin == 0:
                _keep(kept, chains, probability)
            bar.set_postfix({"accepted": f"{chains.recent:.2f}"}, refresh=False)
            bar.update()
            if file.due(done, last):
                drawn = {name: torch.stack(x, 1) for name, x in kept.items() if x}
                file.save({"chains": chains.state_dict(), "done": done, "kept": drawn})
    vectors = torch.stack(kept["vectors"][:num_samples], 1)
    states = (
        torch.stack(kept["states"][:num_samples], 1)
        if likelihood.estimated
        else likelihood.paths(vectors.flatten(0, 1)).unflatten(0, (num_chains, num_samples))
    )
    return ParticleMCMCResult(
        likelihood.parameters.to_values(vectors),
        states,
        torch.stack(kept["log_likelihood"][:num_samples], 1),
        torch.stack(kept["acceptance"][:num_samples], 1),
    )


def _keep(kept: dict[str, list[Tensor]], chains: MetropolisChains, probability: Tensor) -> None:
    now = chains.current
    kept["vectors"].append(now.vectors)
    kept["log_likelihood"].append(now.log_likelihood)
    kept["acceptance"].append(probability)
    if now.states is not None:
        kept["states"].append(now.states)
