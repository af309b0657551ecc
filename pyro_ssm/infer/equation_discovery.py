"""Equations from a noisy record: the posterior of the states and the terms of the drift, in turns."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from pyro_ssm.binding import random_parameters
from pyro_ssm.blocks._checks import check_choice, check_positive, check_size
from pyro_ssm.data import TimeSeries
from pyro_ssm.dynamics import NeuralSDE, TermLibrary
from pyro_ssm.guides import AbstractBridge
from pyro_ssm.infer.annealing import warmup_cosine
from pyro_ssm.infer.elbo_solver_free import SolverFree
from pyro_ssm.infer.fit import FitResult, fit
from pyro_ssm.infer.local_parameters import local_parameters
from pyro_ssm.infer.term_coefficients import PRIORS, TermRegression, term_regression
from pyro_ssm.models import StateSpaceModel, site_name

__all__ = ["DiscoveredEquations", "discover_equations"]

COEFFICIENTS = "transition.drift.coefficients"


class DiscoveredEquations(NamedTuple):
    """What :func:`discover_equations` returns.

    ``predict.forecast``, ``predict.impute`` and their kin take it as a posterior: they draw the coefficients from
    their joint normal law, and the path from the guide.

    Attributes:
        library: the drift; its coefficients are the posterior means (where they have no prior of their own).
        terms: means and covariances of the scaled coefficients.
        fitted: the fit of the states and of the diffusion.

    >>> from pyro_ssm.infer import DiscoveredEquations
    >>> DiscoveredEquations._fields
    ('library', 'terms', 'fitted')
    """

    library: TermLibrary
    terms: TermRegression
    fitted: FitResult

    @property
    def coefficients(self) -> Tensor:
        """Posterior means ``(state, terms)``, in units of state and time."""
        return self.library.in_units(self.terms.coefficients)

    @property
    def scale(self) -> Tensor:
        """Posterior standard deviations ``(state, terms)``, in units of state and time.

        They are conditional on the posterior of the states and on the diffusion as learnt, and so rather too small.
        """
        return self.library.in_units(self.terms.scale)

    def kept(self, deviations: float = 3.0) -> Tensor:
        """Which coefficients are further from 0 than this many standard deviations, ``(state, terms)`` boolean."""
        return self.terms.coefficients.abs() > deviations * self.terms.scale

    def equations(self, deviations: float = 3.0, digits: int = 3) -> list[str]:
        """The kept terms in words, one line for each coordinate, as ``(mean ± standard deviation) term``."""
        return self.library.equations(
            torch.where(self.kept(deviations), self.terms.coefficients, 0.0), digits=digits, scale=self.terms.scale
        )

    def draws(self, num_samples: int) -> dict[str, Tensor]:
        """Draws of the scaled coefficients ``(num_samples, state, terms)``, by their name in the model."""
        check_size("num_samples", num_samples)
        return {COEFFICIENTS: self.terms.sample(num_samples)}


def discover_equations(
    model: StateSpaceModel,
    guide: AbstractBridge,
    data: TimeSeries,
    *,
    num_steps: int = 1500,
    lr: float = 2e-2,
    every: int = 50,
    prior: str = "relevance",
    scale: float = 1.0,
    loss: SolverFree | None = None,
    diffusion_rate: float = 5.0,
    callback: Callable[[int, float], bool | None] | None = None,
    **options: Any,
) -> DiscoveredEquations:
    """Find which terms of a library make up the drift of an equation, from noisy observations of its states.

    .. math:: dz = f(z)\\, dt + g\\, dW, \\qquad f_i(z) = \\frac{c_i}{\\tau} \\sum_p C_{ip}\\, \\theta_p(z), \\qquad
        \\max_{q, g, C}\\; E_q \\log p(y \\mid z) - KL(q \\,\\|\\, p_{C, g}) + \\log p(C)

    in turns: :func:`~pyro_ssm.infer.fit` moves the posterior q of the states and the diffusion by gradients of
    :class:`~pyro_ssm.infer.SolverFree`; every so many steps :func:`~pyro_ssm.infer.term_regression` sets the
    coefficients in closed form, under a sparse prior. No noisy record is differentiated and no equation is solved.
    Gradients alone do badly here, because terms are strongly correlated; and a diffusion that is left over from the
    start hides small terms, which is why it learns faster than the rest.

    Coefficients that are a parameter of the library are set to their means. Where they have a prior of their own
    (:func:`~pyro_ssm.dynamics.with_sparse_prior`) their means and scales in the guide's ``AutoNormal`` are set, and
    gradients move them in between; the scales are then those of independent coefficients
    (``TermRegression.mean_field_scale``).

    A guide with far more knots than the states have bends needs many more steps, since it starts on the noise:
    ``SVISE(model, data, knots=60)``. Choose the library's ``scale`` about the size of the states and its
    ``time_scale`` about that of their motion.

    Args:
        model: its drift is a :class:`~pyro_ssm.dynamics.TermLibrary`, its noise is diagonal.
        guide: of the states; SVISE, ARCTA or SDEMatching.
        data: the series.
        num_steps: of the gradient.
        lr: learning rate of the guide.
        every: steps between regressions; the first is after twice as many.
        prior: of the regression: ``"relevance"``, ``"laplace"`` or ``"normal"``.
        scale: of that prior, see :func:`~pyro_ssm.infer.term_regression`.
        loss: default ``SolverFree(64)``.
        diffusion_rate: the learning rate of the diffusion, in units of ``lr``.
        callback: as that of ``fit``; called after a regression.
        options: further arguments of :func:`~pyro_ssm.infer.fit`, ``progress=False`` for instance. The default
            ``schedule`` is :func:`~pyro_ssm.infer.warmup_cosine` down to 2 %.

    Returns:
        :class:`DiscoveredEquations`; model and guide are trained in place. Not differentiable.

    Raises:
        TypeError: the drift is no library of terms; or its coefficients have a prior and the guide over them is no
            ``AutoNormal``.
        ValueError: an argument is out of its range, or the noise is not diagonal.

    Randomness: torch's global generator.

    Source: Course and Nair (2023), "State estimation of a physical system with unknown governing equations", Nature
    622; the regression is that of Tipping (2001).

    >>> import torch, pyro_ssm as ssm
    >>> _ = torch.manual_seed(0)
    >>> library = ssm.dynamics.TermLibrary(state_dim=1, degree=3)
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.NeuralSDE(library, ssm.dynamics.ConstantDiffusion(0.1, 1)),
    ...     ssm.emissions.LinearNormal(1, 1, matrix=torch.eye(1), scale=0.01).requires_grad_(False))
    >>> times = torch.linspace(0, 4, 41)
    >>> data = ssm.TimeSeries(times, (-0.5 * times).exp().unsqueeze(-1))
    >>> found = ssm.infer.discover_equations(model, ssm.guides.SVISE(model, data), data, num_steps=300, progress=False)
    >>> [name for name, kept in zip(library.names, found.kept()[0]) if kept]
    ['z1']
    """
    library = _library(model)
    check_size("num_steps", num_steps)
    check_size("every", every)
    check_positive("diffusion_rate", diffusion_rate)
    check_choice("prior", prior, PRIORS)
    check_positive("scale", scale)
    is_random = COEFFICIENTS in random_parameters(model)
    if is_random and not isinstance(guide.parameter_guide, AutoNormal):
        raise TypeError(
            "the coefficients have a prior, and their posterior is set in an AutoNormal; the guide over parameters is "
            f"a {type(guide.parameter_guide).__name__}. Leave it out, or leave out the prior"
        )

    def regress(step: int, bound: float) -> bool | None:
        if step % every == 0 and step >= 2 * every:
            found = term_regression(model, guide, data, prior=prior, scale=scale, num_times=1000, num_particles=4)
            _set_coefficients(model, guide, found, is_random)
        return None if callback is None else callback(step, bound)

    schedule = warmup_cosine(num_steps, min(50, num_steps // 10), final=0.02)
    options = {"schedule": schedule, "optimizer": _adam(model.transition.diffusion, diffusion_rate), **options}
    own = () if is_random else (library.coefficients,)
    learnt = [parameter.requires_grad for parameter in own]
    try:
        for parameter in own:
            parameter.requires_grad_(False)
        loss = SolverFree(64) if loss is None else loss
        fitted = fit(model, guide, data, loss=loss, num_steps=num_steps, lr=lr, callback=regress, **options)
    finally:
        for parameter, before in zip(own, learnt, strict=True):
            parameter.requires_grad_(before)
    with local_parameters():
        found = term_regression(model, guide, data, prior=prior, scale=scale, num_times=4000, num_particles=10)
        _set_coefficients(model, guide, found, is_random)
    return DiscoveredEquations(library, found, fitted)


def _library(model: StateSpaceModel) -> TermLibrary:
    drift = model.transition.drift if isinstance(model.transition, NeuralSDE) else model.transition
    if not isinstance(drift, TermLibrary):
        raise TypeError(f"the drift must be a dynamics.TermLibrary, got {type(drift).__name__}")
    return drift


@torch.no_grad()
def _set_coefficients(model: StateSpaceModel, guide: AbstractBridge, found: TermRegression, is_random: bool) -> None:
    if not is_random:
        model.transition.drift.coefficients.copy_(found.coefficients)
        return
    site, posterior = site_name(model, COEFFICIENTS), cast(AutoNormal, guide.parameter_guide)
    attrgetter(site)(posterior.locs).copy_(found.coefficients)
    parent, _, name = site.rpartition(".")
    setattr(attrgetter(parent)(posterior.scales), name, found.mean_field_scale)


def _adam(diffusion: Any, factor: float) -> Callable[..., Optimizer]:
    """Adam, with a rate of its own for the diffusion."""
    own = {id(p) for p in diffusion.parameters()} if isinstance(diffusion, nn.Module) else set()

    def build(parameters: list[Tensor], lr: float) -> Optimizer:
        fast = [p for p in parameters if id(p) in own]
        groups: list[dict[str, Any]] = [{"params": [p for p in parameters if id(p) not in own]}]
        return Adam(groups + ([{"params": fast, "lr": factor * lr}] if fast else []), lr=lr)

    return build
