"""Amortised linear bridges: each gap's posterior is a function of a window of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_ssm.blocks import MLP, Linear
from pyro_ssm.blocks._checks import check_size
from pyro_ssm.data import TimeSeries
from pyro_ssm.guides.bridge import AbstractBridge, BridgeContext, knots_of
from pyro_ssm.guides.bridge_basis import DeepKernelBasis
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.ops.kalman import matvec

__all__ = ["ARCTA", "WindowEncoder"]


class WindowEncoder(PyroModule):
    """A network of the observations around each time: values, mask, and how far away they are.

    .. math:: h_k = \\text{MLP}\\big((y_j, \\text{seen}_j, t_j - t_k)_{|j - k| \\le w}\\big)

    No recurrence: all times at once, and what is further away than the window does not count. Values are 0 where
    missing, everything is 0 outside the series.

    Args:
        obs_dim: size of an observation.
        window: w, observation times on each side.
        features: size of the result.
        hidden: hidden layers.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.guides.arcta import WindowEncoder
    >>> WindowEncoder(1, 2, 8)(ssm.TimeSeries(torch.arange(4.0), torch.ones(3, 4, 1))).shape
    torch.Size([3, 4, 8])
    """

    def __init__(self, obs_dim: int, window: int, features: int, hidden: int | Sequence[int] = (64,)) -> None:
        super().__init__()
        self.window = check_size("window", window, least=0)
        self.network = MLP((2 * self.window + 1) * (2 * obs_dim + 2), hidden, features, "silu")

    def forward(self, data: TimeSeries) -> Tensor:
        """``(*batch, knots, features)``; the knots are :func:`~pyro_ssm.guides.bridge.knots_of` the data."""
        if data.values is None or data.mask is None:
            raise ValueError("an encoder needs observations: `data.values` is None")
        steps, seen = knots_of(data), data.mask.to(data.values.dtype)
        times, real, shown = data.times, data.step_mask, torch.cat([data.values, seen], -1)
        if steps is not None:
            times, real = times.index_select(-1, steps), real.index_select(-1, steps)
            place = torch.searchsorted(steps, data.observed_index)
            whole = shown.new_zeros(shown.shape[:-2] + (len(steps),) + shown.shape[-1:])
            shown = whole.index_copy(-2, place, shown)
        offsets = torch.arange(-self.window, self.window + 1, device=times.device)
        index = torch.arange(times.shape[-1], device=times.device).unsqueeze(-1) + offsets  # (K, 2 w + 1)
        inside = (index >= 0) & (index < times.shape[-1])
        index = index.clamp(0, times.shape[-1] - 1)
        inside = inside & real[..., index]
        away = (times[..., index] - times.unsqueeze(-1)).to(shown).expand(inside.shape)
        parts = [shown[..., index, :], away.unsqueeze(-1), torch.ones_like(away).unsqueeze(-1)]
        around = torch.cat(parts, -1) * inside.to(shown).unsqueeze(-1)
        return self.network(around.flatten(-2))


class ARCTA(AbstractBridge):
    """Amortised reparametrisation: a linear posterior equation for each gap, from a window of the data around it,

    .. math::
        q(z_t) = N(m_t, \\operatorname{diag} s_t^2), \\qquad
        m_t = (1 - w)\\, H_k + w\\, H_{k+1} + \\textstyle\\sum_i \\beta_i(w)\\, D_{ki}, \\quad
        w = \\frac{t - t_k}{t_{k+1} - t_k},

    and likewise :math:`\\log s_t`, with H and D from networks of the window's features
    (:class:`~pyro_ssm.guides.arcta.WindowEncoder`) and :math:`\\beta` the weights of deep-kernel interpolation in the
    gap (:class:`~pyro_ssm.guides.bridge_basis.DeepKernelBasis`). Neighbouring gaps share the knot's features, so that
    the path is continuous (bridges that start afresh would have no density with respect to the model).

    Train it with :class:`~pyro_ssm.infer.SolverFree`: its cost does not grow with the number of solver steps, and
    no gradient runs through time, so chaotic systems and long series train as others do. It is amortised: new series
    need no training. It does not depend on drawn parameters of the model.

    Args:
        model: the state-space model; unbound.
        window: observation times that are read on each side of a knot.
        hidden_dim: features of the encoder.
        points: inner points of the deep kernel in a gap.
        encoder_hidden: hidden layers of the encoder.
        scale: first scale of the marginals, about.
        parameters: a guide over random parameters (default: ``AutoNormal``).

    Raises:
        TypeError: the diffusion depends on the state.

    Source: Course and Nair (2023), "Amortized reparametrization: efficient and scalable variational inference for
    latent SDEs", NeurIPS, section 3; the marginals here are continuous from window to window.

    >>> import torch, pyro_ssm as ssm
    >>> sde = ssm.dynamics.NeuralSDE(ssm.dynamics.MLPDrift(2), ssm.dynamics.ConstantDiffusion(0.5, 2))
    >>> model = ssm.StateSpaceModel(ssm.dynamics.NormalInitial(2), sde, ssm.emissions.LinearNormal(2, 1))
    >>> guide = ssm.guides.ARCTA(model, window=2, hidden_dim=8)
    >>> guide(ssm.TimeSeries(torch.arange(4.0), torch.ones(3, 4, 1)).refine(5)).shape
    torch.Size([3, 16, 2])
    """

    def __init__(
        self,
        model: StateSpaceModel,
        window: int = 3,
        hidden_dim: int = 64,
        *,
        points: int = 3,
        encoder_hidden: int | Sequence[int] = (64, 64),
        scale: float = 0.1,
        parameters: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, "diagonal", True, parameters)
        width = self._marginal.width(model.initial.state_dim)
        self.encoder = WindowEncoder(model.emission.obs_dim, window, hidden_dim, encoder_hidden)
        self.kernel = DeepKernelBasis(points)
        self.ends = Linear(hidden_dim, width)
        self.bends = Linear(2 * hidden_dim + 1, width * points)
        shrink(self.ends, model.initial.state_dim, scale)
        shrink(self.bends)

    def encode(self, data: TimeSeries, model: StateSpaceModel) -> BridgeContext:
        features, knots = self.encoder(data), knot_times(data)
        return self.context(data, model, knots, self.ends(features), self.bends(beside_gaps(features, knots)))

    def bend(self, bends: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = self.kernel(fraction)
        each = bends.unflatten(-1, (-1, self.kernel.size))
        return matvec(each, value), matvec(each, slope)


def knot_times(data: TimeSeries) -> Tensor:
    """``(K,)`` or ``(*batch, K)``: the times of :func:`~pyro_ssm.guides.bridge.knots_of`."""
    steps = knots_of(data)
    return data.times if steps is None else data.times.index_select(-1, steps)


def beside_gaps(features: Tensor, knots: Tensor) -> Tensor:
    """Features of both ends of each gap, and the logarithm of its length: ``(*lead, K - 1, 2 hidden + 1)``."""
    length = knots.diff(dim=-1).log().to(features).unsqueeze(-1).expand(features[..., 1:, :1].shape)
    return torch.cat([features[..., :-1, :], features[..., 1:, :], length], -1)


def shrink(layer: Linear, state_dim: int = 0, scale: float = 1.0) -> None:
    """Small weights, and biases that start log-scales at ``scale``."""
    with torch.no_grad():
        layer.weight.mul_(0.1)
        layer.bias.zero_()
        if state_dim:
            layer.bias[state_dim : 2 * state_dim] = torch.tensor(scale).log()
