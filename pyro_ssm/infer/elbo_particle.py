"""The bound of a particle filter whose proposal is the guide: variational sequential Monte Carlo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_ssm.binding import is_bound
from pyro_ssm.data import TimeSeries
from pyro_ssm.guides import Guide
from pyro_ssm.infer.elbo_differentiable import DifferentiableELBO
from pyro_ssm.infer.elbo_weights import refuse_score_function
from pyro_ssm.infer.handler_stack import is_annealed
from pyro_ssm.infer.smc.check import check_fraction, check_number
from pyro_ssm.infer.smc.collectors.choices import ChoiceLogProb
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.filter import ParticleFiltered, particle_filter
from pyro_ssm.infer.smc.guided import guided
from pyro_ssm.infer.smc.noise import Noise, Pathwise, PseudoRandom
from pyro_ssm.infer.smc.resample import AncestorResampling, Resampling
from pyro_ssm.infer.smc.resample_gradient import StopGradientResampling
from pyro_ssm.models import StateSpaceModel, series_plate, site_name

__all__ = ["ParticleELBO"]

GRADIENTS = ("pathwise", "score", "stop")


class ParticleELBO(DifferentiableELBO):
    """The bound of a particle filter with the guide as proposal (FIVO, AESMC, VSMC), one filter for each series.

    .. math::
        L_N = \\sum_b E\\left[ \\log \\prod_k \\sum_n W_{k-1}^{nb}\\,
        \\frac{p(z_k^{nb} \\mid z_{k-1}^{nb}, \\theta)\\, p(y_{kb} \\mid z_k^{nb}, \\theta)}
        {q(z_k^{nb} \\mid z_{k-1}^{nb}, y_b, \\theta)} \\right] + \\log p(\\theta) - \\log q(\\theta) \\le \\log p(y)

    It is :class:`~pyro_ssm.infer.IWAE` with resampling in between: unpromising paths are given up on the way, and
    the log-variance of the estimate grows with the length of the series instead of exponentially. With one particle it
    is the evidence lower bound, with ``ess_threshold=0`` the importance-weighted one (same noise, same number). It is
    tighter than IWAE where the past tells which particles will do well; not with a guide that reads the future
    (``direction="future"`` or ``"both"``), whose weights are meant to even out only at the end: resampling
    by them adds variance, and a warning says so. The bound grows with N in the limit, not for each N.

    Random parameters :math:`\\theta` (``PyroSample``) are drawn once for all particles from the guide's posterior over
    parameters. A mini-batch scales the logarithm by its plate. Masks, ragged lengths, memory, inputs and refined grids
    are as in the filter. It plugs into ``pyro.infer.SVI`` and :func:`~pyro_ssm.infer.fit`.

    Args:
        num_particles: N.
        gradient: of the bound.

            * ``"pathwise"``: through draws and weights, while the choice of ancestors counts as fixed: biased for the
              gradient of :math:`L_N`, by the score of resampling, and of low variance; what all three papers use.
              Unbiased without resampling (``ess_threshold=0``, or one particle) and, with ``ess_threshold=1``, with a
              ``TransportResampling`` or a ``DiffusionResampling`` (then for the bound of that filter).
            * ``"score"``: with that score term, under multinomial resampling, and a control variate from the past.
              Unbiased for the gradient of :math:`L_N` with ``ess_threshold=1``; with a threshold in between it leaves
              out that the decision to resample depends on the parameters. Of high variance.
            * ``"stop"``: by :class:`~pyro_ssm.infer.smc.StopGradientResampling`: consistent for the gradient of
              :math:`\\log p(y)` as N grows, not of the bound; it teaches the model, and a guide nothing.
        resampling: as for :func:`~pyro_ssm.infer.particle_filter`; by default ``"multinomial"`` for ``"score"``, else
            ``"systematic"``. With a :class:`~pyro_ssm.infer.smc.Resampling` object, ``gradient`` must be
            ``"pathwise"``.
        ess_threshold: resample a series whose effective sample size is below this fraction of N; 0 never.
        build: ``(bound model, guide, data) -> FeynmanKac``, by default :func:`~pyro_ssm.infer.guided`; a
            ``functools.partial`` of it gives a look-ahead guide its twist.
        noise: what states and ancestors are drawn from; default torch's global generator.

    Raises:
        ValueError: an argument out of its range; in a run, KL annealing around it; as ``particle_filter``.
        TypeError: in a run, a model that is not a ``StateSpaceModel`` itself, or a guide that is no ``guides.Guide``.
        NotImplementedError: a draw of the guide is not reparameterised.

    Source: C. Maddison et al. (2017), "Filtering variational objectives", NeurIPS; T. A. Le et al. (2018),
    "Auto-encoding sequential Monte Carlo", ICLR; C. Naesseth et al. (2018), "Variational sequential Monte Carlo",
    AISTATS.

    >>> import torch, pyro, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> guide = ssm.guides.Structured(model, hidden_dim=8, direction="past")
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=ssm.infer.ParticleELBO(8))
    >>> isinstance(svi.step(data), float)
    True
    """

    def __init__(
        self,
        num_particles: int = 10,
        *,
        gradient: str = "pathwise",
        resampling: str | Resampling | None = None,
        ess_threshold: float = 0.5,
        build: Callable[[Any, Any, TimeSeries], FeynmanKac] = guided,
        noise: Noise | None = None,
    ) -> None:
        check_number(num_particles)
        check_fraction(ess_threshold)
        super().__init__(num_particles=num_particles)
        self.gradient, self.resampling = gradient, _resampling(gradient, resampling)
        self.ess_threshold, self.build = ess_threshold, build
        self.noise = PseudoRandom() if noise is None else noise

    def differentiable_loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> Tensor:
        """The negative bound, summed over series; its gradient is what ``gradient`` says."""
        data = _data(model, guide, args)
        drawn = poutine.trace(_parameters).get_trace(guide, data)
        refuse_score_function(drawn)
        run = poutine.trace(poutine.replay(self._integrated, trace=drawn)).get_trace(model, guide, data)
        return torch.as_tensor(drawn.log_prob_sum() - run.log_prob_sum())

    def _integrated(self, model: StateSpaceModel, guide: Guide, data: TimeSeries) -> None:
        """The model with its states integrated out by the filter: random parameters, and one term a series."""
        bound = model.bind()
        with guide._pyro_context:  # Pyro learns of the guide's parameters as they are read
            log_likelihood = self._log_likelihood(bound, guide, data)
        with series_plate(model, data):
            pyro.factor(site_name(model, "y"), log_likelihood)

    def _log_likelihood(self, bound: StateSpaceModel, guide: Guide, data: TimeSeries) -> Tensor:
        """The filter's estimate ``(*batch,)``, with the gradient that is wanted."""
        fk = self.build(bound, guide, data)
        choices = [ChoiceLogProb()] if self.gradient == "score" else []
        found = particle_filter(
            fk,
            self.num_particles,
            resampling=self.resampling,
            ess_threshold=self.ess_threshold,
            collectors=choices,
            noise=Pathwise(self.noise, "ParticleELBO"),
            differentiable=True,
        )
        return found.total + _score_term(fk, found) if choices else found.total


