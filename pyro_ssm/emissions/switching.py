"""Linear Gaussian observations whose map depends on the regime."""

from __future__ import annotations

from collections.abc import Sequence

from pyro import distributions as dist
from torch import Tensor

from pyro_ssm.blocks._conditioning import check_state
from pyro_ssm.blocks._regimes import regime_list, stack_affine
from pyro_ssm.blocks._tables import pick, state_index
from pyro_ssm.components import Affine, AffineGaussian, Emission

__all__ = ["SwitchingLinear"]


class SwitchingLinear(Emission):
    """What a switching linear system shows,

    .. math:: y_k \\mid s_k = j, x_k \\;\\sim\\; N(H_j x_k + d_j, R_j R_j^T), \\qquad z_k = (s_k, x_k).

    Args:
        regimes: K ``AffineGaussian`` emissions of x; ``[emission] * K`` shares one.

    Raises:
        TypeError: a regime is no affine Gaussian emission.
        ValueError: the sizes differ.

    >>> import torch
    >>> from pyro_ssm.emissions import LinearNormal, SwitchingLinear
    >>> emission = SwitchingLinear([LinearNormal(2, 1)] * 3)
    >>> emission(torch.zeros(5, 3), torch.arange(5.0), None).event_shape
    torch.Size([1])
    """

    def __init__(self, regimes: Sequence[Emission]) -> None:
        super().__init__()
        self.regimes = regime_list(regimes, Emission, AffineGaussian)
        self.num_regimes = len(self.regimes)
        self.state_dim = 1 + self.regimes[0].state_dim
        self.obs_dim = self.regimes[0].obs_dim

    def by_regime(self, time: Tensor, inputs: Tensor | None) -> Affine:
        """The law of the observations in each regime, with a dim K before its events."""
        return stack_affine([regime.affine(time, inputs) for regime in self.regimes])

    def forward(
        self, state: Tensor, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> dist.MultivariateNormal:
        """The law of the observations; ``state`` ``(..., time, 1 + n)``."""
        check_state(self, state)
        index = state_index(state)
        matrix, offset, scale_tril = (
            pick(part, index, event) for part, event in zip(self.by_regime(time, inputs), (2, 1, 2))
        )
        loc = (matrix @ state[..., 1:].unsqueeze(-1)).squeeze(-1) + offset
        return dist.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"num_regimes={self.num_regimes}, state_dim={self.state_dim}, obs_dim={self.obs_dim}"
