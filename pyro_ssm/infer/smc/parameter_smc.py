"""Sequential Monte Carlo over parameters: what its samplers share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.infer.smc.moves import P, metropolis, walk_root
from pyro_ssm.infer.smc.parameter_likelihood import ParameterLikelihood
from pyro_ssm.infer.smc.tree import tree_map
from pyro_ssm.ops.resampling import systematic

__all__ = [
    "Evidence",
    "ParameterSMCResult",
    "check_numbers",
    "log_posterior",
    "rejuvenate",
    "result_of",
]


class ParameterSMCResult(NamedTuple):
    """Equally weighted draws of parameters and states, and the evidence; a posterior as that of particle MCMC.

    The draws are of one cloud, so they count as one chain.

    >>> from pyro_ssm.infer.smc import ParameterSMCResult
    >>> ParameterSMCResult._fields
    ('parameters', 'states', 'log_likelihood', 'log_evidence', 'increments', 'ess', 'acceptance', 'stages')
    """

    parameters: dict[str, Tensor]  # dotted name -> (1, draws, *event), constrained
    states: Tensor  # (1, draws, *batch, time, state)
    log_likelihood: Tensor  # (1, draws), of all data; an estimate where the filter gives one
    log_evidence: Tensor  # (), log p(y), estimated; unbiased but for its logarithm and the adaptation
    increments: Tensor  # (stages,), of the log evidence
    ess: Tensor  # (stages,), effective sample size of the draws after each reweighting
    acceptance: Tensor  # (stages,), mean probability of acceptance of the moves; NaN where there were none
    stages: Tensor  # (stages,): temperatures, or particles of each filter at each time (0 for filters without)

    @property
    def num_chains(self) -> int:
        """1."""
        return 1

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Parameters by dotted name and the path as ``"z"``, ``(draws, ...)``, with a leading 1 if grouped."""
        grouped = {**self.parameters, "z": self.states}
        return grouped if group_by_chain else {name: value.flatten(0, 1) for name, value in grouped.items()}


class Evidence:
    """The stages of a sampler as they come: increments of the log evidence, and what became of the cloud.

    >>> import torch
    >>> from pyro_ssm.infer.smc.parameter_smc import Evidence
    >>> evidence = Evidence()
    >>> evidence.add(torch.tensor(-1.0), torch.tensor(9.0), 0.5)
    >>> evidence.total
    -1.0
    """

    def __init__(self, rows: list[list[float]] | None = None) -> None:
        self.rows: list[list[float]] = rows or []

    def add(self, increment: Tensor, ess: Tensor, stage: float) -> None:
        """A reweighting.

        Raises:
            ValueError: no draw is possible after it.
        """
        if not math.isfinite(float(increment)):
            raise ValueError(
                f"stage {len(self.rows)} of the sampler over parameters: the data are impossible at every draw. Use "
                "more draws or particles, a filter that sees the observations, or a prior that knows their scale"
            )
        self.rows.append([float(increment), float(ess), math.nan, float(stage)])

    def moved(self, acceptance: Tensor) -> None:
        """The moves after the last reweighting."""
        self.rows[-1][2] = float(acceptance)

    @property
    def total(self) -> float:
        """The log evidence so far."""
        return sum(row[0] for row in self.rows)


def log_posterior(population: Any) -> Tensor:
    """:math:`\\log p(\\theta) + \\log p(y \\mid \\theta)` of a population, ``(S,)``.

    >>> import torch
    >>> from pyro_ssm.infer.smc.parameter_likelihood import Evaluated
    >>> from pyro_ssm.infer.smc.parameter_smc import log_posterior
    >>> log_posterior(Evaluated(torch.zeros(1, 1), torch.tensor([1.0]), torch.tensor([2.0]), None))
    tensor([3.])
    """
    return population.log_prior + population.log_likelihood


