"""The network of a posterior drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyro.nn import PyroModule
from torch import Tensor

from pyro_ssm.blocks import MLP, Linear, activation_function
from pyro_ssm.blocks._checks import hidden_sizes

__all__ = ["PosteriorDrift"]


class PosteriorDrift(PyroModule):
    """A network of the state and the features of the data,

    .. math:: v(z, c) = \\text{MLP}(a(W z + C c + b)).

    Args:
        state_dim: size of the state.
        feature_dim: size of the features.
        out_dim: size of the result.
        hidden: sizes of the hidden layers, at least one.
        activation: see ``blocks.activation_function``.

    >>> import torch
    >>> from pyro_ssm.guides import PosteriorDrift
    >>> PosteriorDrift(2, 8, 2)(torch.zeros(1), torch.zeros(3, 5, 2), torch.zeros(5, 8)).shape
    torch.Size([3, 5, 2])
    """

    def __init__(
        self,
        state_dim: int,
        feature_dim: int,
        out_dim: int,
        hidden: int | Sequence[int] = (64, 64),
        activation: str | Callable[[Tensor], Tensor] = "softplus",
    ) -> None:
        super().__init__()
        sizes = hidden_sizes(hidden)
        if not sizes:
            raise ValueError("`hidden` must have at least one layer, got ()")
        self.from_state = Linear(state_dim, sizes[0], bias=False)
        self.from_features = Linear(feature_dim, sizes[0])
        self.rest = MLP(sizes[0], sizes[1:], out_dim, activation)
        self.activation = activation

    def forward(self, time: Tensor, state: Tensor, features: Tensor) -> Tensor:
        """``(..., time, out)``."""
        return self.given(state, self.from_features(features))

    def given(self, state: Tensor, prepared: Tensor) -> Tensor:
        """The same with ``from_features(features)`` computed before, for all times at once."""
        return self.rest(activation_function(self.activation)(self.from_state(state) + prepared))

    def softplus_layers(self) -> list[Tensor] | None:
        """The weights that :meth:`given` uses, as :func:`~pyro_ssm.ops.euler_network_path` takes them.

        None for another activation, weights with draws, or a subclass with another ``given``.
        """
        if self.activation != "softplus" or type(self).given is not PosteriorDrift.given:
            return None
        weights: list[Tensor] = [self.from_state.weight]
        for layer in self.rest.layers:
            weights += [layer.weight, layer.bias]
        dims = [2, *(2, 1) * len(self.rest.layers)]
        return weights if [weight.dim() for weight in weights] == dims else None
