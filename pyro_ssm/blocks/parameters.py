"""Parameters: vectors, positive vectors with a floor, and Cholesky factors with a floor on their diagonal.

A softplus alone underflows to zero, and the logarithm of a scale of zero is the usual first NaN of a fit. The floor
belongs to the constraint, so the parameter *is* the scale: what is read, drawn or bound is used as it stands.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import Transform

from pyro_ssm.blocks._checks import check_positive

__all__ = [
    "CholeskyAbove",
    "SoftplusAbove",
    "cholesky_parameter",
    "positive_parameter",
    "softplus_above",
    "vector_parameter",
]


class SoftplusAbove(type(constraints.positive)):  # type: ignore[misc]  # torch exports instances, not classes
    """The numbers above ``floor``, reached by :math:`x = \\text{floor} + \\log(1 + e^u)`.

    >>> import torch
    >>> from torch.distributions import transform_to
    >>> from pyro_ssm.blocks import SoftplusAbove
    >>> transform_to(SoftplusAbove(0.5))(torch.tensor(-1000.0))
    tensor(0.5000)
    """

    def __init__(self, floor: float) -> None:
        super().__init__(lower_bound=floor)


class CholeskyAbove(type(constraints.lower_cholesky)):  # type: ignore[misc]
    """Lower triangular matrices whose diagonal lies above ``floor`` (a softplus on the diagonal).

    >>> import torch
    >>> from torch.distributions import transform_to
    >>> from pyro_ssm.blocks import CholeskyAbove
    >>> transform_to(CholeskyAbove(0.5))(torch.full((2, 2), -1000.0))
    tensor([[ 5.0000e-01,  0.0000e+00],
            [-1.0000e+03,  5.0000e-01]])
    """

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.floor = floor

    def check(self, value: Tensor) -> Tensor:
        """Whether each matrix satisfies the constraint."""
        above = (value.diagonal(dim1=-2, dim2=-1) > self.floor).all(-1)
        return super().check(value) & above


class _CholeskyAboveTransform(Transform):
    domain = constraints.independent(constraints.real, 2)
    codomain = constraints.lower_cholesky
    bijective = True

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.diagonal = _softplus_above(SoftplusAbove(floor))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _CholeskyAboveTransform) and self.diagonal == other.diagonal

    def _call(self, x: Tensor) -> Tensor:
        return x.tril(-1) + torch.diag_embed(self.diagonal(x.diagonal(dim1=-2, dim2=-1)))

    def _inverse(self, y: Tensor) -> Tensor:
        return y.tril(-1) + torch.diag_embed(self.diagonal.inv(y.diagonal(dim1=-2, dim2=-1)))


class _SoftplusAboveTransform(Transform):
    domain = constraints.real
    codomain = constraints.positive
    bijective = True
    sign = 1

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.floor = floor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SoftplusAboveTransform) and self.floor == other.floor

    def _call(self, x: Tensor) -> Tensor:
        return F.softplus(x) + self.floor

    def _inverse(self, y: Tensor) -> Tensor:
        y = y - self.floor
        return (-y).expm1().neg().log() + y

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -F.softplus(-x)


@biject_to.register(SoftplusAbove)
@transform_to.register(SoftplusAbove)
def _softplus_above(constraint: Any) -> Transform:
    return _SoftplusAboveTransform(constraint.lower_bound)


@transform_to.register(CholeskyAbove)
def _cholesky_above(constraint: Any) -> Transform:
    return _CholeskyAboveTransform(constraint.floor)


def softplus_above(value: Tensor, floor: float) -> Tensor:
    """A network's output as a scale: :math:`\\text{floor} + \\log(1 + e^u)`, any shape.

    >>> import torch
    >>> from pyro_ssm.blocks import softplus_above
    >>> softplus_above(torch.tensor([-1000.0, 0.0]), floor=0.25)
    tensor([0.2500, 0.9431])
    """
    return F.softplus(value) + floor


def vector_parameter(name: str, init: float | Tensor, size: int) -> nn.Parameter:
    """A learnable vector ``(size,)``, one event dim.

    Args:
        name: for error messages.
        init: its first value, a number or a tensor that broadcasts to ``(size,)``.
        size: how many entries.

    Raises:
        ValueError: ``init`` has the wrong shape.

    >>> from pyro_ssm.blocks import vector_parameter
    >>> vector_parameter("mean", 0.5, size=2).tolist()
    [0.5, 0.5]
    """
    return nn.Parameter(_vector(name, init, size))


def _vector(name: str, init: float | Tensor, size: int) -> Tensor:
    value = torch.as_tensor(init, dtype=torch.get_default_dtype()).detach()
    if value.dim() > 1 or value.numel() not in (1, size):
        raise ValueError(f"`{name}` must be a number or have shape ({size},), got shape {tuple(value.shape)}")
    return value.expand(size).clone()


def positive_parameter(name: str, init: float | Tensor, size: int, floor: float) -> Any:
    """A learnable vector ``(size,)`` above ``floor``, one event dim.

    Args:
        name: for error messages.
        init: its first value, a number or a tensor that broadcasts to ``(size,)``.
        size: how many entries.
        floor: the lower bound of the learnable parameter, positive.

    Returns:
        A ``PyroParam``, to be assigned to an attribute of a component.

    Raises:
        ValueError: an entry of ``init`` does not lie above ``floor``, or has the wrong shape.

    >>> import torch
    >>> from pyro_ssm.blocks import positive_parameter
    >>> from pyro_ssm.components import Component
    >>> component = Component()
    >>> component.scale = positive_parameter("scale", 0.3, size=2, floor=1e-4)
    >>> component.scale.detach()
    tensor([0.3000, 0.3000])
    """
    floor = check_positive("floor", floor)
    value = _vector(name, init, size)
    if not bool((value > floor).all()):
        raise ValueError(f"`{name}` must lie above its floor {floor}, got {init}. Raise it, or lower the floor")
    return PyroParam(value, constraint=SoftplusAbove(floor), event_dim=1)


def cholesky_parameter(name: str, init: float | Tensor, size: int, floor: float) -> Any:
    """A learnable lower triangular ``(size, size)`` factor whose diagonal lies above ``floor``, two event dims.

    Args:
        name: for error messages.
        init: a number or vector (the diagonal), or a whole lower triangular matrix.
        size: the number of rows.
        floor: the lower bound of the diagonal, positive.

    Returns:
        A ``PyroParam``, to be assigned to an attribute of a component.

    Raises:
        ValueError: the diagonal of ``init`` does not lie above ``floor``, or has the wrong shape.

    >>> import torch
    >>> from pyro_ssm.blocks import cholesky_parameter
    >>> from pyro_ssm.components import Component
    >>> component = Component()
    >>> component.scale_tril = cholesky_parameter("scale", 0.3, size=2, floor=1e-4)
    >>> component.scale_tril.detach()
    tensor([[0.3000, 0.0000],
            [0.0000, 0.3000]])
    """
    floor = check_positive("floor", floor)
    value = torch.as_tensor(init, dtype=torch.get_default_dtype()).detach()
    if value.dim() < 2 and value.numel() in (1, size):
        value = torch.diag(value.expand(size))
    if value.shape != (size, size):
        raise ValueError(
            f"`{name}` must be a number, or have shape ({size},) or ({size}, {size}), got shape {tuple(value.shape)}"
        )
    constraint = CholeskyAbove(floor)
    if not bool(constraint.check(value)):
        raise ValueError(
            f"`{name}` must be lower triangular with a diagonal above its floor {floor}, got {value.tolist()}"
        )
    return PyroParam(value.clone(), constraint=constraint, event_dim=2)
