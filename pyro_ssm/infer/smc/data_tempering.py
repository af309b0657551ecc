"""Sequential Monte Carlo over parameters along the data, with the states integrated out."""

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

__all__ = ["ibis"]


@torch.no_grad()
def ibis(
    model: Any,
    data: TimeSeries,
    num_samples: int = 1000,
    *,
    filter: Filter = kalman_filter,
    num_moves: int = 5,
    num_ancestors: int | None = None,
    ess_threshold: float = 0.5,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    resume: bool = True,
    progress: bool = True,
) -> ParameterSMCResult:
    """Draw parameters and states from their posterior as the data come in, with an exact filter (IBIS).

    .. math::
        W_s \\propto W_s\\, p(y_k \\mid y_{<k}, \\theta_s), \\qquad
        \\hat p(y_k \\mid y_{<k}) = \\sum_s W_s\\, p(y_k \\mid y_{<k}, \\theta_s)

    A cloud of prior draws is reweighted by each observation, and resampled and moved (by Metropolis-Hastings steps for
    the posterior given the data so far) where it has become uneven. The evidence of every beginning of the data comes
    with it: ``increments`` are the one-step predictive densities with parameters integrated out, honest scores of a
    model. For models without an exact filter see :func:`smc_squared`.

    Args:
        model: an unbound :class:`~pyro_ssm.models.StateSpaceModel`; what has a prior (``PyroSample``) is sampled.
        data: with values; a batch of series shares the parameters, and goes on step by step together.
        num_samples: S, draws of the parameters.
        filter: a filter without particles, of a bound model and data. With an approximate one, such as an
            extended Kalman filter, the result is as approximate.
        num_moves: Metropolis-Hastings steps of each draw at each rejuvenation.
        num_ancestors: as in :func:`smc_sampler`: the waste-free variant.
        ess_threshold: the cloud is rejuvenated where its effective sample size is below this fraction of S, and at the
            end.
        checkpoint: path of a file with the whole state, written atomically.
        checkpoint_every: steps between checkpoints.
        resume: go on from ``checkpoint`` if it exists.
        progress: show a bar.

    Returns:
        :class:`ParameterSMCResult`, one stage for each time.

    Raises:
        ValueError: numbers out of range; no draw explains an observation; the checkpoint is of another run.
        TypeError: the model is bound, a prior discrete, or the filter one with particles.

    Randomness: torch's global generator. Not differentiable. Source: Chopin (2002), "A sequential particle filter
    method for static models", Biometrika 89, section 4.

    >>> import torch, pyro.distributions as dist, pyro_ssm as ssm
    >>> from pyro.nn import PyroSample
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.OrnsteinUhlenbeck(1), ssm.emissions.LinearNormal(1, 1))
    >>> model.transition.rate = PyroSample(dist.LogNormal(0.0, 1.0))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(4, 1))
    >>> ssm.infer.ibis(model, data, num_samples=50, progress=False).increments.shape
    torch.Size([4])
    """
    check_numbers(num_samples, num_moves, ess_threshold, num_ancestors)
    likelihood = ParameterLikelihood(model, data, filter)
    settings = run_settings(
        "ibis", likelihood, num_samples=num_samples, num_moves=num_moves, num_ancestors=num_ancestors
    )
    file = RunFile(checkpoint, checkpoint_every, settings | {"threshold": ess_threshold}, resume, data.device)

    def evaluate(vectors: Tensor) -> Evaluated:
        # one run of the filter over all data gives the increments of every beginning of them
        return Evaluated(vectors, likelihood.parameters.log_prior(vectors), likelihood.increments(vectors), None)

    saved = file.load()
    if saved is None:
        start, evidence = 0, Evidence()
        population = evaluate(likelihood.parameters.draw(num_samples))
        log_weights = -torch.full_like(population.log_prior, num_samples).log()
    else:
        start, evidence = saved["done"], Evidence(saved["evidence"])
        population = Evaluated(*saved["population"])
        log_weights = saved["log_weights"]

    last = population.log_likelihood.shape[-1]
    with tqdm(total=last, initial=start, desc="ibis", disable=not progress, dynamic_ncols=True) as bar:
        for done in range(start + 1, last + 1):
            increment, log_weights, weights, ess = normalise(log_weights + population.log_likelihood[:, done - 1])
            evidence.add(increment, ess, 0)
            if ess < ess_threshold * num_samples or done == last:

                def log_target(some: Evaluated, done: int = done) -> Tensor:
                    return some.log_prior + some.log_likelihood[:, :done].sum(-1)

                population, rate = rejuvenate(population, weights, evaluate, log_target, num_moves, num_ancestors)
                evidence.moved(rate)
                log_weights = -torch.full_like(log_weights, num_samples).log()
            bar.set_postfix({"ess": f"{float(ess):.0f}"}, refresh=False)
            bar.update()
            if file.due(done, last):
                file.save(
                    {
                        "done": done,
                        "evidence": evidence.rows,
                        "population": list(population),
                        "log_weights": log_weights,
                    }
                )
    return result_of(likelihood, population, None, evidence)
