"""Where the state starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._conditioning import inputs_of
from pyro_ssm.blocks._gaussian import noise_law, set_noise
from pyro_ssm.blocks.linear import linear
from pyro_ssm.blocks.parameters import vector_parameter
from pyro_ssm.components import Gaussian, Initial
from pyro_ssm.distributions import SingularNormal

__all__ = ["KnownInitial", "NormalInitial"]


class NormalInitial(Initial, Gaussian):
    """A Gaussian start with learnable mean and covariance,

    .. math:: z_1 \\sim N(m + B u_1,\\; L L^T).

    Args:
        state_dim: size of the state.
        input_dim: size of the inputs; 0 ignores them. With inputs, the first ones shift the mean.
        covariance: ``"diagonal"`` (parameter ``scale``) or ``"full"`` (parameter ``scale_tril``).
        loc: first value of the mean, a number or ``(state_dim,)``.
        scale: first value of the standard deviations (a number, ``(state_dim,)``, or a whole factor if full).
        floor: lower bound of the learnable standard deviations.

    Parameters: ``loc`` ``(state,)``, ``input_matrix`` ``(state, input)`` (from zero), ``scale`` ``(state,)`` or
    ``scale_tril`` ``(state, state)``. For a start that is fixed, call ``requires_grad_(False)``.

    Shapes:
        The law has batch ``(..., 1)`` (that of ``time``) and event ``(state,)``.

    Raises:
        ValueError: a size is wrong; or, when called, inputs are missing or have another size.

    >>> import torch
    >>> from pyro_ssm.dynamics import NormalInitial
    >>> law = NormalInitial(state_dim=2)(torch.zeros(7, 1, dtype=torch.float64), None)
    >>> law.batch_shape, law.event_shape
    (torch.Size([7, 1]), torch.Size([2]))
    """

    event_dims: ClassVar[Mapping[str, int]] = {"loc": 1, "input_matrix": 2, "scale": 1, "scale_tril": 2}

    def __init__(
        self,
        state_dim: int,
        input_dim: int = 0,
        covariance: str = "diagonal",
        loc: float | Tensor = 0.0,
        scale: float | Tensor = 1.0,
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.state_dim = check_size("state_dim", state_dim)
        self.input_dim = check_size("input_dim", input_dim, least=0)
        self.loc = vector_parameter("loc", loc, state_dim)
        if input_dim:
            self.input_matrix = nn.Parameter(torch.zeros(state_dim, input_dim))
        set_noise(self, state_dim, covariance, scale, floor)

    def forward(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the first state; ``time`` ``(..., 1)``, ``inputs`` ``(..., 1, input)`` or None."""
        u = inputs_of(self, inputs, self.loc)
        loc = self.loc if u is None else linear(u, self.input_matrix, self.loc)
        batch = torch.broadcast_shapes(loc.shape[:-1], time.shape)
        return noise_law(self, loc.expand(batch + (self.state_dim,)))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"state_dim={self.state_dim}, input_dim={self.input_dim}, covariance={self.covariance!r}"


class KnownInitial(Initial, Gaussian):
    """A start that is known,

    .. math:: z_1 = v.

    A Gaussian law with no variance: it can be drawn from and goes into the Kalman family, and has no density.

    Args:
        value: v ``(state,)``; not learnt.

    Shapes:
        The law has batch ``(..., 1)`` (that of ``time``) and event ``(state,)``.

    Raises:
        ValueError: ``value`` is not a vector.

    >>> import torch
    >>> from pyro_ssm.dynamics import KnownInitial
    >>> KnownInitial(torch.tensor([1.0, 2.0]))(torch.zeros(1), None).sample()
    tensor([[1., 2.]])
    """

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        value = torch.as_tensor(value).detach().to(torch.get_default_dtype())
        if value.dim() != 1 or not len(value):
            raise ValueError(f"`value` must have shape (state,), got shape {tuple(value.shape)}")
        self.state_dim = len(value)
        self.register_buffer("value", value.clone())

    def forward(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the first state; ``time`` ``(..., 1)``."""
        zero = self.value.new_zeros(self.state_dim, self.state_dim)
        return SingularNormal(self.value.expand(time.shape + self.value.shape), scale_tril=zero, validate_args=False)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"state_dim={self.state_dim}"
