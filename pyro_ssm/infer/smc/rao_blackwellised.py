"""Rao-Blackwellised filters: draw one part of the state, integrate the other out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import Affine
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.smc.feynman_kac import Draw, FeynmanKac
from pyro_ssm.infer.smc.locally_optimal import conditional
from pyro_ssm.infer.smc.tree import leaves
from pyro_ssm.ops.kalman import predict
from pyro_ssm.ops.reading import may_read

__all__ = ["Weighed", "linear_step", "rao_blackwellised"]


class Weighed(NamedTuple):
    """Particles and the evidence of the observation they have seen last.

    >>> from pyro_ssm.infer.smc import Weighed
    >>> Weighed._fields
    ('particles', 'log_weight')
    """

    particles: Any  # the drawn part and the law of the rest; leaves (N, *batch, ...)
    log_weight: Tensor  # (N, *batch), log p(y_k | drawn part up to k, y_<k); exactly 0 where nothing is observed


def rao_blackwellised(
    start: Callable[[Draw, torch.Size], Weighed],
    step: Callable[[int, Any, Draw], Weighed],
    data: TimeSeries,
    *,
    batch_shape: torch.Size | None = None,
    state: Callable[[Any], Tensor] | None = None,
) -> FeynmanKac:
    """The Feynman-Kac process of a model part of whose state is drawn and part is integrated out exactly.

    .. math::
        u_k \\sim p(u_k \\mid u_{k-1}), \\qquad G_k = p(y_k \\mid u_{1:k}, y_{<k})
        = \\int p(y_k \\mid x_k, u_k)\\, p(x_k \\mid u_{1:k}, y_{<k})\\, dx_k

    A particle holds the drawn part ``u`` and the law of the other part given it (the mean and square-root covariance
    of a linear-Gaussian ``x``, the probabilities of a finite one). By the Rao-Blackwell theorem the variance of the
    evidence is at most that of a filter which draws both.

    Args:
        start: ``(draw, shape) -> Weighed``: draw the first ``u`` for leading dims ``shape = (N, *batch)``, condition
            on the first observation.
        step: ``(k, particles, draw) -> Weighed``: the same for step k. :func:`linear_step` is the exact update of a
            linear-Gaussian part. ``draw(law, shape)`` takes the run's noise.
        data: with values, seen by the two functions too.
        batch_shape: of the series, parameters' sample dims first; default: that of the data.
        state: ``particles -> (N, *batch, state)``, what moments are taken of: by default the first tensor.

    Raises:
        TypeError: ``data`` is no TimeSeries.
        ValueError: no values, or a refined grid.

    Source: Doucet, de Freitas, Murphy and Russell (2000), "Rao-Blackwellised particle filtering for dynamic Bayesian
    networks"; Chen and Liu (2000), "Mixture Kalman filters".

    >>> import torch, pyro_ssm as ssm, pyro.distributions as dist
    >>> from pyro_ssm.infer.smc import Weighed, linear_step
    >>> data = ssm.TimeSeries(torch.arange(3.0), torch.ones(3, 1))
    >>> one, zero = torch.ones(1, 1), torch.zeros(1)
    >>> def step(k, particles, draw):  # a random walk x seen with a noise of random scale u
    ...     mean, root = particles[1:]
    ...     u = draw(dist.Normal(zero, 1.0).to_event(1), mean.shape[:1])
    ...     emission = ssm.components.Affine(one, zero, u.exp().unsqueeze(-1))
    ...     y = data.values[k], data.mask[k]
    ...     mean, root, evidence = linear_step(mean, root, ssm.components.Affine(one, zero, one), emission, *y)
    ...     return Weighed((u, mean, root.expand(u.shape + (1,))), evidence)
    >>> def start(draw, shape):
    ...     return step(0, (None, torch.zeros(shape + (1,)), one), draw)
    >>> fk = ssm.infer.rao_blackwellised(start, step, data)
    >>> ssm.infer.particle_filter(fk, num_particles=50).log_likelihood.shape
    torch.Size([3])
    """
    if not isinstance(data, TimeSeries):
        raise TypeError(f"`data` must be a TimeSeries, got {type(data).__name__}. Wrap it: TimeSeries(times, values)")
    if data.values is None or data.mask is None:
        raise ValueError("rao_blackwellised needs observations, but `data` has no values")
    if data.observed_index is not None:
        raise ValueError("rao_blackwellised takes an observation at each step, and the grid of `data` is refined")
    batch = data.batch_shape if batch_shape is None else torch.Size(batch_shape)
    over_time = batch + (data.num_times,)

    def of_particles(weighed: Weighed) -> Tensor:
        return next(leaves(weighed.particles)) if state is None else state(weighed.particles)

    return FeynmanKac(
        start,
        lambda k, previous, draw: step(k, previous.particles, draw),
        lambda k, previous, weighed: weighed.log_weight,
        data.num_times,
        batch,
        step_mask=data.step_mask.expand(over_time) if data.is_ragged else None,
        active=data.mask.any(-1).expand(over_time),
        state=of_particles,
        describe=lambda k, position: f"step {k} of {data._series_name(position[len(batch) - len(data.batch_shape) :])}",
    )


def linear_step(
    mean: Tensor,
    root: Tensor,
    transition: Affine | None,
    emission: Affine,
    value: Tensor,
    mask: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Predict and update the linear-Gaussian part of each particle, exactly.

    .. math::
        x' = F x + b + Q \\epsilon, \\qquad y = H x' + d + R e, \\qquad x \\sim N(m, L L^T)

    Args:
        mean: m, ``(N, *batch, n)``.
        root: L, ``(N, *batch, n, n)`` or broadcastable.
        transition: (F, b, Q), each with the particles' leading dims where it depends on the drawn part; None at the
            first step.
        emission: (H, d, R), likewise.
        value: ``(*batch, obs)``.
        mask: bool, as ``value``; missing entries are integrated out.

    Returns:
        The mean and square-root covariance of x' given y, and :math:`\\log p(y)` ``(N, *batch)``, exactly 0 where
        nothing is observed.

    >>> import torch
    >>> from pyro_ssm.components import Affine
    >>> from pyro_ssm.infer.smc import linear_step
    >>> one, zero = torch.ones(1, 1), torch.zeros(1)
    >>> law = Affine(one, zero, one)
    >>> mean, root, _ = linear_step(torch.zeros(5, 1), one, law, law, torch.ones(1), zero == 0)
    >>> mean[0], root
    (tensor([0.6667]), tensor([[0.8165]]))
    """
    if transition is not None:
        mean, root = predict(mean, root, *transition)
    is_whole = may_read() and bool(mask.all())
    return conditional(mean, root, emission, value, None if is_whole else mask)
