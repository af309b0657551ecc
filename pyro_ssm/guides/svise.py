"""A Markov Gaussian posterior with parameters of its own for each series: state estimation and equation discovery."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_ssm.binding import bind, random_parameters
from pyro_ssm.blocks._checks import check_choice, check_size
from pyro_ssm.components import AffineGaussian
from pyro_ssm.data import TimeSeries
from pyro_ssm.guides.bridge import AbstractBridge, BridgeContext, knots_of, time_range
from pyro_ssm.guides.bridge_basis import legendre_basis, polynomial_basis
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.models.laws import check_record
from pyro_ssm.ops.kalman import matvec

__all__ = ["SVISE"]


class SVISE(AbstractBridge):
    """State estimation without a solver: the posterior is a linear equation whose marginals are learnt for each series,

    .. math::
        q(z_t) = N(m_t, S_t), \\qquad dz = \\big(\\dot m_t - A_t (z - m_t)\\big)\\, dt + g\\, dW, \\qquad
        A_t S_t = \\tfrac12 (g g^T - \\dot S_t) + W_t, \\quad W_t = -W_t^T,

    with :math:`m_t` and the logarithm of the scale :math:`S_t^{1/2}` as polynomials between knots, continuous, with a
    kink at each knot. By default there is a knot at each observation; the bends are then smooth where the exact
    posterior is, and a linear equation with linear observations has its exact posterior in the family up to their
    degree (``covariance="full"`` where coordinates are coupled; for one coordinate, or uncoupled ones, the diagonal).

    Train it with :class:`~pyro_ssm.infer.SolverFree`. With a drift that is a library of terms and a sparse prior
    (:class:`~pyro_ssm.dynamics.TermLibrary`) it finds equations. The posterior knows only the series it was built
    for: a mini-batch picks its rows by ``data.index``, other data are refused (use :class:`ARCTA` or
    :class:`SDEMatching`, which are amortised). It does not depend on drawn parameters of the model.

    Args:
        model: the state-space model; unbound.
        data: all the series; gives the knots and the first values of the curves.
        knots: None (each observation time, and the ends), a number of evenly spaced ones for each series, or times
            ``(K,)`` or ``(*batch, K)`` that reach from the first to the last time.
        degree: of the polynomials in a gap, at least 1 (straight lines).
        covariance: ``"diagonal"``, cost linear in the state; or ``"full"``, cubic, with correlations and rotation.
        states: first means at the observation times, ``(*batch, observed time, state)``; by default, for a linear
            emission, the least-squares states of the values (interpolated where values are missing), else 0.
        scale: first scale of the marginals, a number or ``(state,)``.
        parameters: a guide over random parameters (default: ``AutoNormal``).

    Parameters: ``ends`` ``(*batch, K, width)``, ``bends`` ``(*batch, K - 1, width (degree - 1))``.

    Raises:
        TypeError: the diffusion depends on the state.
        ValueError: knots that do not reach over the data; or, when called, data of other series.

    Source: Course and Nair (2023), "State estimation of a physical system with unknown governing equations", Nature
    622, methods; the family of marginals and the spin W follow Archambeau et al. (2007).

    >>> import torch, pyro_ssm as ssm
    >>> sde = ssm.dynamics.NeuralSDE(ssm.dynamics.MLPDrift(2), ssm.dynamics.ConstantDiffusion(0.5, 2))
    >>> model = ssm.StateSpaceModel(ssm.dynamics.NormalInitial(2), sde, ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.ones(3, 4, 1))
    >>> guide = ssm.guides.SVISE(model, data)
    >>> fitted = ssm.infer.fit(
    ...     model, guide, data, loss=ssm.infer.SolverFree(num_times=8), num_steps=2, progress=False)
    >>> guide(data.refine(5)).shape
    torch.Size([3, 16, 2])
    """

    def __init__(
        self,
        model: StateSpaceModel,
        data: TimeSeries,
        *,
        knots: int | Tensor | None = None,
        degree: int = 4,
        covariance: str = "diagonal",
        states: Tensor | None = None,
        scale: float | Tensor = 0.1,
        parameters: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, check_choice("covariance", covariance, ("diagonal", "full")), True, parameters)
        check_record(model, data)
        if data.values is None:
            raise ValueError("SVISE is built for observations: `data.values` is None")
        self.spins = model.initial.state_dim * (model.initial.state_dim - 1) // 2
        self.degree = check_size("degree", degree)
        self.knots = _knots(knots, data)  # a plain attribute: float64 in every dtype of the guide
        self.batch_shape = data.batch_shape
        n, width = model.initial.state_dim, self._marginal.width(model.initial.state_dim)
        shape = data.batch_shape + (self.knots.shape[-1],)
        ends = torch.zeros(shape + (width,), dtype=data.dtype)
        means = _first_states(model, data) if states is None else torch.as_tensor(states).detach().to(ends)
        wanted = data.batch_shape + (data.num_observed_times, n)
        if means.shape != wanted:
            raise ValueError(f"`states` must have shape {tuple(wanted)}, got {tuple(means.shape)}")
        at = self.knots.expand(shape)
        ends[..., :n] = _interpolated(at, data.observed_times.expand(means.shape[:-1]), means)
        ends[..., n : 2 * n] = torch.as_tensor(scale, dtype=ends.dtype).log()
        self.ends = nn.Parameter(ends.to(data.device))
        gaps = data.batch_shape + (self.knots.shape[-1] - 1,)
        self.bends = nn.Parameter(torch.zeros(gaps + (width * (degree - 1),), dtype=data.dtype, device=data.device))

    def encode(self, data: TimeSeries, model: StateSpaceModel) -> BridgeContext:
        knots = self.knots.to(data.device)
        ends: Tensor = self.ends
        bends: Tensor = self.bends
        if data.index is not None and len(self.batch_shape) == 1 and data.total == self.batch_shape[0]:
            rows = data.index.to(ends.device)
            ends, bends = ends.index_select(0, rows), bends.index_select(0, rows)
            knots = knots if knots.dim() == 1 else knots.index_select(0, rows.to(knots.device))
        elif data.batch_shape != self.batch_shape:
            raise ValueError(
                f"SVISE was built for series of batch shape {tuple(self.batch_shape)}, got {tuple(data.batch_shape)}. "
                "It is not amortised: build one for these data, or use ARCTA or SDEMatching"
            )
        first, last = time_range(data)
        if bool((first < knots[..., :1]).any() | (last > knots[..., -1:]).any()):
            raise ValueError(
                f"`data.times` reach from {float(first.min()):.6g} to {float(last.max()):.6g}, beyond the knots of "
                "this SVISE. Build it with all the times (data.extend(...) before, for a forecast)"
            )
        return self.context(data, model, knots, ends, bends)

    def bend(self, bends: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor]:
        if self.degree == 1:
            zero = bends.new_zeros(())
            return zero, zero
        value, slope = polynomial_basis(fraction, self.degree - 1)
        each = bends.unflatten(-1, (-1, self.degree - 1))  # (..., n, width, degree - 1)
        if self.covariance == "full":  # the spin jumps at a knot, as an observation turns it
            shapes, spins = each.split([each.shape[-2] - self.spins, self.spins], -2)
            jumps = matvec(spins, legendre_basis(fraction, self.degree - 1)[0])
            still = torch.zeros_like(jumps)  # nothing reads its slope
            return torch.cat([matvec(shapes, value), jumps], -1), torch.cat([matvec(shapes, slope), still], -1)
        return matvec(each, value), matvec(each, slope)


def _knots(given: int | Tensor | None, data: TimeSeries) -> Tensor:
    """Times ``(K,)`` or ``(*batch, K)``, float64."""
    first, last = time_range(data)
    if given is None:
        steps = knots_of(data)
        return (data.times if steps is None else data.times.index_select(-1, steps)).detach().clone()
    if isinstance(given, int):
        part = torch.linspace(0, 1, check_size("knots", given, least=2), dtype=torch.float64, device=data.device)
        times = first + (last - first) * part
        times[..., -1:] = last
        return times
    times = torch.as_tensor(given).to(data.times)
    if times.dim() > 1 and times.shape[:-1] != data.batch_shape:
        raise ValueError(f"`knots` must be (K,) or {tuple(data.batch_shape)} + (K,), got {tuple(times.shape)}")
    if bool((times.diff(dim=-1) <= 0).any()) or bool((times[..., :1] > first).any() | (times[..., -1:] < last).any()):
        raise ValueError(
            "`knots` must increase and reach from the first to the last time of each series; they go from "
            f"{float(times.min()):.6g} to {float(times.max()):.6g}, the data from {float(first.min()):.6g} to "
            f"{float(last.max()):.6g}"
        )
    return times.clone()


def _first_states(model: StateSpaceModel, data: TimeSeries) -> Tensor:
    """Least-squares states of the values where the emission is linear, ``(*batch, observed time, state)``; else 0."""
    n, values = model.initial.state_dim, data.values
    inputs = data.inputs
    is_linear = isinstance(model.emission, AffineGaussian)
    if not is_linear or random_parameters(model.emission) or values is None or data.mask is None:
        return torch.zeros(data.batch_shape + (data.num_observed_times, n), dtype=data.dtype)
    filled, times = values.double().cpu().numpy().copy(), data.observed_times.expand(values.shape[:-1]).cpu().numpy()
    mask = data.mask.cpu().numpy()
    for row in map(tuple, np.argwhere(~mask.all(-2) & mask.any(-2))):  # a series and a coordinate with gaps
        at = (*row[:-1], slice(None), row[-1])
        seen = mask[at]
        filled[at] = np.interp(times[row[:-1]], times[row[:-1]][seen], filled[at][seen])
    if inputs is not None and data.observed_index is not None:
        inputs = inputs.index_select(-2, data.observed_index)
    with torch.no_grad():
        law = bind(model.emission).affine(data.observed_times, inputs)
        rest = torch.as_tensor(filled, device=data.device) - law.offset.double()
        return matvec(torch.linalg.pinv(law.matrix.double()), rest).to(data.dtype)


def _interpolated(at: Tensor, times: Tensor, values: Tensor) -> Tensor:
    """``values`` ``(*batch, J, n)`` at ``times`` ``(*batch, J)`` to times ``(*batch, K)``, on straight lines."""
    if times.shape[-1] == 1:
        return values.expand(values.shape[:-2] + at.shape[-1:] + values.shape[-1:])
    j = torch.searchsorted(times[..., 1:-1].contiguous(), at.contiguous(), right=True)
    left, right = times.gather(-1, j), times.gather(-1, j + 1)
    w = ((at - left) / (right - left)).clamp(0, 1).to(values).unsqueeze(-1)
    low, high = (torch.take_along_dim(values, (j + shift).unsqueeze(-1), -2) for shift in (0, 1))
    return torch.lerp(low, high, w)
