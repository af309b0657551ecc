"""Drifts and diffusions of stochastic differential equations: linear, constant, and networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_positive, check_size, hidden_sizes
from pyro_ssm.blocks._conditioning import concatenate, inputs_of
from pyro_ssm.blocks._gaussian import with_time
from pyro_ssm.blocks.linear import Linear, linear
from pyro_ssm.blocks.mlp import MLP, activation_function
from pyro_ssm.blocks.parameters import positive_parameter, softplus_above, vector_parameter
from pyro_ssm.ops import CoordinateScale
from pyro_ssm.ops.block_diagonal import block_rows

__all__ = ["ConstantDiffusion", "ElementwiseDiffusion", "LinearDrift", "MLPDiffusion", "MLPDrift"]


_DENSE = 16  # states up to which block-diagonal matrices are multiplied as dense ones


class LinearDrift(PyroModule):
    """The affine drift :math:`f(t, z, u) = F z + B u + c`.

    Args:
        matrix: first value of ``F`` ``(state, state)``, in 1 / time.
        offset: first value of ``c``, a number or ``(state,)``, in state / time.
        input_dim: size of the inputs; 0 ignores them.

    Parameters: ``matrix``, ``offset``, ``input_matrix`` ``(state, input)`` (from zero).

    Raises:
        ValueError: ``matrix`` is not square.

    >>> import torch
    >>> from pyro_ssm.dynamics import LinearDrift
    >>> LinearDrift(torch.tensor([[-2.0]]), offset=1.0)(torch.zeros(1, 1), torch.ones(1, 1), None)
    tensor([[-1.]], grad_fn=<AddmmBackward0>)
    """

    event_dims: ClassVar[Mapping[str, int]] = {"matrix": 2, "offset": 1, "input_matrix": 2}

    def __init__(self, matrix: Tensor, offset: float | Tensor = 0.0, input_dim: int = 0) -> None:
        super().__init__()
        matrix = torch.as_tensor(matrix).detach().to(torch.get_default_dtype())
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"`matrix` must be square (state, state), got shape {tuple(matrix.shape)}")
        self.state_dim = matrix.shape[0]
        self.input_dim = check_size("input_dim", input_dim, least=0)
        self.matrix = nn.Parameter(matrix.clone())
        self.offset = vector_parameter("offset", offset, self.state_dim)
        if input_dim:
            self.input_matrix = nn.Parameter(torch.zeros(self.state_dim, input_dim))

    def forcing(self, inputs: Tensor | None) -> Tensor:
        """:math:`B u + c`, ``(..., time or 1, state)``."""
        offset = with_time(self.offset, 1)
        u = inputs_of(self, inputs, self.matrix)
        value = offset if u is None else linear(u, self.input_matrix, offset)
        return value.expand(value.shape[:-1] + (self.state_dim,))

    def forward(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        """``state`` ``(..., time, state)`` to the same shape."""
        u = inputs_of(self, inputs, self.matrix)
        shift = self.offset if u is None else linear(u, self.input_matrix, self.offset)
        return linear(state, self.matrix, shift)


class MLPDrift(PyroModule):
    """A network as drift, :math:`f(t, z, u) = \\text{MLP}(z, u, t)`.

    Args:
        state_dim: size of the state.
        hidden: sizes of the hidden layers.
        input_dim: size of the inputs; 0 ignores them.
        uses_time: whether the network sees the time itself (in the dtype of the state: keep times near 0).
        activation: a smooth one keeps the order of the solver (see ``blocks.activation_function``).
        scale: the last layer's first weights are multiplied by it; a small number starts near :math:`f = 0`.

    >>> import torch
    >>> from pyro_ssm.dynamics import MLPDrift
    >>> MLPDrift(state_dim=2)(torch.zeros(5, 1), torch.zeros(3, 5, 2), None).shape
    torch.Size([3, 5, 2])
    """

    memory_dim = 0

    def __init__(
        self,
        state_dim: int,
        hidden: int | Sequence[int] = (64, 64),
        input_dim: int = 0,
        uses_time: bool = False,
        activation: str | Callable[[Tensor], Tensor] = "softplus",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.state_dim = check_size("state_dim", state_dim)
        self.input_dim = check_size("input_dim", input_dim, least=0)
        self.uses_time = uses_time
        self.network = MLP(state_dim + input_dim + uses_time, hidden, state_dim, activation)
        _shrink(self.network, scale)

    def forward(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        """``state`` ``(..., time, state)`` to the same shape."""
        x = concatenate(self, state, inputs, None)
        return self.network(_beside(x, time) if self.uses_time else x)


class ConstantDiffusion(PyroModule):
    """A diffusion that depends on nothing: :math:`g = \\text{diag}(q)`, or a matrix.

    Args:
        value: first value: a number or ``(state,)`` for diagonal noise (positive, learnt above ``floor``), or a
            matrix ``(state, noise)`` for additive noise (learnt freely). In state / sqrt(time).
        state_dim: size of the state, where ``value`` is a number.
        floor: lower bound of the learnable diagonal.

    Parameters: ``scale`` ``(state,)``, or ``matrix`` ``(state, noise)``. For a diffusion that is known, call
    ``requires_grad_(False)``.

    >>> import torch
    >>> from pyro_ssm.dynamics import ConstantDiffusion
    >>> ConstantDiffusion(0.5, state_dim=2)(torch.zeros(1, 1), torch.zeros(1, 2), None).detach()
    tensor([0.5000, 0.5000])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"scale": 1, "matrix": 2}
    state_free = True

    def coordinate_scale(self) -> Tensor | None:
        """The scales as :func:`~pyro_ssm.ops.euler_network_path` takes them; None for a matrix or draws."""
        own = type(self).forward is ConstantDiffusion.forward  # or a subclass has another
        return self.scale if own and self.is_diagonal and self.scale.dim() == 1 else None

    def __init__(self, value: float | Tensor, state_dim: int | None = None, floor: float = 1e-4) -> None:
        super().__init__()
        value = torch.as_tensor(value, dtype=torch.get_default_dtype()).detach()
        self.is_diagonal = value.dim() < 2
        if not self.is_diagonal:
            self.state_dim, self.noise_dim = value.shape
            self.matrix = nn.Parameter(value.clone())
            return
        self.state_dim = check_size("state_dim", value.numel() if state_dim is None else state_dim)
        self.noise_dim = self.state_dim
        self.scale = positive_parameter("value", value, self.state_dim, floor)

    def forward(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        """``(..., state)``, or ``(..., time or 1, state, noise)``."""
        return self.scale if self.is_diagonal else with_time(self.matrix, 2)


class ElementwiseDiffusion(PyroModule):
    """Diagonal noise whose scale depends on its own coordinate: one small network for each,

    .. math:: g_i(z_i) = \\text{floor} + \\log(1 + e^{a_i}), \\qquad a_i = v_i^T \\phi(w_i z_i + b_i) + c_i.

    Milstein's scheme asks for this form. All networks are evaluated together.

    Args:
        state_dim: size of the state.
        hidden: hidden units of each network.
        init: the scale at the start, about.
        ceiling: upper bound of the scale, reached by a sigmoid in place of the softplus; None has none.
        activation: see ``blocks.activation_function``.
        floor: least scale.

    Parameters: ``slope``, ``shift``, ``weight`` ``(state, hidden)``, ``bias`` ``(state,)``.

    >>> import torch
    >>> from pyro_ssm.dynamics import ElementwiseDiffusion
    >>> ElementwiseDiffusion(state_dim=2, hidden=8)(torch.zeros(5, 1), torch.zeros(3, 5, 2), None).shape
    torch.Size([3, 5, 2])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"slope": 2, "shift": 2, "weight": 2, "bias": 1}
    elementwise = True

    def __init__(
        self,
        state_dim: int,
        hidden: int = 32,
        init: float = 0.5,
        ceiling: float | None = None,
        activation: str | Callable[[Tensor], Tensor] = "softplus",
        floor: float = 1e-3,
    ) -> None:
        super().__init__()
        self.state_dim = self.noise_dim = check_size("state_dim", state_dim)
        self.hidden = check_size("hidden", hidden)
        self.floor = check_positive("floor", floor)
        self.ceiling = None if ceiling is None else check_positive("ceiling", ceiling)
        if not floor < init or (ceiling is not None and not init < ceiling):
            raise ValueError(f"`init` must lie between `floor` {floor} and `ceiling` {ceiling}, got {init}")
        self.activation = activation
        activation_function(activation)
        bound = self.hidden**-0.5
        self.slope = nn.Parameter(torch.empty(state_dim, hidden).uniform_(-1, 1))
        self.shift = nn.Parameter(torch.empty(state_dim, hidden).uniform_(-1, 1))
        self.weight = nn.Parameter(torch.empty(state_dim, hidden).uniform_(-0.1 * bound, 0.1 * bound))
        level = torch.tensor(init - floor)
        raw = level.expm1().log() if ceiling is None else (level / (ceiling - floor)).logit()
        self.bias = nn.Parameter(raw.expand(state_dim).clone())

    @property
    def _is_dense(self) -> bool:
        return self.slope.dim() + self.shift.dim() + self.weight.dim() == 6 and self.state_dim <= _DENSE

    def coordinate_scale(self) -> CoordinateScale | None:
        """The parameters as :func:`~pyro_ssm.ops.euler_network_path` takes them; None where they have draws."""
        own = type(self).forward is ElementwiseDiffusion.forward  # or a subclass has another
        if not own or not self._is_dense or self.activation != "softplus" or self.bias.dim() != 1:
            return None
        span = None if self.ceiling is None else self.ceiling - self.floor
        return CoordinateScale(self.slope, self.shift, self.weight, self.bias, self.floor, span)

    def forward(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        """``(..., time, state)``."""
        activate = activation_function(self.activation)
        if self._is_dense:
            # as products with block-diagonal matrices: some zeros are cheaper than three passes over the hidden units
            hidden = activate(linear(state, block_rows(self.slope).mT, self.shift.flatten()))
            raw = linear(hidden, block_rows(self.weight)) + self.bias
        else:
            hidden = activate(torch.addcmul(self.shift, state.unsqueeze(-1), self.slope))
            raw = torch.linalg.vecdot(hidden, self.weight) + self.bias
        if self.ceiling is None:
            return softplus_above(raw, self.floor)
        return self.floor + (self.ceiling - self.floor) * torch.sigmoid(raw)


class MLPDiffusion(PyroModule):
    """A network as diffusion matrix, :math:`g(t, z, u) = G_0 + \\text{MLP}(z, u, t)`, for general and scalar noise.

    Args:
        state_dim: size of the state.
        noise_dim: number of Brownian motions.
        hidden: sizes of the hidden layers.
        input_dim: size of the inputs; 0 ignores them.
        uses_time: whether the network sees the time itself.
        activation: see ``blocks.activation_function``.
        init: :math:`G_0` is ``init`` on the diagonal and 0 elsewhere, at first.

    >>> import torch
    >>> from pyro_ssm.dynamics import MLPDiffusion
    >>> MLPDiffusion(state_dim=2, noise_dim=3)(torch.zeros(5, 1), torch.zeros(4, 5, 2), None).shape
    torch.Size([4, 5, 2, 3])
    """

    memory_dim = 0

    def __init__(
        self,
        state_dim: int,
        noise_dim: int,
        hidden: int | Sequence[int] = (64,),
        input_dim: int = 0,
        uses_time: bool = False,
        activation: str | Callable[[Tensor], Tensor] = "softplus",
        init: float = 0.5,
    ) -> None:
        super().__init__()
        self.state_dim = check_size("state_dim", state_dim)
        self.noise_dim = check_size("noise_dim", noise_dim)
        self.input_dim = check_size("input_dim", input_dim, least=0)
        self.uses_time = uses_time
        hidden_sizes(hidden)
        self.network = MLP(state_dim + input_dim + uses_time, hidden, state_dim * noise_dim, activation)
        _shrink(self.network, 0.1)
        with torch.no_grad():
            self.network.layers[-1].bias.copy_(init * torch.eye(state_dim, noise_dim).flatten())

    def forward(self, time: Tensor, state: Tensor, inputs: Tensor | None) -> Tensor:
        """``(..., time, state, noise)``."""
        x = concatenate(self, state, inputs, None)
        value = self.network(_beside(x, time) if self.uses_time else x)
        return value.unflatten(-1, (self.state_dim, self.noise_dim))


def _beside(x: Tensor, time: Tensor) -> Tensor:
    lead = torch.broadcast_shapes(x.shape[:-1], time.shape[:-1])
    return torch.cat([x.expand(lead + x.shape[-1:]), time.expand(lead + (1,))], -1)


def _shrink(network: MLP, scale: float) -> None:
    last: Linear = network.layers[-1]
    with torch.no_grad():
        last.weight.mul_(scale)
        last.bias.mul_(scale)
