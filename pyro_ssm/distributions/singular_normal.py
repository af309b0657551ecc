"""A normal law whose covariance may be singular."""

from __future__ import annotations

from typing import Any

from pyro.distributions import MultivariateNormal
from torch import Tensor

from pyro_ssm.ops.linalg import vanishing_pivots
from pyro_ssm.ops.reading import may_read

__all__ = ["SingularNormal", "affine_law"]


class SingularNormal(MultivariateNormal):
    """A normal law of which the covariance may be singular: draws and moments always, a density where there is one.

    .. math:: x = m + L \\varepsilon, \\qquad \\varepsilon \\sim N(0, I)

    The step of a seasonal pattern, an autoregression in state form or a running sum moves in fewer directions than the
    state has, so that a path has no density. ``log_prob`` says so; what needs no density (draws, the Kalman family,
    bootstrap particle filters) goes on. Where L has no vanishing pivot it is the ordinary multivariate normal.

    Args:
        loc: ``(..., n)``.
        scale_tril: ``(..., n, n)`` lower triangular with a diagonal that is not negative.

    Raises:
        NotImplementedError: ``log_prob`` or ``entropy`` of a singular law.

    >>> import torch
    >>> from pyro_ssm.distributions import SingularNormal
    >>> law = SingularNormal(torch.zeros(2), scale_tril=torch.tensor([[2.0, 0.0], [1.0, 0.0]]), validate_args=False)
    >>> x = law.sample()
    >>> bool(x[0] == 2 * x[1])
    True
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """The density ``(...)``; differentiable."""
        self._check_regular()
        return super().log_prob(value)

    def entropy(self) -> Tensor:
        """The entropy ``(...)``."""
        self._check_regular()
        return super().entropy()

    def _check_regular(self) -> None:
        if may_read() and bool(vanishing_pivots(self._unbroadcasted_scale_tril).any()):
            raise NotImplementedError(
                "this normal law has no density: its covariance is singular (a component whose state has more "
                "coordinates than noises). Integrate the states out: infer.Marginal(model) with NUTS or SVI, "
                "infer.kalman_filter, infer.sample_posterior; what only draws (simulation, predict) works"
            )


def affine_law(parts: Any, state: Tensor) -> SingularNormal:
    """The law :math:`N(A z + b, L L^T)` of a ``components.Affine`` at given states.

    Args:
        parts: matrix ``(..., time, out, in)``, offset ``(..., time, out)``, scale_tril ``(..., time, out, out)``.
        state: ``(..., time, in)``.

    Returns:
        Batch ``(..., time)``, event ``(out,)``.

    >>> import torch
    >>> from pyro_ssm.components import Affine
    >>> from pyro_ssm.distributions import affine_law
    >>> parts = Affine(torch.full((1, 1, 1), 0.5), torch.ones(1, 1), torch.ones(1, 1, 1))
    >>> affine_law(parts, torch.ones(4, 1)).mean.squeeze(-1)
    tensor([1.5000, 1.5000, 1.5000, 1.5000])
    """
    loc = (parts.matrix @ state.unsqueeze(-1)).squeeze(-1) + parts.offset
    return SingularNormal(loc, scale_tril=parts.scale_tril, validate_args=False)
