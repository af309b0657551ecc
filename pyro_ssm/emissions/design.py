"""What is seen are known sums of the state, or factors of it with loadings to learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_ssm.blocks._checks import check_size
from pyro_ssm.blocks._conditioning import check_state
from pyro_ssm.blocks._gaussian import diagonal_normal, with_time
from pyro_ssm.blocks.linear import linear
from pyro_ssm.blocks.parameters import positive_parameter, vector_parameter
from pyro_ssm.components import Affine, AffineGaussian, Emission
from pyro_ssm.distributions import SingularNormal

__all__ = ["DesignNormal"]


class DesignNormal(AffineGaussian, Emission):
    """A linear Gaussian emission whose matrix is known, up to the loadings of factors,

    .. math::
        y_{k,i} = \\Big(r_{k,i} + \\sum_f \\Lambda_{if}\\, r_{k,j(i,f)}\\Big)^T z_k + d_i + s_i\\, \\varepsilon_{k,i},

    where the rows :math:`r_k` (which may depend on the time and on inputs) come from ``design``: the first ``obs_dim``
    of them are seen as they are, and :math:`j(i, f)` names the row that carries factor f to observation i.

    Args:
        design: a module ``(time, inputs) -> (..., time or 1, rows, state)``, such as ``structural.Design`` or
            ``structural.Aggregation``.
        state_dim: size of the state.
        obs_dim: size of an observation.
        factor_rows: j ``(obs, factors)``, numbers of rows; None: no factors.
        offset: first value of ``offset`` d; None: none.
        scale: first value of the noise's standard deviations; None: no noise (what is seen is exact).
        floor: lower bound of the learnable standard deviations.

    Parameters: ``loadings`` ``(obs, factors)`` (from 0.5), ``offset`` ``(obs,)``, ``scale`` ``(obs,)``.

    Raises:
        ValueError: a size is wrong; or, when called, the state has another size.

    >>> import torch
    >>> from pyro_ssm.dynamics.structural import Level, Trend, sum_design
    >>> from pyro_ssm.emissions import DesignNormal
    >>> emission = DesignNormal(sum_design(Level() + Trend()), state_dim=3, obs_dim=1, scale=0.1)
    >>> emission(torch.tensor([[1.0, 2.0, 5.0]]), torch.zeros(1), None).mean
    tensor([[3.]])
    """

    event_dims: ClassVar[Mapping[str, int]] = {"loadings": 2, "offset": 1, "scale": 1}
    factor_rows: Tensor

    def __init__(
        self,
        design: nn.Module,
        state_dim: int,
        obs_dim: int,
        *,
        factor_rows: Tensor | None = None,
        offset: float | Tensor | None = None,
        scale: float | Tensor | None = 0.5,
        floor: float = 1e-6,
    ) -> None:
        super().__init__()
        self.state_dim = check_size("state_dim", state_dim)
        self.obs_dim = check_size("obs_dim", obs_dim)
        self.design = design
        self.has_factors, self.has_offset, self.has_noise = (
            factor_rows is not None,
            offset is not None,
            scale is not None,
        )
        if factor_rows is not None:
            if factor_rows.dim() != 2 or factor_rows.shape[0] != obs_dim:
                raise ValueError(f"`factor_rows` must have shape ({obs_dim}, factors), got {tuple(factor_rows.shape)}")
            self.register_buffer("factor_rows", factor_rows.long(), persistent=False)
            self.loadings = nn.Parameter(torch.full(factor_rows.shape, 0.5))
        if offset is not None:
            self.offset = vector_parameter("offset", offset, obs_dim)
        if scale is not None:
            self.scale = positive_parameter("scale", scale, obs_dim, floor)

    def forward(self, state: Tensor, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the observations; ``state`` ``(..., time, state)``, ``inputs`` ``(..., time, input)`` or None."""
        check_state(self, state)
        loc = linear(state, self.matrix(time, inputs), with_time(self.offset, 1) if self.has_offset else None)
        if self.has_noise:
            return diagonal_normal(loc, self.scale)
        return SingularNormal(loc, scale_tril=loc.new_zeros(self.obs_dim, self.obs_dim), validate_args=False)

    def affine(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Affine:
        """The matrix of every time, the offset, and the noise along the diagonal."""
        matrix = self.matrix(time, inputs)
        offset = with_time(self.offset, 1) if self.has_offset else matrix.new_zeros(1, self.obs_dim)
        scale = with_time(self.scale, 1) if self.has_noise else matrix.new_zeros(1, self.obs_dim)
        offset, scale = (x.expand(x.shape[:-1] + (self.obs_dim,)) for x in (offset, scale))
        return Affine(matrix, offset, torch.diag_embed(scale))

    def matrix(self, time: Tensor, inputs: Tensor | None) -> Tensor:
        """``(..., time or 1, obs, state)``."""
        return self.read(self.design(time, inputs))

    def read(self, rows: Tensor) -> Tensor:
        """The matrix of given rows ``(..., rows, state)``: the first ones, and the factors' with their loadings."""
        if not self.has_factors:
            return rows[..., : self.obs_dim, :]
        loadings = with_time(self.loadings, 2).unsqueeze(-1)
        return rows[..., : self.obs_dim, :] + (loadings * rows[..., self.factor_rows, :]).sum(-2)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"state_dim={self.state_dim}, obs_dim={self.obs_dim}, factors={self.has_factors}, noise={self.has_noise}"
