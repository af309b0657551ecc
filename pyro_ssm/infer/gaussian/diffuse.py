"""The diffuse first steps of a series and the ordinary filter after them, put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import Affine
from pyro_ssm.models.linear_gaussian import System
from pyro_ssm.ops.kalman import FilterSteps, predict
from pyro_ssm.ops.kalman_backward import Conditionals
from pyro_ssm.ops.kalman_diffuse import DiffuseLaw, DiffuseSteps, diffuse_conditionals, diffuse_phase
from pyro_ssm.ops.kalman_smoother import backward_conditionals

__all__ = ["Filtering", "conditionals", "run_filter", "run_terms"]

EVENTS = (1, 2, 3, 2, 3)  # dims of the parts of FilterSteps from time on


class Filtering(NamedTuple):
    """The steps of a filter, and the diffuse phase they began with.

    >>> from pyro_ssm.infer.gaussian.diffuse import Filtering
    >>> Filtering._fields
    ('steps', 'phase')
    """

    steps: FilterSteps
    phase: DiffuseSteps | None  # in float64

    def diffuse(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The diffuse columns of the filtered and of the predicted law at all times ``(..., time, n, q)``."""
        if self.phase is None:
            raise ValueError("the start is proper: there are no diffuse columns")
        lead, num_times = self.steps.log_likelihood.shape[:-1], self.steps.log_likelihood.shape[-1]
        whole = []
        for law in (self.phase.filtered, self.phase.predicted):
            columns = torch.where(law.is_proper[..., None, None], law.mean.new_zeros(()), law.diffuse).to(dtype)
            columns = columns.expand(lead + columns.shape[-3:])
            rest = columns.new_zeros(lead + (num_times - columns.shape[-3],) + columns.shape[-2:])
            whole.append(torch.cat([columns, rest], -3))
        return whole[0], whole[1]


def run_filter(system: System, filter: Callable[[System], FilterSteps]) -> Filtering:
    """``filter`` over the whole series, after the diffuse phase where the start is diffuse.

    >>> from pyro_ssm.infer.gaussian.diffuse import run_filter
    >>> run_filter.__name__
    'run_filter'
    """
    if system.diffuse is None:
        return Filtering(filter(system), None)
    begun, phase, left = _begin(system)
    if left is None:
        return Filtering(begun, phase)
    pairs = zip(zip(begun, filter(left), strict=True), EVENTS, strict=True)
    return Filtering(FilterSteps(*(_cat_time(pair, event) for pair, event in pairs)), phase)


def run_terms(system: System, terms: Callable[[System], Tensor]) -> Tensor:
    """The log-likelihoods of :func:`run_filter` alone, when ``terms`` gives those of a proper start.

    >>> from pyro_ssm.infer.gaussian.diffuse import run_terms
    >>> run_terms.__name__
    'run_terms'
    """
    if system.diffuse is None:
        return terms(system)
    begun, _, left = _begin(system)
    return begun.log_likelihood if left is None else _cat_time((begun.log_likelihood, terms(left)), 1)


def _begin(system: System) -> tuple[FilterSteps, DiffuseSteps, System | None]:
    """The diffuse phase, in the dtype of the system and as it is, and what is left of the series after it."""
    if system.diffuse is None:
        raise ValueError("the start is proper: there is no diffuse phase")
    exact = system.to(torch.float64)
    phase = diffuse_phase(
        exact.values,
        exact.mask,
        exact.mean,
        exact.scale_tril,
        system.diffuse.double(),
        *exact.transition,
        *exact.emission,
        num_times=system.num_times,
        observed_index=system.observed_index,
        step_mask=system.step_mask,
    )
    dtype, first = system.values.dtype, phase.log_likelihood.shape[-1]
    law, before = phase.filtered, phase.predicted
    begun = FilterSteps(phase.log_likelihood, law.mean, law.scale_tril, before.mean, before.scale_tril)
    begun = FilterSteps(*(part.to(dtype) for part in begun))
    if first == system.num_times:
        return begun, phase, None
    last = phase.filtered.mean[..., -1, :], phase.filtered.scale_tril[..., -1, :, :]
    ahead = predict(*last, *_step(exact.transition, first - 1))
    if system.step_mask is not None:
        real = system.step_mask[..., first]
        ahead = (
            torch.where(real[..., None], ahead[0], last[0]),
            torch.where(real[..., None, None], ahead[1], last[1]),
        )
    return begun, phase, _from(system, first, *(part.to(dtype) for part in ahead))


