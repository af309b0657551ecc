"""SMC^2: sequential Monte Carlo over parameters, with a particle filter for each."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.smc.bootstrap import bootstrap
from pyro_ssm.infer.smc.filter_bank import FilterBank
from pyro_ssm.infer.smc.parameter_likelihood import Filter, ParameterLikelihood
from pyro_ssm.infer.smc.parameter_smc import (
    Evidence,
    ParameterSMCResult,
    check_numbers,
    log_posterior,
    rejuvenate,
    result_of,
)
from pyro_ssm.infer.smc.resample import Resampling
from pyro_ssm.infer.smc.resume import RunFile, run_settings
from pyro_ssm.infer.smc.stepper import normalise

__all__ = ["smc_squared"]


@torch.no_grad()
def smc_squared(
    model: Any,
    data: TimeSeries,
    num_samples: int = 500,
    num_particles: int = 100,
    *,
    filter: Filter = bootstrap,
    num_moves: int = 3,
    ess_threshold: float = 0.5,
    least_acceptance: float = 0.15,
    max_particles: int = 10_000,
    resampling: str | Resampling = "systematic",
    filter_threshold: float = 0.5,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 20,
    resume: bool = True,
    progress: bool = True,
) -> ParameterSMCResult:
    """Draw parameters and states from their posterior as the data come in, for any model with a particle filter.

    .. math::
        W_s \\propto W_s\\, \\hat p_N(y_k \\mid y_{<k}, \\theta_s), \\qquad
        \\hat p(y_k \\mid y_{<k}) = \\sum_s W_s\\, \\hat p_N(y_k \\mid y_{<k}, \\theta_s)

    Each of S parameters carries a particle filter of N particles, all run as one batch. Where the weights of the
    parameters have become uneven, parameters are resampled with their filters, and moved by particle marginal
    Metropolis-Hastings steps for the posterior given the data so far. Where these are accepted too rarely, N is
    doubled: new filters take the place of the old, and parameters are reweighted by the ratio of their estimates. The
    draws are right for any N, in the limit of S. Nothing need be known beforehand, and no chain has to converge.

    Args:
        model: an unbound :class:`~pyro_ssm.models.StateSpaceModel`; what has a prior (``PyroSample``) is sampled.
        data: with values; a batch of series shares the parameters, and goes on step by step together.
        num_samples: S.
        num_particles: N at the beginning.
        filter: a builder of a Feynman-Kac process from a bound model and data: ``bootstrap``, ``locally_optimal``,
            ``lambda model, data: guided(model, guide, data)``.
        num_moves: Metropolis-Hastings steps of each draw at each rejuvenation; each runs its filter from the beginning.
        ess_threshold: rejuvenate where the effective sample size of the parameters is below this fraction of S, and at
            the end.
        least_acceptance: double N where the moves are accepted with less probability.
        max_particles: N is not raised above this.
        resampling: of the filters, as in :func:`particle_filter`.
        filter_threshold: their ``ess_threshold``.
        checkpoint: path of a file with the whole state, written atomically.
        checkpoint_every: steps between checkpoints.
        resume: go on from ``checkpoint`` if it exists.
        progress: show a bar.

    Returns:
        :class:`ParameterSMCResult`, one stage for each time, with N as ``stages``. Memory: all clouds of all filters,
        :math:`S N T` states.

    Raises:
        ValueError: numbers out of range; no draw explains an observation; the checkpoint is of another run.
        TypeError: the model is bound, a prior discrete, or the filter one without particles (see :func:`ibis`).

    Randomness: torch's global generator. Not differentiable. Source: Chopin, Jacob and Papaspiliopoulos (2013),
    "SMC^2: an efficient algorithm for sequential analysis of state space models", J. R. Statist. Soc. B 75, sections 3
    and 3.6.

    >>> import torch, pyro.distributions as dist, pyro_ssm as ssm
    >>> from pyro.nn import PyroSample
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.OrnsteinUhlenbeck(1), ssm.emissions.LinearNormal(1, 1))
    >>> model.transition.rate = PyroSample(dist.LogNormal(0.0, 1.0))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(4, 1))
    >>> found = ssm.infer.smc_squared(model, data, num_samples=40, num_particles=20, progress=False)
    >>> found.parameters["transition.rate"].shape, found.states.shape, found.increments.shape
    (torch.Size([1, 40]), torch.Size([1, 40, 4, 1]), torch.Size([4]))
    """
    check_numbers(num_samples, num_moves, ess_threshold)
    likelihood = ParameterLikelihood(model, data, filter, num_particles, resampling, filter_threshold)
    if not likelihood.estimated:
        raise TypeError("smc_squared needs a builder of particle filters; for a filter without particles use ibis")
    settings = run_settings("smc_squared", likelihood, num_samples=num_samples, num_moves=num_moves)
    settings |= {"threshold": ess_threshold, "least_acceptance": least_acceptance, "max_particles": max_particles}
    file = RunFile(checkpoint, checkpoint_every, settings, resume, data.device)

    saved = file.load()
    if saved is None:
        evidence, bank = Evidence(), likelihood.bank(likelihood.parameters.draw(num_samples))
        log_weights = -torch.full_like(bank.log_prior, num_samples).log()
    else:
        evidence, log_weights = Evidence(saved["evidence"]), saved["log_weights"]
        bank = _restored(likelihood, saved)
        bank.restart_noise()
        file.load()  # the generators once more: restoring drew from them

    last = bank.num_times
    with tqdm(total=last, initial=bank.k + 1, desc="smc_squared", disable=not progress, dynamic_ncols=True) as bar:
        while bank.k + 1 < last:
            increment, log_weights, weights, ess = normalise(log_weights + bank.advance())
            evidence.add(increment, ess, bank.num_particles)
            if ess < ess_threshold * num_samples or bank.k + 1 == last:
                bank, log_weights = _rejuvenate(likelihood, bank, weights, evidence, num_moves)
                if evidence.rows[-1][2] < least_acceptance and 2 * bank.num_particles <= max_particles:
                    bank, log_weights = _doubled(likelihood, bank, log_weights)
                    if bank.k + 1 == last:  # the draws returned have equal weights
                        bank, log_weights = _rejuvenate(likelihood, bank, log_weights.exp(), evidence, num_moves)
            bar.set_postfix({"ess": f"{float(ess):.0f}", "particles": bank.num_particles}, refresh=False)
            bar.update()
            if file.due(bank.k + 1, last):
                bank.restart_noise()  # what was drawn in advance is not saved
                file.save(
                    {
                        "k": bank.k,
                        "num_particles": bank.num_particles,
                        "bank": bank.parts(),
                        "log_weights": log_weights,
                        "evidence": evidence.rows,
                    }
                )
    return result_of(likelihood, bank, bank.paths(), evidence)


def _rejuvenate(
    likelihood: ParameterLikelihood, bank: FilterBank, weights: Tensor, evidence: Evidence, num_moves: int
) -> tuple[FilterBank, Tensor]:
    def evaluate(vectors: Tensor) -> FilterBank:
        return likelihood.bank(vectors, bank.num_particles).run(bank.k)

    moved, rate = rejuvenate(bank, weights, evaluate, log_posterior, num_moves)
    evidence.moved(rate)
    return moved, -torch.full_like(weights, len(weights)).log()


def _doubled(likelihood: ParameterLikelihood, bank: FilterBank, log_weights: Tensor) -> tuple[FilterBank, Tensor]:
    """Filters of twice as many particles for the same parameters, which are weighed by the ratio of the estimates."""
    new = likelihood.bank(bank.vectors, 2 * bank.num_particles, log_prior=bank.log_prior).run(bank.k)
    return new, normalise(log_weights + new.log_likelihood - bank.log_likelihood)[1]


def _restored(likelihood: ParameterLikelihood, saved: dict[str, Any]) -> FilterBank:
    parts = saved["bank"]
    bank = likelihood.bank(parts[0], saved["num_particles"], log_prior=parts[1])
    bank.advance()  # the particles' structure comes from the process; only their numbers are in the file
    return bank.with_parts(parts, saved["k"])
