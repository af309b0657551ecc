"""Maximum likelihood for hidden Markov models by expectation-maximisation."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.binding import parameter_names, random_parameters
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.discrete.hmm import smooth
from pyro_ssm.infer.discrete.m_step import Seen, free_parameters, maximise, maximise_emission
from pyro_ssm.infer.discrete.system import finite_system
from pyro_ssm.models import StateSpaceModel

__all__ = ["BaumWelchResult", "baum_welch", "check_em", "check_monotone"]


class BaumWelchResult(NamedTuple):
    """What :func:`baum_welch` returns.

    >>> from pyro_ssm.infer.discrete import BaumWelchResult
    >>> BaumWelchResult._fields
    ('model', 'log_likelihood', 'num_iterations', 'converged')
    """

    model: StateSpaceModel  # a copy of the model at the last parameters
    log_likelihood: Tensor  # (num_iterations + 1,)  before each iteration, and after the last
    num_iterations: int
    converged: bool


@torch.no_grad()
def baum_welch(
    model: StateSpaceModel,
    data: TimeSeries,
    *,
    fixed: Collection[str] = (),
    max_iterations: int = 100,
    tolerance: float = 1e-6,
) -> BaumWelchResult:
    """Maximum likelihood by expectation-maximisation, every step in closed form; all series of ``data`` are pooled.

    .. math::
        \\theta' = \\operatorname{argmax}_{\\theta'} E_{z \\sim p(z \\mid y, \\theta)}[\\log p(z, y \\mid \\theta')]

    Closed forms exist for ``CategoricalInitial`` and ``MarkovChain`` without inputs, and for the table emissions
    (``NormalTable``, ``StudentTTable``, ``PoissonTable``, ``CategoricalTable``); any other part must be fixed. Missing
    entries, padding and unequal lengths are taken for what they are. The likelihood never falls; this is checked.
    Start from parameters that differ between the states: equal states stay equal.

    Args:
        model: an unbound :class:`~pyro_ssm.models.StateSpaceModel` without priors; it is not changed.
        data: with values.
        fixed: dotted names of parameters that stay, such as ``"emission.scale"``; so does what has ``requires_grad``
            off.
        max_iterations: of both steps.
        tolerance: stop when an iteration gains less than this times ``1 + |log-likelihood|``.

    Raises:
        TypeError: the model is not a hidden Markov model, has priors, or a free parameter has no closed form.
        ValueError: ``fixed`` names no parameter; the data has no values.
        RuntimeError: the likelihood fell.

    Sources: Baum, Petrie, Soules and Weiss (1970); Rabiner (1989), section III.C; Peel and McLachlan (2000) for the
    Student law.

    >>> import torch, pyro_ssm as ssm
    >>> emission = ssm.emissions.NormalTable(2, 1, loc=torch.tensor([-1.0, 1.0]))
    >>> model = ssm.StateSpaceModel(ssm.dynamics.CategoricalInitial(2), ssm.dynamics.MarkovChain(2), emission)
    >>> data = ssm.TimeSeries(torch.arange(6.0), torch.tensor([-3.1, -2.9, -3.0, 2.9, 3.0, 3.1]).unsqueeze(-1))
    >>> result = ssm.infer.baum_welch(model, data)
    >>> result.converged, result.model.emission.loc.detach().squeeze(-1)
    (True, tensor([-3.,  3.]))
    """
    check_em(model, fixed, "baum_welch")
    model = copy.deepcopy(model)
    free = {part: free_parameters(getattr(model, part), fixed, part) for part in ("initial", "transition", "emission")}
    trace: list[float] = []
    converged = False
    for iteration in range(max_iterations + 1):
        _, system = finite_system(model, data, "baum_welch")
        smoothed = smooth(system)
        trace.append(float(smoothed.log_likelihood.double().sum()))
        if iteration:
            check_monotone(trace, smoothed.probs.dtype, "log-likelihood")
            converged = trace[-1] - trace[-2] < tolerance * (1 + abs(trace[-1]))
        if converged or iteration == max_iterations:
            break
        K = smoothed.probs.shape[-1]
        maximise(model.initial, smoothed.probs[..., 0, :].reshape(-1, K).sum(0), free["initial"])
        pairwise = smoothed.pairwise
        if data.is_ragged:  # into padding there is no move
            pairwise = pairwise * data.step_mask[..., 1:, None, None].to(pairwise.dtype)
        maximise(model.transition, pairwise.reshape(-1, K, K).sum(0), free["transition"])
        at = smoothed.probs if data.observed_index is None else smoothed.probs[..., data.observed_index, :]
        maximise_emission(model.emission, Seen(data.values.to(at.dtype), data.mask, at), free["emission"])
    return BaumWelchResult(model, torch.tensor(trace, dtype=torch.float64), len(trace) - 1, converged)


def check_em(model: StateSpaceModel, fixed: Collection[str], method: str) -> None:
    """Raise unless the model is unbound and without priors, and ``fixed`` names parameters of it."""
    if not isinstance(model, StateSpaceModel):
        raise TypeError(f"`model` must be a StateSpaceModel, got {type(model).__name__}")
    if random := random_parameters(model):
        raise TypeError(
            f"{method} maximises the likelihood, but {random} have priors. Replace them by values, or use "
            "infer.Marginal with NUTS or SVI"
        )
    known = parameter_names(model)
    if unknown := sorted(set(fixed) - set(known)):
        raise ValueError(f"`fixed` names {unknown}, which the model does not have; it has {known}")


def check_monotone(trace: list[float], dtype: torch.dtype, what: str) -> None:
    """Raise if the last step fell by more than rounding explains."""
    slack = 1e3 * torch.finfo(dtype).eps * (1 + abs(trace[-1]))
    if not trace[-1] >= trace[-2] - slack:
        raise RuntimeError(
            f"the {what} fell from {trace[-2]} to {trace[-1]} in iteration {len(trace) - 1}, which it cannot do in "
            "exact arithmetic. Use float64 (model.double(), data.to(dtype=torch.float64)) or a larger floor"
        )
