"""A state driven by the path of the data: neural controlled differential equations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_choice, check_size
from pyro_ssm.blocks._flow import field_value, flow, solver_of
from pyro_ssm.blocks.evolving import EvolvingBlock, first_state
from pyro_ssm.blocks.linear import Linear
from pyro_ssm.blocks.mlp import MLP
from pyro_ssm.ops import interpolation_slope

__all__ = ["NeuralCDE"]

#: z; the control; its slope over the last interval; the gap that is not yet crossed; steps seen (0, 1, or 2 for more)
State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class NeuralCDE(EvolvingBlock):
    """A neural controlled differential equation: the state moves as the path of the data moves,

    .. math::
        z_1 = z_0 + \\zeta(X_1), \\qquad dz = f(z)\\, dX, \\qquad y_k = z_k, \\qquad
        X_k = (t_k,\\ x_k,\\ c_k,\\ v_k)

    with f a network to matrices ``(hidden, channels)``. X has the time, the values x, for each value the number c of
    times it was seen (where ``obs_dim`` is given), and other columns v. A missing value keeps the last one that was
    seen, 0 before the first, so that nothing of the future enters. Between the steps X is interpolated:

    * ``"linear"``: dX/dt constant over the gap.
    * ``"cubic"``: Hermite's polynomial with backward differences: the slope at each step is that of the interval
      before it, so that the path does not depend on later values.
    * ``"rectilinear"``: first the time goes on while the values are held, then these move while the time is held. The
      state before an observation is then known without it, which forecasting needs (``models.neural_cde``).

    The solution does not depend on the speed at which X is run through: with ``clock=False``, and in the linear form,
    not on the gaps at all. The output at step k depends on steps up to k only.

    Args:
        in_features: columns of u.
        hidden_dim: features of the state and of the output.
        field: f, a module or function from ``(..., time, hidden)`` to ``(..., time, hidden, channels)``; default a
            network of smooth units with a last tanh. ``channels`` are ``in_features + clock``, in the order time, u.
        obs_dim: columns of values, followed by their mask, with which u begins; 0: all of u is the path.
        interpolation: see above.
        clock: whether the time is a channel of X.
        hidden: sizes of the hidden layers of the default f.
        method, num_steps, rtol, atol: of the solver, for each interval (each of its two parts where it is rectilinear),
            as for :class:`ODERNN`.

    Raises:
        ValueError: an argument is out of its range; or, when called, ``field`` returns another shape.
        FloatingPointError: when called, an adaptive method cannot take a step.

    State: a tuple of tensors ``(..., 1, n)``. Randomness: first values, from torch's generator.

    Source: P. Kidger, J. Morrill, J. Foster, T. Lyons (2020), Neural controlled differential equations for irregular
    time series, section 3; J. Morrill, P. Kidger, L. Yang, T. Lyons (2021), Neural controlled differential equations
    for online prediction tasks, section 3.

    >>> import torch
    >>> from pyro_ssm.blocks import NeuralCDE
    >>> block = NeuralCDE(3, hidden_dim=8, interpolation="cubic")
    >>> block(torch.randn(2, 5, 3), dt=torch.rand(2, 5))[0].shape
    torch.Size([2, 5, 8])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"first": 1}

    def __init__(
        self,
        in_features: int,
        hidden_dim: int,
        field: Callable[[Tensor], Tensor] | None = None,
        *,
        obs_dim: int = 0,
        interpolation: str = "linear",
        clock: bool = True,
        hidden: int | Sequence[int] = (64,),
        method: str = "rk4",
        num_steps: int = 1,
        rtol: float = 1e-4,
        atol: float = 1e-5,
    ) -> None:
        super().__init__()
        self.in_features = check_size("in_features", in_features)
        self.out_features = self.hidden_dim = check_size("hidden_dim", hidden_dim)
        self.obs_dim = check_size("obs_dim", obs_dim, least=0)
        if in_features < 2 * obs_dim:
            raise ValueError(f"`in_features` counts {obs_dim} values and their mask: at least {2 * obs_dim} is wanted")
        self.interpolation = check_choice("interpolation", interpolation, ("cubic", "linear", "rectilinear"))
        self.clock, self.foresees = clock, interpolation == "rectilinear"
        self.solver = solver_of(method, num_steps, rtol, atol)
        self.field = _MatrixField(hidden_dim, in_features + clock, hidden) if field is None else field
        self.enter = Linear(in_features, hidden_dim)
        self.first = nn.Parameter(torch.zeros(hidden_dim))

    def start(self, shape: torch.Size | tuple[int, ...]) -> State:
        control = self.first.new_zeros((*shape, 1, self.in_features))
        return first_state(self.first, tuple(shape)), control, control, control[..., :1], control[..., :1]

    def prepare(self, u: Tensor) -> tuple[Tensor, ...]:
        if self.obs_dim == 0:
            return u[..., :0], u[..., :0], u
        return self.observed(u)

    def evolve(self, state: State, gap: Tensor) -> State:
        z, control, slope, waiting, steps = state
        gap = gap * (steps > 0)  # the path begins with the first step
        if not self.foresees:
            return z, control, slope, waiting + gap, steps
        if self.clock:
            z = flow(lambda s, z: self._field(z)[..., 0] * gap, z, gap, self.solver)
        return z, control, slope, waiting, steps

    def see(self, state: State, seen: tuple[Tensor, ...]) -> State:
        z, control, slope, gap, steps = state
        now = self._control(control, seen)
        change = now - control
        begins = steps == 0
        left = change if self.interpolation != "cubic" else torch.where(steps > 1, slope * gap, change)
        # the interval's polynomial in the part s of the gap: values, and slopes at both ends
        rows = torch.cat(torch.broadcast_tensors(control, left, 2 * (change - left), left - change), -1)
        rows = torch.where(begins, torch.zeros_like(rows), rows)

        def velocity(s: float | Tensor, z: Tensor) -> Tensor:
            moves = interpolation_slope(rows, torch.as_tensor(s, dtype=z.dtype, device=z.device), self.in_features)
            if self.clock:
                moves = torch.cat([gap.expand(moves.shape[:-1] + (1,)), moves], -1)
            return (self._field(z) @ moves.unsqueeze(-1)).squeeze(-1)

        moved = torch.where(begins, z + self.enter(now), flow(velocity, z, gap, self.solver))
        crossed = torch.where(gap > 0, gap, torch.ones_like(gap))
        return moved, now, change / crossed, torch.zeros_like(gap), (steps + 1).clamp_max(2)

    def read(self, state: State) -> Tensor:
        return state[0]

    def _field(self, z: Tensor) -> Tensor:
        return field_value(self.field, z, self.in_features + self.clock)

    def _control(self, before: Tensor, seen: tuple[Tensor, ...]) -> Tensor:
        values, mask, rest = seen
        last, count, _ = before.split([self.obs_dim, self.obs_dim, self.in_features - 2 * self.obs_dim], -1)
        parts = [torch.where(mask.bool(), values, last), count + mask, rest]
        lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(lead + part.shape[-1:]) for part in parts], -1)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        kind = f"interpolation={self.interpolation!r}, method={self.solver.method!r}"
        return f"{self.in_features}, {self.hidden_dim}, obs_dim={self.obs_dim}, {kind}"


class _MatrixField(PyroModule):
    """A network of the state to matrices whose entries lie in (-1, 1)."""

    def __init__(self, hidden_dim: int, channels: int, hidden: int | Sequence[int]) -> None:
        super().__init__()
        self.channels = channels
        self.network = MLP(hidden_dim, hidden, hidden_dim * channels, "silu")  # smooth, for the solver

    def forward(self, state: Tensor) -> Any:
        return torch.tanh(self.network(state)).unflatten(-1, (-1, self.channels))
