"""Named models of the literature as short factories."""

from __future__ import annotations

from collections.abc import Callable

from pyro_ssm import dynamics, emissions
from pyro_ssm.blocks import MLP
from pyro_ssm.components import Emission
from pyro_ssm.models.recurrent import MemoryNormal, MemoryNormalInitial, RecurrentMemory
from pyro_ssm.models.state_space import StateSpaceModel

__all__ = ["dmm", "srnn", "vrnn"]


def dmm(
    state_dim: int,
    obs_dim: int,
    *,
    transition_dim: int = 64,
    emission_dim: int = 64,
    input_dim: int = 0,
    emission: Callable[..., Emission] = emissions.Normal,
) -> StateSpaceModel:
    """Deep Markov model: a gated neural transition under a neural emission.

    .. math:: z_{k+1} \\sim N(\\mu(z_k, u_k), \\sigma^2(z_k, u_k)), \\qquad y_k \\sim p(y_k \\mid f(z_k))

    Args:
        state_dim: of the state.
        obs_dim: columns of an observation.
        transition_dim: hidden units of the transition.
        emission_dim: hidden units of each of the emission's two layers.
        input_dim: columns of ``data.inputs`` that transition and emission see.
        emission: a class of :mod:`pyro_ssm.emissions`.

    Source: R. G. Krishnan, U. Shalit, D. Sontag (2017), Structured inference networks for nonlinear state space
    models, AAAI, section 3.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.models.dmm(4, 88, emission=ssm.emissions.Bernoulli)
    >>> model(ssm.TimeSeries(torch.arange(5.0).expand(2, 5)))[0].shape
    torch.Size([2, 5, 4])
    """
    return StateSpaceModel(
        dynamics.NormalInitial(state_dim),
        dynamics.GatedTransition(state_dim, transition_dim, input_dim=input_dim),
        emission(state_dim, obs_dim, hidden=(emission_dim, emission_dim), input_dim=input_dim),
    )


def vrnn(
    state_dim: int,
    obs_dim: int,
    *,
    hidden_dim: int = 64,
    input_dim: int = 0,
    emission: Callable[..., Emission] = emissions.Normal,
) -> StateSpaceModel:
    """Variational recurrent neural network: all dependence in time runs through a GRU over states and observations.

    .. math::
        z_t \\sim p(z_t \\mid h_{t-1}), \\qquad y_t \\sim p(y_t \\mid z_t, h_{t-1}), \\qquad h_t = f(y_t, z_t, h_{t-1})

    Pair it with ``guides.Structured(model, direction="past", structured=False)``, which sees :math:`y_{\\le t}` and
    :math:`h_{t-1}` as the paper's inference network does. A missing observation is skipped by the GRU, not
    marginalised.

    Args:
        state_dim: of the state.
        obs_dim: columns of an observation.
        hidden_dim: of the GRU and of every network.
        input_dim: columns of ``data.inputs`` that the GRU and the emission see.
        emission: a class of :mod:`pyro_ssm.emissions`.

    Source: J. Chung, K. Kastner, L. Dinh, K. Goel, A. Courville, Y. Bengio (2015), A recurrent latent variable model
    for sequential data, NeurIPS, equations 5 to 11.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.models.vrnn(2, 3, hidden_dim=8)
    >>> z, y = model(ssm.TimeSeries(torch.arange(5.0).expand(4, 5)))  # a joint draw of states and observations
    >>> y.shape
    torch.Size([4, 5, 3])
    """
    prior = MLP(hidden_dim, (hidden_dim,), 2 * state_dim)
    return StateSpaceModel(
        MemoryNormalInitial(state_dim, prior),
        MemoryNormal(state_dim, prior),
        emission(state_dim, obs_dim, hidden=(hidden_dim,), input_dim=input_dim, memory_dim=hidden_dim),
        RecurrentMemory(obs_dim, hidden_dim, state_dim=state_dim, input_dim=input_dim),
    )


def srnn(
    state_dim: int,
    obs_dim: int,
    *,
    hidden_dim: int = 64,
    input_dim: int = 0,
    emission: Callable[..., Emission] = emissions.Normal,
) -> StateSpaceModel:
    """Stochastic recurrent neural network: a Markov state over a deterministic GRU of past observations.

    .. math::
        d_t = f(y_{t-1}, d_{t-1}), \\qquad z_t \\sim p(z_t \\mid z_{t-1}, d_t), \\qquad y_t \\sim p(y_t \\mid z_t, d_t)

    Pair it with ``guides.Structured(model, direction="future")``: the paper's smoothing network reads observations and
    :math:`d` backwards.

    Args:
        state_dim: of the state.
        obs_dim: columns of an observation.
        hidden_dim: of the GRU and of every network.
        input_dim: columns of ``data.inputs`` that the GRU, the transition and the emission see.
        emission: a class of :mod:`pyro_ssm.emissions`.

    Source: M. Fraccaro, S. K. Sonderby, U. Paquet, O. Winther (2016), Sequential neural models with stochastic layers,
    NeurIPS, equations 1 to 6.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.models.srnn(2, 3, hidden_dim=8)
    >>> model(ssm.TimeSeries(torch.arange(5.0).expand(4, 5)))[0].shape
    torch.Size([4, 5, 2])
    """
    return StateSpaceModel(
        MemoryNormalInitial(state_dim, MLP(hidden_dim, (hidden_dim,), 2 * state_dim)),
        dynamics.MLPTransition(state_dim, (hidden_dim,), input_dim=input_dim, memory_dim=hidden_dim),
        emission(state_dim, obs_dim, hidden=(hidden_dim,), input_dim=input_dim, memory_dim=hidden_dim),
        RecurrentMemory(obs_dim, hidden_dim, input_dim=input_dim),
    )
