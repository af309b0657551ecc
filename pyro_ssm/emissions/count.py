"""Counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from pyro import distributions as dist
from torch import Tensor

from pyro_ssm.blocks._checks import check_positive
from pyro_ssm.blocks.parameters import positive_parameter
from pyro_ssm.emissions._network import NetworkEmission, check_link, positive

__all__ = ["NegativeBinomial", "Poisson"]


class _Count(NetworkEmission):
    """A network's expected counts, through a positive link."""

    def __init__(
        self,
        state_dim: int,
        obs_dim: int,
        hidden: int | Sequence[int] = (),
        input_dim: int = 0,
        memory_dim: int = 0,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        *,
        link: str = "softplus",
        floor: float = 1e-4,
    ) -> None:
        super().__init__(state_dim, obs_dim, hidden, input_dim, memory_dim, activation)
        self.link = check_link(link)
        self.floor = check_positive("floor", floor)

    def _expected(self, state: Tensor, inputs: Tensor | None, memory: Tensor | None) -> Tensor:
        return positive(self._outputs(state, inputs, memory), self.link, self.floor)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{super().extra_repr()}, link={self.link!r}"


class Poisson(_Count):
    """Counts with a network's rate,

    .. math:: y_{ki} \\sim \\text{Poisson}(\\text{floor} + \\text{link}(f_i(z_k, u_k, m_k))).

    Args:
        state_dim: size of the state.
        obs_dim: size of an observation.
        hidden: sizes of the hidden layers; ``()`` is an affine map.
        input_dim: size of the inputs; 0 ignores them.
        memory_dim: size of the memory's summary; 0 ignores it.
        activation: of the hidden layers (see ``blocks.activation_function``).
        link: ``"softplus"``, or ``"exp"`` (effects multiply; the exponent is held below 40).
        floor: least expected count; a rate of zero would make any count impossible.

    Raises:
        ValueError: a size is wrong; or, when called, the state, inputs or memory have another size or are missing.

    >>> import torch
    >>> from pyro_ssm.emissions import Poisson
    >>> law = Poisson(state_dim=2, obs_dim=3, link="exp")(torch.zeros(5, 2), torch.arange(5.0), None)
    >>> law.log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])
    """

    def forward(self, state: Tensor, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the observations; ``state`` ``(..., time, state)``."""
        rate = self._expected(state, inputs, memory)
        return dist.Independent(dist.Poisson(rate, validate_args=False), 1, validate_args=False)


class NegativeBinomial(_Count):
    """Counts that vary more than Poisson's, by mean and concentration,

    .. math::
        y_{ki} \\sim \\text{NegativeBinomial}(\\mu_{ki}, r_i), \\qquad
        \\mu_{ki} = \\text{floor} + \\text{link}(f_i(z_k, u_k, m_k)), \\qquad
        \\operatorname{Var} y_{ki} = \\mu_{ki} + \\mu_{ki}^2 / r_i.

    Args:
        state_dim: size of the state.
        obs_dim: size of an observation.
        hidden: sizes of the hidden layers; ``()`` is an affine map.
        input_dim: size of the inputs; 0 ignores them.
        memory_dim: size of the memory's summary; 0 ignores it.
        activation: of the hidden layers (see ``blocks.activation_function``).
        link: ``"softplus"``, or ``"exp"`` (effects multiply; the exponent is held below 40).
        floor: least expected count, and lower bound of the learnable concentration.
        concentration: first value of the learnable ``concentration`` :math:`r` ``(obs,)``; large values are Poisson's.

    Raises:
        ValueError: a size is wrong; or, when called, the state, inputs or memory have another size or are missing.

    >>> import torch
    >>> from pyro_ssm.emissions import NegativeBinomial
    >>> law = NegativeBinomial(state_dim=2, obs_dim=3)(torch.zeros(5, 2), torch.arange(5.0), None)
    >>> torch.allclose(law.variance, law.mean + law.mean**2 / 10)
    True
    """

    event_dims: ClassVar[Mapping[str, int]] = {"concentration": 1}

    def __init__(
        self,
        state_dim: int,
        obs_dim: int,
        hidden: int | Sequence[int] = (),
        input_dim: int = 0,
        memory_dim: int = 0,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        *,
        link: str = "softplus",
        floor: float = 1e-4,
        concentration: float | Tensor = 10.0,
    ) -> None:
        super().__init__(state_dim, obs_dim, hidden, input_dim, memory_dim, activation, link=link, floor=floor)
        self.concentration = positive_parameter("concentration", concentration, obs_dim, floor)

    def forward(self, state: Tensor, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the observations; ``state`` ``(..., time, state)``."""
        concentration = self.concentration
        logits = self._expected(state, inputs, memory).log() - concentration.log()
        law = dist.NegativeBinomial(concentration, logits=logits, validate_args=False)
        return dist.Independent(law, 1, validate_args=False)
