"""Named latent models in continuous time: ordinary and stochastic differential equations under a neural emission."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyro_ssm import dynamics, emissions
from pyro_ssm.blocks import with_normal_priors
from pyro_ssm.components import Emission
from pyro_ssm.models.state_space import StateSpaceModel

__all__ = ["latent_ode", "latent_sde", "ode2vae"]


def latent_ode(
    state_dim: int,
    obs_dim: int,
    *,
    field: Any = None,
    hidden: int | Sequence[int] = (64, 64),
    emission: Callable[..., Emission] = emissions.Normal,
    emission_dim: int | Sequence[int] = (),
    noise: float | None = 0.01,
    poisson: bool | Any = False,
    input_dim: int = 0,
    **solver: Any,
) -> StateSpaceModel:
    """Latent ODE: a random start, a neural equation that carries it, and noise that is fixed.

    .. math::
        z(t_1) \\sim N(m, \\operatorname{diag} s^2), \\qquad \\frac{dz}{dt} = f(z, u),
        \\qquad y_k \\sim N(g(z(t_k)),\\; \\text{noise}^2)

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
        poisson: whether the times of observation are a Poisson process, of one channel for each column, whose rates are
            a network of the state (:class:`~pyro_ssm.dynamics.LogIntensity`, or a module in its place): the record's
            mask is then observed too, as the site ``"times"``.
        input_dim: columns of ``data.inputs`` that the default field, the emission and the rates see.
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
    rates = dynamics.LogIntensity(state_dim, obs_dim, input_dim=input_dim) if poisson is True else poisson or None
    options: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4, "log_intensity": rates, "state_dim": state_dim} | solver
    return StateSpaceModel(
        dynamics.NormalInitial(state_dim),
        dynamics.NeuralODE(field, **options),
        _emission(emission, state_dim, obs_dim, emission_dim, noise, input_dim=input_dim),
    )


def ode2vae(
    position_dim: int,
    obs_dim: int,
    *,
    hidden: int | Sequence[int] = (64, 64),
    prior_scale: float = 1.0,
    emission: Callable[..., Emission] = emissions.Normal,
    emission_dim: int | Sequence[int] = (64,),
    noise: float | None = None,
    **solver: Any,
) -> StateSpaceModel:
    """ODE2VAE: positions and velocities under an acceleration with random weights, of which the positions are seen.

    .. math::
        W \\sim p(W), \\qquad (x, v)(t_1) \\sim N(m, \\operatorname{diag} s^2), \\qquad \\dot x = v, \\quad
        \\dot v = a_W(x, v), \\qquad y_k \\sim p(y_k \\mid g(x(t_k)))

    Pair it with ``guides.PositionVelocity(model, hidden_dim, num_frames)``, which reads the position off the first
    observation and the velocity off the first few, and has a mean-field posterior of the weights. The bound holds
    :math:`KL(q(W) \\| p(W))` once for all series and :math:`KL(q(x_1, v_1) \\| p)` for each;
    ``infer.PushForwardELBO`` adds the paper's terms along the path, and with ``encoder_weight`` those of ODE2VAE-KL.

    Args:
        position_dim: of x; the state has twice as many coordinates, positions first.
        obs_dim: columns of an observation.
        hidden: hidden layers of the acceleration.
        prior_scale: of its weights (see ``blocks.with_normal_priors``).
        emission: a class of :mod:`pyro_ssm.emissions` over a network.
        emission_dim: hidden layers of that network.
        noise: standard deviation of an observation, not learnt; None leaves it to the emission.
        solver: options of :class:`~pyro_ssm.dynamics.NeuralODE`; by default ``rtol=1e-3, atol=1e-4``.

    Source: Ç. Yildiz, M. Heinonen, H. Lähdesmäki (2019), ODE2VAE: deep generative second order ODEs with Bayesian
    neural networks, NeurIPS, section 3.

    >>> import torch, pyro_ssm as ssm
    >>> data = ssm.TimeSeries(torch.arange(6.0), torch.randn(5, 6, 3))
    >>> model = ssm.models.ode2vae(2, 3, hidden=4, emission_dim=4)
    >>> guide = ssm.guides.PositionVelocity(model, 8, num_frames=3)
    >>> _ = ssm.infer.fit(model, guide, data, num_steps=2, progress=False)
    >>> ssm.predict.forecast(model, guide, data, times=[6.0, 7.0], num_samples=10).values.shape
    torch.Size([10, 5, 2, 3])
    """
    field = with_normal_priors(dynamics.SecondOrder(position_dim, hidden=hidden), prior_scale)
    return StateSpaceModel(
        dynamics.NormalInitial(2 * position_dim),
        dynamics.NeuralODE(field, **({"rtol": 1e-3, "atol": 1e-4} | solver)),
        emissions.Coordinates(_emission(emission, position_dim, obs_dim, emission_dim, noise), 2 * position_dim),
    )


def latent_sde(
    state_dim: int,
    obs_dim: int,
    *,
    hidden: int | Sequence[int] = (64, 64),
    diffusion_dim: int = 8,
    emission: Callable[..., Emission] = emissions.Normal,
    emission_dim: int | Sequence[int] = (),
    noise: float | None = 0.01,
    input_dim: int = 0,
    **solver: Any,
) -> StateSpaceModel:
    """Latent SDE: a neural drift, and for each coordinate a diffusion that is a network of it.

    .. math::
        z(t_1) \\sim N(m, \\operatorname{diag} s^2), \\qquad dz = f(z, u)\\, dt + \\operatorname{diag}(g_i(z_i))\\,
        dW, \\qquad y_k \\sim N(h(z(t_k)),\\; \\text{noise}^2)

    Pair it with ``guides.PosteriorSDE(model, hidden_dim)``, and train it on ``data.refine(n)``: steps of the solver are
    those of the grid.

    Args:
        state_dim: of the state.
        obs_dim: columns of an observation.
        hidden: hidden layers of the drift.
        diffusion_dim: hidden units of each coordinate's diffusion.
        emission: a class of :mod:`pyro_ssm.emissions` over a network.
        emission_dim: hidden layers of that network; ``()`` is an affine map.
        noise: standard deviation of an observation, not learnt; None leaves it to the emission.
        input_dim: columns of ``data.inputs`` that drift and emission see.
        solver: options of :class:`~pyro_ssm.dynamics.NeuralSDE`.

    Source: X. Li, T.-K. L. Wong, R. T. Q. Chen, D. Duvenaud (2020), Scalable gradients for stochastic differential
    equations, AISTATS, section 5.

    >>> import torch, pyro_ssm as ssm
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.randn(5, 4, 1)).refine(3)
    >>> model = ssm.models.latent_sde(2, 1, hidden=8)
    >>> guide = ssm.guides.PosteriorSDE(model, 8)
    >>> _ = ssm.infer.fit(model, guide, data, num_steps=2, progress=False)
    >>> ssm.predict.forecast(model, guide, data, times=[4.0, 5.0], num_samples=10).values.shape
    torch.Size([10, 5, 2, 1])
    """
    drift = dynamics.MLPDrift(state_dim, hidden, input_dim)
    return StateSpaceModel(
        dynamics.NormalInitial(state_dim),
        dynamics.NeuralSDE(drift, dynamics.ElementwiseDiffusion(state_dim, diffusion_dim), **solver),
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
