"""Paths of stochastic differential equations by the solvers of torchsde, with our noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchsde
from torch import Tensor, nn

from pyro_ssm.ops.brownian import BrownianPath
from pyro_ssm.ops.sde import Field

__all__ = ["SOLVERS", "torchsde_path"]

_ALL, _COMMUTING = ("diagonal", "scalar", "additive", "general"), ("diagonal", "scalar", "additive")
_STRATONOVICH = (("stratonovich",), _ALL)
#: its solvers: the integrals and the kinds of noise that they are for
SOLVERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "euler": (("ito",), _ALL),
    "milstein": (("ito", "stratonovich"), _COMMUTING),
    "srk": (("ito",), _COMMUTING),
    "midpoint": _STRATONOVICH,
    "heun": _STRATONOVICH,
    "euler_heun": _STRATONOVICH,
    "reversible_heun": _STRATONOVICH,
    "log_ode": _STRATONOVICH,
}

#: what a solver asks of the noise beside its increments
_LEVY_AREA = {"srk": "space-time", "log_ode": "foster"}


def torchsde_path(
    drift: Field,
    diffusion: Field,
    start: Tensor,
    brownian: BrownianPath,
    *,
    method: str,
    noise: str = "diagonal",
    interpretation: str = "ito",
    inputs: Tensor | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
    substeps: int = 1,
    adaptive: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-4,
) -> Tensor:
    """A whole path by ``torchsde.sdeint`` (or ``sdeint_adjoint``), gap by gap in normalised time.

    .. math:: dz = \\Delta_k f\\, ds + \\sqrt{\\Delta_k}\\, g\\, dB, \\qquad s \\in [0, 1], \\quad
        B(1) = \\Delta W_k / \\sqrt{\\Delta_k}

    So every series may have its own times, a solver lands on each of them, inputs are held within a gap, and the noise
    over each gap is that of ``brownian``: with ``method="euler"`` and one substep the path is that of
    :func:`~pyro_ssm.ops.sde_path`. Inside a gap the noise is torchsde's ``BrownianInterval``, pinned at both ends,
    seeded by ``brownian.seed``, and told the step (a last step of 6e-8 would otherwise rebuild its tree).

    Args:
        drift: as in :func:`~pyro_ssm.ops.sde_path`, as are ``diffusion``, ``start``, ``noise`` and ``inputs``.
        brownian: times and increments.
        method: torchsde's name of a solver (``"euler"``, ``"milstein"``, ``"srk"``, ``"midpoint"`` ...).
        interpretation: ``"ito"`` or ``"stratonovich"``.
        adjoint_params: every tensor that the fields read and that needs a gradient; then the gradient is taken by the
            stochastic adjoint, gap by gap. None backpropagates through the solver.
        substeps: steps of a fixed-step solver in each gap (the first step of an adaptive one).
        adaptive: whether the solver chooses its steps.
        rtol: relative tolerance of an adaptive solver.
        atol: absolute tolerance.

    Returns:
        ``(*lead, time, state)``.

    Source: Li, Wong, Chen and Duvenaud (2020), "Scalable gradients for stochastic differential equations".

    >>> import torch
    >>> from pyro_ssm.ops import BrownianPath, sde_path
    >>> from pyro_ssm.ops.torchsde_path import torchsde_path
    >>> f, g = lambda t, z, u: -z, lambda t, z, u: 0.1 * z
    >>> noise, start = BrownianPath.draw(torch.arange(5.0).double() / 4, 1, (3,)), torch.ones(3, 1, 1)
    >>> ours = sde_path(f, g, start, noise.times, noise.increments)
    >>> torch.allclose(torchsde_path(f, g, start, noise, method="euler"), ours, atol=1e-5)
    True
    """
    lead = torch.broadcast_shapes(start.shape[:-2], brownian.increments.shape[:-2], brownian.times.shape[:-1])
    state_dim, rows = start.shape[-1], lead.numel()
    gaps = brownian.times.diff(dim=-1).to(start).unsqueeze(-1)
    normal = (brownian.increments / gaps.sqrt()).expand(lead + (gaps.shape[-2], brownian.noise_dim))
    clock = brownian.times.to(start).unsqueeze(-1)
    unit = torch.tensor([0.0, 1.0], dtype=torch.float64, device=start.device)
    solve: Any = torchsde.sdeint if adjoint_params is None else torchsde.sdeint_adjoint
    more = {} if adjoint_params is None else {"adjoint_params": tuple(adjoint_params), "adjoint_adaptive": adaptive}
    state, states = start.expand(lead + (1, state_dim)), []
    states.append(state)
    for k in range(gaps.shape[-2]):
        now = slice(k, k + 1)
        field = _Gap(drift, diffusion, noise, interpretation, lead)
        field.time, field.gap = clock[..., now, :], gaps[..., now, :]
        field.inputs = None if inputs is None else inputs[..., now, :]
        within = torchsde.BrownianInterval(
            0.0,
            1.0,
            W=normal[..., k, :].reshape(rows, -1).detach(),
            entropy=(brownian.seed + k) % (2**31 - 1),
            dt=1.0 / substeps,
            levy_area_approximation=_LEVY_AREA.get(method, "none"),
        )
        _, end = solve(
            field,
            state.reshape(rows, state_dim),
            unit,
            bm=within,
            method=method,
            dt=1.0 / substeps,
            adaptive=adaptive,
            rtol=rtol,
            atol=atol,
            **more,
        )
        state = end.reshape(lead + (1, state_dim))
        states.append(state)
    return torch.cat(states, -2)


class _Gap(nn.Module):
    """The equation within one gap, as torchsde wants it: two-dimensional states, time in [0, 1]."""

    time: Tensor
    gap: Tensor
    inputs: Tensor | None

    def __init__(self, drift: Field, diffusion: Field, noise: str, interpretation: str, lead: torch.Size) -> None:
        super().__init__()
        self.fields, self.lead = (drift, diffusion), lead  # a tuple, so that nothing is registered
        self.noise_type, self.sde_type = noise, interpretation

    def f(self, s: Tensor, z: Tensor) -> Tensor:
        """The drift ``(rows, state)``."""
        value = self.fields[0](self._at(s, z), z.reshape(self.lead + (1, -1)), self.inputs) * self.gap
        return value.expand(self.lead + value.shape[-2:]).reshape(len(z), -1)

    def g(self, s: Tensor, z: Tensor) -> Tensor:
        """The diffusion ``(rows, state)``, or ``(rows, state, noise)``."""
        value = self.fields[1](self._at(s, z), z.reshape(self.lead + (1, -1)), self.inputs)
        root = self.gap.sqrt()
        if self.noise_type == "diagonal":
            value = value * root
            return value.expand(self.lead + (1, z.shape[-1])).reshape(len(z), -1)
        value = value * root.unsqueeze(-1)
        return value.expand(self.lead + value.shape[-3:]).reshape(len(z), *value.shape[-2:])

    def _at(self, s: Tensor, z: Tensor) -> Tensor:
        return self.time + torch.as_tensor(s).to(z) * self.gap
