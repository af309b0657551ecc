"""The log-likelihood of each series, estimated by weighted draws from a guide, and the bound beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.infer.elbo_weights import LogWeights, PlateShape, log_weights, plate_shape
from pyro_ssm.infer.evaluating import evaluating
from pyro_ssm.infer.local_parameters import local_parameters

__all__ = ["ImportanceEstimate", "LowerBound", "evidence_lower_bound", "importance_log_likelihood"]


class ImportanceEstimate(NamedTuple):
    """What :func:`importance_log_likelihood` returns; all in nats, without gradient.

    Attributes:
        log_likelihood: ``(*series)``, :math:`\\log \\tfrac1K \\sum_k w_k`. Its exponential is unbiased for the
            likelihood; the logarithm lies below :math:`\\log p(y)` in expectation.
        standard_error: ``(*series)``, of the logarithm, by the delta method; too small to be believed when ``ess`` is
            small.
        ess: ``(*series)``, effective sample size :math:`(\\sum w)^2 / \\sum w^2`, between 1 and K.
        bound: ``(*series)``, the mean log weight: the evidence lower bound from the same draws.
        num_samples: K.

    >>> import torch
    >>> from pyro_ssm.infer import ImportanceEstimate
    >>> x = torch.tensor([-1.0, -2.0])
    >>> ImportanceEstimate(x, 0 * x, 0 * x + 9, x - 1, 9).total
    tensor(-3.)
    """

    log_likelihood: Tensor
    standard_error: Tensor
    ess: Tensor
    bound: Tensor
    num_samples: int

    @property
    def total(self) -> Tensor:
        """The log-likelihood of all series together."""
        return self.log_likelihood.sum()

    @property
    def total_standard_error(self) -> Tensor:
        """The standard error of :attr:`total`; series have independent draws."""
        return self.standard_error.square().sum().sqrt()


class LowerBound(NamedTuple):
    """What :func:`evidence_lower_bound` returns; nats, without gradient.

    Attributes:
        series: ``(*series)``, :math:`E_q[\\log p(y_b, z_b \\mid \\theta) - \\log q(z_b \\mid y_b, \\theta)]`.
        shared: ``()``, :math:`E_q[\\log p(\\theta) - \\log q(\\theta)]` for random parameters; 0 without.
        standard_error: ``(*series)``, of the mean over draws; NaN for one draw.
        num_samples: number of draws.

    >>> import torch
    >>> from pyro_ssm.infer import LowerBound
    >>> LowerBound(torch.tensor([-1.0, -2.0]), torch.tensor(-0.5), torch.zeros(2), 1).total
    tensor(-3.5000)
    """

    series: Tensor
    shared: Tensor
    standard_error: Tensor
    num_samples: int

    @property
    def total(self) -> Tensor:
        """The bound of all series together, :math:`\\le \\log p(y)`."""
        return self.series.sum() + self.shared


def importance_log_likelihood(
    model: Callable[..., Any], guide: Callable[..., Any], data: Any, num_samples: int, batch: int = 100
) -> ImportanceEstimate:
    """Estimate :math:`\\log p(y_b)` of each series by importance sampling from a guide.

    .. math::
        \\hat p(y_b) = \\tfrac1K \\sum_{k=1}^K \\frac{p(y_b, z_{kb})}{q(z_{kb} \\mid y_b)},
        \\qquad z_{kb} \\sim q(\\cdot \\mid y_b)

    Masks and lengths count as in the model; the scale of a mini-batch does not. When the guide draws random
    parameters, all series share a draw of them, and the estimate is one number for the whole data set (of shape
    ``()``), whose weight is that of all series together; the more series, the smaller ``ess``. To have one for each
    series, give numbers to the
    parameters: ``pyro.condition`` model and guide on them.

    Args:
        model: the model.
        guide: the guide.
        data: what both take.
        num_samples: number K of draws.
        batch: draws that are held in memory at a time.

    Returns:
        :class:`ImportanceEstimate`, shape ``data.batch_shape``.

    Raises:
        ValueError: a count is less than 1, or a mini-batch is weighed jointly with random parameters.

    Randomness: torch's global generator. Source: Burda et al. (2016), section 5; Owen (2013), chapter 9.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro_ssm.infer import importance_log_likelihood
    >>> def model(y):
    ...     with pyro.plate("series", 2):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
    >>> def exact_posterior(y):
    ...     with pyro.plate("series", 2):
    ...         pyro.sample("z", dist.Normal(y / 2, 0.5**0.5))
    >>> y = torch.tensor([1.0, -2.0])
    >>> estimate = importance_log_likelihood(model, exact_posterior, y, num_samples=10)
    >>> torch.allclose(estimate.log_likelihood, dist.Normal(0.0, 2**0.5).log_prob(y))
    True
    """
    series = torch.cat([_joint(weights, shape) for weights, shape in _chunks(model, guide, data, num_samples, batch)])
    normalised = series.softmax(0)
    ess = 1 / normalised.square().sum(0)
    # delta method: sd(log mean w) = sd(w) / (mean(w) sqrt(K))
    spread = (num_samples / ess - 1).clamp_min(0) / (num_samples - 1) if num_samples > 1 else ess * math.nan
    return ImportanceEstimate(
        log_likelihood=series.logsumexp(0) - math.log(num_samples),
        standard_error=spread.sqrt(),
        ess=ess,
        bound=series.mean(0),
        num_samples=num_samples,
    )


def evidence_lower_bound(
    model: Callable[..., Any], guide: Callable[..., Any], data: Any, num_samples: int = 1, batch: int = 100
) -> LowerBound:
    """Estimate the evidence lower bound of each series, without gradient.

    .. math:: L_b = \\tfrac1K \\sum_k \\log p(y_b, z_{kb} \\mid \\theta_k) - \\log q(z_{kb} \\mid y_b, \\theta_k)

    Divide by ``data.lengths`` for nats per step, or by ``data.mask.sum((-2, -1))`` for nats per observation.

    Args:
        model: the model.
        guide: the guide.
        data: what both take.
        num_samples: number of draws that are averaged.
        batch: draws that are held in memory at a time.

    Returns:
        :class:`LowerBound`, shape ``data.batch_shape``; the scale of a mini-batch does not enter.

    Raises:
        ValueError: a count is less than 1.

    Randomness: torch's global generator.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro_ssm.infer import evidence_lower_bound
    >>> def model(y):
    ...     with pyro.plate("series", 2):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
    >>> def prior(y):
    ...     with pyro.plate("series", 2):
    ...         pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> y = torch.tensor([1.0, -2.0])
    >>> torch.manual_seed(0) and evidence_lower_bound(model, prior, y, num_samples=1000).series.shape
    torch.Size([2])
    """
    weights = [weights for weights, _ in _chunks(model, guide, data, num_samples, batch)]
    series = torch.cat([chunk.series for chunk in weights])
    shared = torch.cat([chunk.shared.expand(chunk.series.shape[0]) for chunk in weights])
    spread = series.std(0) if num_samples > 1 else torch.full_like(series[0], math.nan)
    return LowerBound(series.mean(0), shared.mean(), spread / math.sqrt(num_samples), num_samples)


def _chunks(
    model: Callable[..., Any], guide: Callable[..., Any], data: Any, num_samples: int, batch: int
) -> Iterator[tuple[LogWeights, PlateShape]]:
    for name, value in (("num_samples", num_samples), ("batch", batch)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    with local_parameters(), torch.no_grad(), evaluating(model, guide):
        shape = plate_shape(model, guide, data)
        for start in range(0, num_samples, batch):
            size = min(batch, num_samples - start)
            yield log_weights(model, guide, data, num_particles=size, shape=shape, repeat_shared=True), shape


def _joint(weights: LogWeights, shape: PlateShape) -> Tensor:
    """The weights of what is independent given nothing: the series, or all of them together under shared parameters."""
    if not (shape.plated and shape.outside):
        return weights.series
    if weights.scale != 1:
        raise ValueError(
            f"the guide draws {list(shape.outside)} for all series, so the weight is that of the whole data set, "
            "and `data` is a mini-batch. Give the full data, or condition model and guide on these sites"
        )
    return weights.series.flatten(1).sum(1) + weights.shared
