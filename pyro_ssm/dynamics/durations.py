"""How long a semi-Markov state lasts: laws of a number of steps 1, ..., D."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pyro.distributions import NegativeBinomial, Poisson
from torch import Tensor

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._gaussian import with_time
from pyro_ssm.blocks._tables import log_of_probability, simplex_parameter, table_of
from pyro_ssm.blocks.parameters import positive_parameter
from pyro_ssm.components import Component

__all__ = ["CategoricalDuration", "Duration", "NegativeBinomialDuration", "PoissonDuration"]


class Duration(Component):
    """The law of a duration for each of K states; a subclass defines ``log_probs()``.

    >>> from pyro_ssm.dynamics import PoissonDuration
    >>> from pyro_ssm.dynamics.durations import Duration
    >>> issubclass(PoissonDuration, Duration)
    True
    """

    def __init__(self, num_states: int, max_duration: int) -> None:
        super().__init__()
        self.num_states = check_size("num_states", num_states)
        self.max_duration = check_size("max_duration", max_duration)

    def log_probs(self) -> Tensor:
        """:math:`\\log P(d \\mid j)` for d = 1, ..., D, ``(..., 1, K, D)`` with a time axis of 1."""
        raise NotImplementedError(f"{type(self).__name__} must define log_probs()")

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"num_states={self.num_states}, max_duration={self.max_duration}"


class CategoricalDuration(Duration):
    """Any law of durations up to D,

    .. math:: P(d \\mid j) = p_{jd}, \\qquad d = 1, \\dots, D.

    Args:
        num_states: K.
        max_duration: D.
        probs: first value ``(K, D)``; None is uniform. A zero stays zero.

    Parameters: ``probs`` ``(K, D)``, rows on the simplex (a prior: ``Dirichlet(...).to_event(1)``).

    Raises:
        ValueError: a size is wrong, or ``probs`` holds no probabilities in its rows.

    >>> from pyro_ssm.dynamics import CategoricalDuration
    >>> CategoricalDuration(2, 4).log_probs().exp().detach()[0, 0]
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"probs": 2}

    def __init__(self, num_states: int, max_duration: int, probs: Tensor | None = None) -> None:
        super().__init__(num_states, max_duration)
        shape = (num_states, max_duration)
        start = torch.full(shape, 1 / max_duration) if probs is None else table_of("probs", probs, shape)
        self.probs = simplex_parameter("probs", start)

    def log_probs(self) -> Tensor:
        return with_time(log_of_probability(self.probs), 2)


class PoissonDuration(Duration):
    """One step and a Poisson number more, cut at D and normalised,

    .. math:: P(d \\mid j) \\propto \\text{Poisson}(d - 1; r_j), \\qquad d = 1, \\dots, D.

    Args:
        num_states: K.
        max_duration: D, well above ``1 + rate``.
        rate: first value of the rates, a number or ``(K,)``.
        floor: lower bound of the learnable rates.

    Parameters: ``rate`` ``(K,)``.

    Raises:
        ValueError: a size is wrong, or a rate does not lie above its floor.

    >>> from pyro_ssm.dynamics import PoissonDuration
    >>> PoissonDuration(2, 30, rate=1.0).log_probs().exp()[0, 0, :2].detach()
    tensor([0.3679, 0.3679])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"rate": 1}

    def __init__(self, num_states: int, max_duration: int, rate: float | Tensor = 4.0, floor: float = 1e-4) -> None:
        super().__init__(num_states, max_duration)
        self.rate = positive_parameter("rate", rate, num_states, floor)

    def log_probs(self) -> Tensor:
        rate = with_time(self.rate, 1).unsqueeze(-1)
        more = torch.arange(self.max_duration, dtype=rate.dtype, device=rate.device)
        return Poisson(rate, validate_args=False).log_prob(more).log_softmax(-1)


class NegativeBinomialDuration(Duration):
    """One step and a negative binomial number more, cut at D and normalised,

    .. math::
        P(d \\mid j) \\propto \\text{NegativeBinomial}(d - 1; m_j, r_j), \\qquad
        \\text{mean } m_j, \\quad \\text{variance } m_j + m_j^2 / r_j.

    With r = 1 the durations are geometric: an ordinary Markov chain (up to the cut).

    Args:
        num_states: K.
        max_duration: D, well above ``1 + mean``.
        mean: first value of the mean number of further steps, a number or ``(K,)``.
        concentration: first value of r, a number or ``(K,)``.
        floor: lower bound of both.

    Parameters: ``mean`` ``(K,)``, ``concentration`` ``(K,)``.

    Raises:
        ValueError: a size is wrong, or a parameter does not lie above its floor.

    >>> from pyro_ssm.dynamics import NegativeBinomialDuration
    >>> NegativeBinomialDuration(1, 60, mean=1.0, concentration=1.0).log_probs().exp()[0, 0, :3].detach()
    tensor([0.5000, 0.2500, 0.1250])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"mean": 1, "concentration": 1}

    def __init__(
        self,
        num_states: int,
        max_duration: int,
        mean: float | Tensor = 4.0,
        concentration: float | Tensor = 4.0,
        floor: float = 1e-4,
    ) -> None:
        super().__init__(num_states, max_duration)
        self.mean = positive_parameter("mean", mean, num_states, floor)
        self.concentration = positive_parameter("concentration", concentration, num_states, floor)

    def log_probs(self) -> Tensor:
        mean, r = (with_time(value, 1).unsqueeze(-1) for value in (self.mean, self.concentration))
        more = torch.arange(self.max_duration, dtype=mean.dtype, device=mean.device)
        law = NegativeBinomial(r, logits=mean.log() - r.log(), validate_args=False)
        return law.log_prob(more).log_softmax(-1)
