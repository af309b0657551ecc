"""Sequential Monte Carlo over parameters from the prior to the posterior, by temperature."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.gaussian import kalman_filter
from pyro_ssm.infer.smc.parameter_likelihood import Evaluated, Filter, ParameterLikelihood
from pyro_ssm.infer.smc.parameter_smc import (
    Evidence,
    ParameterSMCResult,
    check_numbers,
    rejuvenate,
    result_of,
)
from pyro_ssm.infer.smc.resume import RunFile, run_settings
from pyro_ssm.infer.smc.stepper import normalise

__all__ = ["smc_sampler"]

_HALVINGS = 60


@torch.no_grad()
def smc_sampler(
    model: Any,
    data: TimeSeries,
    num_samples: int = 1000,
    num_particles: int = 100,
    *,
    filter: Filter = kalman_filter,
    num_moves: int = 5,
    num_ancestors: int | None = None,
    ess_threshold: float = 0.5,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> ParameterSMCResult:
    """Draw parameters and states from their posterior, and estimate the evidence, by tempering.

    .. math::
        \\pi_\\lambda(\\theta) \\propto p(\\theta)\\, p(y \\mid \\theta)^\\lambda, \\qquad
        0 = \\lambda_0 < \\dots < \\lambda_n = 1, \\qquad
        \\hat p(y) = \\prod_i \\sum_s W_s\\, p(y \\mid \\theta_s)^{\\lambda_{i+1} - \\lambda_i}

    A cloud of prior draws is reweighted, resampled and moved from one temperature to the next; each next temperature is
    the largest that keeps the effective sample size. All draws are evaluated as one batch. It finds separate modes that
    a single chain does not, as long as the cloud of prior draws covers them.

    Args:
        model: an unbound :class:`~pyro_ssm.models.StateSpaceModel`; what has a prior (``PyroSample``) is sampled.
        data: with values; a batch of series shares the parameters.
        num_samples: S, draws of the parameters.
        num_particles: N of each particle filter, for filters with particles.
        filter: as in :func:`pmmh`. With particle filters the estimate of the likelihood takes the place of the
            likelihood: the draws at :math:`\\lambda = 1` and the evidence stay right (Duan and Fulop 2015).
        num_moves: Metropolis-Hastings steps of each draw at each temperature.
        num_ancestors: M, a divisor of S: the waste-free sampler, in which only M draws are resampled, each makes
            :math:`S / M - 1` moves, and all that they meet is kept. Best with M well below S (``S = 1000, M = 50``).
        ess_threshold: effective sample size to keep, as a fraction of S.
        checkpoint: path of a file with the whole state, written atomically after each temperature.
        resume: go on from ``checkpoint`` if it exists.
        progress: show a bar with the temperature.

    Returns:
        :class:`ParameterSMCResult`, with the temperatures as ``stages``.

    Raises:
        ValueError: numbers out of range; no prior draw explains the data; the checkpoint is of another run.
        TypeError: the model is bound, or a prior discrete.

    Randomness: torch's global generator. Not differentiable. Source: Del Moral, Doucet and Jasra (2006), "Sequential
    Monte Carlo samplers", J. R. Statist. Soc. B 68; Dau and Chopin (2022), "Waste-free sequential Monte Carlo",
    J. R. Statist. Soc. B 84.

    >>> import torch, pyro.distributions as dist, pyro_ssm as ssm
    >>> from pyro.nn import PyroSample
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.OrnsteinUhlenbeck(1), ssm.emissions.LinearNormal(1, 1))
    >>> model.transition.rate = PyroSample(dist.LogNormal(0.0, 1.0))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(4, 1))
    >>> found = ssm.infer.smc_sampler(model, data, num_samples=50, progress=False)
    >>> found.parameters["transition.rate"].shape, found.log_evidence.shape
    (torch.Size([1, 50]), torch.Size([]))
    """
    check_numbers(num_samples, num_moves, ess_threshold, num_ancestors)
    likelihood = ParameterLikelihood(model, data, filter, num_particles)
    settings = run_settings(
        "smc_sampler", likelihood, num_samples=num_samples, num_moves=num_moves, num_ancestors=num_ancestors
    )
    file = RunFile(checkpoint, 1, settings | {"threshold": ess_threshold}, resume, data.device)
    saved = file.load()
    if saved is None:
        temperature, evidence = 0.0, Evidence()
        population = likelihood(likelihood.parameters.draw(num_samples))
    else:
        temperature, evidence = saved["temperature"], Evidence(saved["evidence"])
        population = Evaluated(*saved["population"])

    with tqdm(total=1.0, initial=temperature, desc="smc_sampler", disable=not progress, dynamic_ncols=True) as bar:
        while temperature < 1:
            step = _next_step(population.log_likelihood, 1 - temperature, ess_threshold)
            temperature = 1.0 if step == 1 - temperature else temperature + step
            weights = _reweigh(population, step, temperature, evidence)

            def log_target(some: Evaluated, temperature: float = temperature) -> Tensor:
                return some.log_prior + temperature * some.log_likelihood

            population, rate = rejuvenate(population, weights, likelihood, log_target, num_moves, num_ancestors)
            evidence.moved(rate)
            bar.set_postfix({"accepted": f"{float(rate):.2f}"}, refresh=False)
            bar.update(round(temperature - bar.n, 6))
            file.save({"temperature": temperature, "evidence": evidence.rows, "population": list(population)})
    return result_of(likelihood, population, population.states, evidence)


def _reweigh(population: Evaluated, step: float, temperature: float, evidence: Evidence) -> Tensor:
    equal = -torch.tensor(float(len(population.vectors)), dtype=torch.float64).log()
    total, _, weights, ess = normalise(equal + step * population.log_likelihood)
    evidence.add(total, ess, temperature)
    return weights


def _next_step(log_likelihood: Tensor, most: float, ess_threshold: float) -> float:
    """The largest step in temperature, up to ``most``, after which the effective sample size is not below its bound."""
    possible = torch.isfinite(log_likelihood).sum()

    def enough(step: float) -> bool:
        return bool(normalise(step * log_likelihood)[3] >= ess_threshold * possible)

    if enough(most) or not bool(possible):
        return most
    low, high = 0.0, most
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low if low > 0 else high
