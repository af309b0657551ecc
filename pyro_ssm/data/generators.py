"""Simulated data whose truth is known. Each function returns the series and the states that made them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from pyro_ssm.data.time_series import TimeSeries

__all__ = [
    "krishnan_linear",
    "krishnan_nonlinear",
    "linear_gaussian",
    "lorenz",
    "lotka_volterra",
    "stochastic_volatility",
]


def _as_generator(generator: Generator | int | None) -> Generator | None:
    """A generator from a seed; None is torch's global one."""
    return torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator


def _simulate(initial: Tensor, step: Callable[[Tensor], Tensor], num_times: int) -> Tensor:
    """The path `(series, time, state)` of z_1 = initial, z_t = step(z_{t-1})."""
    if num_times < 1:
        raise ValueError(f"`num_times` is {num_times}, but at least 1 is wanted.")
    states = [initial]
    for _ in range(num_times - 1):
        states.append(step(states[-1]))
    return torch.stack(states, dim=-2)


def linear_gaussian(
    num_series: int = 100,
    num_times: int = 50,
    *,
    matrix: Any = ((0.9, 0.2), (-0.2, 0.9)),
    offset: Any = 0.0,
    scale_tril: Any = ((0.3, 0.0), (0.0, 0.3)),
    emission_matrix: Any = ((1.0, 0.0),),
    emission_offset: Any = 0.0,
    emission_scale_tril: Any = ((0.2,),),
    initial_loc: Any = 0.0,
    initial_scale_tril: Any = ((1.0, 0.0), (0.0, 1.0)),
    missing: float = 0.0,
    generator: Generator | int | None = None,
) -> tuple[TimeSeries, Tensor]:
    """Simulates a linear-Gaussian state-space model.

    z_1 ~ N(m, P), z_t ~ N(A z_{t-1} + b, Q), y_t ~ N(H z_t + d, R). The default is a damped rotation seen in one
    coordinate.

    Args:
        num_series: number of independent series.
        num_times: steps, at times 0, 1, 2, ...
        matrix: A `(state, state)`.
        offset: b `(state,)` or a number.
        scale_tril: lower triangular factor of Q.
        emission_matrix: H `(obs, state)`.
        emission_offset: d `(obs,)` or a number.
        emission_scale_tril: lower triangular factor of R.
        initial_loc: m `(state,)` or a number.
        initial_scale_tril: lower triangular factor of P.
        missing: probability that an entry is hidden, each on its own.
        generator: a torch generator or a seed; default torch's global generator.

    Returns:
        The series `(num_series, num_times, obs)` and the states `(num_series, num_times, state)`.

    Raises:
        ValueError: if `missing` is not in [0, 1).

    Example:
        >>> from pyro_ssm.data import linear_gaussian
        >>> data, states = linear_gaussian(3, 10, generator=0)
        >>> data.values.shape, states.shape
        (torch.Size([3, 10, 1]), torch.Size([3, 10, 2]))
    """
    if not 0.0 <= missing < 1.0:
        raise ValueError(f"`missing` is {missing}, but a probability in [0, 1) is wanted.")
    generator = _as_generator(generator)
    A, L_Q, H, L_R, L_P, b, d, m = (
        torch.as_tensor(x, dtype=torch.get_default_dtype())
        for x in (
            matrix, scale_tril, emission_matrix, emission_scale_tril, initial_scale_tril,
            offset, emission_offset, initial_loc,
        )
    )  # fmt: skip

    def noise(scale: Tensor) -> Tensor:
        return torch.randn(num_series, len(scale), generator=generator) @ scale.mT

    states = _simulate(m + noise(L_P), lambda z: z @ A.mT + b + noise(L_Q), num_times)
    values = states @ H.mT + d + torch.randn(num_series, num_times, len(H), generator=generator) @ L_R.mT
    data = TimeSeries(torch.arange(num_times), values)
    if missing:
        data = data.hide(torch.rand(values.shape, generator=generator) < missing)
    return data, states


def krishnan_linear(
    num_series: int = 5000, num_times: int = 25, generator: Generator | int | None = None
) -> tuple[TimeSeries, Tensor]:
    """Simulates the linear model on which deep Markov models are checked against the Kalman filter.

    z_1 ~ N(0, 1), z_t ~ N(z_{t-1} + 0.05, 10), x_t ~ N(0.5 z_t, 20); the second numbers are variances.

    Args:
        num_series: number of independent series.
        num_times: steps, at times 0, 1, 2, ...
        generator: a torch generator or a seed; default torch's global generator.

    Returns:
        The series and the states, both `(num_series, num_times, 1)`.

    Reference:
        Krishnan, Shalit, Sontag (2017), Structured Inference Networks for Nonlinear State Space Models, AAAI, Fig. 4.

    Example:
        >>> from pyro_ssm.data import krishnan_linear
        >>> data, states = krishnan_linear(4, 25, generator=0)
        >>> data, states.shape
        (TimeSeries(batch=(4,), times=25, obs=1, observed=100.0%), torch.Size([4, 25, 1]))
    """
    return linear_gaussian(
        num_series,
        num_times,
        matrix=((1.0,),),
        offset=0.05,
        scale_tril=((10.0**0.5,),),
        emission_matrix=((0.5,),),
        emission_scale_tril=((20.0**0.5,),),
        initial_scale_tril=((1.0,),),
        generator=generator,
    )


