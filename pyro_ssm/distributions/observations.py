"""The law of a whole record of observations given a path: one site ``"y"`` with event ``(time, obs)``."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_ssm.distributions.history import History
from pyro_ssm.distributions.masked import MaskedLaw

__all__ = ["Observations"]


class Observations(TorchDistribution):
    """Observations given a path: :math:`p(y \\mid z) = \\prod_k p(y_k \\mid z_k, m'_k)`, event ``(time, obs)``.

    A hidden entry adds exactly 0. With a memory that sees y, a draw steps through time (or returns the y that was drawn
    together with this very path). A draw of a discrete law is not differentiable; ``log_prob`` always is.

    Args:
        law: the masked law of all steps, batch ``(..., time)``, event ``(obs,)``; a function that returns it when
            memory sees observations, since then it depends on the y with which the program ends.
        states: the path, needed only beside ``history``.
        history: the run of memory that path and observations share.
        shape: batch shape and event shape, needed when ``law`` is a function.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.distributions import Observations, masked
    >>> law = masked(dist.Normal(torch.zeros(4, 2), 1.0).to_event(1), torch.ones(4, 2, dtype=torch.bool))
    >>> y = Observations(law)
    >>> y.event_shape, y.log_prob_steps(torch.zeros(4, 2)).shape
    (torch.Size([4, 2]), torch.Size([4]))
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self,
        law: MaskedLaw | Any,
        states: Tensor | None = None,
        history: History | None = None,
        shape: tuple[torch.Size, torch.Size] | None = None,
    ) -> None:
        self._law, self._states, self._history = law, states, history
        if shape is None:
            shape = (law.batch_shape[:-1], law.batch_shape[-1:] + law.event_shape)
        super().__init__(*shape, validate_args=False)

    @property
    def history(self) -> History | None:
        """The run of a memory that sees observations; None without one."""
        return self._history

    @property
    def states(self) -> Tensor | None:
        """The path, where there is a :attr:`history`."""
        return self._states

    @property
    def law(self) -> MaskedLaw:
        """The law of all steps, batch ``(..., time)``, event ``(obs,)``."""
        return self._law() if callable(self._law) and not isinstance(self._law, MaskedLaw) else self._law

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self._history is None and self.law.has_rsample

    @property
    def support(self) -> Any:  # type: ignore[override]
        return constraints.independent(self.law.support, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Observations:
        batch_shape = torch.Size(batch_shape)
        if callable(self._law) and not isinstance(self._law, MaskedLaw):
            return Observations(self._law, self._states, self._history, (batch_shape, self.event_shape))
        law = self._law.expand(batch_shape + self.event_shape[:1])
        return Observations(law, self._states, self._history, (batch_shape, self.event_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        if self._history is None:
            return self.law.sample(sample_shape)
        if torch.Size(sample_shape):
            raise ValueError("observations with a memory of y take their sample dims from the path; got sample_shape")
        with torch.no_grad():
            drawn = self._history.drawn_observations(self._states)
            if drawn is not None:
                return drawn
            # one record for each element of the batch, also where a plate is larger than the path's batch
            return self._history.simulate(self._states.expand(self.batch_shape + self._states.shape[-2:]))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self.law.rsample(sample_shape)

    def log_prob_steps(self, value: Tensor) -> Tensor:
        """The terms of ``log_prob``, shape ``(*batch, time)``; 0 where nothing is observed."""
        return self.law.log_prob(value)

    def log_prob(self, value: Tensor) -> Tensor:
        terms = self.log_prob_steps(value)
        return terms.sum(-1).expand(torch.broadcast_shapes(terms.shape[:-1], self.batch_shape))
