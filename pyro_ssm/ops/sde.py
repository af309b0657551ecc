"""Fixed-step schemes for stochastic differential equations: one step, and a whole path from given noise.

The equation is :math:`dz = f(t, z, u)\\, dt + g(t, z, u)\\, dW` (or :math:`\\circ\\, dW`); u is held within a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ssm.ops.solver_error import SolverError

__all__ = ["Field", "SDEStep", "check_path", "fixed_step_methods", "noise_times", "sde_path", "sde_step"]

#: ``(t, z, u)`` with ``t`` ``(..., 1, 1)``, ``z`` ``(..., 1, state)``
Field = Callable[[Tensor, Tensor, Tensor | None], Tensor]

NOISES = ("diagonal", "scalar", "additive", "general")
COMMUTING = ("diagonal", "scalar", "additive")
#: interpretation -> scheme -> the kinds of noise for which it converges to that integral (strongly, order 1/2 or 1)
SCHEMES = {
    "ito": {"euler": NOISES, "milstein": COMMUTING, "heun": ("additive",)},
    "stratonovich": {
        "euler": ("additive",),
        "euler_heun": NOISES,
        "heun": NOISES,
        "midpoint": NOISES,
        "milstein": COMMUTING,
    },
}


class SDEStep(NamedTuple):
    """Everything a scheme needs for one step from t to t'.

    >>> from pyro_ssm.ops.sde import SDEStep
    >>> SDEStep._fields
    ('drift', 'diffusion', 'noise', 'time', 'next_time', 'inputs', 'gap', 'increment')
    """

    drift: Field
    diffusion: Field
    noise: str
    time: Tensor  # (..., 1, 1), in the dtype of the state
    next_time: Tensor
    inputs: Tensor | None
    gap: Tensor  # (..., 1, 1)
    increment: Tensor  # (..., 1, noise): W(t') - W(t)


def fixed_step_methods(interpretation: str, noise: str) -> list[str]:
    """The schemes of :func:`sde_path` that converge to that integral for that kind of noise.

    >>> from pyro_ssm.ops.sde import fixed_step_methods
    >>> fixed_step_methods("ito", "general")
    ['euler']
    """
    return [method for method, noises in SCHEMES[interpretation].items() if noise in noises]


def noise_times(g: Tensor, increment: Tensor, noise: str) -> Tensor:
    """:math:`g\\, \\Delta W`: elementwise for diagonal noise, else a matrix ``(..., state, noise)`` times a vector.

    >>> import torch
    >>> from pyro_ssm.ops.sde import noise_times
    >>> noise_times(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0]), "scalar")
    tensor([3., 6.])
    """
    if noise == "diagonal":
        return g * increment
    return (g @ increment.unsqueeze(-1)).squeeze(-1)


def _euler(z: Tensor, s: SDEStep) -> Tensor:
    """z + f dt + g dW (Euler-Maruyama; to Itô's integral)."""
    g = s.diffusion(s.time, z, s.inputs)
    return z + s.drift(s.time, z, s.inputs) * s.gap + noise_times(g, s.increment, s.noise)


def _milstein(z: Tensor, s: SDEStep, ito: bool) -> Tensor:
    """Euler + (g(z + g sqrt dt) - g(z)) / (2 sqrt dt) (dW^2 - dt), the derivative along g by a difference.

    Kloeden and Platen (1992), equation 11.1.3; in Stratonovich's form without ``- dt``. For diagonal noise each g_i may
    depend on its own z_i only.
    """
    f, g = s.drift(s.time, z, s.inputs), s.diffusion(s.time, z, s.inputs)
    moved = z + f * s.gap + noise_times(g, s.increment, s.noise)
    if s.noise == "additive":
        return moved
    root = s.gap.sqrt()
    along = g if s.noise == "diagonal" else g.squeeze(-1)
    other = s.diffusion(s.time, z + along * root, s.inputs)
    slope = (other if s.noise == "diagonal" else other.squeeze(-1)) - along
    square = s.increment.square() - s.gap if ito else s.increment.square()
    return moved + slope * square / (2 * root)


def _euler_heun(z: Tensor, s: SDEStep) -> Tensor:
    """z + f dt + (g(z) + g(z + g dW)) / 2 dW."""
    f, g = s.drift(s.time, z, s.inputs), s.diffusion(s.time, z, s.inputs)
    other = s.diffusion(s.next_time, z + noise_times(g, s.increment, s.noise), s.inputs)
    return z + f * s.gap + noise_times(0.5 * (g + other), s.increment, s.noise)


def _heun(z: Tensor, s: SDEStep) -> Tensor:
    """The trapezoidal rule over an Euler step, for drift and diffusion."""
    f, g = s.drift(s.time, z, s.inputs), s.diffusion(s.time, z, s.inputs)
    there = z + f * s.gap + noise_times(g, s.increment, s.noise)
    f = 0.5 * (f + s.drift(s.next_time, there, s.inputs))
    g = 0.5 * (g + s.diffusion(s.next_time, there, s.inputs))
    return z + f * s.gap + noise_times(g, s.increment, s.noise)


def _midpoint(z: Tensor, s: SDEStep) -> Tensor:
    """Drift and diffusion at half an Euler step."""
    half = 0.5 * (s.time + s.next_time)
    f, g = s.drift(s.time, z, s.inputs), s.diffusion(s.time, z, s.inputs)
    middle = z + 0.5 * (f * s.gap + noise_times(g, s.increment, s.noise))
    f, g = s.drift(half, middle, s.inputs), s.diffusion(half, middle, s.inputs)
    return z + f * s.gap + noise_times(g, s.increment, s.noise)


_STEPS: dict[str, Callable[[Tensor, SDEStep], Tensor]] = {
    "euler": _euler,
    "euler_heun": _euler_heun,
    "heun": _heun,
    "midpoint": _midpoint,
}


def sde_step(state: Tensor, step: SDEStep, method: str, interpretation: str = "ito") -> Tensor:
    """One step of a fixed-step scheme.

    .. math:: z_{k+1} = \\Phi(z_k, \\Delta W_k)

    Args:
        state: ``(..., time, state)``.
        step: the fields, times and noise, which broadcast with the state.
        method: ``"euler"``, ``"milstein"``, ``"euler_heun"``, ``"heun"`` or ``"midpoint"``.
        interpretation: ``"ito"`` or ``"stratonovich"``; of the five only Milstein's form asks for it.

    Returns:
        ``(..., time, state)``; differentiable.

    Source: Kloeden and Platen (1992), "Numerical Solution of Stochastic Differential Equations", sections 10.2, 11.1;
    Rößler (2010), "Runge-Kutta methods for the strong approximation of solutions of SDEs", for Stratonovich's.

    >>> import torch
    >>> from pyro_ssm.ops.sde import SDEStep, sde_step
    >>> t = torch.zeros(1, 1)
    >>> step = SDEStep(lambda t, z, u: -z, lambda t, z, u: 0 * z + 2, "diagonal", t, t + 0.5, None, t + 0.5, t + 0.1)
    >>> sde_step(torch.ones(1, 1), step, "euler")
    tensor([[0.7000]])
    """
    if method == "milstein":
        return _milstein(state, step, interpretation == "ito")
    return _STEPS[method](state, step)


def sde_path(
    drift: Field,
    diffusion: Field,
    start: Tensor,
    times: Tensor,
    increments: Tensor,
    *,
    method: str = "euler",
    noise: str = "diagonal",
    interpretation: str = "ito",
    inputs: Tensor | None = None,
) -> Tensor:
    """A whole path by a fixed-step scheme, one step a gap of the grid.

    .. math:: z_{k+1} = \\Phi(z_k, \\Delta W_k), \\qquad k = 1, \\dots, T - 1

    Args:
        drift: ``(t, z, u) -> (..., 1, state)``.
        diffusion: ``(t, z, u) -> (..., 1, state)`` for diagonal noise, else ``(..., 1, state, noise)``.
        start: ``(*lead, 1, state)``.
        times: ``(time,)`` or ``(*batch, time)`` float64.
        increments: ``(*lead, time - 1, noise)``.
        method: see :func:`sde_step`.
        noise: ``"diagonal"``, ``"scalar"``, ``"additive"`` or ``"general"``.
        interpretation: ``"ito"`` or ``"stratonovich"``.
        inputs: ``(*batch, time, input)`` or None; ``inputs[k]`` holds in the k-th gap.

    Returns:
        ``(*lead, time, state)``; differentiable in start, increments and whatever the fields depend on. No randomness.

    >>> import torch
    >>> from pyro_ssm.ops import BrownianPath, sde_path
    >>> times = torch.linspace(0, 1, 101, dtype=torch.float64)
    >>> noise = BrownianPath.draw(times, 1, (5,))
    >>> sde_path(lambda t, z, u: -z, lambda t, z, u: 0.1 * z, torch.ones(5, 1, 1), times, noise.increments).shape
    torch.Size([5, 101, 1])
    """
    clock = times.to(start).unsqueeze(-1)
    at = clock.split(1, -2)
    gaps = times.diff(dim=-1).to(start).unsqueeze(-1).split(1, -2) if len(at) > 1 else ()
    dW = increments.split(1, -2)
    held = None if inputs is None else inputs.split(1, -2)
    states = [start]
    for k, gap in enumerate(gaps):
        u = None if held is None else held[k]
        step = SDEStep(drift, diffusion, noise, at[k], at[k + 1], u, gap, dW[k])
        states.append(sde_step(states[-1], step, method, interpretation))
    if len(states) > 1:
        states[0] = start.expand(states[-1].shape)
    return torch.cat(states, -2)


def check_path(path: Tensor, times: Tensor, what: str) -> Tensor:
    """``path`` ``(*lead, time, state)`` if it is finite; one synchronisation.

    Raises:
        SolverError: it is not; names the time, the series and the norm of the state before.

    >>> import torch
    >>> from pyro_ssm.ops.sde import check_path
    >>> path, times = torch.tensor([[1.0], [3.0], [float("inf")]]), torch.tensor([0.0, 0.5, 1.0])
    >>> check_path(path, times, "the path")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    pyro_ssm.ops.solver_error.SolverError: the path is not finite at step 2 (time 1) of the series: the state ...
    """
    if torch.compiler.is_compiling() or bool(torch.isfinite(path.detach().sum())):
        return path
    bad = ~path.detach().isfinite().all(-1)
    if not bool(bad.any()):
        return path  # only the sum was too large
    at = bad.nonzero()
    k = int(at[:, -1].min())
    lead = tuple(at[at[:, -1] == k][0, :-1].tolist())
    own = torch.broadcast_to(times, bad.shape)[lead]
    before = float(path.detach()[lead + (max(k - 1, 0),)].norm())
    series = f"series {lead if len(lead) > 1 else lead[0]}" if lead else "the series"
    previous = f"the state before has norm {before:.4g}" if k else "this is the start"
    raise SolverError(
        f"{what} is not finite at step {k} (time {float(own[k]):.6g}) of {series}: {previous}, the gap is "
        f"{float(own[k] - own[max(k - 1, 0)]):.4g}. The field blows up or returns NaN there: refine the grid "
        "(data.refine), bound the field, or start nearer to the data"
    )
