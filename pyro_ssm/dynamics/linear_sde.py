"""Linear stochastic differential equations, exact over gaps of any length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._conditioning import inputs_of
from pyro_ssm.blocks._gaussian import with_time
from pyro_ssm.blocks.linear import linear
from pyro_ssm.blocks.parameters import vector_parameter
from pyro_ssm.components import Affine, Initial
from pyro_ssm.distributions import SingularNormal
from pyro_ssm.dynamics.part import Part
from pyro_ssm.dynamics.stationary import Stationary
from pyro_ssm.ops import linear_sde_step, stationary_root
from pyro_ssm.ops.linear_sde import LinearStep

__all__ = ["LinearSDE", "LinearSDEProcess"]


class LinearSDEProcess(Stationary, Part):
    """The base of linear stochastic differential equations: a subclass says what ``F`` and ``L`` are,

    .. math:: dz = (F z + B u + c)\\, dt + L\\, dW.

    A subclass defines :meth:`system`, which computes ``F`` ``(..., state, state)`` and ``L`` ``(..., state, noise)``
    from its own parameters (drawn ones have leading dims that end in a time axis of 1), and may define
    :meth:`stationary_covariance_root` where it is known in closed form. Everything else, the law over a gap, its exact
    discretisation and the stationary start, is here. See :class:`LinearSDE` for what holds of the law.

    Attributes:
        input_dim: size of the inputs; 0 ignores them. With inputs there is a parameter ``input_matrix``.

    >>> import torch
    >>> from pyro_ssm.blocks import positive_parameter
    >>> from pyro_ssm.dynamics.linear_sde import LinearSDEProcess
    >>> class Decay(LinearSDEProcess):
    ...     event_dims = {"rate": 1}
    ...     state_dim = 1
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.rate = positive_parameter("rate", 2.0, 1, floor=1e-4)
    ...     def system(self):
    ...         F = -self.rate.unsqueeze(-1)
    ...         return F, torch.ones_like(F)
    >>> Decay().stationary()(torch.zeros(1), None).variance.detach()
    tensor([[0.2500]])
    """

    label = "process"
    input_dim: int = 0

    def system(self) -> tuple[Tensor, Tensor]:
        """The drift ``F`` ``(..., state, state)`` in 1 / time and the diffusion ``L`` ``(..., state, noise)``."""
        raise NotImplementedError(f"{type(self).__name__} must define system() and return F and L")

    def forcing(self, inputs: Tensor | None) -> Tensor | None:
        """:math:`B u + c` ``(..., time or 1, state)`` in state / time; None where there is neither."""
        return None

    def usual_start(self) -> Initial:
        """The stationary law."""
        return self.stationary()

    def affine(self, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Affine:
        """:math:`(e^{F \\Delta},\\; \\Gamma (B u + c),\\; S)`; a time axis of 1 where all gaps are equal."""
        F, L = self.system()
        step = _steps(F, L, next_time - time)
        forcing = self.forcing(inputs)
        if forcing is None:
            return Affine(step.matrix, step.matrix.new_zeros(1, self.state_dim), step.scale_tril)
        return Affine(step.matrix, (step.integral @ forcing.unsqueeze(-1)).squeeze(-1), step.scale_tril)

    def stationary_law(self, inputs: Tensor | None) -> Any:
        """The law with :math:`F m + B u + c = 0` and :math:`F P + P F^T + L L^T = 0`."""
        root = with_time(self.stationary_covariance_root(), 2)
        forcing = self.forcing(inputs)
        if forcing is None:
            mean = root.new_zeros(1, self.state_dim)
        else:
            mean = -torch.linalg.solve(self.system()[0], forcing.unsqueeze(-1)).squeeze(-1)
        return SingularNormal(mean, scale_tril=root, validate_args=False)

    def stationary_covariance_root(self) -> Tensor:
        """The square root ``(..., state, state)`` of the solution of the Lyapunov equation.

        Raises:
            ValueError: an eigenvalue of ``F`` does not have a negative real part.
        """
        F, L = self.system()
        slowest = torch.linalg.eigvals(F.detach()).real.max()
        if not bool(slowest < 0):
            raise ValueError(
                f"{type(self).__name__.removeprefix('Bound')} has no stationary law: an eigenvalue of F has the real "
                f"part {float(slowest):.6g}, and all must be negative. Use a diffuse or a normal start"
            )
        gap = 1 / F.detach().abs().sum(-1).amax(-1)  # any will do
        step = linear_sde_step(F, L, gap)
        return stationary_root(step.matrix, step.scale_tril)


class LinearSDE(LinearSDEProcess):
    """A linear stochastic differential equation with learnable matrices,

    .. math:: dz = (F z + B u + c)\\, dt + L\\, dW,

    whose law over a gap :math:`\\Delta` is exact (inputs are held within a gap):

    .. math::
        z_{k+1} \\sim N\\left(e^{F \\Delta} z_k + \\Gamma (B u_k + c),\\;
        \\int_0^\\Delta e^{F s} L L^T e^{F^T s} ds\\right), \\qquad \\Gamma = \\int_0^\\Delta e^{F s} ds.

    Two gaps in a row are one long gap (Chapman-Kolmogorov), so an unobserved time changes nothing. Equal gaps are
    computed once. The covariance may be singular, and is right to rounding for the shortest gaps and the fewest noises
    (``ops.linear_sde``): nothing is added to it. Where it is singular, a path has no density (:class:`SingularNormal
    <pyro_ssm.distributions.SingularNormal>`): integrate the states out.

    Args:
        matrix: first value of ``F`` ``(state, state)``, in 1 / time.
        diffusion: first value of ``L`` ``(state, noise)``, in state / sqrt(time).
        input_dim: size of the inputs; 0 ignores them.
        offset: first value of ``c`` ``(state,)``, in state / time; None leaves it out.

    Parameters: ``matrix``, ``diffusion``, ``input_matrix`` ``(state, input)`` (from zero), ``offset``. To learn a few
    constants of a structured ``F``, subclass :class:`LinearSDEProcess`.

    Raises:
        ValueError: a shape is wrong; or, when called, the state or inputs have another size or are missing.

    Gradients: through the parameters, not the times. No randomness but that of the law.

    Source: Van Loan (1978), "Computing integrals involving the matrix exponential"; Särkkä and Solin (2019), "Applied
    Stochastic Differential Equations", section 6.2.

    >>> import torch
    >>> from pyro_ssm.dynamics import LinearSDE
    >>> damped = LinearSDE(torch.tensor([[0.0, 1.0], [-4.0, -0.5]]), torch.tensor([[0.0], [1.0]]))
    >>> times = torch.tensor([0.0, 0.5, 1000.0], dtype=torch.float64)
    >>> matrix, offset, root = damped.affine(times[:-1], times[1:], None)
    >>> (root @ root.mT)[1].diagonal().detach()  # over the long gap: the stationary variances
    tensor([0.2500, 1.0000])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"matrix": 2, "diffusion": 2, "input_matrix": 2, "offset": 1}

    def __init__(
        self, matrix: Tensor, diffusion: Tensor, input_dim: int = 0, offset: float | Tensor | None = None
    ) -> None:
        super().__init__()
        matrix, diffusion = (torch.as_tensor(x).detach().to(torch.get_default_dtype()) for x in (matrix, diffusion))
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"`matrix` must be square (state, state), got shape {tuple(matrix.shape)}")
        self.state_dim = matrix.shape[0]
        if diffusion.dim() != 2 or diffusion.shape[0] != self.state_dim:
            raise ValueError(
                f"`diffusion` must have shape ({self.state_dim}, noise), as `matrix` has {self.state_dim} rows, "
                f"got shape {tuple(diffusion.shape)}"
            )
        self.input_dim = check_size("input_dim", input_dim, least=0)
        self.matrix, self.diffusion = nn.Parameter(matrix.clone()), nn.Parameter(diffusion.clone())
        if input_dim:
            self.input_matrix = nn.Parameter(torch.zeros(self.state_dim, input_dim))
        self.has_offset = offset is not None
        if offset is not None:
            self.offset = vector_parameter("offset", offset, self.state_dim)

    def system(self) -> tuple[Tensor, Tensor]:
        """The matrices themselves."""
        return self.matrix, self.diffusion

    def forcing(self, inputs: Tensor | None) -> Tensor | None:
        """:math:`B u + c`."""
        u = inputs_of(self, inputs, self.matrix)
        offset = with_time(self.offset, 1) if self.has_offset else None
        return offset if u is None else linear(u, self.input_matrix, offset)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"state_dim={self.state_dim}, noise_dim={self.diffusion.shape[-1]}, input_dim={self.input_dim}"