def _score_term(fk: FeynmanKac, found: ParticleFiltered) -> Tensor:
    """0, with the gradient :math:`\\sum_k \\nabla s_k (R_k - b_k)` ``(*batch,)``.

    R_k is the log-likelihood from step k on. b_k is what it would be if each step brought as much as those before k
    did on average: known before the choice, it takes variance and adds no bias.
    """
    score, reward = found.collected["choices"], found.log_likelihood.detach()
    real = torch.ones_like(reward) if fk.step_mask is None else fk.step_mask.to(reward.dtype)
    past, passed = reward.cumsum(-1) - reward, real.cumsum(-1) - real
    ahead, left = reward.sum(-1, keepdim=True) - past, real.sum(-1, keepdim=True) - passed
    term = (score * (ahead - left * past / passed.clamp_min(1))).sum(-1)
    return term - term.detach()


def _parameters(guide: Guide, data: TimeSeries) -> None:
    with guide._pyro_context:
        guide.parameters_given(data)


def _resampling(gradient: str, given: str | Resampling | None) -> str | Resampling:
    if gradient not in GRADIENTS:
        raise ValueError(f"`gradient` must be one of {GRADIENTS}, got {gradient!r}")
    if isinstance(given, Resampling) and gradient != "pathwise":
        raise ValueError(
            f"`gradient`={gradient!r} brings its own resampling. Name a scheme, or give {type(given).__name__} with "
            "gradient='pathwise'"
        )
    if gradient == "score":
        if given not in (None, "multinomial"):
            raise ValueError(
                f"gradient='score' needs choices whose probability is known, resampling='multinomial', got {given!r}"
            )
        return "multinomial"
    scheme = "systematic" if given is None else given
    if isinstance(scheme, str):
        return (StopGradientResampling if gradient == "stop" else AncestorResampling)(scheme)
    return scheme


def _data(model: Any, guide: Any, args: tuple[Any, ...]) -> TimeSeries:
    if not isinstance(model, StateSpaceModel) or is_bound(model):
        raise TypeError(
            f"ParticleELBO steps through the model's laws, and needs an unbound StateSpaceModel, got "
            f"{type(model).__name__}. For other programs use IWAE, which weighs whole paths"
        )
    if not isinstance(guide, Guide):
        raise TypeError(
            f"ParticleELBO steps through the guide, and needs a guides.Guide (with `encode` and `step`), got "
            f"{type(guide).__name__}. For other guides use IWAE"
        )
    if len(args) != 1 or not isinstance(args[0], TimeSeries):
        raise TypeError(f"ParticleELBO needs model and guide to take one TimeSeries, got {len(args)} argument(s)")
    if is_annealed():
        raise ValueError(
            "KL annealing weighs the site 'z', and a particle filter has none: its bound is no reconstruction less a "
            "KL. Leave `annealing` out, or anneal with Trace_ELBO or IWAE first and go on with ParticleELBO"
        )
    return args[0]
