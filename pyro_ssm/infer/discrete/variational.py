"""Variational inference and EM for switching linear models, recurrent ones included."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.discrete.baum_welch import check_em, check_monotone
from pyro_ssm.infer.discrete.mean_field import MeanField, RegimePosterior
from pyro_ssm.infer.discrete.switching import kim_smoother
from pyro_ssm.infer.discrete.switching_m_step import check_closed_forms, check_recurrent, switching_m_step
from pyro_ssm.infer.discrete.switching_system import switching_system
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.ops.block_tridiagonal import PathMoments

__all__ = ["SwitchingEM", "SwitchingPosterior", "switching_em", "switching_variational"]


class SwitchingPosterior(NamedTuple):
    """What :func:`switching_variational` returns: q(x) q(regimes).

    >>> from pyro_ssm.infer.discrete import SwitchingPosterior
    >>> SwitchingPosterior._fields[:2]
    ('elbo', 'probs')
    """

    elbo: Tensor  # (*batch,)  a lower bound on log p(y)
    probs: Tensor  # (*batch, time, K)  q(s_k = j)
    pairwise: Tensor  # (*batch, time - 1, K, K)  q(s_k = i, s_{k+1} = j); 0 into padding
    mean: Tensor  # (*batch, time, n)
    covariance: Tensor  # (*batch, time, n, n)
    lag_one_covariance: Tensor  # (*batch, time - 1, n, n)  Cov(x_k, x_{k+1})
    trace: Tensor  # (sweeps,)  the total bound after each sweep
    converged: bool


class SwitchingEM(NamedTuple):
    """What :func:`switching_em` returns.

    >>> from pyro_ssm.infer.discrete import SwitchingEM
    >>> SwitchingEM._fields
    ('model', 'elbo', 'num_iterations', 'converged', 'posterior')
    """

    model: StateSpaceModel  # a copy of the model at the last parameters
    elbo: Tensor  # (num_iterations + 1,)  the total bound before each iteration, and after the last
    num_iterations: int
    converged: bool
    posterior: SwitchingPosterior  # of the last parameters


@torch.no_grad()
def switching_variational(
    model: Any, data: TimeSeries, *, max_sweeps: int = 100, tolerance: float = 1e-8
) -> SwitchingPosterior:
    """The structured mean field of a switching linear model: a Gaussian path and a chain of regimes, in turn.

    .. math::
        \\log p(y) \\ge E_{q(x) q(s)}[\\log p(x, s, y)] + H[q(x)] + H[q(s)], \\qquad
        q(x) \\text{ Gaussian}, \\quad q(s) \\text{ Markov}

    Each half is exact given the other (a block-tridiagonal solve; forward-backward), so the bound never falls; this is
    checked. It starts from the Kim smoother. In a recurrent model the logsumexp of the regime's logits is bounded by
    Bohning's quadratic, so that the bound stays a bound (looser); stick-breaking and Polya-gamma are not used.

    Args:
        model: as for :func:`~pyro_ssm.infer.kim_filter`; its noises must not be singular. Recurrent: the chain is
            ``MarkovChain(K, input_dim=n)`` without zeros.
        data: with values; missing entries and padding are taken for what they are.
        max_sweeps: of both halves.
        tolerance: stop when a sweep gains less than this times ``1 + |bound|``.

    Returns:
        Not differentiable.

    Raises:
        TypeError: the model is not of the switching kind.
        RuntimeError: the bound fell.

    Sources: Ghahramani and Hinton (2000), "Variational learning for switching state-space models"; Bohning (1992),
    "Multinomial logistic regression algorithm".

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.SwitchingInitial(ssm.dynamics.CategoricalInitial(2), [ssm.dynamics.NormalInitial(1)] * 2),
    ...     ssm.dynamics.SwitchingLinear(ssm.dynamics.MarkovChain(2), [ssm.dynamics.LinearNormal(1) for _ in "ab"]),
    ...     ssm.emissions.SwitchingLinear([ssm.emissions.LinearNormal(1, 1)] * 2))
    >>> posterior = ssm.infer.switching_variational(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> posterior.elbo.shape, posterior.probs.shape
    (torch.Size([3]), torch.Size([3, 4, 2]))
    """
    field, regimes = _start(model, data, "switching_variational", None)
    trace: list[float] = []
    converged = False
    for _ in range(max(1, max_sweeps)):
        path = field.path(regimes)
        regimes, elbo = field.regimes(path)
        trace.append(float(elbo.double().sum()))
        if len(trace) > 1:
            check_monotone(trace, elbo.dtype, "lower bound")
            converged = trace[-1] - trace[-2] < tolerance * (1 + abs(trace[-1]))
        if converged:
            break
    return _posterior(regimes, path, elbo, trace, converged)


@torch.no_grad()
def switching_em(
    model: StateSpaceModel,
    data: TimeSeries,
    *,
    fixed: Collection[str] = (),
    max_iterations: int = 100,
    tolerance: float = 1e-6,
    sweeps: int = 2,
) -> SwitchingEM:
    """Variational EM for a switching linear model: mean-field sweeps, then every parameter in closed form.

    .. math:: \\text{ELBO}(q, \\theta) \\le \\log p(y \\mid \\theta), \\qquad \\text{ascended in } q(x), q(s), \\theta

    All series of ``data`` are pooled. The regimes' laws are weighted linear regressions on expected moments; a
    recurrent chain's logits the maximum of the quadratic bound. The bound never falls; this is checked. Start from
    regimes that differ: equal regimes stay equal.

    Args:
        model: an unbound :class:`~pyro_ssm.models.StateSpaceModel` without priors whose regimes are ``NormalInitial``,
            ``dynamics.LinearNormal`` and ``emissions.LinearNormal``, its chain ``CategoricalInitial`` and
            ``MarkovChain`` (or with other parts, fixed); it is not changed. A full covariance of observations wants
            rows that are seen whole or not at all.
        data: with values.
        fixed: dotted names of parameters that stay, such as ``"emission.regimes.0.matrix"`` (an object that several
            regimes share has the name of the last); so does what has ``requires_grad`` off.
        max_iterations: of E and M steps.
        tolerance: stop when an iteration gains less than this times ``1 + |bound|``.
        sweeps: mean-field sweeps in each E step.

    Raises:
        TypeError: the model is not of the switching kind, has priors, or a free parameter has no closed form.
        ValueError: ``fixed`` names no parameter; the data has no values.
        RuntimeError: the bound fell.

    Sources: Ghahramani and Hinton (2000), section 4; Linderman et al. (2017) for the recurrent model (there with
    Polya-gamma augmentation).

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.SwitchingInitial(ssm.dynamics.CategoricalInitial(2), [ssm.dynamics.NormalInitial(1)] * 2),
    ...     ssm.dynamics.SwitchingLinear(ssm.dynamics.MarkovChain(2), [ssm.dynamics.LinearNormal(1) for _ in "ab"]),
    ...     ssm.emissions.SwitchingLinear([ssm.emissions.LinearNormal(1, 1)] * 2)).double()
    >>> data = ssm.TimeSeries(torch.arange(20.0), torch.randn(20, 1).double())
    >>> result = ssm.infer.switching_em(model, data, max_iterations=3, tolerance=0.0)
    >>> result.num_iterations, bool((result.elbo.diff() > -1e-9).all())
    (3, True)
    """
    check_em(model, fixed, "switching_em")
    field, regimes = _start(model, data, "switching_em", fixed)
    model = copy.deepcopy(model)
    trace: list[float] = []
    converged = False
    for iteration in range(max_iterations + 1):
        if iteration:
            psi = field.psi
            field = MeanField(switching_system(model, data, "switching_em"))
            field.psi = psi
        for _ in range(max(1, sweeps)):
            path = field.path(regimes)
            regimes, elbo = field.regimes(path)
        trace.append(float(elbo.double().sum()))
        if iteration:
            check_monotone(trace, elbo.dtype, "lower bound")
            converged = trace[-1] - trace[-2] < tolerance * (1 + abs(trace[-1]))
        if converged or iteration == max_iterations:
            break
        switching_m_step(model, field, regimes, path, fixed)
    steps = len(trace) - 1
    posterior = _posterior(regimes, path, elbo, trace[-1:], converged)
    return SwitchingEM(model, torch.tensor(trace, dtype=torch.float64), steps, converged, posterior)


def _start(
    model: Any, data: TimeSeries, method: str, fixed: Collection[str] | None
) -> tuple[MeanField, RegimePosterior]:
    system = switching_system(model, data, method)
    check_recurrent(model)
    if fixed is not None:
        check_closed_forms(model, data, fixed)
    smoothed = kim_smoother(model, data)
    field = MeanField(system)
    return field, field.start(smoothed.probs, smoothed.pairwise, smoothed.mean)


def _posterior(
    regimes: RegimePosterior, path: PathMoments, elbo: Tensor, trace: list[float], converged: bool
) -> SwitchingPosterior:
    moments = path.mean, path.covariance, path.lag_one
    return SwitchingPosterior(elbo, *regimes, *moments, torch.tensor(trace, dtype=torch.float64), converged)