def _steps(F: Tensor, L: Tensor, gap: Tensor) -> LinearStep:
    """The step over each gap ``(*batch, time)``: equal gaps are computed once, unless parameters vary with the series
    and copies for every pair of a series and a gap would cost more.
    """
    F, L = with_time(F, 2), with_time(L, 2)  # (*lead, 1, n, n)
    lead = torch.broadcast_shapes(F.shape[:-2], L.shape[:-2])
    distinct, which = torch.unique(gap, return_inverse=True)
    if lead.numel() * distinct.numel() > torch.broadcast_shapes(lead, gap.shape).numel():
        return linear_sde_step(F, L, gap.to(F))
    step = linear_sde_step(F, L, distinct.to(F))
    if distinct.numel() == 1:
        return step  # one step stands for all times
    return LinearStep(*(_take(part, which) for part in step))


def _take(part: Tensor, which: Tensor) -> Tensor:
    """``part`` ``(*lead, distinct, n, n)`` at ``which`` ``(*batch, time)``: ``(*lead and batch, time, n, n)``."""
    if part.dim() == 3:
        return part[which]
    values, index = part.flatten(-2), which.unsqueeze(-1)
    while values.dim() < index.dim():
        values = values.unsqueeze(0)
    while index.dim() < values.dim():
        index = index.unsqueeze(0)
    return torch.take_along_dim(values, index, -2).unflatten(-1, part.shape[-2:])
