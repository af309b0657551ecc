"""Autoregressive and moving-average parts in state form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._gaussian import diagonal_normal
from pyro_ssm.blocks.parameters import positive_parameter, vector_parameter
from pyro_ssm.dynamics.structural.motion import StationaryMotion, set_scale

__all__ = ["AR", "ARMA", "ParallelAR", "from_partial", "to_partial"]


def from_partial(partial: Tensor) -> Tensor:
    """The coefficients of the stationary autoregression with given partial autocorrelations.

    .. math:: \\phi^{(k)}_j = \\phi^{(k-1)}_j - r_k \\phi^{(k-1)}_{k-j}, \\qquad \\phi^{(k)}_k = r_k

    A one-to-one map (Durbin and Levinson) from the cube :math:`(-1, 1)^p` to the stationary autoregressions.

    Args:
        partial: ``(..., p)``, between -1 and 1.

    Returns:
        ``(..., p)``, differentiable.

    Source: Barndorff-Nielsen and Schou (1973), "On the parametrization of autoregressive models by partial
    autocorrelations"; Monahan (1984).

    >>> import torch
    >>> from pyro_ssm.dynamics.structural import from_partial
    >>> from_partial(torch.tensor([0.5, -0.2]))
    tensor([ 0.6000, -0.2000])
    """
    coefficients = partial[..., :1]
    for k in range(1, partial.shape[-1]):
        new = partial[..., k : k + 1]
        coefficients = torch.cat([coefficients - new * coefficients.flip(-1), new], -1)
    return coefficients


def to_partial(coefficients: Tensor) -> Tensor:
    """The partial autocorrelations of an autoregression, the inverse of :func:`from_partial`.

    Args:
        coefficients: ``(p,)``.

    Raises:
        ValueError: the autoregression is not stationary.

    >>> import torch
    >>> from pyro_ssm.dynamics.structural import to_partial
    >>> to_partial(torch.tensor([0.6, -0.2]))
    tensor([ 0.5000, -0.2000])
    """
    rest = coefficients
    partial: list[Tensor] = []
    while len(rest):
        last = rest[-1]
        if not bool(last.abs() < 1):
            raise ValueError(
                f"`coefficients` must be those of a stationary autoregression, got {coefficients.tolist()}"
            )
        partial.insert(0, last)
        rest = (rest[:-1] + last * rest[:-1].flip(-1)) / (1 - last.square())
    return torch.stack(partial)


class AR(StationaryMotion):
    """A stationary autoregression,

    .. math:: x_{k+1} = \\phi_1 x_k + \\dots + \\phi_p x_{k+1-p} + s\\, \\varepsilon_k, \\qquad
        z_k = (x_k, \\dots, x_{k-p+1}).

    It is parametrised by its partial autocorrelations, so that every value is stationary; a uniform prior on them is
    ``PyroSample(dist.Uniform(-1.0, 1.0).expand([p]).to_event(1))``.

    Args:
        order: p, at least 1.
        coefficients: first value of :math:`\\phi` ``(p,)``; None takes 0.5 and zeros.
        scale: first value of ``scale`` s, in units of the series.
        floor: lower bound of the learnable scale.

    Parameters: ``partial`` ``(p,)`` (see :func:`from_partial`), ``scale`` ``(1,)``. The usual start is stationary.

    Raises:
        ValueError: the first coefficients are not stationary, or a size is wrong.

    >>> import torch
    >>> from pyro_ssm.dynamics.structural import AR
    >>> part = AR(2, coefficients=torch.tensor([0.6, -0.2]))
    >>> part.coefficients().detach(), part.partial.detach()
    (tensor([ 0.6000, -0.2000]), tensor([ 0.5000, -0.2000]))
    """

    event_dims: ClassVar[Mapping[str, int]] = {"partial": 1, "scale": 1}
    label = "ar"

    def __init__(
        self,
        order: int = 1,
        coefficients: Tensor | None = None,
        scale: float | Tensor = 1.0,
        floor: float = 1e-6,
    ) -> None:
        super().__init__()
        self.state_dim = self.order = check_size("order", order)
        self.partial = _partial_parameter(order, coefficients)
        set_scale(self, "scale", scale, floor)

    def coefficients(self) -> Tensor:
        """:math:`\\phi` ``(..., p)``."""
        return from_partial(self.partial)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The companion matrix with :math:`\\phi` in its first row, and noise in the first coordinate."""
        first = self.coefficients().unsqueeze(-2)
        rest = torch.eye(self.order, dtype=first.dtype, device=first.device)[:-1]
        A = torch.cat([first, rest.expand(first.shape[:-2] + rest.shape)], -2)
        shaken = torch.eye(self.order, dtype=first.dtype, device=first.device)[0]
        return A, torch.diag_embed(self.scale * shaken)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"order={self.order}, state_dim={self.state_dim}"


