"""The bound of a latent stochastic differential equation on marginals at random times: no path, no solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_ssm.binding import is_bound
from pyro_ssm.blocks._checks import check_choice, check_size
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions import gaussian_moments, masked
from pyro_ssm.guides import AbstractBridge, BridgeContext
from pyro_ssm.guides.bridge import time_range
from pyro_ssm.guides.marginals import AbstractMarginal, DiagonalMarginal, FullMarginal
from pyro_ssm.infer.elbo_differentiable import DifferentiableELBO
from pyro_ssm.infer.elbo_weights import refuse_score_function
from pyro_ssm.infer.handler_stack import annealing_factor
from pyro_ssm.models import StateSpaceModel, series_plate, site_name
from pyro_ssm.ops import gauss_hermite_rule

__all__ = ["DrawnTimes", "SolverFree", "SolverFreeTerms"]

TIMES = ("stratified", "uniform", "quadrature")


class SolverFreeTerms(NamedTuple):
    """The three terms of the bound of each series, ``(*batch,)``: the bound is likelihood - start - path.

    >>> from pyro_ssm.infer.elbo_solver_free import SolverFreeTerms
    >>> SolverFreeTerms._fields
    ('likelihood', 'start', 'path')
    """

    likelihood: Tensor
    start: Tensor
    path: Tensor


class DrawnTimes(NamedTuple):
    """Where :class:`SolverFree` looks at a posterior.

    >>> from pyro_ssm.infer.elbo_solver_free import DrawnTimes
    >>> DrawnTimes._fields
    ('times', 'weight', 'inputs', 'marginal', 'noise', 'weights')
    """

    times: Tensor  # (*batch, n), float64
    weight: Tensor  # (*batch, n or 1), of each time in the integral
    inputs: Tensor | None  # (*batch, n, input)
    marginal: AbstractMarginal
    noise: Tensor  # (S, *lead, n, state)
    weights: Tensor  # (S,), of each draw in the mean


class SolverFree(DifferentiableELBO):
    """The continuous-time evidence lower bound, for guides that know the marginals of their path,

    .. math::
        L = \\sum_j E_{q_{t_j}} \\log p(y_j \\mid z) - KL(q(z_1) \\,\\|\\, p(z_1))
        - \\tfrac12 \\int_{t_1}^{t_T} E_{q_t} \\big| g^{-1} (f_q - f)(t, z) \\big|^2\\, dt
        + \\log p(\\theta) - \\log q(\\theta) \\;\\le\\; \\log p(y),

    estimated without bias (each term, constants included, in nats) from states :math:`z = F_t(\\varepsilon)` at
    ``num_times`` random times in each series: that many evaluations of the model's drift, whatever the grid. It is the
    bound of the *equation*; ``Trace_ELBO`` and its kin give, for the same pair, that of the Euler chain on
    ``data.times``, which comes near on ``data.refine(n)``.

    It takes the guides :class:`~pyro_ssm.guides.SVISE`, :class:`~pyro_ssm.guides.ARCTA` and
    :class:`~pyro_ssm.guides.SDEMatching`. Random parameters :math:`\\theta` (``PyroSample``) are drawn once. A
    mini-batch scales by its plate, ``kl_annealing`` weighs start and path, missing entries and padding add exactly 0.
    Inputs are held between the times of the data.

    Args:
        num_times: times in each series; with ``times="quadrature"``, nodes in each gap between knots.
        num_particles: draws of the noise at each time.
        times: ``"stratified"`` (one in each of ``num_times`` equal parts of the series' range), ``"uniform"``
            (independent), or ``"quadrature"`` (Gauss-Legendre in each gap: no randomness, biased by its error).
        order: takes a Gauss-Hermite rule of that many points in each dimension of the noise in place of draws: exact
            for polynomials up to degree 2 order - 1, ``order ** state`` points. None draws.
        num_observations: observation times of which the likelihood is taken, drawn for each series without
            replacement, and scaled up; None takes all.

    Raises:
        ValueError: an argument is out of its range; or, in a run, the data have no values.
        TypeError: in a run, the guide has no marginals, or the model is no ``StateSpaceModel`` itself.
        FloatingPointError: the drift or the guide's curves are not finite; says where.

    Gradients: reparametrised, exact for the estimate.

    Source: Course and Nair (2023), "Amortized reparametrization", equation 9; Bartosh, Vetrov and Naesseth (2025),
    "SDE Matching", section 4.

    >>> import torch, pyro_ssm as ssm
    >>> sde = ssm.dynamics.NeuralSDE(ssm.dynamics.MLPDrift(2), ssm.dynamics.ConstantDiffusion(0.5, 2))
    >>> model = ssm.StateSpaceModel(ssm.dynamics.NormalInitial(2), sde, ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.ones(3, 4, 1))
    >>> terms = ssm.infer.SolverFree(num_times=8).terms(model, ssm.guides.ARCTA(model), data)
    >>> terms.path.shape, bool((terms.path > 0).all())
    (torch.Size([3]), True)
    """

    def __init__(
        self,
        num_times: int = 16,
        num_particles: int = 1,
        *,
        times: str = "stratified",
        order: int | None = None,
        num_observations: int | None = None,
    ) -> None:
        super().__init__(num_particles=check_size("num_particles", num_particles))
        self.num_times = check_size("num_times", num_times)
        self.times = check_choice("times", times, TIMES)
        self.order = None if order is None else check_size("order", order)
        self.num_observations = num_observations
        if num_observations is not None:
            check_size("num_observations", num_observations)

    def differentiable_loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> Tensor:
        """The negative bound, summed over series; differentiable."""
        data = _checked(model, guide, args)
        drawn = poutine.trace(_parameters).get_trace(guide, data)
        refuse_score_function(drawn)
        run = poutine.trace(poutine.replay(self._program, trace=drawn)).get_trace(model, guide, data)
        return torch.as_tensor(drawn.log_prob_sum() - run.log_prob_sum())

    def terms(self, model: StateSpaceModel, guide: AbstractBridge, data: TimeSeries) -> SolverFreeTerms:
        """The terms of each series, at one draw of the random parameters; differentiable."""
        _checked(model, guide, (data,))
        bound = guide.bind_model(_parameters(guide, data))
        return self._terms(bound, guide, data)

    def _program(self, model: StateSpaceModel, guide: AbstractBridge, data: TimeSeries) -> None:
        """The model with its path integrated out: random parameters, and the bound of each series."""
        bound = model.bind()
        with guide._pyro_context:  # Pyro learns of the guide's parameters as they are read
            terms = self._terms(bound, guide, data)
        z = site_name(model, "z")
        beta = annealing_factor(z)
        with series_plate(model, data):
            pyro.factor(site_name(model, "y"), terms.likelihood)
            pyro.factor(z, -beta * (terms.start + terms.path))

    # ---------------------------------------------------------------------------------------------- the terms

    def _terms(self, bound: StateSpaceModel, guide: AbstractBridge, data: TimeSeries) -> SolverFreeTerms:
        context = guide.encode(data, bound)
        terms = (
            self._likelihood(bound, guide, context, data),
            self._start(guide, context, data),
            self._path(guide, context, data),
        )
        shape = torch.broadcast_shapes(data.batch_shape, *(term.shape for term in terms))
        return SolverFreeTerms(*(term.expand(shape) for term in terms))

    def _likelihood(self, bound: Any, guide: AbstractBridge, context: BridgeContext, data: TimeSeries) -> Tensor:
        """:math:`\\sum_j E \\log p(y_j | z(t_j))`."""
        times, inputs, values, mask = data.observed_times, data.inputs, data.values, data.mask
        if values is None or mask is None:
            raise ValueError("a guide needs observations: `data.values` is None")
        if inputs is not None and data.observed_index is not None:
            inputs = inputs.index_select(-2, data.observed_index)
        scale, count = 1.0, self.num_observations
        if count is not None and count < times.shape[-1]:
            scale = times.shape[-1] / count
            each = torch.rand(values.shape[:-1], device=times.device).argsort(-1)[..., :count].sort(-1).values
            times = times.expand(values.shape[:-1]).gather(-1, each)
            values, mask = (torch.take_along_dim(part, each.unsqueeze(-1), -2) for part in (values, mask))
            inputs = None if inputs is None else torch.take_along_dim(inputs, each.unsqueeze(-1), -2)
        noise, weights = self._noise(guide, context, times, data)
        states = guide.at(context, times).motion(noise).state
        terms = masked(bound.emission(states, times, inputs), mask).log_prob(values).sum(-1)
        return scale * _mean(terms, weights)

    def _start(self, guide: AbstractBridge, context: BridgeContext, data: TimeSeries) -> Tensor:
        """:math:`KL(q(z_1) \\| p(z_1))`, closed where both are Gaussian."""
        marginal = guide.at(context, data.times[..., :1])
        closed = _gaussian_divergence(marginal, context.initial)
        if closed is not None:
            return closed.squeeze(-1)
        noise, weights = self._noise(guide, context, data.times[..., :1], data)
        state = marginal.motion(noise).state
        terms = marginal.law().log_prob(state) - context.initial.log_prob(state)
        return _mean(terms.squeeze(-1), weights)

    def _path(self, guide: AbstractBridge, context: BridgeContext, data: TimeSeries) -> Tensor:
        """:math:`\\tfrac12 \\int E |u|^2 dt`."""
        drawn = self.draw(guide, context, data)
        control = guide.control(context, drawn.marginal, drawn.noise, drawn.times, drawn.inputs)
        rate = 0.5 * control.value.square().sum(-1)
        return _mean((rate * drawn.weight.to(rate)).sum(-1), drawn.weights)

    def draw(self, guide: AbstractBridge, context: BridgeContext, data: TimeSeries) -> DrawnTimes:
        """Times, the posterior's marginals there, and noise for it, of which the weighted sum is an integral over time
        of an expectation.
        """
        times, weight = self._drawn_times(context, data)
        noise, weights = self._noise(guide, context, times, data)
        return DrawnTimes(times, weight, _held(data, times), guide.at(context, times), noise, weights)

    def _drawn_times(self, context: BridgeContext, data: TimeSeries) -> tuple[Tensor, Tensor]:
        """Times ``(*batch, n)`` and their weights in the integral."""
        first, last = time_range(data)
        if self.times == "quadrature":
            x, w = (torch.as_tensor(part).to(first) for part in np.polynomial.legendre.leggauss(self.num_times))
            knots = torch.minimum(torch.maximum(context.knots, first), last)
            length = knots.diff(dim=-1).unsqueeze(-1)
            times = knots[..., :-1].unsqueeze(-1) + length * (0.5 + 0.5 * x)
            return times.flatten(-2), (length * (0.5 * w)).flatten(-2)
        shape = data.batch_shape + (self.num_times,)
        part = torch.rand(shape, dtype=first.dtype, device=first.device)
        if self.times == "stratified":
            part = (part + torch.arange(self.num_times, device=first.device)) / self.num_times
        return first + (last - first) * part, (last - first) / self.num_times

    def _noise(
        self, guide: AbstractBridge, context: BridgeContext, times: Tensor, data: TimeSeries
    ) -> tuple[Tensor, Tensor]:
        """Noise ``(S, *lead, n, state)`` at some times, and weights ``(S,)`` of the mean over it."""
        like, n = context.ends, context.sde.state_dim
        lead = torch.broadcast_shapes(like.shape[:-2], data.batch_shape, times.shape[:-1])
        shape = lead + (times.shape[-1], n)
        if self.order is None:
            S = self.num_particles
            return torch.randn((S, *shape), dtype=like.dtype, device=like.device), like.new_full((S,), 1 / S)
        rule = gauss_hermite_rule(n, self.order).like(like)
        points = rule.points.reshape((-1,) + (1,) * (len(shape) - 1) + (n,)).expand((-1, *shape))
        return points, rule.mean_weights


def _mean(terms: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean over the first dim."""
    return torch.tensordot(weights, terms, 1)


def _held(data: TimeSeries, times: Tensor) -> Tensor | None:
    """The inputs that hold at times ``(*batch, n)``."""
    if data.inputs is None:
        return None
    inputs, grid = data.inputs, data.times
    lead = torch.broadcast_shapes(inputs.shape[:-2], grid.shape[:-1], times.shape[:-1])
    if grid.dim() > 1:
        grid = grid.expand(lead + grid.shape[-1:])
    times = times.expand(lead + times.shape[-1:]).contiguous()
    k = (torch.searchsorted(grid.contiguous(), times, right=True) - 1).clamp(0, data.num_times - 1)
    return torch.take_along_dim(inputs.expand(lead + inputs.shape[-2:]), k.unsqueeze(-1), -2)


def _gaussian_divergence(marginal: AbstractMarginal, initial: Any) -> Tensor | None:
    """``(..., 1)``; None where one of the laws is not Gaussian."""
    if not isinstance(marginal, (DiagonalMarginal, FullMarginal)):
        return None
    try:
        loc, root = gaussian_moments(initial)
    except TypeError:
        return None
    if isinstance(marginal, DiagonalMarginal) and type(initial) is type(marginal.law()):
        return kl_divergence(marginal.law(), initial)
    mine, mine_root = gaussian_moments(marginal.law())
    normal = torch.distributions.MultivariateNormal
    return kl_divergence(
        normal(mine, scale_tril=mine_root, validate_args=False), normal(loc, scale_tril=root, validate_args=False)
    )


def _parameters(guide: AbstractBridge, data: TimeSeries) -> dict[str, Tensor]:
    with guide._pyro_context:
        return guide.parameters_given(data)


def _checked(model: Any, guide: Any, args: tuple[Any, ...]) -> TimeSeries:
    if not isinstance(model, StateSpaceModel) or is_bound(model):
        raise TypeError(f"SolverFree reads the model's laws, and needs an unbound StateSpaceModel, got {_name(model)}")
    if not isinstance(guide, AbstractBridge):
        raise TypeError(
            f"SolverFree needs a guide that knows its marginals (guides.SVISE, ARCTA or SDEMatching), got "
            f"{_name(guide)}. For guides that solve their equation (PosteriorSDE) use Trace_ELBO or IWAE"
        )
    if len(args) != 1 or not isinstance(args[0], TimeSeries):
        raise TypeError(f"SolverFree needs model and guide to take one TimeSeries, got {len(args)} argument(s)")
    return args[0]


def _name(subject: Any) -> str:
    return type(subject).__name__
