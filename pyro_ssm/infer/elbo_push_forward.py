"""The training loss of ODE2VAE: the bound, and at each time the distance of the states' posterior from a normal law."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_ssm.binding import random_parameters
from pyro_ssm.data import TimeSeries
from pyro_ssm.dynamics import NeuralODE
from pyro_ssm.guides import encoded_laws
from pyro_ssm.infer.elbo import DifferentiableELBO
from pyro_ssm.models import StateSpaceModel, site_name
from pyro_ssm.models.laws import stopped_times

__all__ = ["PushForwardELBO"]


class PushForwardELBO(DifferentiableELBO):
    """The evidence lower bound of a latent ODE less what the states' posterior is away from N(0, I) after the start,

    .. math::
        L &= \\text{ELBO} - w \\sum_{k \\ge 2} E\\big[\\log q(z_k) - \\log N(z_k; 0, I)\\big], \\\\
        \\log q(z_k) &= \\log q(z_1)
        - \\int_{t_1}^{t_k} \\operatorname{tr} \\frac{\\partial f}{\\partial z}(t, z(t))\\, dt,

    with q carried along by the field (the instantaneous change of variables), given its random weights. With w = 1 that
    is the objective of ODE2VAE, in which each state has the prior N(0, I). The terms are no part of a model, since its
    equation says where :math:`z_k` is: they hold the states where the emission knows them. w = 0 is the bound itself.

    The integral is taken by the trapezoidal rule at the times of the data (exact where the divergence is linear in
    time; refine them where gaps are long), the trace exactly, by one backward pass a coordinate. The terms are scaled
    with their series in mini-batches; padding adds exactly 0. Bounds for reports come from
    ``infer.evidence_lower_bound``.

    With ``encoder_weight`` :math:`\\gamma` the loss also has the distance from what the encoder says of later states,

    .. math:: - \\gamma \\sum_{k \\ge 2} E\\big[\\log q(z_k)
        - \\log q_{enc}(z_k \\mid y_k, \\dots, y_{k + m - 1})\\big],

    the start's own law read off the frames from :math:`y_k` on (``guides.encoded_laws``): the penalised objective
    ODE2VAE-KL, which keeps a strong decoder from leaving the encoder untrained. Its terms are those of observations
    with m - 1 more after them, in each of which something was seen.

    Args:
        weight: w.
        num_particles: draws.
        encoder_weight: :math:`\\gamma`; the guide must then read first frames (``guides.PositionVelocity``).

    Raises:
        ValueError: a weight is negative.
        TypeError: when called, the model is no ``StateSpaceModel`` of a ``NeuralODE``, or has jumps; or the guide
            cannot encode later states.

    Source: Yildiz, Heinonen and Lähdesmäki (2019), "ODE2VAE", NeurIPS, section 3.3; Chen et al. (2018), "Neural
    ordinary differential equations", theorem 1.

    >>> import torch, pyro_ssm as ssm
    >>> data = ssm.TimeSeries(torch.arange(6.0), torch.randn(5, 6, 3))
    >>> model = ssm.models.ode2vae(1, 3, hidden=4, emission_dim=4)
    >>> guide = ssm.guides.PositionVelocity(model, 8)
    >>> loss = ssm.infer.PushForwardELBO()
    >>> ssm.infer.fit(model, guide, data, loss=loss, num_steps=2, progress=False).num_steps
    2
    """

    def __init__(self, weight: float = 1.0, num_particles: int = 1, encoder_weight: float = 0.0) -> None:
        super().__init__(num_particles=num_particles)
        for what, number in (("weight", weight), ("encoder_weight", encoder_weight)):
            if not 0 <= number < float("inf"):
                raise ValueError(f"`{what}` must be finite and not negative, got {number}")
        self.weight, self.encoder_weight = float(weight), float(encoder_weight)

    def differentiable_loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> Tensor:
        """The negative bound; differentiable."""
        if not isinstance(model, StateSpaceModel) or not isinstance(model.transition, NeuralODE):
            raise TypeError("PushForwardELBO needs a StateSpaceModel whose transition is a dynamics.NeuralODE")
        if model.transition.jump is not None:
            raise TypeError("PushForwardELBO follows densities through a flow, and this equation has jumps")
        data: TimeSeries = args[0]
        name, loss = site_name(model, "z_start"), torch.zeros(())
        for model_trace, guide_trace in self._get_traces(model, guide, args, {}):
            bound = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
            if name not in guide_trace:
                raise TypeError(f'PushForwardELBO needs a guide that samples "{name}", such as guides.InitialState')
            start = guide_trace.nodes[name]
            path = model_trace.nodes[site_name(model, "z")]["value"]
            first = start["fn"].log_prob(start["value"])
            log_q = push_forward(_equation(model, model_trace), path, data, first)
            log_p = -0.5 * (path.square() + torch.tensor(2 * torch.pi).log().to(path)).sum(-1)
            away = torch.where(data.step_mask, log_q - log_p, torch.zeros_like(log_p))[..., 1:]
            terms = self.weight * away.sum(-1)
            if self.encoder_weight:
                terms = terms + self.encoder_weight * from_encoder(guide, data, path, log_q)
            loss = loss + ((start["scale"] * terms).sum() - bound) / self.num_particles
        return loss


def from_encoder(guide: Any, data: TimeSeries, path: Tensor, log_q: Tensor) -> Tensor:
    """:math:`\\sum_{k \\ge 2} \\log q(z_k) - \\log q_{enc}(z_k)` of paths ``(*lead, time, state)``, ``(*lead,)``.

    >>> from pyro_ssm.infer.elbo_push_forward import from_encoder
    >>> from_encoder.__name__
    'from_encoder'
    """
    law, complete = encoded_laws(guide, data)
    if data.observed_index is not None:
        path, log_q = path.index_select(-2, data.observed_index), log_q.index_select(-1, data.observed_index)
    windows = complete.shape[-1]
    away = log_q[..., :windows] - law.log_prob(path[..., :windows, :])
    return torch.where(complete, away, torch.zeros_like(away))[..., 1:].sum(-1)


def _equation(model: StateSpaceModel, trace: Any) -> NeuralODE:
    """The equation with the parameters that the trace has drawn."""
    values = {name: trace.nodes[site_name(model, name)]["value"] for name in random_parameters(model)}
    with pyro.poutine.block():
        return model.bind(values).transition  # type: ignore[return-value]


def push_forward(ode: NeuralODE, path: Tensor, data: TimeSeries, first: Tensor) -> Tensor:
    """:math:`\\log q(z_k)` ``(*lead, time)`` along paths ``(*lead, time, state)``, from that of the start ``(*lead,)``.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.elbo_push_forward import push_forward
    >>> ode = ssm.dynamics.NeuralODE(lambda t, z, u: -z, state_dim=2)
    >>> path = ode.solve(torch.ones(1, 2), torch.arange(3.0))
    >>> push_forward(ode, path, ssm.TimeSeries(torch.arange(3.0)), torch.zeros(()))       # the law contracts
    tensor([0., 2., 4.])
    """
    times = stopped_times(data)
    trace = divergence(lambda z: ode.field_at(z, times, data.inputs), path)
    area = 0.5 * (trace[..., 1:] + trace[..., :-1]) * times.diff(dim=-1).to(trace)
    moved = torch.nn.functional.pad(area.cumsum(-1), (1, 0))
    return first.unsqueeze(-1) - moved


def divergence(field: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """:math:`\\operatorname{tr} \\partial f / \\partial z` ``(...)`` at states ``(..., state)``, each by itself.

    >>> import torch
    >>> from pyro_ssm.infer.elbo_push_forward import divergence
    >>> divergence(lambda z: z**2, torch.tensor([[1.0, 2.0], [3.0, 0.0]])).detach()
    tensor([6., 6.])
    """
    learning = torch.is_grad_enabled()
    with torch.enable_grad():
        z = states if states.requires_grad and learning else states.detach().requires_grad_()
        value, total = field(z), torch.zeros_like(states[..., 0])
        for i in range(states.shape[-1]):
            column = value[..., i].sum()
            if not column.requires_grad:
                continue
            (slope,) = torch.autograd.grad(column, z, create_graph=learning, retain_graph=True, allow_unused=True)
            if slope is not None:
                total = total + slope[..., i]
    return total if learning else total.detach()
