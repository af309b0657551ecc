"""The bootstrap filter: particles move as the model does and are weighed by what is observed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_ssm.components import SampleOnly
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.smc.build import Kernel, Proposed, process
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac, GaussianSteps
from pyro_ssm.infer.smc.model_steps import ModelSteps, StateParticles
from pyro_ssm.infer.smc.step_index import StepIndex

__all__ = ["bootstrap"]


def bootstrap(model: Any, data: TimeSeries) -> FeynmanKac:
    """The Feynman-Kac process whose proposal is the model's own transition.

    .. math:: M_k = p(z_k \\mid z_{k-1}, m_{k-1}), \\qquad G_k = p(y_k \\mid z_k, m'_k)

    It needs no density of the transition (``SampleOnly`` will do) and no proposal; its weights are uneven where an
    observation says much more than the transition does. Memory, missing entries, own time grids, inputs, refined
    grids, ragged batches and batches of parameters are as in the model; where nothing is observed the increment of the
    log-likelihood is exactly 0. Where an equation has a ``log_intensity`` the weights count the Poisson process of the
    times as well, :math:`G_k\\, e^{-\\Lambda_k} \\prod_{i\\ \\text{seen}} \\lambda_i(t_k, z_k)` (a second
    solve of the gap).

    Args:
        model: a :class:`~pyro_ssm.models.StateSpaceModel`, bound, or without random parameters.
        data: with values.

    Raises:
        ValueError: no values, or another width than the emission's.
        RuntimeError: a random parameter has no value.

    Source: Gordon, Salmond and Smith (1993), "Novel approach to nonlinear/non-Gaussian Bayesian state estimation".

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> ssm.infer.particle_filter(ssm.infer.bootstrap(model, data), num_particles=100).log_likelihood.shape
    torch.Size([3, 4])
    """
    steps = ModelSteps(model, data, "bootstrap")
    kernel = Kernel(steps, lambda k, state, summary: Proposed(steps.law(k, state, summary)))

    def log_potential(k: StepIndex, previous: StateParticles | None, particles: StateParticles) -> Tensor:
        seen = steps.log_observation(k, particles.state, particles.summary)
        return seen + steps.log_times(k, None if previous is None else previous.state, particles.state)

    gaussian = None
    if steps.memory is None and not steps.is_timed and not isinstance(steps.model.transition, SampleOnly):
        gaussian = GaussianSteps(steps.moves, steps.observed, steps.transition)
    return process(steps, kernel, log_potential, steps.seen, gaussian=gaussian)
