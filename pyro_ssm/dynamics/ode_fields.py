"""Fields of ordinary differential equations: second order, and a mechanism beside a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._conditioning import concatenate
from pyro_ssm.blocks.mlp import MLP
from pyro_ssm.dynamics.sde_fields import _beside, _shrink

__all__ = ["GreyBox", "SecondOrder"]


class SecondOrder(PyroModule):
    """A second-order equation as a field of positions and velocities, :math:`z = (x, v)`,

    .. math:: \\dot x = v, \\qquad \\dot v = a(t, z, u),

    with a network a (the acceleration), or the user's own. Its weights may have priors
    (``blocks.with_normal_priors(field)``): with ``NeuralODE`` that is the dynamics of ODE2VAE, whose emission sees the
    positions only (``emissions.Coordinates``). It may also be the drift of a :class:`NeuralSDE`.

    Args:
        position_dim: size of x; the state has twice as many coordinates, positions first.
        acceleration: ``a(t, z, u)`` from states ``(..., time, 2 * position)`` to ``(..., time, position)``; a module or
            a function. None builds a network.
        hidden: hidden layers of the network.
        input_dim: columns of the inputs that the network sees; 0 ignores them.
        uses_time: whether the network sees the time itself.
        activation: of the network; a smooth one keeps the order of the solver.
        scale: the network's last first weights are multiplied by it.

    Raises:
        TypeError: ``acceleration`` cannot be called.
        ValueError: when called, it returns another size.

    Source: Yildiz, Heinonen and Lähdesmäki (2019), "ODE2VAE: deep generative second order ODEs with Bayesian neural
    networks", NeurIPS, section 3.

    >>> import torch
    >>> from pyro_ssm.dynamics import SecondOrder
    >>> pendulum = SecondOrder(1, lambda t, z, u: -torch.sin(z[..., :1]))
    >>> pendulum(torch.zeros(1, 1), torch.tensor([[0.0, 2.0]]), None)
    tensor([[2., -0.]])
    """

    memory_dim = 0

    def __init__(
        self,
        position_dim: int,
        acceleration: Any = None,
        *,
        hidden: int | Sequence[int] = (64, 64),
        input_dim: int = 0,
        uses_time: bool = False,
        activation: str | Callable[[Tensor], Tensor] = "tanh",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.position_dim = check_size("position_dim", position_dim)
        self.state_dim = 2 * position_dim
        self.uses_time = uses_time
        if acceleration is None:
            self.input_dim = check_size("input_dim", input_dim, least=0)
            acceleration = MLP(self.state_dim + input_dim + uses_time, hidden, position_dim, activation)
            _shrink(acceleration, scale)
            self.network = acceleration
        elif not callable(acceleration):
            raise TypeError(f"`acceleration` must be callable as a(t, z, inputs), got {acceleration!r}")
        else:
            self.acceleration = acceleration

    def forward(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        """``(v, a)`` of states ``(..., time, 2 * position)``."""
        velocity = state[..., self.position_dim :]
        if "network" in self._modules:
            x = concatenate(self, state, inputs, None)
            change = self.network(_beside(x, time) if self.uses_time else x)
        else:
            change = self.acceleration(time, state, inputs)
            if change.shape[-1] != self.position_dim:
                raise ValueError(
                    f"`acceleration` must return (..., time, {self.position_dim}), got {tuple(change.shape)} for a "
                    f"state of shape {tuple(state.shape)}"
                )
        shape = torch.broadcast_shapes(velocity.shape, change.shape)
        return torch.cat([velocity.expand(shape), change.expand(shape)], -1)


class GreyBox(PyroModule):
    """A known mechanism and a network for what it leaves out,

    .. math:: f(t, z, u) = m(t, z, u) + c(t, z, u).

    The mechanism is usually a ``PyroModule`` with the constants of an equation, learnt (``PyroParam``) or with priors
    (``PyroSample``); the correction a network that starts near 0 (``MLPDrift(..., scale=1e-2)``). ``bind`` names their
    parameters ``field.mechanism.name`` and ``field.correction.name``. A :class:`FieldPenalty`, or a prior on the
    network's weights (``blocks.with_normal_priors(correction, 0.1)``), keeps the correction from doing the mechanism's
    work.

    Args:
        mechanism: m, a function or a module.
        correction: c, likewise.
        state_dim: size of the state; by default that of ``correction`` or of ``mechanism``.

    Raises:
        TypeError: a part cannot be called.
        ValueError: the sizes of the state differ; or, when called, the parts return different sizes.

    Source: Rackauckas et al. (2020), "Universal differential equations for scientific machine learning".

    >>> import torch, pyro.distributions as dist
    >>> from pyro.nn import PyroModule, PyroSample
    >>> from pyro_ssm.binding import random_parameters
    >>> from pyro_ssm.dynamics import GreyBox, MLPDrift
    >>> class Decay(PyroModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.rate = PyroSample(dist.LogNormal(0.0, 0.5))
    ...     def forward(self, t, z, u):
    ...         return -self.rate * z
    >>> random_parameters(GreyBox(Decay(), MLPDrift(2, 8, scale=0.01)))
    ['mechanism.rate']
    """

    def __init__(self, mechanism: Any, correction: Any, state_dim: int | None = None) -> None:
        super().__init__()
        for name, part in (("mechanism", mechanism), ("correction", correction)):
            if not callable(part):
                raise TypeError(f"`{name}` must be callable as {name}(t, z, inputs), got {part!r}")
        self.mechanism, self.correction = mechanism, correction
        sizes = [state_dim, *(getattr(part, "state_dim", None) for part in (correction, mechanism))]
        known = [size for size in sizes if size is not None]
        if len(set(known)) > 1:
            raise ValueError(
                f"`state_dim`, that of `correction` and that of `mechanism` differ: {sizes}. Build both parts for the "
                "whole state"
            )
        if known:
            self.state_dim = check_size("state_dim", known[0])

    def forward(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        """``state`` ``(..., time, state)`` to the same shape (or, of an acceleration, to half as many columns)."""
        known, learnt = self.mechanism(time, state, inputs), self.correction(time, state, inputs)
        if known.shape[-1] != learnt.shape[-1]:  # one column would broadcast over all
            raise ValueError(
                f"`mechanism` and `correction` must return as many columns as each other, got {tuple(known.shape)} and "
                f"{tuple(learnt.shape)} for a state of shape {tuple(state.shape)}"
            )
        return known + learnt