class ARMA(StationaryMotion):
    """A stationary autoregression with a moving average of its noise,

    .. math:: x_{k+1} = \\sum_{i=1}^{p} \\phi_i x_{k+1-i} + s \\Big(\\varepsilon_{k+1} + \\sum_{j=1}^{q} \\theta_j
        \\varepsilon_{k+1-j}\\Big),

    in Harvey's form with :math:`\\max(p, q + 1)` coordinates, the first of which is x.

    Args:
        order: p, at least 0.
        moving_average_order: q, at least 0.
        coefficients: first value of :math:`\\phi` ``(p,)``; None takes 0.5 and zeros.
        moving_average: first value of :math:`\\theta` ``(q,)``; None takes zeros.
        scale: first value of ``scale`` s, in units of the series.
        floor: lower bound of the learnable scale.

    Parameters: ``partial`` ``(p,)`` (see :func:`from_partial`), ``moving_average`` ``(q,)`` (not constrained: a moving
    average need not be invertible), ``scale`` ``(1,)``. The usual start is stationary.

    Raises:
        ValueError: the first coefficients are not stationary, both orders are 0, or a size is wrong.

    Source: Harvey (1989), "Forecasting, Structural Time Series Models and the Kalman Filter", section 3.3.

    >>> import torch
    >>> from pyro_ssm.dynamics.structural import ARMA
    >>> part = ARMA(1, 1, coefficients=torch.tensor([0.5]), moving_average=torch.tensor([0.4]))
    >>> part.stationary()(torch.zeros(1), None).variance[0, 0].detach()  # (1 + 2 ph th + th^2) / (1 - ph^2)
    tensor(2.0800)
    """

    event_dims: ClassVar[Mapping[str, int]] = {"partial": 1, "moving_average": 1, "scale": 1}
    label = "arma"

    def __init__(
        self,
        order: int = 1,
        moving_average_order: int = 1,
        coefficients: Tensor | None = None,
        moving_average: Tensor | float | None = None,
        scale: float | Tensor = 1.0,
        floor: float = 1e-6,
    ) -> None:
        super().__init__()
        self.order = check_size("order", order, least=0)
        self.moving_average_order = check_size("moving_average_order", moving_average_order, least=0)
        if order == moving_average_order == 0:
            raise ValueError("`order` and `moving_average_order` are both 0: use structural.Irregular()")
        self.state_dim = max(order, moving_average_order + 1)
        if order:
            self.partial = _partial_parameter(order, coefficients)
        if moving_average_order:
            start = 0.0 if moving_average is None else moving_average
            self.moving_average: nn.Parameter = vector_parameter("moving_average", start, moving_average_order)
        set_scale(self, "scale", scale, floor)

    def coefficients(self) -> Tensor:
        """:math:`\\phi` ``(..., p)``."""
        return from_partial(self.partial) if self.order else self.scale.new_zeros(0)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """:math:`\\phi` in the first column beside a shift, and one noise that enters as
        :math:`(1, \\theta_1, \\dots)`.
        """
        n = self.state_dim
        one = torch.ones_like(self.scale[..., :1])
        moving = self.moving_average if self.moving_average_order else self.scale.new_zeros(0)
        first = _padded(self.coefficients(), n).unsqueeze(-1)
        shift = torch.eye(n, dtype=first.dtype, device=first.device)[:, : n - 1]
        A = torch.cat([first, shift.expand(first.shape[:-2] + shift.shape)], -1)
        lead = torch.broadcast_shapes(one.shape[:-1], moving.shape[:-1])
        weights = torch.cat([one.expand(lead + (1,)), moving.expand(lead + moving.shape[-1:])], -1)
        noise = (self.scale * _padded(weights, n)).unsqueeze(-1)
        return A, torch.cat([noise, noise.new_zeros(noise.shape[:-1] + (n - 1,))], -1)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"order={self.order}, moving_average_order={self.moving_average_order}, state_dim={self.state_dim}"


