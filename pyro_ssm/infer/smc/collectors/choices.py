"""How probable the ancestors were that a run has chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ssm.infer.smc.collectors.base import Collector
from pyro_ssm.infer.smc.collectors.fixed_lag import require_ancestors
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.stepper import Step, normalise

__all__ = ["ChoiceLogProb"]


class ChoiceLogProb(Collector):
    """The log-probability of the ancestors before each step, as multinomial resampling draws them; 0 where none were.

    .. math:: s_k = \\sum_n \\log W_{k-1}^{a_k^n}

    In a differentiable run its gradient is that of the score-function term of resampling. Other schemes choose with the
    same marginal probabilities but not independently: this is then not their log-probability.

    Args:
        name: of the result, ``(*batch, time)``.

    Raises:
        ValueError: in a run, a resampling without ancestors.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> fk = ssm.infer.bootstrap(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1)))
    >>> chosen = ssm.infer.smc.ChoiceLogProb()
    >>> run = ssm.infer.particle_filter(fk, 10, resampling="multinomial", ess_threshold=1.0, collectors=[chosen])
    >>> run.collected["choices"].shape, bool((run.collected["choices"][:, 0] == 0).all())
    (torch.Size([3, 4]), True)
    """

    def __init__(self, name: str = "choices") -> None:
        self.name = name

    def start(self, fk: FeynmanKac, num_particles: int) -> None:
        self._fk = fk
        self._found: list[Tensor] = []

    def collect(self, step: Step) -> None:
        require_ancestors(self, step)
        if step.previous is None or step.ancestors is None:
            self._found.append(torch.zeros_like(step.log_likelihood))
            return
        log_weights = step.previous.log_weights
        if self._fk.log_twist is not None:
            log_weights = normalise(log_weights + self._fk.log_twist(step.k - 1, step.previous.particles))[1]
        chosen = log_weights.gather(0, step.ancestors).sum(0)
        if isinstance(step.resampled, Tensor):
            chosen = torch.where(step.resampled, chosen, torch.zeros_like(chosen))
        self._found.append(chosen)

    def result(self) -> Tensor:
        return torch.stack(self._found, -1)