def krishnan_nonlinear(
    num_series: int = 5000,
    num_times: int = 25,
    alpha: float = 0.5,
    beta: float = -0.1,
    generator: Generator | int | None = None,
) -> tuple[TimeSeries, Tensor]:
    """Simulates the two-dimensional nonlinear model in which alpha and beta are to be recovered.

    z_t ~ N([0.2 u + tanh(alpha v), 0.2 v + sin(beta u)], I) with (u, v) = z_{t-1}; x_t ~ N(0.5 z_t, 0.1 I); z_1 ~ N(0,
    0.01 I). The second numbers are variances.

    Args:
        num_series: number of independent series.
        num_times: steps, at times 0, 1, 2, ...
        alpha: slope within tanh.
        beta: slope within sin.
        generator: a torch generator or a seed; default torch's global generator.

    Returns:
        The series and the states, both `(num_series, num_times, 2)`.

    Reference:
        Krishnan, Shalit, Sontag (2017), Structured Inference Networks for Nonlinear State Space Models, AAAI, Fig. 3.

    Example:
        >>> from pyro_ssm.data import krishnan_nonlinear
        >>> data, states = krishnan_nonlinear(4, 25, generator=0)
        >>> states.shape
        torch.Size([4, 25, 2])
    """
    generator = _as_generator(generator)

    def step(z: Tensor) -> Tensor:
        u, v = z.unbind(-1)
        loc = torch.stack([0.2 * u + torch.tanh(alpha * v), 0.2 * v + torch.sin(beta * u)], dim=-1)
        return loc + torch.randn(num_series, 2, generator=generator)

    states = _simulate(0.1 * torch.randn(num_series, 2, generator=generator), step, num_times)
    values = 0.5 * states + 0.1**0.5 * torch.randn(num_series, num_times, 2, generator=generator)
    return TimeSeries(torch.arange(num_times), values), states


def stochastic_volatility(
    num_series: int = 1,
    num_times: int = 500,
    level: float = -1.0,
    persistence: float = 0.95,
    volatility: float = 0.2,
    generator: Generator | int | None = None,
) -> tuple[TimeSeries, Tensor]:
    """Simulates returns whose log-variance is an autoregression.

    h_1 ~ N(mu, sigma^2 / (1 - rho^2)), h_t ~ N(mu + rho (h_{t-1} - mu), sigma^2), y_t ~ N(0, exp(h_t)).

    Args:
        num_series: number of independent series.
        num_times: steps, at times 0, 1, 2, ...
        level: mu.
        persistence: rho, between -1 and 1.
        volatility: sigma.
        generator: a torch generator or a seed; default torch's global generator.

    Returns:
        The series and the log-variances h, both `(num_series, num_times, 1)`.

    Raises:
        ValueError: if the autoregression is not stationary.

    Reference:
        Kim, Shephard, Chib (1998), Stochastic Volatility, Review of Economic Studies 65(3).

    Example:
        >>> from pyro_ssm.data import stochastic_volatility
        >>> data, log_variance = stochastic_volatility(2, 100, generator=0)
        >>> log_variance.shape
        torch.Size([2, 100, 1])
    """
    if not -1.0 < persistence < 1.0:
        raise ValueError(f"`persistence` is {persistence}, but a number between -1 and 1 is wanted (stationary).")
    generator = _as_generator(generator)

    def noise() -> Tensor:
        return volatility * torch.randn(num_series, 1, generator=generator)

    initial = level + noise() / (1.0 - persistence**2) ** 0.5
    states = _simulate(initial, lambda h: level + persistence * (h - level) + noise(), num_times)
    values = (0.5 * states).exp() * torch.randn(states.shape, generator=generator)
    return TimeSeries(torch.arange(num_times), values), states


def _euler_maruyama(
    drift: Callable[[Tensor], Tensor],
    initial: Tensor,
    gap: float,
    num_times: int,
    noise: float,
    substeps: int,
    generator: Generator | None,
) -> Tensor:
    """Path of dX = f(X) dt + noise dW at `num_times` times a `gap` apart; `substeps` Euler-Maruyama steps per gap."""
    if substeps < 1:
        raise ValueError(f"`substeps` is {substeps}, but at least 1 is wanted.")
    dt = gap / substeps

    def step(x: Tensor) -> Tensor:
        for _ in range(substeps):
            x = x + dt * drift(x) + noise * dt**0.5 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return x

    return _simulate(initial, step, num_times)


