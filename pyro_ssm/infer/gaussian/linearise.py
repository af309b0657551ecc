"""Affine Gaussian laws in the place of nonlinear ones: what all Gaussian-approximate filters have in common.

A *linearisation* takes a law :math:`p(y | x) = N(f(x), Q(x) Q(x)^T)` and a Gaussian :math:`x \\sim N(m, L L^T)`, and
gives matrices with :math:`p(y | x) \\approx N(A x + b, \\Omega)`. The filters differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_ssm.components import Affine
from pyro_ssm.distributions.moments import gaussian_parts
from pyro_ssm.ops.kalman import matvec
from pyro_ssm.ops.linalg import solve_lower_right, tria
from pyro_ssm.ops.quadrature import SigmaPoints

__all__ = ["Law", "Linearisation", "Regression", "Taylor", "evaluate", "expected_root"]

#: states ``(*sample, ..., time, n)`` to a Gaussian distribution with one event dim
Law = Callable[[Tensor], Any]


@runtime_checkable
class Linearisation(Protocol):
    """A rule that replaces a Gaussian law by an affine one around N(m, L L^T); all times of a path at once.

    >>> from pyro_ssm.infer.gaussian.linearise import Linearisation, Taylor
    >>> rule: Linearisation = Taylor()
    """

    def __call__(self, law: Law, mean: Tensor, scale_tril: Tensor) -> Affine:
        """``mean`` ``(..., time, n)``, ``scale_tril`` ``(..., time, n, n)`` to matrices with the same leading dims."""
        ...


class Taylor:
    """The first-order expansion at the mean, with the noise found there.

    .. math:: A = \\frac{\\partial f}{\\partial x}(m), \\qquad b = f(m) - A m, \\qquad \\Omega = Q(m) Q(m)^T

    The Jacobian comes from one backward pass over as many copies of the state as the law has coordinates, which the
    law sees as one more sample dim. Plain reverse-mode differentiation also passes through solvers and compiled
    operators that are ``torch.autograd.Function`` s, which ``torch.func`` refuses. The Jacobian is differentiable.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.infer.gaussian.linearise import Taylor
    >>> law = lambda x: dist.Normal(x**2, 1.0).to_event(1)
    >>> Taylor()(law, torch.full((1, 1), 3.0), torch.ones(1, 1, 1))
    Affine(matrix=tensor([[[6.]]]), offset=tensor([[-9.]]), scale_tril=tensor([[[1.]]]))
    """

    def __call__(self, law: Law, mean: Tensor, scale_tril: Tensor) -> Affine:
        loc, root, diagonal = evaluate(law, mean)
        A = _jacobian(law, mean, loc.shape[-1], create_graph=loc.requires_grad)
        return Affine(A, loc - matvec(A, mean), root.diag_embed() if diagonal else root)


def _jacobian(law: Law, mean: Tensor, size: int, create_graph: bool) -> Tensor:
    """The derivative of the law's location, ``(..., time, size, n)``: copy i of the state gives row i."""
    shape = (size, *mean.shape)
    wanted = torch.eye(size, dtype=mean.dtype, device=mean.device).reshape(size, *[1] * (mean.dim() - 1), size)
    with torch.enable_grad():
        x = mean.expand(shape)
        x = x if create_graph and x.requires_grad else x.detach().requires_grad_()
        loc, _, _ = evaluate(law, x)
    if not loc.requires_grad:  # it depends on nothing
        return mean.new_zeros(mean.shape[:-1] + (size, mean.shape[-1]))
    (rows,) = torch.autograd.grad(
        loc, x, wanted.expand(loc.shape), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return rows.movedim(0, -2)


class Regression:
    """Statistical linear regression: the affine law nearest to the law, on average over the state.

    .. math::
        A = \\operatorname{Cov}(f, x)\\, P^{-1}, \\qquad b = E f - A m, \\qquad
        \\Omega = \\operatorname{Cov} f - A P A^T + E[Q(x) Q(x)^T], \\qquad P = L L^T,

    with expectations over sigma points :math:`x_s = m + L \\xi_s`. The residual covariance is never a difference of two
    matrices: with :math:`B = E f \\xi^T = A L`, its root has the columns :math:`\\sqrt{v_s} (r_s - B \\xi_s)`.

    Args:
        rule: sigma points in n dimensions (``pyro_ssm.ops``).

    Sources: Arasaratnam, Haykin and Elliott (2007), "Discrete-time nonlinear filtering algorithms using Gauss-Hermite
    quadrature"; Garcia-Fernandez, Svensson, Morelande and Särkkä (2015), "Posterior linearization filter", section II.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.infer.gaussian.linearise import Regression
    >>> from pyro_ssm.ops import unscented_rule
    >>> law = lambda x: dist.Normal(x**2, 1.0).to_event(1)     # x ~ N(0, 1): x^2 has mean 1 and variance 2
    >>> A, b, root = Regression(unscented_rule(1))(law, torch.zeros(1, 1), torch.ones(1, 1, 1))
    >>> torch.allclose(torch.stack([b.squeeze(), root.squeeze() ** 2]), torch.tensor([1.0, 2.0 + 1.0]))
    True
    """

    def __init__(self, rule: SigmaPoints) -> None:
        self.rule = rule

    def __call__(self, law: Law, mean: Tensor, scale_tril: Tensor) -> Affine:
        points, w, v, c = rule = self.rule.like(mean)
        x = mean + (scale_tril @ points.mT).movedim(-1, 0)
        loc, root, diagonal = evaluate(law, x)
        # weights may be large and of both signs; their sums over differences of values are precise
        F = (loc - loc[0]).movedim(0, -1)  # (..., time, p, S)
        f = loc[0] + F @ w
        B = (v * F) @ points
        columns = v.sqrt() * (F - (F @ c).unsqueeze(-1) - B @ points.mT)
        omega = tria(torch.cat([columns, expected_root(root, diagonal, rule)], -1))
        A = solve_lower_right(B, scale_tril)
        return Affine(A, f - matvec(A, mean), omega)


def evaluate(law: Law, x: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The parts of a law (:func:`~pyro_ssm.distributions.moments.gaussian_parts`) for each state, in its dtype.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.infer.gaussian.linearise import evaluate
    >>> loc, deviations, _ = evaluate(lambda x: dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.zeros(5, 3))
    >>> loc.shape, deviations.stride()
    (torch.Size([5, 2]), (0, 0))
    """
    loc, root, diagonal = gaussian_parts(law(x))
    lead, p = x.shape[:-1], loc.shape[-1:]
    return loc.to(x.dtype).expand(lead + p), root.to(x.dtype).expand(lead + (p if diagonal else p + p)), diagonal


def expected_root(root: Tensor, diagonal: bool, rule: SigmaPoints) -> Tensor:
    """The square root of the mean of Q Q^T over the points of a rule (the dim in front).

    .. math:: E[Q Q^T] = \\bar Q \\bar Q^T + \\operatorname{Cov} Q, \\qquad \\bar Q = E Q,

    both by the rule, so that negative mean weights do no harm; with positive weights it is the weighted sum itself.

    Args:
        root: deviations ``(S, ..., n)`` if ``diagonal``, otherwise square roots ``(S, ..., n, n)``.

    Returns:
        ``(..., n, n)`` lower triangular.

    >>> import torch
    >>> from pyro_ssm.infer.gaussian.linearise import expected_root
    >>> from pyro_ssm.ops import cubature_rule
    >>> deviations = torch.tensor([[1.0], [7.0]])              # at the two points; (1 + 49) / 2 = 25
    >>> expected_root(deviations, True, cubature_rule(1).like(deviations))
    tensor([[5.]])
    """
    if root.stride(0) == 0:  # the noise does not depend on the state
        return root[0].diag_embed() if diagonal else root[0]
    change = root - root[0]
    middle = root[0] + _weighted(rule.mean_weights, change)
    spread = rule.spread_weights.sqrt().reshape(-1, *[1] * (root.dim() - 1))
    rest = spread * (change - _weighted(rule.centre_weights, change))
    if diagonal:
        return torch.linalg.vector_norm(torch.cat([middle.unsqueeze(0), rest]), dim=0).diag_embed()
    return tria(torch.cat([middle, rest.movedim(0, -2).flatten(-2)], -1))


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    return torch.tensordot(weights, values, 1)
