"""Real-valued observations around a network's mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from pyro import distributions as dist
from torch import Tensor

from pyro_ssm.blocks._checks import check_positive
from pyro_ssm.blocks._gaussian import diagonal_normal
from pyro_ssm.blocks.parameters import positive_parameter, softplus_above
from pyro_ssm.components import Gaussian
from pyro_ssm.emissions._network import NetworkEmission

__all__ = ["Normal", "StudentT"]


class _LocationScale(NetworkEmission):
    """A network's location, and a scale that is a parameter or the network's as well."""

    event_dims: ClassVar[Mapping[str, int]] = {"scale": 1}

    def __init__(
        self,
        state_dim: int,
        obs_dim: int,
        hidden: int | Sequence[int] = (),
        input_dim: int = 0,
        memory_dim: int = 0,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        *,
        scale: float | Tensor = 0.5,
        network_scale: bool = False,
        floor: float = 1e-3,
    ) -> None:
        super().__init__(
            state_dim, obs_dim, hidden, input_dim, memory_dim, activation, outputs_per_obs=1 + network_scale
        )
        self.network_scale = network_scale
        self.floor = check_positive("floor", floor)
        if not network_scale:
            self.scale = positive_parameter("scale", scale, obs_dim, floor)

    def _loc_and_scale(self, state: Tensor, inputs: Tensor | None, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        outputs = self._outputs(state, inputs, memory)
        if not self.network_scale:
            return outputs, self.scale
        loc, raw_scale = outputs.chunk(2, dim=-1)
        return loc, softplus_above(raw_scale, self.floor)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{super().extra_repr()}, network_scale={self.network_scale}"


class Normal(_LocationScale, Gaussian):
    """Gaussian observations around a network's mean,

    .. math:: y_{ki} \\sim N(f_i(z_k, u_k, m_k),\\; s_i^2).

    Args:
        state_dim: size of the state.
        obs_dim: size of an observation.
        hidden: sizes of the hidden layers; ``()`` is an affine map.
        input_dim: size of the inputs; 0 ignores them.
        memory_dim: size of the memory's summary; 0 ignores it.
        activation: of the hidden layers (see ``blocks.activation_function``).
        scale: first value of the learnable parameter ``scale`` ``(obs,)``, in the units of the observations.
        network_scale: whether the standard deviation comes from the network instead; there is then no ``scale``.
        floor: least standard deviation, in the units of the observations. A floor of 0.001 is meant for observations
            of about unit variance.

    Raises:
        ValueError: a size is wrong; or, when called, the state, inputs or memory have another size or are missing.

    >>> import torch
    >>> from pyro_ssm.emissions import Normal
    >>> law = Normal(state_dim=2, obs_dim=3, hidden=8, scale=0.1)(torch.zeros(5, 2), torch.arange(5.0), None)
    >>> law.variance[0].detach()
    tensor([0.0100, 0.0100, 0.0100])
    """

    def forward(self, state: Tensor, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the observations; ``state`` ``(..., time, state)``."""
        return diagonal_normal(*self._loc_and_scale(state, inputs, memory))


class StudentT(_LocationScale):
    """Observations with heavy tails around a network's location,

    .. math:: y_{ki} = f_i(z_k, u_k, m_k) + s_i\\, t_{ki}, \\qquad t_{ki} \\sim \\text{Student}(\\nu_i),

    with :math:`\\nu_i > 2`, so that the variance :math:`s_i^2 \\nu_i / (\\nu_i - 2)` is finite.

    Args:
        state_dim: size of the state.
        obs_dim: size of an observation.
        hidden: sizes of the hidden layers; ``()`` is an affine map.
        input_dim: size of the inputs; 0 ignores them.
        memory_dim: size of the memory's summary; 0 ignores it.
        activation: of the hidden layers (see ``blocks.activation_function``).
        scale: first value of the learnable parameter ``scale`` ``(obs,)``, in the units of the observations.
        network_scale: whether the scale comes from the network instead; there is then no ``scale``.
        floor: least scale, in the units of the observations.
        df: first value of the learnable degrees of freedom ``df`` ``(obs,)``, above 2.

    Raises:
        ValueError: a size is wrong; or, when called, the state, inputs or memory have another size or are missing.

    >>> import torch
    >>> from pyro_ssm.emissions import StudentT
    >>> law = StudentT(state_dim=2, obs_dim=3, scale=1.0, df=4.0)(torch.zeros(5, 2), torch.arange(5.0), None)
    >>> law.variance[0].detach()
    tensor([2.0000, 2.0000, 2.0000])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"scale": 1, "df": 1}

    def __init__(
        self,
        state_dim: int,
        obs_dim: int,
        hidden: int | Sequence[int] = (),
        input_dim: int = 0,
        memory_dim: int = 0,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        *,
        scale: float | Tensor = 0.5,
        network_scale: bool = False,
        floor: float = 1e-3,
        df: float | Tensor = 5.0,
    ) -> None:
        super().__init__(
            state_dim,
            obs_dim,
            hidden,
            input_dim,
            memory_dim,
            activation,
            scale=scale,
            network_scale=network_scale,
            floor=floor,
        )
        self.df = positive_parameter("df", df, obs_dim, floor=2.0)

    def forward(self, state: Tensor, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the observations; ``state`` ``(..., time, state)``."""
        loc, scale = self._loc_and_scale(state, inputs, memory)
        return dist.Independent(dist.StudentT(self.df, loc, scale, validate_args=False), 1, validate_args=False)
