"""Feed-forward networks whose every weight may have a prior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.nn.functional as F
from pyro import distributions as dist
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_choice, check_positive, hidden_sizes
from pyro_ssm.blocks.linear import Linear, check_map
from pyro_ssm.ops import softplus, softplus_network

__all__ = ["MLP", "activation_function", "with_normal_priors"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "relu": F.relu,
    "sigmoid": F.sigmoid,
    "silu": F.silu,
    "softplus": softplus,
    "tanh": F.tanh,
}

Module = TypeVar("Module", bound=nn.Module)


def activation_function(activation: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The elementwise function of that name (elu, gelu, relu, sigmoid, silu, softplus, tanh), or the one that is given.

    >>> import torch
    >>> from pyro_ssm.blocks import activation_function
    >>> activation_function("relu")(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """
    if isinstance(activation, str):
        return _ACTIVATIONS[check_choice("activation", activation, sorted(_ACTIVATIONS))]
    if not callable(activation):
        raise TypeError(f"`activation` must be a name or a function of a tensor, got {activation!r}")
    return activation


class MLP(PyroModule):
    """A feed-forward network of :class:`Linear` layers,

    .. math:: h_0 = x, \\quad h_{i+1} = a(W_i h_i + b_i), \\quad y = W_n h_n + b_n.

    Its parameters are named ``layers.0.weight``, ``layers.0.bias``, ... and each may be bound or given a prior.

    Args:
        in_features: size of ``x``'s last dimension.
        hidden: sizes of the hidden layers: a number, a sequence, or ``()`` for one affine map.
        out_features: size of the result's last dimension.
        activation: a name (see :func:`activation_function`) or a function; not applied to the result.

    Shapes:
        ``(..., time, in)`` gives ``(..., time, out)``.

    >>> import torch
    >>> from pyro_ssm.blocks import MLP
    >>> MLP(2, (8, 8), 3)(torch.zeros(5, 2)).shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        in_features: int,
        hidden: int | Sequence[int],
        out_features: int,
        activation: str | Callable[[Tensor], Tensor] = "relu",
    ) -> None:
        super().__init__()
        sizes = (in_features, *hidden_sizes(hidden), out_features)
        layers: Any = PyroModule[nn.ModuleList]  # mypy does not know this class factory
        self.layers = layers(Linear(i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True))
        self.activation = activation
        activation_function(activation)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., time, in)`` to ``(..., time, out)``."""
        if (network := self.softplus_layers()) is not None:
            check_map(x, network[0])
            return softplus_network(x, network)
        activate = activation_function(self.activation)
        *hidden, last = self.layers
        for layer in hidden:
            x = activate(layer(x))
        return last(x)

    def softplus_layers(self) -> list[Tensor] | None:
        """Weight and bias of each layer, as :func:`~pyro_ssm.ops.softplus_network` takes them.

        None for another activation, weights with draws, or layers of another kind.
        """
        if self.activation != "softplus" or any(type(layer).forward is not Linear.forward for layer in self.layers):
            return None
        weights = [part for layer in self.layers for part in (layer.weight, layer.bias)]
        dims = [2, 1] * len(self.layers)
        return weights if [0 if part is None else part.dim() for part in weights] == dims else None

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"activation={self.activation}" if isinstance(self.activation, str) else ""


def with_normal_priors(module: Module, scale: float = 1.0) -> Module:
    """Put independent normal priors on all weights of the :class:`Linear` layers below ``module``, in place.

    .. math:: W_{ij} \\sim N(0, \\text{scale}^2 / \\text{in}), \\qquad b_i \\sim N(0, \\text{scale}^2)

    so that a layer's output has the same variance whatever its width (Neal 1996, section 2.1).

    Args:
        module: a :class:`Linear`, an :class:`MLP`, a component, or a whole model; move it to its device first, because
            a prior stays where it was made.
        scale: prior standard deviation of a layer's output for inputs of unit variance.

    Returns:
        ``module`` itself, whose weights are now ``PyroSample``.

    Raises:
        ValueError: there is no :class:`Linear` below ``module``.

    >>> from pyro_ssm.binding import random_parameters
    >>> from pyro_ssm.blocks import MLP, with_normal_priors
    >>> random_parameters(with_normal_priors(MLP(2, 4, 1)))
    ['layers.0.weight', 'layers.0.bias', 'layers.1.weight', 'layers.1.bias']
    """
    scale = check_positive("scale", scale)
    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, Linear)]
    if not layers:
        raise ValueError(f"with_normal_priors found no blocks.Linear below {type(module).__name__}")
    for layer in layers:
        weight, bias = layer.weight, layer.bias
        spread = weight.new_full(weight.shape, scale / layer.in_features**0.5)
        layer.weight = PyroSample(dist.Normal(spread.new_zeros(()), spread).to_event(2))
        if bias is not None:
            layer.bias = PyroSample(dist.Normal(bias.new_zeros(()), bias.new_full(bias.shape, scale)).to_event(1))
    return module
