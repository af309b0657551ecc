"""Resampling by ancestors whose weights let a gradient through what is otherwise a fixed choice."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ssm.infer.smc.resample import AncestorResampling, Resampled, Weighted
from pyro_ssm.infer.smc.tree import take

__all__ = ["SoftResampling", "StopGradientResampling"]


class StopGradientResampling(AncestorResampling):
    """Resampling as usual, with weights whose values are equal and whose gradients are those of the weights chosen.

    .. math:: w'_j = \\frac1N\\, \\frac{W_{a_j}}{\\bot W_{a_j}}

    with :math:`\\bot` the value without its gradient. No number of the filter changes.

    Gradient: that of the estimated likelihood :math:`\\hat Z` is *unbiased* for the gradient of the likelihood,
    :math:`E\\, \\nabla \\hat Z = \\nabla p(y)`, with any unbiased scheme, any threshold of the effective sample size
    and any proposal with reparameterised draws. Hence :math:`\\nabla \\log \\hat Z = \\nabla \\hat Z / \\hat Z` is
    consistent for the score :math:`\\nabla \\log p(y)` as N grows; it is *not* the gradient of the bound
    :math:`E \\log \\hat Z`, and with respect to a proposal alone it tends to 0. Its variance is that of the score
    along ancestral paths: it grows with the square of time.

    Args:
        scheme: as for :class:`~pyro_ssm.infer.smc.AncestorResampling`.

    Source: A. Scibior, F. Wood (2021), "Differentiable particle filtering without modifying the forward pass".

    >>> import torch
    >>> from pyro_ssm.infer.smc import StopGradientResampling, Weighted
    >>> x, log_weights = torch.tensor([1.0, 2.0]), torch.tensor([0.25, 0.75]).log().requires_grad_()
    >>> cloud = Weighted(x, lambda: x, log_weights, log_weights.exp(), None)
    >>> found = StopGradientResampling()(cloud, torch.tensor([0.1], dtype=torch.float64))
    >>> found.log_weights.exp(), torch.autograd.grad(found.log_weights.exp().sum(), log_weights)[0]
    (tensor([0.5000, 0.5000], grad_fn=<ExpBackward0>), tensor([0., 1.]))
    """

    def __call__(self, weighted: Weighted, uniforms: Tensor) -> Resampled:
        resampled = super().__call__(weighted, uniforms)
        chosen = take(weighted.log_weights, resampled.ancestors, weighted.weights.shape[1:])
        change = chosen - chosen.detach()
        if weighted.need is not None:  # the others kept their weights, gradients and all
            change = torch.where(weighted.need, change, torch.zeros_like(change))
        return resampled._replace(log_weights=resampled.log_weights + change)


class SoftResampling(AncestorResampling):
    """Resampling by a mixture of the weights and equal weights, corrected for.

    .. math::
        P(a_j = i) = Q_i = \\alpha W_i + \\frac{1 - \\alpha}{N}, \\qquad w'_j = \\frac{W_{a_j}}{N\\, Q_{a_j}}

    The likelihood is unbiased for every :math:`\\alpha`; the smaller it is, the more uneven weights remain.
    :math:`\\alpha = 1` is plain resampling, :math:`\\alpha = 0` chooses at random.

    Gradient: flows through :math:`W / Q` while the choice counts as fixed. It is unbiased for *nothing*: more of the
    score of the choice is kept the smaller :math:`\\alpha` is (all of it at 0, none at 1). For an unbiased gradient of
    the likelihood take :class:`StopGradientResampling`.

    Args:
        alpha: share of the weights in the mixture, in [0, 1].
        scheme: as for :class:`~pyro_ssm.infer.smc.AncestorResampling`.

    Raises:
        ValueError: ``alpha`` is not in [0, 1].

    Source: P. Karkus, D. Hsu, W. S. Lee (2018), "Particle filter networks with application to visual localization",
    CoRL, section 4.2.

    >>> import torch
    >>> from pyro_ssm.infer.smc import SoftResampling, Weighted
    >>> x, log_weights = torch.tensor([1.0, 2.0]), torch.tensor([0.25, 0.75]).log()
    >>> cloud = Weighted(x, lambda: x, log_weights, log_weights.exp(), None)
    >>> SoftResampling(0.5)(cloud, torch.tensor([0.3], dtype=torch.float64)).log_weights.exp()
    tensor([0.3333, 0.6000])
    """

    def __init__(self, alpha: float = 0.5, scheme: str = "systematic") -> None:
        super().__init__(scheme)
        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` must be in [0, 1], got {alpha}; 1 is plain resampling")
        self.alpha = float(alpha)

    def __call__(self, weighted: Weighted, uniforms: Tensor) -> Resampled:
        if self.alpha == 1:
            return super().__call__(weighted, uniforms)
        mixture = self.alpha * weighted.weights + (1 - self.alpha) / len(weighted.weights)
        resampled = super().__call__(weighted._replace(weights=mixture), uniforms)
        ratio = take(weighted.log_weights - mixture.log(), resampled.ancestors, mixture.shape[1:])
        if weighted.need is not None:
            ratio = torch.where(weighted.need, ratio, torch.zeros_like(ratio))
        return resampled._replace(log_weights=resampled.log_weights + ratio)
