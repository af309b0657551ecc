"""Expectation maximisation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_ssm.binding import is_bound
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.expectation_maximisation.parameters import PARTS, Fixed, Regression, held_entries, regression_of
from pyro_ssm.infer.expectation_maximisation.squarem import Accelerator
from pyro_ssm.infer.expectation_maximisation.statistics import (
    Posterior,
    emission_moments,
    initial_moments,
    transition_moments,
)
from pyro_ssm.infer.gaussian import kalman_smoother
from pyro_ssm.models import StateSpaceModel

__all__ = ["EMResult", "em"]

ROUNDING = 1e-9  # of a log-likelihood in float64, relative to its size and to the number of observations

#: ``(bound model, data) -> result`` with ``mean``, ``scale_tril``, ``lag_one_covariance`` and ``log_likelihood``
Smoother = Callable[[Any, TimeSeries], Any]


class EMResult(NamedTuple):
    """What :func:`em` returns.

    >>> from pyro_ssm.infer import EMResult
    >>> EMResult._fields
    ('model', 'log_likelihood', 'num_iterations', 'converged')
    """

    model: Any  # the fitted model, bound; the model that was given holds the same parameters
    log_likelihood: Tensor  # (num_iterations + 1,) float64, of all the data, before the first and after each iteration
    num_iterations: int  # how many M-steps were taken
    converged: bool  # whether the last iteration raised the log-likelihood by less than the tolerance


def em(
    model: StateSpaceModel,
    data: TimeSeries,
    *,
    num_iterations: int = 200,
    tolerance: float = 1e-4,
    fixed: Fixed = (),
    smoother: Smoother = kalman_smoother,
    accelerate: bool = False,
    progress: bool = True,
) -> EMResult:
    """Maximum likelihood by expectation maximisation, for models whose M-step is a regression.

    .. math:: \\theta_{i+1} = \\arg\\max_\\theta\\; E_{z \\sim p_{\\theta_i}(z \\mid y)} [\\log p_\\theta(y, z)]

    Given the states, each law ``dynamics.NormalInitial``, ``dynamics.LinearNormal``, ``emissions.LinearNormal``
    (and ``dynamics.RBFTransition``, ``emissions.RBFNormal``) is a linear regression on states, inputs and a constant,
    so the M-step solves normal equations of expected moments; no step size is needed. All series are pooled; ragged,
    missing (also single entries under correlated noise), refined and own time grids need nothing special, since these
    laws count steps.

    What ``fixed`` names stays, and so does every parameter with ``requires_grad=False``. A component that stays
    altogether may be of any class that the smoother takes. For *one* series fix ``initial.scale``: its best value is
    its floor. With some entries of a matrix fixed in unlike rows and a full noise, the M-step maximises over
    coefficients given the noise, then over the noise (ECM, Meng and Rubin 1993), which is monotone as well.

    With the exact smoother the log-likelihood cannot fall: a fall beyond rounding raises. With an approximate one
    (``smoother=extended_kalman_smoother``, needed for radial components) the E-step is not exact, ``log_likelihood`` is
    the smoother's approximation, and it may fall.

    EM is slow near the maximum when much is missing or noise is small: ``accelerate`` extrapolates every two steps
    (SQUAREM) and keeps the better of extrapolated and plain, which is still monotone; or go on with
    ``infer.fit(infer.Marginal(model), None, data)``.

    Args:
        model: unbound; its parameters are updated in place. It computes in float64, whatever its dtype.
        data: with values.
        num_iterations: at most.
        tolerance: stop when an iteration changes the log-likelihood of all data by less, in nats; 0 never stops.
        fixed: names of parameters (``"emission.matrix"``) or components (``"initial"``) that stay; or a mapping from
            names to bool masks, True where the entry stays.
        smoother: of the E-step.
        accelerate: extrapolate, with the exact smoother only.
        progress: show a bar.

    Returns:
        :class:`EMResult`. Nothing is differentiable, nothing random.

    Raises:
        TypeError: a component with free parameters has no closed-form M-step; the model is bound, or not linear.
        ValueError: a parameter has a prior, nothing is free, an argument is out of its range.
        KeyError: ``fixed`` names no parameter.
        RuntimeError: the log-likelihood fell, or is not finite; the parameters are those before the step.

    Sources: Shumway and Stoffer (1982), "An approach to time series smoothing and forecasting using the EM algorithm";
    Ghahramani and Hinton (1996), "Parameter estimation for linear dynamical systems"; Holmes (2013), "Derivation of an
    EM algorithm for constrained and unconstrained multivariate autoregressive state-space models"; Ghahramani and
    Roweis (1999), "Learning nonlinear dynamical systems using an EM algorithm"; Varadhan and Roland (2008), "Simple
    and globally convergent methods for accelerating the convergence of any EM algorithm".

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.LinearNormal(1),
    ...     ssm.emissions.LinearNormal(1, 1, matrix=torch.ones(1, 1)))
    >>> data = ssm.TimeSeries(torch.arange(20.0), torch.randn(5, 20, 1))
    >>> fitted = ssm.infer.em(model, data, num_iterations=5, fixed=["emission.matrix"], progress=False)
    >>> fitted.log_likelihood.shape, bool((fitted.log_likelihood.diff() > -1e-6).all())
    (torch.Size([6]), True)
    """
    if not isinstance(model, StateSpaceModel) or is_bound(model):
        raise TypeError(
            f"`model` must be an unbound StateSpaceModel, got {type(model).__name__}: em updates its parameters"
        )
    if num_iterations < 1:
        raise ValueError(f"`num_iterations` must be at least 1, got {num_iterations}")
    if not tolerance >= 0:
        raise ValueError(f"`tolerance` must not be negative, got {tolerance}")
    held = held_entries(model, fixed)
    for part in PARTS:
        regression_of(model, part, held)  # what cannot be maximised is refused before anything is computed
    exact = copy.deepcopy(model).double()
    regressions = {part: found for part in PARTS if (found := regression_of(exact, part, held)) is not None}
    if not regressions:
        raise ValueError("nothing to fit: every parameter is fixed, or has requires_grad=False")
    run = _Run(exact, data.to(dtype=torch.float64), regressions, smoother)
    try:
        with torch.no_grad():
            trace, converged = run.climb(num_iterations, tolerance, accelerate, progress)
    finally:
        _copy_parameters(exact, model)
    return EMResult(model.bind(), torch.tensor(trace, dtype=torch.float64), len(trace) - 1, converged)


class _Run:
    """EM on a float64 copy of the model."""

    def __init__(
        self, model: StateSpaceModel, data: TimeSeries, regressions: dict[str, Regression], smoother: Smoother
    ) -> None:
        self.model, self.data, self.regressions, self.smoother = model, data, regressions, smoother
        self.is_exact = True
        self.unconstrained = list(model.parameters())

    def expect(self) -> tuple[Posterior, float]:
        """The E-step: smoothed states and the log-likelihood, at the present parameters."""
        smoothed = self.smoother(self.model.bind(), self.data)
        self.is_exact = bool(smoothed.exact)
        covariance = smoothed.scale_tril @ smoothed.scale_tril.mT
        total = float(smoothed.log_likelihood.sum())
        return Posterior(smoothed.mean, covariance, smoothed.lag_one_covariance), total

    def maximise(self, posterior: Posterior) -> None:
        """The M-step: each component's regression."""
        for part, regression in self.regressions.items():
            of = regression.component, regression.W
            if part == "initial":
                moments = initial_moments(*of, posterior, self.data)
            elif part == "transition":
                if self.data.num_times == 1:
                    continue  # nothing moved
                moments = transition_moments(*of, posterior, self.data)
            else:
                moments = emission_moments(*of, regression.S, regression.diagonal, posterior, self.data)
            regression.maximise(moments)

    def climb(
        self, num_iterations: int, tolerance: float, accelerate: bool, progress: bool
    ) -> tuple[list[float], bool]:
        """E- and M-steps until the log-likelihood stands still."""
        posterior, total = self.expect()
        if accelerate and not self.is_exact:
            raise ValueError("`accelerate` compares log-likelihoods, so it needs an exact smoother; leave it out")
        if not math.isfinite(total):
            raise RuntimeError(f"the log-likelihood at the start is {total}. Start from other parameters")
        trace, accelerator = [total], Accelerator() if accelerate else None
        slack = ROUNDING * int(self.data.mask.sum()) if self.data.mask is not None else 0.0
        with tqdm(total=num_iterations, desc="em", disable=not progress, dynamic_ncols=True) as bar:
            for i in range(num_iterations):
                before = self.snapshot()
                self.maximise(posterior)
                if accelerator is None or not accelerator.extrapolate(before, self.unconstrained):
                    posterior, total = self.expect()
                else:
                    try:
                        posterior, total = self.expect()
                    except torch.linalg.LinAlgError:  # a jump too far
                        total = math.nan
                    if not accelerator.judge(total >= trace[-1], self.unconstrained):  # nor where it is NaN
                        posterior, total = self.expect()
                fell = trace[-1] - total
                if not math.isfinite(total) or (self.is_exact and fell > slack + ROUNDING * abs(total)):
                    self.put(before)
                    raise RuntimeError(
                        f"EM iteration {i + 1} took the log-likelihood from {trace[-1]!r} to {total!r}, which an exact "
                        "E-step cannot do but by rounding. The parameters are those before it. Look for a noise near "
                        "its floor, regressors that are nearly collinear, or values of very unlike size; "
                        "infer.fit(infer.Marginal(model), None, data) does without normal equations"
                    )
                trace.append(total)
                bar.set_postfix({"log-likelihood": f"{total:.4f}"}, refresh=False)
                bar.update()
                if abs(fell) < tolerance:
                    return trace, True
        return trace, False

    def snapshot(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.unconstrained]

    def put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.unconstrained, values, strict=True):
            parameter.copy_(value)


@torch.no_grad()
def _copy_parameters(source: StateSpaceModel, target: StateSpaceModel) -> None:
    """Unconstrained values, in the dtype of the target."""
    for new, old in zip(source.parameters(), target.parameters(), strict=True):
        old.copy_(new)
