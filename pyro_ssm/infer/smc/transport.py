"""Resampling by optimal transport: particles move instead of being chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ssm.infer.smc.resample import Resampled, Resampling, Weighted
from pyro_ssm.infer.smc.tree import tree_mix, tree_where
from pyro_ssm.ops.sinkhorn import transport_plan

__all__ = ["TransportResampling"]


class TransportResampling(Resampling):
    """Each new particle is an average of old ones, taken by an entropy-regularised transport plan.

    .. math::
        w'_i = \\sum_k P_{ik} \\approx \\tfrac1N, \\qquad x'_i = \\frac{1}{w'_i} \\sum_k P_{ik}\\, x_k, \\qquad
        P = \\text{plan from } W \\text{ to } \\tfrac1N \\text{ at the cost }
        \\frac{\\|x_i - x_k\\|^2}{\\epsilon\\, d\\, \\max_c \\operatorname{var}_c(x)}

    What Sinkhorn's iteration has not yet brought to 1/N stays in the new weights, so that the weighted mean of the
    state (and of every other part of a particle) is kept to rounding, whatever the tolerance.

    It is a deterministic and smooth function of the cloud and needs no random numbers; it leaves means unbiased and
    nothing else: averages are less spread than what they average, by more the larger :math:`\\epsilon`. The estimated
    likelihood is therefore *biased*; it is consistent for :math:`\\epsilon \\to 0` as N grows. The cost is N times N a
    series. The memory of a particle is averaged too. States must be vectors of real numbers: an average of indices
    means nothing.

    Gradient: exact for the value that is computed, the change of the plan included (to the order of ``tolerance``):
    the gradient of :math:`\\log \\hat Z` for fixed noise, hence unbiased for that of :math:`E \\log \\hat Z` of
    *this* filter, if every step resamples (``ess_threshold=1``).

    Args:
        regularisation: :math:`\\epsilon`; the smaller, the closer to unregularised transport, and the more iterations.
        tolerance: largest relative error of a new weight.
        max_iterations: of Sinkhorn, a step.
        num_iterations: exactly so many instead, without a look at the error, which would wait for a GPU and cannot be
            captured in a CUDA graph; what they leave stays in the new weights. The gradient is then that of the
            converged plan, as far as it is one.

    Raises:
        ValueError: an argument is not positive.
        TypeError: in a run, a part of a particle is not a floating-point tensor.

    Source: A. Corenflos, J. Thornton, G. Deligiannidis, A. Doucet (2021), "Differentiable particle filtering via
    entropy-regularized optimal transport", ICML; S. Reich (2013), "A nonparametric ensemble transform method for
    Bayesian inference".

    >>> import torch
    >>> from pyro_ssm.infer.smc import TransportResampling, Weighted
    >>> x, log_weights = torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([0.2, 0.2, 0.6]).log()
    >>> moved = TransportResampling()(Weighted(x, lambda: x, log_weights, log_weights.exp(), None), torch.empty(0))
    >>> (moved.log_weights.exp() * moved.particles[:, 0]).sum()  # 0.2 * 0 + 0.2 * 1 + 0.6 * 4
    tensor(2.6000)
    """

    smooth = True

    def __init__(
        self,
        regularisation: float = 0.5,
        tolerance: float = 1e-4,
        max_iterations: int = 1000,
        num_iterations: int | None = None,
    ) -> None:
        for name, value in (
            ("regularisation", regularisation),
            ("tolerance", tolerance),
            ("max_iterations", max_iterations),
            ("num_iterations", 1 if num_iterations is None else num_iterations),
        ):
            if not value > 0:
                raise ValueError(f"`{name}` must be greater than 0, got {value}")
        self.regularisation, self.tolerance, self.max_iterations = regularisation, tolerance, max_iterations
        self.num_iterations, self.reads = num_iterations, num_iterations is None

    def rows(self, num_particles: int) -> int:
        return 0

    def __call__(self, weighted: Weighted, uniforms: Tensor) -> Resampled:
        batch = weighted.weights.shape[1:]
        cost = _distances(weighted.states().movedim(0, -2)) / self.regularisation
        log_weights = weighted.log_weights.movedim(0, -1)
        plan = transport_plan(cost, log_weights, self.tolerance, self.max_iterations, self.num_iterations)
        mass = plan.logsumexp(-1)
        mixing = (plan - mass.unsqueeze(-1)).exp()  # (*batch, N, N), rows sum to 1
        particles = tree_mix(weighted.particles, mixing, batch, type(self).__name__)
        log_weights = mass.movedim(-1, 0)
        if weighted.need is not None:
            particles = tree_where(weighted.need, particles, weighted.particles, len(batch))
            log_weights = torch.where(weighted.need, log_weights, weighted.log_weights)
        return Resampled(particles, log_weights, None)


def _distances(x: Tensor) -> Tensor:
    """Squared distances of ``(*batch, N, d)``, in units of d times the largest variance of a coordinate."""
    centred = x - x.mean(-2, keepdim=True)
    variance = centred.square().mean(-2).amax(-1).clamp_min(torch.finfo(x.dtype).tiny)
    squares = centred.square().sum(-1)
    squared = squares.unsqueeze(-1) + squares.unsqueeze(-2) - 2 * centred @ centred.mT
    return squared / (x.shape[-1] * variance[..., None, None])
