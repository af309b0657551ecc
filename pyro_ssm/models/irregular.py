"""Predictors of irregular series: a deterministic memory in continuous time, and the law of the next observation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from pyro_ssm import dynamics, emissions
from pyro_ssm.blocks import GRUD, ODERNN, EvolvingBlock, EvolvingMemory, GRUODEBayes, NeuralCDE
from pyro_ssm.components import Emission
from pyro_ssm.models.state_space import StateSpaceModel

__all__ = ["gru_d", "gru_ode_bayes", "neural_cde", "ode_rnn", "predictor"]

_NORMAL = partial(emissions.Normal, network_scale=True)


def predictor(
    block: EvolvingBlock,
    *,
    input_dim: int = 0,
    emission: Callable[..., Emission] = _NORMAL,
    emission_dim: int = 64,
) -> StateSpaceModel:
    """A model without a latent state: a block remembers the past, and predicts the next observation from it,

    .. math::
        h_k^- = \\text{evolve}(h_{k-1}, \\Delta_k), \\qquad y_k \\sim p(y_k \\mid h_k^-, u_k), \\qquad
        h_k = \\text{see}(h_k^-, y_k, u_k)

    so that :math:`\\log p(y) = \\sum_k \\log p(y_k \\mid y_{<k})` is exact, one site ``"y"``, and there is no ``"z"``.
    Fit it by maximum likelihood, ``infer.fit(model, None, data)``; weights with priors take Pyro's automatic guides or
    NUTS. ``infer.predictive_filter`` gives the one-step predictions and their log-likelihoods,
    ``predict.forecast`` and ``predict.impute`` feed draws back into the memory. A missing value is skipped, not
    marginalised, and adds exactly 0.

    Args:
        block: an evolving block of ``2 * obs_dim + input_dim`` columns whose state moves before an observation is known
            (see :class:`~pyro_ssm.blocks.EvolvingMemory`).
        input_dim: columns of ``data.inputs`` that block and emission see.
        emission: a class of :mod:`pyro_ssm.emissions` over a network, or a function of the same arguments; default a
            normal law whose mean and scale are the network's.
        emission_dim: units of its hidden layer.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.blocks import GRUODE
    >>> model = ssm.models.predictor(GRUODE(2, 8, obs_dim=1), emission_dim=8)
    >>> data = ssm.TimeSeries(torch.tensor([0.0, 0.3, 2.0]), torch.tensor([[1.0], [float("nan")], [2.0]]))
    >>> ssm.infer.predictive_filter(model, data).log_likelihood.shape
    torch.Size([3])
    """
    memory = EvolvingMemory(block, input_dim=input_dim)
    return StateSpaceModel(
        dynamics.EmptyInitial(),
        dynamics.EmptyTransition(),
        emission(0, block.obs_dim, hidden=(emission_dim,), input_dim=input_dim, memory_dim=block.out_features),
        memory,
    )


def gru_d(
    obs_dim: int,
    *,
    hidden_dim: int = 64,
    input_dim: int = 0,
    mean: float | Tensor = 0.0,
    emission: Callable[..., Emission] = _NORMAL,
) -> StateSpaceModel:
    """GRU-D as a predictor: values decay to their mean, and the state to zero, until the next observation.

    Args:
        obs_dim: columns of an observation.
        hidden_dim: of the GRU and of the emission's network.
        input_dim: columns of ``data.inputs`` that the GRU and the emission see.
        mean: of the values (see :class:`~pyro_ssm.blocks.GRUD`).
        emission: see :func:`predictor`.

    Source: Z. Che et al. (2018), Recurrent neural networks for multivariate time series with missing values.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.models.gru_d(3, hidden_dim=8)
    >>> ssm.infer.predictive_filter(model, ssm.TimeSeries(torch.arange(4.0), torch.zeros(4, 3))).predicted.mean.shape
    torch.Size([4, 3])
    """
    block = GRUD(obs_dim, hidden_dim, input_dim, mean=mean)
    return predictor(block, input_dim=input_dim, emission=emission, emission_dim=hidden_dim)


def ode_rnn(
    obs_dim: int,
    *,
    hidden_dim: int = 64,
    input_dim: int = 0,
    field: Callable[[Tensor], Tensor] | None = None,
    cell: str = "gru",
    emission: Callable[..., Emission] = _NORMAL,
    method: str = "rk4",
    num_steps: int = 1,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> StateSpaceModel:
    """ODE-RNN as an autoregressive model: its state follows a neural equation up to the time of the next observation.

    .. math:: p(y) = \\prod_k p(y_k \\mid h(t_k^-)), \\qquad \\frac{dh}{dt} = f(h), \\qquad h(t_k) = \\text{cell}(y_k,
        h(t_k^-))

    Args:
        obs_dim: columns of an observation.
        hidden_dim: of the state and of the networks.
        input_dim: columns of ``data.inputs`` that the cell and the emission see.
        field: f (see :class:`~pyro_ssm.blocks.ODERNN`).
        cell: ``"gru"`` or ``"rnn"``.
        emission: see :func:`predictor`.
        method, num_steps, rtol, atol: of the solver, for each gap. Time is best scaled so that gaps are of order 1.

    Source: Y. Rubanova, R. T. Q. Chen, D. Duvenaud (2019), Latent ordinary differential equations for
    irregularly-sampled time series, section 3.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.models.ode_rnn(1, hidden_dim=8)
    >>> data = ssm.TimeSeries(torch.rand(5, 4).cumsum(-1), torch.randn(5, 4, 1))
    >>> _ = ssm.infer.fit(model, None, data, num_steps=2, progress=False)
    >>> ssm.predict.forecast(model, None, data, times=torch.tensor([5.0, 7.5]), num_samples=10).values.shape
    torch.Size([10, 5, 2, 1])
    """
    options: dict[str, Any] = {"method": method, "num_steps": num_steps, "rtol": rtol, "atol": atol}
    block = ODERNN(2 * obs_dim + input_dim, hidden_dim, field, cell=cell, obs_dim=obs_dim, **options)
    return predictor(block, input_dim=input_dim, emission=emission, emission_dim=hidden_dim)


def gru_ode_bayes(
    obs_dim: int,
    *,
    hidden_dim: int = 64,
    input_dim: int = 0,
    prepared_dim: int = 8,
    floor: float = 1e-3,
    feed_prediction: bool = False,
    method: str = "exponential",
    num_steps: int = 2,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> StateSpaceModel:
    """GRU-ODE-Bayes: a continuous GRU whose own prediction is corrected at each observation.

    .. math:: y_k \\sim N(\\mu(h_k^-), \\operatorname{diag} s^2(h_k^-)), \\qquad
        h_k = \\operatorname{GRU}(\\text{prediction, observation and their difference},\\; h_k^-)

    Its likelihood is the paper's pre-jump loss; ``infer.PostJumpELBO`` adds the paper's second term, which asks of the
    state after the jump the prediction that Bayes' rule makes of the one before it.

    The emission's network is the jump's too; Pyro knows its parameters as ``memory.block.head``.

    Args:
        obs_dim: columns of an observation.
        hidden_dim: of the state and of the emission's network.
        input_dim: columns of ``data.inputs`` that the jump sees.
        prepared_dim: features that each value brings to the jump.
        floor: least standard deviation of an observation, in its units.
        feed_prediction: whether the prediction drives the flow between observations.
        method, num_steps, rtol, atol: of the flow, for each gap (see :class:`~pyro_ssm.blocks.GRUODE`). Time is best
            scaled so that gaps are of order 1.

    Source: E. De Brouwer, J. Simm, A. Arany, Y. Moreau (2019), GRU-ODE-Bayes: continuous modeling of
    sporadically-observed time series.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.models.gru_ode_bayes(1, hidden_dim=8)
    >>> data = ssm.TimeSeries(torch.rand(5, 4).cumsum(-1), torch.randn(5, 4, 1))
    >>> loss = ssm.infer.PostJumpELBO(weight=0.1, obs_scale=0.1)
    >>> ssm.infer.fit(model, None, data, loss=loss, num_steps=2, progress=False).num_steps
    2
    """
    emission = emissions.Normal(0, obs_dim, hidden_dim, memory_dim=hidden_dim, network_scale=True, floor=floor)
    block = GRUODEBayes(
        obs_dim,
        hidden_dim,
        input_dim,
        prepared_dim=prepared_dim,
        head=emission.network,
        floor=floor,
        feed_prediction=feed_prediction,
        method=method,
        num_steps=num_steps,
        rtol=rtol,
        atol=atol,
    )
    memory = EvolvingMemory(block, input_dim=input_dim)
    return StateSpaceModel(dynamics.EmptyInitial(), dynamics.EmptyTransition(), emission, memory)


def neural_cde(
    obs_dim: int,
    *,
    hidden_dim: int = 32,
    input_dim: int = 0,
    field: Callable[[Tensor], Tensor] | None = None,
    emission: Callable[..., Emission] = _NORMAL,
    method: str = "rk4",
    num_steps: int = 1,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> StateSpaceModel:
    """A neural controlled differential equation as an on-line predictor.

    Its path is rectilinear: up to the time of an observation only the time goes on, so that the state before it is
    known without it; then the values (and how often each was seen) move.

    Args:
        obs_dim: columns of an observation.
        hidden_dim: of the state and of the emission's network.
        input_dim: columns of ``data.inputs`` that path and emission see.
        field: f, from ``(..., time, hidden)`` to ``(..., time, hidden, 1 + 2 * obs_dim + input_dim)`` (see
            :class:`~pyro_ssm.blocks.NeuralCDE`).
        emission: see :func:`predictor`.
        method, num_steps, rtol, atol: of the solver, for each gap and each jump.

    Source: J. Morrill, P. Kidger, L. Yang, T. Lyons (2021), Neural controlled differential equations for online
    prediction tasks, section 3.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.models.neural_cde(2, hidden_dim=8)
    >>> model(ssm.TimeSeries(torch.arange(5.0).expand(4, 5)))[1].shape
    torch.Size([4, 5, 2])
    """
    block = NeuralCDE(
        2 * obs_dim + input_dim,
        hidden_dim,
        field,
        obs_dim=obs_dim,
        interpolation="rectilinear",
        method=method,
        num_steps=num_steps,
        rtol=rtol,
        atol=atol,
    )
    return predictor(block, input_dim=input_dim, emission=emission, emission_dim=hidden_dim)
