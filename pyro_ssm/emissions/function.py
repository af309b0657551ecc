"""Real-valued observations around a known function of the state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._conditioning import StateFunction, check_function, function_value
from pyro_ssm.blocks._gaussian import noise_law, set_noise
from pyro_ssm.components import Emission, Gaussian

__all__ = ["FunctionNormal"]


class FunctionNormal(Emission, Gaussian):
    """Gaussian observations around a known function,

    .. math:: y_k \\sim N(h(z_k, u_k),\\; R R^T).

    The counterpart of :class:`~pyro_ssm.dynamics.FunctionTransition`: a sensor whose equation is known, such as the
    sine of an angle or the distance to a beacon. Unknown constants are parameters of a ``PyroModule``, to learn or to
    give priors (bind names them ``function.name``).

    Args:
        state_dim: size of the state.
        obs_dim: size of an observation.
        function: ``h(state, inputs)`` from ``(..., time, state)`` to ``(..., time, obs)``; a ``PyroModule`` (parameters
            found by ``bind``), another module, or a plain function. It gets ``inputs`` as the data has them (or None).
            It must broadcast: drawn constants have leading dims ``(*draws, *plates, 1, 1)`` that the state may lack.
        scale: first value of the noise's standard deviations (a number, ``(obs,)``, or a whole factor if full), in the
            units of the observations.
        floor: lower bound of the learnable standard deviations.
        covariance: ``"diagonal"`` (parameter ``scale`` ``(obs,)``) or ``"full"`` (parameter ``scale_tril``).

    Raises:
        TypeError: ``function`` cannot be called.
        ValueError: a size is wrong; or, when called, the state or the function's value has another size.

    >>> import torch
    >>> from pyro_ssm.emissions import FunctionNormal
    >>> emission = FunctionNormal(2, 1, lambda z, u: torch.sin(z[..., :1]), scale=0.1)
    >>> emission(torch.ones(4, 2), torch.arange(4.0), None).mean[0]
    tensor([0.8415])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"scale": 1, "scale_tril": 2}

    def __init__(
        self,
        state_dim: int,
        obs_dim: int,
        function: StateFunction,
        scale: float | Tensor = 0.5,
        floor: float = 1e-4,
        covariance: str = "diagonal",
    ) -> None:
        super().__init__()
        self.state_dim = check_size("state_dim", state_dim)
        self.obs_dim = check_size("obs_dim", obs_dim)
        self.function = check_function(function)
        set_noise(self, obs_dim, covariance, scale, floor)

    def forward(self, state: Tensor, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the observations; ``state`` ``(..., time, state)``."""
        return noise_law(self, function_value(self, state, inputs, self.obs_dim, "an observation"))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"state_dim={self.state_dim}, obs_dim={self.obs_dim}, covariance={self.covariance!r}"
