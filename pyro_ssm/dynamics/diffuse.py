"""A start of which nothing is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._gaussian import with_time
from pyro_ssm.blocks.parameters import positive_parameter, vector_parameter
from pyro_ssm.components import Diffuse, Initial

__all__ = ["DiffuseInitial"]


class DiffuseInitial(Diffuse, Initial):
    """A start with infinite variance in the coordinates that are diffuse, and Gaussian in the others,

    .. math::
        z_{1,i} \\sim N(0, \\kappa), \\; \\kappa \\to \\infty \\quad (i \\text{ diffuse}), \\qquad
        z_{1,i} \\sim N(m_i, s_i^2) \\quad (\\text{otherwise}).

    The usual start of what has no stationary law: levels, trends, seasonals, regression coefficients. The exact Kalman
    family (``kalman_filter``, ``kalman_smoother``, ``sample_posterior``, ``Marginal``) takes the limit exactly; no
    large number stands for infinity. The law is improper, so it cannot be drawn from and a path has no density:
    calling it raises.

    The log-likelihood is the diffuse one of Durbin and Koopman, with all constants of :math:`\\log 2 \\pi`: the limit
    of :math:`\\log p(y) + \\tfrac{q}{2} \\log \\kappa`, q the number of diffuse coordinates that the data determines.

    Args:
        state_dim: size of the state.
        diffuse: which coordinates are diffuse, ``state_dim`` booleans; None: all.
        loc: first value of the mean of the others, a number or ``(state_dim,)``.
        scale: first value of their standard deviations, a number or ``(state_dim,)``.
        floor: lower bound of the learnable standard deviations.

    Parameters: ``loc`` ``(state,)`` and ``scale`` ``(state,)``, of which the entries of diffuse coordinates are never
    read; there are none where all are diffuse. For a start that is fixed, call ``requires_grad_(False)``.

    Raises:
        ValueError: a size is wrong.
        TypeError: when called; or ``diffuse`` is not of booleans.

    Sources: Koopman (1997), "Exact initial Kalman filtering and smoothing for nonstationary time series models";
    Durbin and Koopman (2012), "Time Series Analysis by State Space Methods", ch. 5.

    >>> import torch, pyro_ssm as ssm
    >>> walk = ssm.dynamics.LinearNormal(1, matrix=torch.eye(1), scale=1469.2**0.5)
    >>> level = ssm.emissions.LinearNormal(1, 1, matrix=torch.eye(1), scale=15098.5**0.5)
    >>> model = ssm.StateSpaceModel(ssm.dynamics.DiffuseInitial(1), walk, level).double()
    >>> nile = ssm.data.load("nile", torch.float64)
    >>> round(ssm.infer.kalman_filter(model, nile).log_likelihood.sum().item(), 4)
    -633.4646
    """

    event_dims: ClassVar[Mapping[str, int]] = {"loc": 1, "scale": 1}

    def __init__(
        self,
        state_dim: int,
        diffuse: Sequence[bool] | Tensor | None = None,
        loc: float | Tensor = 0.0,
        scale: float | Tensor = 1.0,
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.state_dim = check_size("state_dim", state_dim)
        which = torch.ones(state_dim, dtype=torch.bool) if diffuse is None else torch.as_tensor(diffuse)
        if which.dtype != torch.bool:
            raise TypeError(f"`diffuse` must be booleans, True where a coordinate is diffuse, got {diffuse!r}")
        if which.shape != (state_dim,):
            raise ValueError(
                f"`diffuse` must have {state_dim} entries, one a coordinate, got shape {tuple(which.shape)}"
            )
        self.register_buffer("is_diffuse", which.clone())
        self.all_diffuse = bool(which.all())
        if not self.all_diffuse:
            self.loc = vector_parameter("loc", loc, state_dim)
            self.scale = positive_parameter("scale", scale, state_dim, floor)

    def forward(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> NoReturn:
        """Raise: an improper law has neither draws nor a density."""
        raise TypeError(
            "DiffuseInitial has infinite variance: it cannot be drawn from, and a path has no density under it. "
            "Integrate the states out with infer.kalman_filter or infer.Marginal, or give the model a proper start "
            "such as dynamics.NormalInitial"
        )

    def moments(self, time: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """:math:`m`, :math:`L` (both zero at diffuse coordinates) and the columns ``(state, q)`` of the others."""
        which, n = self.is_diffuse, self.state_dim
        columns = torch.eye(n, dtype=torch.get_default_dtype(), device=which.device)[:, which]
        if self.all_diffuse:
            return columns.new_zeros(n), columns.new_zeros(n, n), columns
        zero = torch.zeros((), dtype=self.scale.dtype, device=which.device)
        loc, scale = with_time(self.loc, 1), with_time(self.scale, 1)
        proper = [torch.where(which, zero, part.expand(part.shape[:-1] + (n,))) for part in (loc, scale)]
        return proper[0], torch.diag_embed(proper[1]), columns.to(self.scale.dtype)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"state_dim={self.state_dim}, diffuse={self.is_diffuse.tolist()}"
