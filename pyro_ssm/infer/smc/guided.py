"""Guided filters: a learned or hand-written proposal, weighed against the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyro_ssm.components import SampleOnly
from pyro_ssm.data import TimeSeries
from pyro_ssm.guides import Guide
from pyro_ssm.infer.smc.build import Kernel, Proposed, process
from pyro_ssm.infer.smc.densities import log_density
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.model_steps import ModelSteps, StateParticles, check_model_and_data
from pyro_ssm.infer.smc.step_index import StepIndex, steps_of

__all__ = ["guided"]

#: ``(state or None, k as a slice, memory summary or None) -> law``
Proposal = Callable[[Tensor | None, Any, Tensor | None], Any]


def guided(
    model: Any,
    guide: Guide | Proposal,
    data: TimeSeries,
    twist: Callable[[Any, Tensor], Tensor] | None = None,
    *,
    looks_ahead: bool | None = None,
) -> FeynmanKac:
    """The Feynman-Kac process whose proposal is a guide (trained by SVI, say) or a function of the user's.

    .. math::
        M_k = q(z_k \\mid z_{k-1}, y), \\qquad
        G_k = \\frac{p(z_k \\mid z_{k-1}, m_{k-1})\\, p(y_k \\mid z_k, m'_k)}{q(z_k \\mid z_{k-1}, y)}

    The proposal draws every step, unobserved ones too, where its weights then are :math:`p / q`.

    A guide that looks ahead (``guide.looks_ahead``: it reads future data) is a valid proposal, and the evidence is
    unbiased. But the weights after step k are those of :math:`p(z_{1:k} \\mid y_{1:k})`, which its draws have
    left on purpose: resampling by them *adds* variance. ``twist`` corrects this: resampling before step k + 1 then
    chooses by :math:`W_k\\, \\psi_k(z_k)` with :math:`\\psi_k \\approx p(y_{>k} \\mid z_k)`, and divides the weight of
    the chosen by :math:`\\psi_k`; the factors telescope. Otherwise take a guide with ``direction="past"``, or do not
    resample (``ess_threshold=0``: importance sampling).

    Args:
        model: a :class:`~pyro_ssm.models.StateSpaceModel`, bound, or without random parameters.
        guide: a :class:`~pyro_ssm.guides.Guide`, whose ``encode`` is called here, once, and whose ``step`` proposes;
            or a function ``(state, k, memory) -> law`` with the same conventions: ``k`` is a slice of one step,
            ``state`` ``(N, *batch, 1, state)`` is z[k - 1], None for ``slice(0, 1)``.
        data: with values.
        twist: ``(k, state) -> (N, *batch)``, an estimate of :math:`\\log p(y_{>k} \\mid z_k)` up to a constant, of
            ``state`` ``(N, *batch, state)``.
        looks_ahead: whether a function reads future data; a Guide declares it itself.

    In a captured run (``particle_filter(..., cuda_graph=True)``) ``k`` is an int64 tensor ``(1,)`` instead of a slice,
    and of the twist instead of a number: ``context[..., k, :]`` is the same for both.

    Raises:
        TypeError: the model's transition has no density, or ``guide`` is neither a Guide nor callable.
        ValueError: as :func:`~pyro_ssm.infer.smc.bootstrap`.

    Source: Doucet, Godsill and Andrieu (2000), "On sequential Monte Carlo sampling methods for Bayesian filtering";
    for twists, Whiteley and Lee (2014), "Twisted particle filters".

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> guide = ssm.guides.Structured(model, hidden_dim=8, direction="past")
    >>> ssm.infer.particle_filter(ssm.infer.guided(model, guide, data), num_particles=100).log_likelihood.shape
    torch.Size([3, 4])
    """
    check_model_and_data(model, data, "guided")
    if isinstance(model.transition, SampleOnly):
        raise TypeError(
            f"guided weighs a proposal against the transition's density, and {type(model.transition).__name__} is "
            "SampleOnly. Use bootstrap(model, data)"
        )
    steps = ModelSteps(model, data, "guided")
    propose: Proposal
    if isinstance(guide, Guide):
        if looks_ahead is not None:
            raise ValueError("`looks_ahead` is for functions; a Guide declares it itself. Leave it out")
        looks_ahead, context, step = guide.looks_ahead, guide.encode(data, steps.model), guide.step

        def propose(state: Tensor | None, k: Any, memory: Tensor | None) -> Any:
            return step(state, k, context, memory)

    elif callable(guide) and not isinstance(guide, type):
        propose = guide
    else:
        name = f"the class {guide.__name__}: make one of it first" if isinstance(guide, type) else type(guide).__name__
        raise TypeError(f"`guide` must be a guides.Guide or a function (state, k, memory), got {name}")
    if twist is not None and not callable(twist):
        raise TypeError(f"`twist` must be a function (k, state) or None, got {type(twist).__name__}")

    kernel = Kernel(steps, lambda k, state, summary: Proposed(propose(state, steps_of(k), summary)))

    def log_potential(k: StepIndex, previous: StateParticles | None, particles: StateParticles) -> Tensor:
        state = particles.state
        _, summary, proposed = kernel.begin(k, previous, state.shape[:-2])
        before = None if previous is None else previous.state
        moved = log_density(steps.law(k, before, summary), state) - log_density(proposed.law, state)
        return moved + steps.log_observation(k, state, particles.summary) + steps.log_times(k, before, state)

    def log_twist(k: StepIndex, particles: StateParticles) -> Tensor:
        return twist(k, particles.state.squeeze(-2))

    return process(steps, kernel, log_potential, None, log_twist=twist and log_twist, looks_ahead=bool(looks_ahead))
