"""A posterior path as a moving map of noise, amortised by a network of the whole series."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.blocks import MLP, Linear
from pyro_ssm.blocks._checks import check_choice, hidden_sizes
from pyro_ssm.data import TimeSeries
from pyro_ssm.guides.arcta import beside_gaps, knot_times, shrink
from pyro_ssm.guides.bridge import AbstractBridge, BridgeContext, knots_of
from pyro_ssm.guides.bridge_basis import tanh_network
from pyro_ssm.guides.encoder import Cell, DataEncoder
from pyro_ssm.models import StateSpaceModel

__all__ = ["SDEMatching"]


class SDEMatching(AbstractBridge):
    """SDE matching: the posterior is a reparametrised path, and its drift follows from derivatives of the map,

    .. math::
        z_t = F_\\phi(t, \\varepsilon, y), \\qquad f_q = \\partial_t F_\\phi + \\tfrac12 \\nabla\\!\\cdot g g^T +
        \\tfrac12 g g^T \\nabla \\log q_\\phi(z_t \\mid y),

    for any diagonal diffusion, that of the model, which may depend on the state. The parameters of F run straight
    between knots (the observations) with a network :math:`4 w (1 - w)\\, \\text{MLP}(h_k, h_{k+1}, w)` on top; the
    features h come from a recurrent network over the whole series, both ways. ``marginals="gaussian"`` is
    :math:`m + s\\varepsilon`, ``"sinh_arcsinh"`` has skewness and tails beside, for posteriors that are not Gaussian.

    Train it with :class:`~pyro_ssm.infer.SolverFree`: the loss is the continuous-time bound at random times.
    A diffusion whose coordinate i depends on :math:`z_i` alone says so by an attribute ``elementwise = True``
    (:class:`~pyro_ssm.dynamics.ElementwiseDiffusion` does); any other costs one derivative a coordinate.

    **The path** in ``forward`` is a chain in noise coordinates, :math:`\\varepsilon_k = F^{-1}(t_k, z_k)`,

    .. math:: \\varepsilon_{k+1} \\sim N\\big(\\varepsilon_k e^{-\\kappa\\Delta} + \\tfrac{\\kappa'}{\\kappa} (1 -
        e^{-\\kappa\\Delta}),\\; 1 - e^{-2\\kappa\\Delta}\\big), \\qquad \\kappa = \\tfrac12 (g / F')^2,

    which is exact for Gaussian marginals with a diffusion that does not depend on the state, and an exponential Euler
    step otherwise, stable on any grid: its marginals are then those of the loss as the grid becomes fine. (For
    ``"sinh_arcsinh"`` a step is normal in z, by the linear part of F at the mean and Itô's correction, as the model's
    Euler step is.) The chain has a density, so its weights are right on every grid.

    Args:
        model: the state-space model; unbound.
        hidden_dim: of the encoder.
        marginals: ``"gaussian"`` or ``"sinh_arcsinh"``.
        hidden: hidden layers of the network between knots, at least one.
        cell: of the encoder (see :class:`~pyro_ssm.guides.encoder.DataEncoder`).
        num_layers: of the encoder.
        dropout: between the encoder's layers.
        input_dim: columns of ``data.inputs`` that the encoder sees (0 for none).
        scale: first scale of the marginals, about.
        parameters: a guide over random parameters (default: ``AutoNormal``); values of these enter the encoder.

    Raises:
        ValueError: the noise of the model is not diagonal.

    Source: Bartosh, Vetrov and Naesseth (2025), "SDE Matching: scalable and simulation-free training of latent
    stochastic differential equations", sections 4 and 5.

    >>> import torch, pyro_ssm as ssm
    >>> sde = ssm.dynamics.NeuralSDE(ssm.dynamics.MLPDrift(2), ssm.dynamics.ElementwiseDiffusion(2))
    >>> model = ssm.StateSpaceModel(ssm.dynamics.NormalInitial(2), sde, ssm.emissions.LinearNormal(2, 1))
    >>> guide = ssm.guides.SDEMatching(model, hidden_dim=8, marginals="sinh_arcsinh")
    >>> guide(ssm.TimeSeries(torch.arange(4.0), torch.ones(3, 4, 1)).refine(5)).shape
    torch.Size([3, 16, 2])
    """

    def __init__(
        self,
        model: StateSpaceModel,
        hidden_dim: int = 64,
        marginals: str = "gaussian",
        *,
        hidden: int | Sequence[int] = (64,),
        cell: Cell = "gru",
        num_layers: int = 1,
        dropout: float = 0.0,
        input_dim: int = 0,
        scale: float = 0.1,
        parameters: Callable[..., Any] | None = None,
    ) -> None:
        kind = check_choice("marginals", marginals, ("gaussian", "sinh_arcsinh"))
        super().__init__(model, "diagonal" if kind == "gaussian" else kind, False, parameters)
        sizes, width = hidden_sizes(hidden), self._marginal.width(model.initial.state_dim)
        if not sizes:
            raise ValueError("`hidden` must have at least one layer, got ()")
        self.encoder = DataEncoder(model, hidden_dim, "both", input_dim, cell, num_layers, dropout)
        self.ends = Linear(hidden_dim, width)
        self.from_ends = Linear(2 * hidden_dim + 1, sizes[0])
        self.from_fraction = Linear(1, sizes[0], bias=False)
        self.network = MLP(sizes[0], sizes[1:], width, "tanh")
        shrink(self.ends, model.initial.state_dim, scale)
        shrink(self.network.layers[-1])

    def encode(self, data: TimeSeries, model: StateSpaceModel) -> BridgeContext:
        features, steps, knots = self.encoder(data, model).features, knots_of(data), knot_times(data)
        if steps is not None:
            features = features.index_select(-2, steps)
        bends = self.from_ends(beside_gaps(features, knots))
        return self.context(data, model, knots, self.ends(features), bends)

    def bend(self, bends: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor]:
        w, speed = fraction.unsqueeze(-1), self.from_fraction.weight[..., 0]
        hidden = torch.tanh(bends + w * speed)
        value, slope = tanh_network(self.network, hidden, (1 - hidden.square()) * speed)
        return 4 * w * (1 - w) * value, 4 * (1 - 2 * w) * value + 4 * w * (1 - w) * slope