def conditionals(system: System, filtering: Filtering, method: str) -> Conditionals:
    """The laws of each state given the next one and the data up to it.

    Raises:
        ValueError: the data leaves a diffuse direction undetermined, so that they are improper.

    >>> from pyro_ssm.infer.gaussian.diffuse import conditionals
    >>> conditionals.__name__
    'conditionals'
    """
    steps, phase, mask = filtering.steps, filtering.phase, system.step_mask
    moves = system.num_times - 1
    if phase is None:
        return backward_conditionals(steps, *_moves(system.transition, 0, moves), step_mask=mask)
    first = phase.log_likelihood.shape[-1]
    early = _moves(system.to(torch.float64).transition, 0, first - 1)
    before = DiffuseLaw(
        *(part.narrow(-event, 0, first - 1) for part, event in zip(phase.filtered, (2, 3, 3, 3), strict=True))
    )
    laws, proper = diffuse_conditionals(before, *early, step_mask=None if mask is None else mask[..., 1:first])
    whole = proper.all(-1) & phase.filtered.is_proper[..., -1]
    if not bool(whole.all()):
        series = (~whole).nonzero()[0].tolist()
        raise ValueError(
            f"{method}: the observations do not determine the diffuse start of {_name(series)}, so the law of its "
            "states is improper. Give the model a proper start (dynamics.NormalInitial), make fewer coordinates "
            "diffuse, or leave out series with too few observations; kalman_filter and Marginal still work"
        )
    dtype = system.values.dtype
    laws = Conditionals(*(part.to(dtype) for part in laws))
    if first == system.num_times:
        return laws
    later = FilterSteps(
        *(part.narrow(-event, first - 1, moves - first + 2) for part, event in zip(steps, EVENTS, strict=True))
    )
    rest = backward_conditionals(
        later,
        *_moves(system.transition, first - 1, moves - first + 1),
        step_mask=None if mask is None else mask[..., first - 1 :],
    )
    parts = (_cat_time(pair, event) for pair, event in zip(zip(laws, rest, strict=True), (3, 2, 3), strict=True))
    return Conditionals(*parts)


def _name(position: Sequence[int]) -> str:
    return f"series {position[0] if len(position) == 1 else tuple(position)}" if position else "the series"


def _cat_time(parts: Sequence[Tensor], event: int) -> Tensor:
    lead = torch.broadcast_shapes(*(part.shape[:-event] for part in parts))
    return torch.cat([part.expand(lead + part.shape[-event:]) for part in parts], -event)


def _moves(law: Affine, start: int, num: int) -> Affine:
    """``num`` steps from ``start`` on, where a time size of 1 may stand for all."""
    parts = []
    for part, event in zip(law, (3, 2, 3), strict=True):
        constant = part.shape[-event] == 1
        parts.append(part.narrow(-event, 0, min(1, num)) if constant else part.narrow(-event, start, num))
    return Affine(*parts)


def _step(law: Affine, k: int) -> list[Tensor]:
    return [part.squeeze(-event) for part, event in zip(_moves(law, k, 1), (3, 2, 3), strict=True)]


def _from(system: System, k: int, mean: Tensor, scale_tril: Tensor) -> System:
    """What is left of the series from time ``k`` on, when ``mean`` and ``scale_tril`` are its law then."""
    index = list(range(system.num_times)) if system.observed_index is None else system.observed_index
    seen = [i - k for i in index if i >= k]
    skipped, mask = len(index) - len(seen), system.mask
    if not seen:  # nothing more to see: the filter still wants one observation, all of it hidden
        seen, skipped, mask = [0], len(index) - 1, torch.zeros_like(mask)
    left = system.num_times - k
    return system._replace(
        mean=mean,
        scale_tril=scale_tril,
        diffuse=None,
        transition=_moves(system.transition, k, left - 1) if left > 1 else _moves(system.transition, 0, 1),
        emission=_moves(system.emission, skipped, len(seen)),
        values=system.values[..., skipped:, :],
        mask=mask[..., skipped:, :],
        step_mask=None if system.step_mask is None else system.step_mask[..., k:],
        observed_index=None if system.observed_index is None else seen,
        num_times=left,
    )
