"""Named latent models in continuous time: ordinary and stochastic differential equations under a neural emission."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyro_ssm import dynamics, emissions
from pyro_ssm.components import Emission
from pyro_ssm.models.state_space import StateSpaceModel

__all__ = ["latent_ode"]


def latent_ode(
    state_dim: int,
    obs_dim: int,
    *,
    field: Any = None,
    hidden: int | Sequence[int] = (64, 64),
    emission: Callable[..., Emission] = emissions.Normal,
    emission_dim: int | Sequence[int] = (),
    noise: float | None = 0.01,
    input_dim: int = 0,
    **solver: Any,
) -> StateSpaceModel:
    """Latent ODE: a random start, a neural equation that carries it, and noise that is fixed.

    .. math::
        z(t_1) \\sim N(m, \\operatorname{diag} s^2), \\qquad \\frac{dz}{dt} = f(z, u), \\qquad y_k \\sim N(g(z(t_k)),\\; \\text{noise}^2)

    Pair it with ``guides.InitialState(model, hidden_dim, cell="ode_rnn")``: an ODE-RNN that runs backward in time over
    the whole record (Rubanova et al.); ``cell="gru"`` is the encoder of Chen et al. Time is best scaled so that a
    series lasts a few units, and observations so that ``noise`` is small beside them. The law of the start begins as
    N(0, I), which the papers keep (``model.initial.requires_grad_(False)``).

    Args:
        state_dim: of the state.
        obs_dim: columns of an observation.
        field: f, as :class:`~pyro_ssm.dynamics.NeuralODE` takes it; default a tanh network of layers ``hidden``.
        hidden: hidden layers of the default field.
        emission: a class of :mod:`pyro_ssm.emissions` over a network.
        emission_dim: hidden layers of that network; ``()`` is the papers' affine map.
        noise: standard deviation of an observation, in its units, which is not learnt: learning it together with the
            path often stops at an explanation of everything by noise. None leaves it to the emission (counts, classes;
            or a scale that is learnt).
        input_dim: columns of ``data.inputs`` that the default field and the emission see.
        solver: options of :class:`~pyro_ssm.dynamics.NeuralODE`; by default ``rtol=1e-3, atol=1e-4``.

    Source: R. T. Q. Chen, Y. Rubanova, J. Bettencourt, D. Duvenaud (2018), Neural ordinary differential equations,
    NeurIPS, section 5; Y. Rubanova, R. T. Q. Chen, D. Duvenaud (2019), Latent ordinary differential equations for
    irregularly-sampled time series, NeurIPS, section 3.

    >>> import torch, pyro_ssm as ssm
    >>> data = ssm.TimeSeries(torch.rand(5, 6).cumsum(-1), torch.randn(5, 6, 1))        # own times of each series
    >>> model = ssm.models.latent_ode(2, 1, hidden=8, noise=0.1)
    >>> guide = ssm.guides.InitialState(model, 8, cell="ode_rnn")
    >>> _ = ssm.infer.fit(model, guide, data, num_steps=2, progress=False)
    >>> ssm.predict.forecast(model, guide, data, times=[7.0, 8.5], num_samples=10).values.shape
    torch.Size([10, 5, 2, 1])
    """
    if field is None:
        field = dynamics.MLPDrift(state_dim, hidden, input_dim, activation="tanh")
    return StateSpaceModel(
        dynamics.NormalInitial(state_dim),
        dynamics.NeuralODE(field, state_dim=state_dim, **({"rtol": 1e-3, "atol": 1e-4} | solver)),
        _emission(emission, state_dim, obs_dim, emission_dim, noise, input_dim=input_dim),
    )


def _emission(
    emission: Callable[..., Emission], state_dim: int, obs_dim: int, hidden: Any, noise: float | None, **more: Any
) -> Emission:
    """The emission over a network; its scale, where ``noise`` is given, is that number and stays it."""
    if noise is None:
        return emission(state_dim, obs_dim, hidden=hidden, **more)
    made = emission(state_dim, obs_dim, hidden=hidden, scale=noise, **more)
    made.scale_unconstrained.requires_grad_(False)
    return made