class ParallelAR(StationaryMotion):
    """Many autoregressions of order 1 beside each other, as one part: the idiosyncratic terms of a factor model,

    .. math:: x_{i,k+1} = \\phi_i x_{i,k} + s_i\\, \\varepsilon_{i,k}.

    Args:
        size: how many.
        coefficient: first value of ``coefficient`` :math:`\\phi`, between -1 and 1, a number or ``(size,)``.
        scale: first value of ``scale`` s, a number or ``(size,)``.
        floor: lower bound of the learnable scales.

    Parameters: ``coefficient`` ``(size,)``, ``scale`` ``(size,)``. The usual start is stationary.

    Raises:
        ValueError: a coefficient is not stationary, or a size is wrong.

    >>> import torch
    >>> from pyro_ssm.dynamics.structural import ParallelAR
    >>> ParallelAR(2, coefficient=0.6, scale=0.8).stationary()(torch.zeros(1), None).variance.detach()
    tensor([[1.0000, 1.0000]])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"coefficient": 1, "scale": 1}
    label = "own"

    def __init__(
        self, size: int, coefficient: float | Tensor = 0.5, scale: float | Tensor = 1.0, floor: float = 1e-6
    ) -> None:
        super().__init__()
        self.state_dim = check_size("size", size)
        start = vector_parameter("coefficient", coefficient, size).detach()
        if not bool((start.abs() < 1).all()):
            raise ValueError(f"`coefficient` must lie between -1 and 1, got {coefficient}")
        self.coefficient: Any = PyroParam(start, constraint=constraints.interval(-1.0, 1.0), event_dim=1)
        self.scale = positive_parameter("scale", scale, size, floor)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Both diagonal."""
        return torch.diag_embed(self._full(self.coefficient)), torch.diag_embed(self._full(self.scale))

    def stationary_law(self, inputs: Tensor | None) -> Any:
        """:math:`N(0, s_i^2 / (1 - \\phi_i^2))`."""
        scale = self._full(self.scale / ((1 - self.coefficient) * (1 + self.coefficient)).sqrt())
        return diagonal_normal(torch.zeros_like(scale), scale)

    def _full(self, value: Tensor) -> Tensor:
        return value.expand(value.shape[:-1] + (self.state_dim,))


def _padded(vector: Tensor, n: int) -> Tensor:
    return torch.nn.functional.pad(vector, (0, n - vector.shape[-1]))


def _partial_parameter(order: int, coefficients: Tensor | None) -> Any:
    if coefficients is None:
        start = torch.zeros(order)
        start[0] = 0.5
    else:
        given = torch.as_tensor(coefficients).detach().reshape(-1).to(torch.get_default_dtype())
        if given.shape != (order,):
            raise ValueError(f"`coefficients` must have shape ({order},), got shape {tuple(given.shape)}")
        start = to_partial(given)
    return PyroParam(start, constraint=constraints.interval(-1.0, 1.0), event_dim=1)