def _observed(states: Tensor, gap: float, noise: float, generator: Generator | None) -> tuple[TimeSeries, Tensor]:
    """States seen with Gaussian noise, in torch's default dtype (they were simulated in float64)."""
    values = states + noise * torch.randn(states.shape, generator=generator, dtype=states.dtype)
    times = gap * torch.arange(states.shape[-2], dtype=torch.float64)
    return TimeSeries(times, values.to(torch.get_default_dtype())), states.to(torch.get_default_dtype())


def lorenz(
    num_series: int = 1024,
    num_times: int = 41,
    gap: float = 0.025,
    *,
    parameters: Sequence[float] = (10.0, 28.0, 8.0 / 3.0),
    noise: float = 0.15,
    obs_noise: float = 0.01,
    substeps: int = 50,
    generator: Generator | int | None = None,
) -> tuple[TimeSeries, Tensor]:
    """Simulates the stochastic Lorenz attractor, seen with noise.

    dX = [sigma (x2 - x1), x1 (rho - x3) - x2, x1 x2 - beta x3] dt + noise dW, X_0 ~ N(0, I), y ~ N(X, obs_noise^2 I);
    additive noise, independent in the three coordinates; Euler-Maruyama with `substeps` steps per gap, in float64. With
    the default 41 times, 0.025 apart, the series cover [0, 1].

    Args:
        num_series: number of independent series.
        num_times: observed times.
        gap: time between them.
        parameters: sigma, rho, beta.
        noise: standard deviation of the driving noise, per square root of time.
        obs_noise: standard deviation of the observation noise.
        substeps: solver steps per gap.
        generator: a torch generator or a seed; default torch's global generator.

    Returns:
        The series and the states, both `(num_series, num_times, 3)`.

    Reference:
        Li, Wong, Chen, Duvenaud (2020), Scalable Gradients for Stochastic Differential Equations, AISTATS, Section 7.2.

    Example:
        >>> from pyro_ssm.data import lorenz
        >>> data, states = lorenz(2, 5, generator=0)
        >>> states.shape, data.times.tolist()
        (torch.Size([2, 5, 3]), [0.0, 0.025, 0.05, 0.07500000000000001, 0.1])
    """
    generator = _as_generator(generator)
    sigma, rho, beta = parameters

    def drift(state: Tensor) -> Tensor:
        x, y, z = state.unbind(-1)
        return torch.stack([sigma * (y - x), x * (rho - z) - y, x * y - beta * z], dim=-1)

    initial = torch.randn(num_series, 3, generator=generator, dtype=torch.float64)
    states = _euler_maruyama(drift, initial, gap, num_times, noise, substeps, generator)
    return _observed(states, gap, obs_noise, generator)


def lotka_volterra(
    num_series: int = 1,
    num_times: int = 651,
    gap: float = 0.1,
    *,
    parameters: Sequence[float] = (2.0 / 3.0, 4.0 / 3.0, 1.0, 1.0),
    start: Sequence[float] = (0.9, 0.2),
    noise: float = 1e-3,
    obs_noise: float = 1e-2,
    substeps: int = 50,
    generator: Generator | int | None = None,
) -> tuple[TimeSeries, Tensor]:
    """Simulates prey and predator with a little noise, seen with noise.

    dX = [x (alpha - beta y), y (delta x - gamma)] dt + noise dW, X_0 = start, y ~ N(X, obs_noise^2 I); (alpha, beta,
    delta, gamma) = `parameters`; Euler-Maruyama with `substeps` steps per gap, in float64. The default covers [0, 65]
    at ten observations per unit of time (train on t <= 50, predict the rest).

    Args:
        num_series: number of independent series.
        num_times: observed times.
        gap: time between them.
        parameters: alpha, beta, delta, gamma.
        start: the first state.
        noise: standard deviation of the driving noise, per square root of time.
        obs_noise: standard deviation of the observation noise.
        substeps: solver steps per gap.
        generator: a torch generator or a seed; default torch's global generator.

    Returns:
        The series and the states, both `(num_series, num_times, 2)`.

    Reference:
        Course, Nair (2023), Amortized Reparametrization: Efficient and Scalable Variational Inference for Latent SDEs,
        NeurIPS.

    Example:
        >>> from pyro_ssm.data import lotka_volterra
        >>> data, states = lotka_volterra(num_times=11, generator=0)
        >>> states.shape
        torch.Size([1, 11, 2])
    """
    generator = _as_generator(generator)
    alpha, beta, delta, gamma = parameters

    def drift(state: Tensor) -> Tensor:
        prey, predator = state.unbind(-1)
        return torch.stack([prey * (alpha - beta * predator), predator * (delta * prey - gamma)], dim=-1)

    initial = torch.tensor(start, dtype=torch.float64).expand(num_series, 2)
    states = _euler_maruyama(drift, initial, gap, num_times, noise, substeps, generator)
    return _observed(states, gap, obs_noise, generator)
