"""The coefficients of a library of terms in closed form, given the posterior of the states."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.blocks._checks import check_choice, check_positive, check_size
from pyro_ssm.data import TimeSeries
from pyro_ssm.dynamics import TermLibrary
from pyro_ssm.guides import AbstractBridge
from pyro_ssm.infer.elbo_solver_free import SolverFree
from pyro_ssm.models import StateSpaceModel

__all__ = ["TermRegression", "term_regression"]


class TermRegression(NamedTuple):
    """What :func:`term_regression` returns, in the scaled coefficients of the library.

    Attributes:
        coefficients: posterior means ``(state, terms)``.
        covariance: of the coefficients of each equation, ``(state, terms, terms)``.

    >>> from pyro_ssm.infer import TermRegression
    >>> TermRegression._fields
    ('coefficients', 'covariance')
    """

    coefficients: Tensor
    covariance: Tensor

    @property
    def scale(self) -> Tensor:
        """Posterior standard deviations ``(state, terms)``."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).sqrt()

    @property
    def mean_field_scale(self) -> Tensor:
        """Standard deviations of the best posterior that takes the coefficients as independent, ``(state, terms)``.

        .. math:: (\\Sigma^{-1})_{pp}^{-1/2}

        Terms are correlated, so these are narrower; an ``AutoNormal`` whose scales are set to the wider ones draws
        coefficients that fit nothing.
        """
        precision = torch.linalg.inv(self.covariance.double()).to(self.covariance)
        return precision.diagonal(dim1=-2, dim2=-1).rsqrt()


@torch.no_grad()
def term_regression(
    model: StateSpaceModel,
    guide: AbstractBridge,
    data: TimeSeries,
    *,
    prior: str = "relevance",
    scale: float = 1.0,
    num_times: int = 1000,
    num_particles: int = 10,
    iterations: int = 200,
) -> TermRegression:
    """The coefficients that maximise the bound while the posterior of the states and the diffusion stay as they are.

    The bound is quadratic in the coefficients of a :class:`~pyro_ssm.dynamics.TermLibrary`, so that

    .. math::
        q(C_i) = N(\\Sigma_i b_i, \\Sigma_i), \\qquad \\Sigma_i^{-1} = \\operatorname{diag}(\\alpha_i) +
        \\int E_{q_t}\\Big[\\tfrac{\\theta \\theta^T}{g_i^2}\\Big] dt, \\qquad
        b_i = \\int E_{q_t}\\Big[\\tfrac{\\theta f_{q,i}}{g_i^2}\\Big] dt

    (with the library's scales). Gradients find these slowly, because terms are correlated; call this every hundred
    steps or so of :func:`~pyro_ssm.infer.fit` (in its ``callback``) and copy the result into the coefficients, or
    into the means of their posterior. The integrals are estimated at random times.

    Args:
        model: its drift is a :class:`~pyro_ssm.dynamics.TermLibrary`, its noise is diagonal.
        guide: of the states; SVISE, ARCTA or SDEMatching.
        data: the series.
        prior: where :math:`\\alpha` comes from: ``"relevance"``, which is learnt for each term,
            :math:`1 / E[C_{ip}^2]` (irrelevant terms vanish); ``"laplace"`` of width ``scale``, by its mixture of
            normals, :math:`1 / (\\text{scale} \\sqrt{E[C_{ip}^2]})`; ``"normal"``, :math:`1 / \\text{scale}^2`.
        scale: of the prior.
        num_times: times in each series.
        num_particles: draws of the state at each time.
        iterations: of :math:`\\alpha`.

    Returns:
        :class:`TermRegression`; no gradient.

    Raises:
        TypeError: the drift is no library of terms.
        ValueError: the noise is not diagonal.

    Source: Tipping (2001), "Sparse Bayesian learning and the relevance vector machine", JMLR 1, for the relevance; the
    regression is the M-step of Course and Nair's (2023) bound.

    >>> import torch, pyro_ssm as ssm
    >>> sde = ssm.dynamics.NeuralSDE(ssm.dynamics.TermLibrary(1, 1), ssm.dynamics.ConstantDiffusion(0.5, 1))
    >>> model = ssm.StateSpaceModel(ssm.dynamics.NormalInitial(1), sde, ssm.emissions.LinearNormal(1, 1))
    >>> data = ssm.TimeSeries(torch.arange(9.0), torch.arange(9.0).neg().exp().unsqueeze(-1))
    >>> found = ssm.infer.term_regression(model, ssm.guides.SVISE(model, data), data)
    >>> found.coefficients.shape, bool((found.scale > 0).all())
    (torch.Size([1, 2]), True)
    """
    check_choice("prior", prior, ("relevance", "laplace", "normal"))
    scale, iterations = check_positive("scale", scale), check_size("iterations", iterations)
    gram, moment = _statistics(model, guide, data, SolverFree(num_times, num_particles))
    alpha = torch.full_like(moment, scale**-2)
    for _ in range(1 if prior == "normal" else iterations):
        covariance = torch.linalg.inv(gram + alpha.diag_embed())
        mean = (covariance @ moment.unsqueeze(-1)).squeeze(-1)
        square = mean.square() + covariance.diagonal(dim1=-2, dim2=-1)
        if prior != "normal":
            alpha = (1 / square if prior == "relevance" else square.rsqrt() / scale).clamp(max=1e12)
    dtype = data.dtype
    return TermRegression(mean.to(dtype), covariance.to(dtype))


def _statistics(
    model: StateSpaceModel, guide: AbstractBridge, data: TimeSeries, loss: SolverFree
) -> tuple[Tensor, Tensor]:
    """:math:`\\int E[\\theta \\theta^T / g_i^2]` and :math:`\\int E[\\theta f_{q,i} / g_i^2]`, summed over series."""
    bound = guide.bind_model(guide.parameters_given(data))
    sde = bound.transition
    if not isinstance(sde.drift, TermLibrary):
        raise TypeError(
            f"the drift must be a dynamics.TermLibrary, got {type(sde.drift).__name__.removeprefix('Bound')}"
        )
    if sde.noise != "diagonal":
        raise ValueError(f"the noise must be diagonal, so that equations are apart, got noise={sde.noise!r}")
    context = guide.encode(data, bound)
    drawn = loss.draw(guide, context, data)
    control = guide.control(context, drawn.marginal, drawn.noise, drawn.times, drawn.inputs)
    time, z = drawn.times.to(control.state).unsqueeze(-1), control.state
    factor = (sde.drift.scale / sde.drift.time_scale).to(z)
    g = sde.diffusion_at(z, drawn.times, drawn.inputs) / factor
    goal = sde.drift(time, z, drawn.inputs) / factor + g * control.value
    weight = (drawn.weight.to(z) * drawn.weights.reshape((-1,) + (1,) * (z.dim() - 2))).unsqueeze(-1) / g.square()
    terms = sde.drift.terms(time, z, drawn.inputs).double().flatten(0, -2)
    weight, goal = (part.expand(z.shape).double().flatten(0, -2) for part in (weight, goal))
    gram = torch.einsum("nd,np,nq->dpq", weight, terms, terms)
    return gram, torch.einsum("nd,np->dp", weight * goal, terms)
