"""What inputs explain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks.parameters import positive_parameter
from pyro_ssm.dynamics.structural.motion import Motion

__all__ = ["Regression"]


class Regression(Motion):
    """A regression on inputs, whose coefficients are states: constant, or a random walk each,

    .. math:: x_k = u_k^T \\beta_k, \\qquad \\beta_{k+1} = \\beta_k + \\text{diag}(s)\\, \\varepsilon_k.

    As states, coefficients are integrated out with everything else, and their posterior is that of the smoother.

    Args:
        columns: which columns of ``data.inputs`` are the regressors: their numbers, or how many (the first ones).
        scale: first value of ``scale`` s ``(number of columns,)``, in units of the coefficients; None: constant ones.
        floor: lower bound of the learnable parameter.

    Parameters: ``scale`` ``(number of columns,)``, unless constant. The usual start is diffuse; for a prior on the
    coefficients give ``Regression(2).named(None, start=dynamics.NormalInitial(2, scale=10.0))``.

    Raises:
        ValueError: ``columns`` is empty, negative or repeats itself.

    Source: Harvey (1989), "Forecasting, Structural Time Series Models and the Kalman Filter", section 7.3.

    >>> from pyro_ssm.dynamics.structural import Regression
    >>> Regression(columns=[0, 3]).input_columns()
    {0: 0, 1: 3}
    """

    event_dims: ClassVar[Mapping[str, int]] = {"scale": 1}
    label = "regression"

    def __init__(
        self, columns: int | Sequence[int] = 1, scale: float | Tensor | None = None, floor: float = 1e-6
    ) -> None:
        super().__init__()
        given = range(check_size("columns", columns)) if isinstance(columns, int) else columns
        self.columns = tuple(check_size("columns", column, least=0) for column in given)
        if not self.columns or len(set(self.columns)) < len(self.columns):
            raise ValueError(f"`columns` must name at least one column, each once, got {columns}")
        self.state_dim = len(self.columns)
        if scale is None:
            self.register_buffer("scale", torch.zeros(self.state_dim), persistent=False)
        else:
            self.scale = positive_parameter("scale", scale, self.state_dim, floor)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The identity, and the scales along the diagonal."""
        scale = self.scale.expand(self.scale.shape[:-1] + (self.state_dim,))
        return torch.eye(self.state_dim, dtype=scale.dtype, device=scale.device), torch.diag_embed(scale)

    def row(self) -> Tensor:
        """Nothing but the inputs."""
        return torch.zeros(self.state_dim)

    def input_columns(self) -> Mapping[int, int]:
        """Coefficient -> column."""
        return dict(enumerate(self.columns))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"columns={list(self.columns)}, state_dim={self.state_dim}"
