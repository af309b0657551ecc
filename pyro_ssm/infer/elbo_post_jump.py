"""The training loss of GRU-ODE-Bayes: the likelihood, and the distance of each jump from Bayes' rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.blocks import EvolvingMemory, GRUODEBayes
from pyro_ssm.blocks._checks import check_positive
from pyro_ssm.distributions import History, Observations
from pyro_ssm.infer.elbo import DifferentiableELBO

__all__ = ["PostJumpELBO"]


class PostJumpELBO(DifferentiableELBO):
    """The evidence lower bound less the distance of the state after each jump from what Bayes' rule makes of it,

    .. math::
        L = \\text{ELBO} - w \\sum_{kj} m_{kj}\\, KL\\big(p^{\\text{Bayes}}_{kj} \\,\\|\\, p^{\\text{post}}_{kj}\\big),
        \\qquad p^{\\text{Bayes}}_{kj} \\propto p^{\\text{pre}}_{kj}\\; N(\\cdot\\,;\\, y_{kj}, r^2),

    where :math:`p^{\\text{pre}}` and :math:`p^{\\text{post}}` are the predictions of the same value before and after
    the jump. Without random parameters the bound is the log-likelihood, and the first term the paper's pre-jump loss.
    It goes with :func:`~pyro_ssm.models.gru_ode_bayes`, into ``infer.fit(model, None, data, loss=...)``; the KL is
    scaled with its series in mini-batches. Gradients flow through all three laws.

    Args:
        weight: w; 0 is the bound itself.
        obs_scale: r, the scale of the observation noise, in the units of the observations; ``(obs,)`` or a number.
        num_particles: draws of random parameters.

    Raises:
        ValueError: ``weight`` is negative, ``obs_scale`` is not positive; or, when called, the model is no such model.

    Source: E. De Brouwer et al. (2019), GRU-ODE-Bayes, section 2.4.

    >>> from pyro_ssm.infer import PostJumpELBO
    >>> PostJumpELBO(weight=0.1, obs_scale=0.01).weight
    0.1
    """

    def __init__(self, weight: float = 1.0, obs_scale: float | Tensor = 0.01, num_particles: int = 1) -> None:
        super().__init__(num_particles=num_particles)
        if not 0 <= weight < float("inf"):
            raise ValueError(f"`weight` must be finite and not negative, got {weight}")
        self.weight = float(weight)
        for value in torch.as_tensor(obs_scale).flatten().tolist():
            check_positive("obs_scale", value)
        self.obs_scale = obs_scale

    def differentiable_loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> Tensor:
        """The negative bound; differentiable."""
        loss: Tensor | float = 0.0
        for model_trace, guide_trace in self._get_traces(model, guide, args, {}):
            bound = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
            penalty = torch.zeros_like(torch.as_tensor(bound))
            for site in _jumping_sites(model_trace):
                distance = jump_divergence(site["fn"], self.obs_scale)
                penalty = penalty + (site["scale"] * distance).sum()
            loss = loss + (self.weight * penalty - bound) / self.num_particles
        return torch.as_tensor(loss)


def _jumping_sites(trace: Any) -> list[Any]:
    """The observed sites of a model with GRU-Bayes jumps."""
    found = [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample" and isinstance(site["fn"], Observations) and _block(site["fn"].history) is not None
    ]
    if not found:
        raise ValueError(
            "PostJumpELBO needs a model whose memory is an EvolvingMemory of blocks.GRUODEBayes: models.gru_ode_bayes. "
            "Others are trained by the bound alone (pyro.infer.Trace_ELBO)"
        )
    return found


def _block(run: History | None) -> GRUODEBayes | None:
    memory = None if run is None else run.memory
    block = memory.block if isinstance(memory, EvolvingMemory) else None
    return block if isinstance(block, GRUODEBayes) else None


def jump_divergence(law: Observations, obs_scale: float | Tensor) -> Tensor:
    """:math:`\\sum_{kj} m_{kj} KL(p^{Bayes}_{kj} \\| p^{post}_{kj})` of each series ``(*batch,)``.

    >>> from pyro_ssm.infer.elbo_post_jump import jump_divergence
    >>> jump_divergence.__name__
    'jump_divergence'
    """
    run: Any = law.history
    memory, states, values, mask = run.memory, law.states, run.values, run.mask
    block: GRUODEBayes = memory.block
    before = run.summaries(states)[1]
    # a jump looks at its own step only: all of them at once
    after = block.see(before, block.prepare(memory.columns(values, mask, memory.inputs_of(run.inputs, states))))
    loc, scale = block.predict(before)
    post_loc, post_scale = block.predict(after)
    r = torch.as_tensor(obs_scale, dtype=loc.dtype, device=loc.device)
    seen = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
    precision = scale.square().reciprocal() + r.square().reciprocal()
    bayes_loc = (loc / scale.square() + seen / r.square()) / precision
    ratio = 1 / (precision * post_scale.square())
    kl = 0.5 * (ratio + ((bayes_loc - post_loc) / post_scale).square() - 1 - ratio.log())
    return torch.where(mask, kl, torch.zeros((), dtype=kl.dtype, device=kl.device)).sum((-2, -1))
