"""What guides without a solver share: marginals that move in closed form, the equation they imply, and its path."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor

from pyro_ssm.blocks._gaussian import diagonal_normal
from pyro_ssm.components import gap
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions.markov_path import Draw
from pyro_ssm.dynamics import KnownInitial, NeuralSDE
from pyro_ssm.dynamics.sde_checks import check_steps
from pyro_ssm.guides.base import Guide
from pyro_ssm.guides.bridge_steps import diffusion_and_slope, full_moves, noise_moves, thermal_decay
from pyro_ssm.guides.marginals import AbstractMarginal, DiagonalMarginal, FullMarginal, SinhArcsinhMarginal
from pyro_ssm.guides.posterior_sde import _equation
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.ops import linear_scan
from pyro_ssm.ops.associative_scan import affine_scan
from pyro_ssm.ops.kalman import matvec

__all__ = ["AbstractBridge", "BridgeContext", "Control"]

MARGINALS: dict[str, Any] = {"diagonal": DiagonalMarginal, "full": FullMarginal, "sinh_arcsinh": SinhArcsinhMarginal}


class BridgeContext(NamedTuple):
    """The curves of a guide: their values at knots, how they bend in between, and the model's equation.

    >>> from pyro_ssm.guides.bridge import BridgeContext
    >>> BridgeContext._fields
    ('knots', 'ends', 'bends', 'times', 'inputs', 'sde', 'initial')
    """

    knots: Tensor  # (K,) or (*batch, K), float64
    ends: Tensor  # (*lead, K, width)
    bends: Tensor  # (*lead, K - 1, ...): what `bend` reads of each gap, flat
    times: Tensor
    inputs: Tensor | None
    sde: NeuralSDE
    initial: Any


class Control(NamedTuple):
    """A state drawn from the posterior's marginal, and u with :math:`g u = f_q - f` there; ``(..., time, state)``.

    >>> from pyro_ssm.guides.bridge import Control
    >>> Control._fields
    ('state', 'value')
    """

    state: Tensor
    value: Tensor


class AbstractBridge(Guide):
    """A posterior equation that is given by its marginals, so that neither training nor drawing calls a solver.

    .. math::
        z_t = F_t(\\varepsilon), \\quad \\varepsilon \\sim N(0, I), \\qquad
        dz = f_q\\, dt + g\\, dW, \\quad
        f_q = \\partial_t F_t + \\tfrac12 \\nabla\\!\\cdot g g^T + \\tfrac12 g g^T \\nabla \\log q_t

    The parameters of :math:`F_t` (mean, log-scale ...) are curves in time: values at knots, straight lines between
    them, and what :meth:`bend` adds, which vanishes at the knots. They are continuous, and may have a kink at a knot,
    as the exact posterior has where something is observed. Only *marginals* enter the bound
    (:class:`~pyro_ssm.infer.SolverFree`), at times that may be drawn at random.

    **The path** (``forward``, so that ``Predictive``, importance weights and particle filters work) is a Markov chain
    over ``data.times``. For Gaussian marginals and a diffusion that does not depend on the state (SVISE, ARCTA) the
    equation is linear and the chain is its exact discretisation: with :math:`\\xi = F^{-1}(z)`,

    .. math:: \\xi_{k+1} \\sim N(\\rho_k \\xi_k,\\; 1 - \\rho_k^2), \\qquad
        \\rho_k = \\exp\\Big(-\\tfrac12 \\int_{t_k}^{t_{k+1}} g^2 / s^2\\, dt\\Big),

    up to the quadrature of this integral (8 nodes a gap); the law of each state is that of the training loss on any
    grid. Otherwise see :class:`~pyro_ssm.guides.SDEMatching`. The model's path, in contrast, is the Euler chain of its
    equation: bounds by paths are those of that chain, on ``data.refine(n)``, the loss of ``SolverFree`` is that of the
    equation itself.

    A subclass defines ``encode`` and ``bend``. The model has diagonal noise (or, with ``covariance="full"``, additive
    noise of full rank), the density of the Euler chain as its site, a start with a density, and no memory.

    Args:
        model: the state-space model; unbound.
        covariance: ``"diagonal"``, ``"full"`` or ``"sinh_arcsinh"``.
        linear: whether the posterior equation must be linear: refuses a diffusion that depends on the state.
        parameters: a guide over random parameters (default: ``AutoNormal``).

    Raises:
        TypeError: the model's transition is no such equation, or depends on what is refused.
        ValueError: its noise, site or start is of another kind.

    Source: the marginal form of Bartosh, Vetrov and Naesseth (2025), "SDE Matching", of which the linear equations of
    Course and Nair (2023) are the Gaussian case.

    >>> from pyro_ssm.guides import ARCTA, SVISE, AbstractBridge, SDEMatching
    >>> all(issubclass(guide, AbstractBridge) for guide in (SVISE, ARCTA, SDEMatching))
    True
    """

    looks_ahead = True

    def __init__(self, model: StateSpaceModel, covariance: str, linear: bool, parameters: Any) -> None:
        super().__init__(model, parameters)
        name, sde = type(self).__name__, _equation(model.transition, type(self).__name__)
        self.covariance, self._marginal = covariance, MARGINALS[covariance]
        kinds = ("diagonal", "additive") if covariance == "full" else ("diagonal",)
        if sde.site != "path" or sde.noise not in kinds:
            raise ValueError(
                f"{name} with covariance={covariance!r} needs {' or '.join(kinds)} noise of full rank and the density "
                f"of the Euler chain, got noise={sde.noise!r} and site={sde.site!r}. Build NeuralSDE(..., "
                "method='euler', site='path'), or use PosteriorSDE"
            )
        self.is_exact = covariance != "sinh_arcsinh" and bool(getattr(sde.diffusion, "state_free", False))
        if linear and not self.is_exact:
            raise TypeError(
                f"{name} needs a diffusion that does not depend on the state, as ConstantDiffusion (a function of time "
                f"says so by an attribute `state_free = True`), got {type(sde.diffusion).__name__}. Use SDEMatching"
            )
        if isinstance(model.initial, KnownInitial):
            raise ValueError(f"{name} needs a start with a density: give NormalInitial(..., scale=...) a small scale")
        if model.memory is not None:
            raise NotImplementedError(f"{name} knows marginals of the state, and a memory reads the whole path")

    # ---------------------------------------------------------------------------------------------- marginals

    def bend(self, bends: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor]:
        """What a curve adds to the straight line at fractions w ``(..., n)`` of gaps, and its slope in w.

        ``bends`` ``(..., n, -)`` are those of the gaps; both results ``(..., n, width)`` vanish, the first one, at
        w = 0 and 1.
        """
        raise NotImplementedError(f"{type(self).__name__} must define bend(bends, fraction)")

    def at(self, context: BridgeContext, times: Tensor) -> AbstractMarginal:
        """The laws of the states at times ``(..., n)`` float64, within the knots."""
        knots, ends = context.knots, context.ends
        if knots.shape[-1] == 1:
            value = ends.expand(ends.shape[:-2] + (times.shape[-1],) + ends.shape[-1:])
            return self._marginal(value, torch.zeros_like(value))
        lead = torch.broadcast_shapes(knots.shape[:-1], times.shape[:-1])
        times = times.expand(lead + times.shape[-1:]).contiguous()
        inner = knots[..., 1:-1]
        if knots.dim() > 1:
            inner = inner.expand(lead + inner.shape[-1:])
        j = torch.searchsorted(inner.contiguous(), times, right=True)
        knots = knots.expand(lead + knots.shape[-1:])
        left, right = knots.gather(-1, j), knots.gather(-1, j + 1)
        length = gap(left, right, ends)
        w = ((times - left) / (right - left)).clamp(0, 1).to(ends)  # padding may lie beyond the knots
        first, last, bends = _of_gaps(ends, j), _of_gaps(ends, j + 1), _of_gaps(context.bends, j)
        value, slope = self.bend(bends, w)
        return self._marginal(torch.lerp(first, last, w.unsqueeze(-1)) + value, (last - first + slope) / length)

    def control(
        self, context: BridgeContext, marginal: AbstractMarginal, noise: Tensor, times: Tensor, inputs: Tensor | None
    ) -> Control:
        """States of the posterior for noise ``(..., n, state)`` and what its drift differs by, in units of g.

        One evaluation of the model's drift and diffusion; differentiable.
        """
        sde, (state, velocity, score) = context.sde, marginal.motion(noise)
        g, spread = diffusion_and_slope(sde, state, times, inputs)
        if sde.noise != "diagonal":
            velocity = velocity + 0.5 * matvec(g, matvec(g.mT, score))
        else:
            velocity = velocity + 0.5 * (g.square() * score + spread)
        apart = velocity - sde.drift_at(state, times, inputs)
        apart = check_steps(apart, state, times, "the drift")
        if sde.noise == "diagonal":
            return Control(state, apart / g)
        root = torch.linalg.cholesky(g @ g.mT)
        root = root.expand(apart.shape[:-1] + root.shape[-2:])
        return Control(state, torch.linalg.solve_triangular(root, apart.unsqueeze(-1), upper=False).squeeze(-1))

    # -------------------------------------------------------------------------------------------------- paths

    def step(self, state: Tensor | None, k: slice, context: Any, memory: Tensor | None = None) -> Any:
        now = self.at(context, context.times[..., k])
        if state is None:
            return now.law()
        last = slice(k.start - 1, k.stop - 1)
        before = self.at(context, context.times[..., last])
        if isinstance(now, FullMarginal) and isinstance(before, FullMarginal):
            turn, root = full_moves(self.at, context, last)
            loc = now.loc + matvec(now.scale_tril @ turn, before.whiten(state - before.loc))
            return MultivariateNormal(loc, scale_tril=now.scale_tril @ root, validate_args=False)
        if self.is_exact and isinstance(now, DiagonalMarginal) and isinstance(before, DiagonalMarginal):
            rho, root = _kept(thermal_decay(self.at, context, last))
            loc = now.loc + rho * (now.scale / before.scale) * (state - before.loc)
            return diagonal_normal(loc, now.scale * root)
        return now.near(*noise_moves(self.at, context, last, before, state))  # type: ignore[attr-defined]

    def draw(self, context: Any) -> Draw | None:
        if not self.is_exact:
            return None

        def path(shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
            whole = self.at(context, context.times)
            like, moves = context.ends, slice(0, shape[-2] - 1)
            noise = torch.randn(shape, dtype=like.dtype, device=like.device)
            if shape[-2] == 1:
                return whole.motion(noise).state, noise, whole.scale.expand(shape)  # type: ignore[attr-defined]
            if isinstance(whole, FullMarginal):
                turn, root = full_moves(self.at, context, moves)
                white = affine_scan(turn, matvec(root, noise[..., 1:, :]), noise[..., 0, :])
                first = whole.scale_tril[..., :1, :, :]
                rest = whole.scale_tril[..., 1:, :, :] @ root
                scale = torch.cat([first.expand(rest.shape[:-3] + first.shape[-3:]), rest], -3)
                return (
                    whole.loc + matvec(whole.scale_tril, white),
                    noise,
                    scale.diagonal(dim1=-2, dim2=-1).expand(shape),
                )
            rho, root = _kept(thermal_decay(self.at, context, moves))
            start = torch.ones_like(root[..., :1, :])
            rho, root = torch.cat([0 * start, rho], -2), torch.cat([start, root], -2)
            white = linear_scan(rho, root * noise)
            scale = whole.scale  # type: ignore[attr-defined]
            return whole.loc + scale * white, noise, (scale * root).expand(shape)  # type: ignore[attr-defined]

        return path

    # ------------------------------------------------------------------------------------------------- helpers

    def context(self, data: TimeSeries, model: StateSpaceModel, knots: Tensor, ends: Tensor, bends: Tensor) -> Any:
        """What :meth:`encode` returns."""
        sde = _equation(model.transition, type(self).__name__)
        initial = model.initial(data.times[..., :1], None if data.inputs is None else data.inputs[..., :1, :])
        return BridgeContext(knots, ends, bends, data.times, data.inputs, sde, initial)


def time_range(data: TimeSeries) -> tuple[Tensor, Tensor]:
    """The first and the last real time of each series, ``(1,)`` or ``(*batch, 1)``."""
    times = data.times
    if data.lengths is None:
        return times[..., :1], times[..., -1:]
    times = times.expand(data.lengths.shape + times.shape[-1:])
    return times[..., :1], times.gather(-1, data.lengths.unsqueeze(-1) - 1)


def knots_of(data: TimeSeries) -> Tensor | None:
    """Steps of the latent grid at which something may be observed, and its ends; None for all of them."""
    if data.observed_index is None:
        return None
    ends = data.observed_index.new_tensor([0, data.num_times - 1])
    return torch.cat([data.observed_index, ends]).unique()


def _of_gaps(values: Tensor, j: Tensor) -> Tensor:
    """``values`` ``(*lead, K, c)`` at places ``(*batch, n)``: ``(*lead, n, c)``."""
    if j.dim() == 1:
        return values.index_select(-2, j)
    return torch.take_along_dim(values, j.reshape((1,) * (values.dim() - 1 - j.dim()) + j.shape + (1,)), -2)


def _kept(decay: Tensor) -> tuple[Tensor, Tensor]:
    """:math:`\\rho = e^{-D}` and :math:`\\sqrt{1 - \\rho^2}`."""
    return (-decay).exp(), (-torch.expm1(-2 * decay)).sqrt()