def rejuvenate(
    population: P,
    weights: Tensor,
    evaluate: Callable[[Tensor], P],
    log_target: Callable[[P], Tensor],
    num_moves: int,
    num_ancestors: int | None = None,
) -> tuple[P, Tensor]:
    """Resample a population, and move its members by Metropolis-Hastings steps that leave the target as it is.

    Without waste, ``num_ancestors`` members are chosen, each is moved on and on, and all that were met are kept: as
    many as before, at the cost of fewer moves each (Dau and Chopin 2022, algorithm 2).

    Args:
        population: S members.
        weights: ``(S,)``, summing to 1.
        evaluate: vectors to a population.
        log_target: of a population, ``(S,)``.
        num_moves: moves of each member, with ``num_ancestors`` None.
        num_ancestors: M, a divisor of S; then each is moved :math:`S / M - 1` times.

    Returns:
        The population of S members of equal weight, in random order (without waste, chain after chain), and the mean
        probability of acceptance.

    >>> from pyro_ssm.infer.smc.parameter_smc import rejuvenate
    >>> rejuvenate.__name__
    'rejuvenate'
    """
    number = len(weights)
    root = walk_root(population.vectors, weights)
    chosen = systematic(weights, torch.rand(1, dtype=torch.float64, device=weights.device))
    if num_ancestors is None:
        current = population.take(chosen[torch.randperm(number, device=weights.device)])
    else:
        # every (S / M)-th of S equidistant points are M equidistant points
        stride = number // num_ancestors
        current = population.take(chosen[int(torch.randint(stride, ())) :: stride])
        num_moves = stride - 1
    met, rates = [current], []
    for _ in range(num_moves):
        vectors = current.vectors + torch.randn_like(current.vectors) @ root.mT
        log_uniforms = torch.rand_like(current.log_prior).log()
        current, _, probability = metropolis(current, evaluate(vectors), log_target, log_uniforms)
        rates.append(probability.mean())
        if num_ancestors is not None:
            met.append(current)
    rate = torch.stack(rates).mean() if rates else weights.new_full((), math.nan)
    if num_ancestors is None:
        return current, rate
    return tree_map(lambda *rows: torch.stack(rows, 1).flatten(0, 1), met[0], *met[1:]), rate


def check_numbers(num_samples: int, num_moves: int, ess_threshold: float, num_ancestors: int | None = None) -> None:
    """Raise where the settings of a sampler are out of range.

    >>> from pyro_ssm.infer.smc.parameter_smc import check_numbers
    >>> check_numbers(100, 3, 0.5)
    """
    if num_samples < 2:
        raise ValueError(f"`num_samples` must be at least 2, got {num_samples}")
    if num_moves < 1:
        raise ValueError(f"`num_moves` must be at least 1, got {num_moves}")
    if not 0 < ess_threshold < 1:
        raise ValueError(f"`ess_threshold` is a fraction of the number of draws, in (0, 1), got {ess_threshold}")
    if num_ancestors is not None and (not 1 <= num_ancestors < num_samples or num_samples % num_ancestors):
        raise ValueError(
            f"`num_ancestors` must be a divisor of `num_samples` ({num_samples}) below it, got {num_ancestors}"
        )


def result_of(likelihood: ParameterLikelihood, population: Any, states: Tensor | None, evidence: Evidence) -> Any:
    """The result of a sampler whose final population has equal weights.

    >>> from pyro_ssm.infer.smc.parameter_smc import result_of
    >>> result_of.__name__
    'result_of'
    """
    vectors = population.vectors
    states = likelihood.paths(vectors) if states is None else states
    rows = torch.tensor(evidence.rows, dtype=torch.float64, device=vectors.device)
    total = population.log_likelihood if population.log_likelihood.dim() == 1 else population.log_likelihood.sum(-1)
    values = likelihood.parameters.to_values(vectors)
    return ParameterSMCResult(
        {name: value.unsqueeze(0) for name, value in values.items()},
        states.unsqueeze(0),
        total.unsqueeze(0),
        rows[:, 0].sum(),
        *rows.unbind(-1),
    )
