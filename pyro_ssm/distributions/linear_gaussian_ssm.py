"""A linear-Gaussian state-space model as a distribution over observations, from its matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_ssm.components import Affine
from pyro_ssm.distributions.linear_gaussian_path import LinearGaussianPath, PathMarginals, check_parts, steps_of
from pyro_ssm.ops.kalman import FilterSteps, matvec
from pyro_ssm.ops.kalman_filter import kalman_filter, kalman_log_likelihood
from pyro_ssm.ops.kalman_smoother import backward_conditionals, kalman_smoother

__all__ = ["LinearGaussianSSM"]

T = TypeVar("T")


class LinearGaussianSSM(TorchDistribution):
    """The law of the observations of a linear-Gaussian state-space model, states integrated out; event ``(time, obs)``.

    .. math::
        z_1 \\sim N(m, L L^T), \\qquad z_{k+1} \\sim N(F_k z_k + b_k, Q_k Q_k^T), \\qquad
        y_k \\sim N(H_k z_k + d_k, R_k R_k^T)

    For a Pyro program that has matrices at hand, as from a network; a model of components is filtered by
    ``infer.kalman_filter``. ``initial`` is the law at the *first* observation and matrices act on columns (Pyro's
    ``GaussianHMM`` moves once before the first observation and acts on rows). Right in float32 (square-root form).

    Args:
        mean: ``(*batch, n)``; scale_tril: ``(*batch, n, n)`` lower triangular, of the first state.
        transition: F, b, Q ``(*batch, time - 1, ...)``, Q lower triangular.
        observation: H ``(*batch, time, p, n)``, d ``(*batch, time, p)``, R ``(*batch, time, p, p)`` lower triangular.
            In both a time axis of 1, or none, stands for all times.
        num_times: wanted where no part varies in time.
        mask: bool, broadcastable to ``(*batch, time, p)``, True where observed; missing entries are integrated out
            exactly, also under correlated noise, and what stands there in a value is never read (NaN is fine).

    Raises:
        ValueError: shapes do not fit, or a factor is not lower triangular.

    ``log_prob`` is differentiable in all matrices and in the value; draws are reparametrised and ignore the mask.

    >>> import torch
    >>> from pyro_ssm.components import Affine
    >>> from pyro_ssm.distributions import LinearGaussianSSM
    >>> eye, zero = torch.eye(2), torch.zeros(2)
    >>> look = Affine(torch.ones(1, 2), torch.zeros(1), 0.1 * torch.ones(1, 1))
    >>> law = LinearGaussianSSM(zero, eye, Affine(0.9 * eye, zero, 0.5 * eye), look, num_times=5)
    >>> y = law.rsample((3,))
    >>> y.shape, law.log_prob(y).shape, law.smooth(y).mean.shape
    (torch.Size([3, 5, 1]), torch.Size([3]), torch.Size([3, 5, 2]))
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = True

    def __init__(
        self,
        mean: Tensor,
        scale_tril: Tensor,
        transition: Affine,
        observation: Affine,
        num_times: int | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        looks = check_parts(mean, scale_tril, observation, "observation")
        moves = check_parts(mean, scale_tril, transition, "transition", mean.shape[-1])
        if num_times is None:
            found = steps_of(looks, None, "observation")
            num_times = found if found > 1 else steps_of(moves, None, "transition") + 1
            if mask is not None and mask.dim() > 1 and found == 1 and mask.shape[-2] > 1:
                num_times = mask.shape[-2]
        steps_of(looks, num_times, "observation")
        path = LinearGaussianPath(mean, scale_tril, transition, num_times)
        p = observation.matrix.shape[-2]
        if mask is not None and (mask.dtype != torch.bool or mask.shape[-1] not in (1, p)):
            raise ValueError(f"`mask` must be boolean (..., time, {p}), got {mask.dtype} of shape {tuple(mask.shape)}")
        lead = [path.batch_shape] + [part.shape[:-e] for part, e in zip(looks, (3, 2, 3), strict=True)]
        lead += [] if mask is None else [mask.shape[:-2]]
        self.path, self.observation, self.mask_observed = path, Affine(*looks), mask
        super().__init__(torch.broadcast_shapes(*lead), torch.Size([num_times, p]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LinearGaussianSSM:
        law = LinearGaussianSSM.__new__(LinearGaussianSSM)
        law.path, law.observation, law.mask_observed = self.path, self.observation, self.mask_observed
        TorchDistribution.__init__(law, torch.Size(batch_shape), self.event_shape, validate_args=False)
        return law

    @property
    def support(self) -> Any:  # type: ignore[override]
        """Records of real numbers; what is hidden has no density, but is never asked for one."""
        return constraints.independent(constraints.real, 2)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self.rsample_joint(sample_shape)[1]

    def rsample_joint(self, sample_shape: Any = torch.Size()) -> tuple[Tensor, Tensor]:
        """A draw of states ``(*sample, *batch, time, n)`` and observations ``(*sample, *batch, time, p)`` together."""
        z = self.path.expand(self.batch_shape).rsample(sample_shape)
        H, d, R = self.observation
        noise = torch.randn(z.shape[:-1] + self.event_shape[1:], dtype=z.dtype, device=z.device)
        return z, matvec(H, z) + d + matvec(R, noise)

    def filter(self, value: Tensor) -> FilterSteps:
        """Filtered and predicted laws, and increments of the log-likelihood, given ``value`` ``(..., time, p)``.

        Returns:
            :class:`~pyro_ssm.ops.kalman.FilterSteps`, leading dims broadcast.
        """
        return self._run(kalman_filter, value)

    def _run(self, operator: Callable[..., T], value: Tensor) -> T:
        if value.shape[-2:] != self.event_shape:
            raise ValueError(
                f"`value` has shape {tuple(value.shape)}, but (..., {', '.join(map(str, self.event_shape))}) is wanted"
            )
        mask = torch.ones_like(value, dtype=torch.bool) if self.mask_observed is None else self.mask_observed
        path = self.path
        return operator(
            value,
            mask.expand(torch.broadcast_shapes(mask.shape, self.event_shape)),
            path.initial_mean,
            path.initial_scale_tril,
            *path.transition,
            *self.observation,
            num_times=self.event_shape[0],
        )

    def smooth(self, value: Tensor) -> PathMarginals:
        """The laws of all states given all of ``value``, with lag-one covariances."""
        steps = self.filter(value)
        laws = backward_conditionals(steps, *self.path.transition)
        mean, root = kalman_smoother(steps, laws)
        after = root[..., 1:, :, :]
        lag = laws.gain @ after @ after.mT
        lead = torch.broadcast_shapes(steps.log_likelihood.shape[:-1], self.batch_shape)
        return PathMarginals(*(part.expand(lead + part.shape[-e:]) for part, e in ((mean, 2), (root, 3), (lag, 3))))

    def log_prob_steps(self, value: Tensor) -> Tensor:
        """The increments :math:`\\log p(y_k | y_{<k})`, ``(*batch, time)``; exactly 0 where nothing is observed."""
        terms = self._run(kalman_log_likelihood, value)
        return terms.expand(torch.broadcast_shapes(terms.shape[:-1], self.batch_shape) + terms.shape[-1:])

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_prob_steps(value).sum(-1)
