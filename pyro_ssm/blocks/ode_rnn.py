"""Recurrent networks whose state follows a differential equation between observations: ODE-RNN and GRU-ODE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyro_ssm.blocks._cells import make_cell
from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._flow import field_value, flow, solver_of
from pyro_ssm.blocks._gru_flow import GRUFlow
from pyro_ssm.blocks.evolving import JumpBlock
from pyro_ssm.blocks.mlp import MLP

__all__ = ["GRUODE", "ODERNN"]


class _JumpRNN(JumpBlock):
    """A recurrent cell at observations; a subclass says what happens between them."""

    event_dims: ClassVar[Mapping[str, int]] = {"first": 1}

    def __init__(self, in_features: int, hidden_dim: int, cell: str, obs_dim: int) -> None:
        super().__init__()
        self.in_features = check_size("in_features", in_features)
        self.out_features = self.hidden_dim = check_size("hidden_dim", hidden_dim)
        self.obs_dim = check_size("obs_dim", obs_dim, least=0)
        if in_features < 2 * obs_dim:
            raise ValueError(
                f"`in_features` counts {obs_dim} values and their mask, so it is at least {2 * obs_dim}; got "
                f"{in_features}. Leave `obs_dim` at 0 for inputs without a mask"
            )
        self.cell = make_cell(cell, in_features, hidden_dim)
        self.first = nn.Parameter(torch.zeros(hidden_dim))

    def prepare(self, u: Tensor) -> tuple[Tensor, ...]:
        if self.obs_dim == 0:
            return self.cell.products(u), u[..., :0]
        values, mask, rest = self.observed(u)
        return self.cell.products(torch.cat([values, mask, rest], -1)), mask

    def see(self, state: Tensor, seen: tuple[Tensor, ...]) -> Tensor:
        products, mask = seen
        return self.where_any(mask, self.cell.update(products, state), state)


class ODERNN(_JumpRNN):
    """A recurrent network whose state follows a neural differential equation between observations,

    .. math::
        \\frac{dh}{dt} = f(h) \\;\\text{ over the gap } \\Delta_k, \\qquad
        h_k = \\text{cell}(u_k, h_k^-), \\qquad y_k = h_k

    With f = 0 it is the recurrent network itself. A time at which nothing is observed (``obs_dim`` given) leaves the
    state to the equation, so that such times change nothing but the solver's steps.

    Args:
        in_features: columns of u.
        hidden_dim: features of the state and of the output.
        field: f, a module or function ``(..., time, hidden)`` to the same shape, per unit of time; default a network
            with one hidden layer of ``hidden_dim`` tanh units.
        cell: ``"gru"`` or ``"rnn"`` (simple, hyperbolic tangent).
        obs_dim: columns of values, followed by their mask, with which u begins; 0: all of u is seen.
        method: ``"euler"``, ``"midpoint"``, ``"heun"`` or ``"rk4"`` with a fixed number of steps a gap; or adaptive,
            ``"bosh3"`` or ``"dopri5"``, with the error of every series below the tolerance.
        num_steps: steps a gap, whatever its length, of a fixed-step method.
        rtol, atol: of an adaptive method.

    State: ``(..., 1, hidden)``. Randomness: first values, from torch's generator.

    Raises:
        ValueError: an argument is out of its range; or, when called, ``field`` returns another shape.
        FloatingPointError: when called, an adaptive method cannot take a step.

    Source: Y. Rubanova, R. T. Q. Chen, D. Duvenaud (2019), Latent ordinary differential equations for
    irregularly-sampled time series, section 3, algorithm 1.

    >>> import torch
    >>> from pyro_ssm.blocks import ODERNN
    >>> block = ODERNN(3, hidden_dim=8, num_steps=2)
    >>> block(torch.zeros(2, 5, 3), dt=torch.rand(2, 5))[0].shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        in_features: int,
        hidden_dim: int,
        field: Callable[[Tensor], Tensor] | None = None,
        *,
        cell: str = "gru",
        obs_dim: int = 0,
        method: str = "rk4",
        num_steps: int = 1,
        rtol: float = 1e-4,
        atol: float = 1e-5,
    ) -> None:
        super().__init__(in_features, hidden_dim, cell, obs_dim)
        self.solver = solver_of(method, num_steps, rtol, atol)
        self.field = MLP(hidden_dim, (hidden_dim,), hidden_dim, "tanh") if field is None else field

    def evolve(self, state: Tensor, gap: Tensor) -> Tensor:
        return flow(lambda s, h: gap * field_value(self.field, h), state, gap, self.solver)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self.in_features}, {self.hidden_dim}, obs_dim={self.obs_dim}, method={self.solver.method!r}"


class GRUODE(_JumpRNN):
    """A GRU in continuous time between observations, and a recurrent cell at them,

    .. math::
        \\frac{dh}{dt} = (1 - u(h)) \\odot (n(h) - h), \\qquad
        u = \\sigma(b_u + U_u h), \\quad r = \\sigma(b_r + U_r h), \\quad n = \\tanh(b_n + r \\odot (U_n h + c))

    which is what a GRU without input moves to when its steps become short. The flow is a pull towards
    :math:`n \\in (-1, 1)`: a state in :math:`(-1, 1)` stays there, it is Lipschitz with constant 2 in time, and it
    rests exactly where the GRU does. The gates are torch's (the reset gate acts after the matrix); the paper's
    acts before it.

    Method "exponential" (the default) is an exponential midpoint rule: over a step it solves the equation with u and n
    held, first at the start, then at the midpoint that this gives; order 2, and no step, however long, leaves
    :math:`(-1, 1)`.

    Args:
        in_features: columns of u.
        hidden_dim: features of the state and of the output.
        cell: of the jumps, ``"gru"`` or ``"rnn"``.
        obs_dim: columns of values, followed by their mask, with which u begins; 0: all of u is seen.
        method: ``"exponential"``, or as for :class:`ODERNN`.
        num_steps: steps a gap, whatever its length, of a fixed-step method.
        rtol, atol: of an adaptive method.

    State: ``(..., 1, hidden)``. Randomness: first values, from torch's generator.

    Source: E. De Brouwer, J. Simm, A. Arany, Y. Moreau (2019), GRU-ODE-Bayes: continuous modeling of
    sporadically-observed time series, sections 2.2 and 2.3.

    >>> import torch
    >>> from pyro_ssm.blocks import GRUODE
    >>> block = GRUODE(3, hidden_dim=8)
    >>> h = block.evolve(torch.full((1, 1, 8), 0.9), torch.full((1, 1, 1), 1000.0))
    >>> bool(h.abs().max() < 1)
    True
    """

    def __init__(
        self,
        in_features: int,
        hidden_dim: int,
        *,
        cell: str = "gru",
        obs_dim: int = 0,
        method: str = "exponential",
        num_steps: int = 2,
        rtol: float = 1e-4,
        atol: float = 1e-5,
    ) -> None:
        super().__init__(in_features, hidden_dim, cell, obs_dim)
        self.flow = GRUFlow(hidden_dim, solver_of(method, num_steps, rtol, atol, "exponential"))

    def evolve(self, state: Tensor, gap: Tensor) -> Tensor:
        return self.flow(state, gap)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self.in_features}, {self.hidden_dim}, obs_dim={self.obs_dim}, method={self.flow.solver.method!r}"
