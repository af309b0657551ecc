"""A latent stochastic differential equation in the way of torchsde's `examples/latent_sde_lorenz.py`.

Written anew with its networks, sizes and loss (posterior drift f, prior drift h, one small diffusion network for each
coordinate, path KL by `logqp=True`), without the encoder: the context is given.
"""

from __future__ import annotations

import torch
import torchsde
from torch import Tensor, nn


class StoredNoise(torchsde.BaseBrownian):
    """Increments that were drawn before, one a step; the last column is that of torchsde's path KL (no noise)."""

    def __init__(self, increments: Tensor) -> None:
        self.increments, self.steps = increments, increments.shape[0]

    def __call__(self, ta, tb=None, return_U=False, return_A=False):
        return self.increments[min(round(float(ta) * self.steps), self.steps - 1)]

    def __repr__(self) -> str:
        return f"StoredNoise({tuple(self.increments.shape)})"

    dtype = property(lambda self: self.increments.dtype)
    device = property(lambda self: self.increments.device)
    shape = property(lambda self: self.increments.shape[1:])
    levy_area_approximation = "none"


class LatentSDE(nn.Module):
    """The posterior equation with its prior, in torchsde's form."""

    sde_type, noise_type = "ito", "diagonal"

    def __init__(self, latent: int, context: int, hidden: int, obs: int, obs_scale: float) -> None:
        super().__init__()

        def net(inputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(inputs, hidden), nn.Softplus(), nn.Linear(hidden, hidden), nn.Softplus(),
                nn.Linear(hidden, latent),
            )  # fmt: skip

        self.f_net, self.h_net = net(latent + context), net(latent)
        self.g_nets = nn.ModuleList(
            nn.Sequential(nn.Linear(1, hidden), nn.Softplus(), nn.Linear(hidden, 1), nn.Sigmoid())
            for _ in range(latent)
        )
        self.first, self.emit = nn.Linear(context, 2 * latent), nn.Linear(latent, obs)
        self.prior_loc, self.prior_scale = torch.zeros(latent), torch.ones(latent)
        self.obs_scale = obs_scale

    def f(self, t: Tensor, z: Tensor) -> Tensor:
        """Posterior drift; the context is that of the end of the step."""
        k = min(round(float(t) * (len(self.context) - 1)) + 1, len(self.context) - 1)
        return self.f_net(torch.cat([z, self.context[k]], 1))

    def h(self, t: Tensor, z: Tensor) -> Tensor:
        """Prior drift."""
        return self.h_net(z)

    def g(self, t: Tensor, z: Tensor) -> Tensor:
        """Diffusion."""
        return torch.cat([net(z[:, i : i + 1]) for i, net in enumerate(self.g_nets)], 1)

    def loss(
        self, context: Tensor, values: Tensor, noise: Tensor | None, *, adjoint: bool = False, plain: bool = False
    ) -> Tensor:
        """The negative bound of all series; ``context`` and ``values`` are time-major, ``noise`` standard normal."""
        self.context = context
        steps, batch = len(context) - 1, context.shape[1]
        dt = 1.0 / steps
        ts = torch.linspace(0, 1, steps + 1, dtype=torch.float32 if plain else torch.float64)
        loc, raw = self.first(context[0]).chunk(2, -1)
        q = torch.distributions.Normal(loc, nn.functional.softplus(raw) + 1e-4)
        p = torch.distributions.Normal(self.prior_loc, self.prior_scale)
        latent = loc.shape[1]
        if noise is None:
            z0 = q.rsample()
            size = (batch, latent + 1)
            bm = None if plain else torchsde.BrownianInterval(0.0, 1.0, size=size, dtype=loc.dtype, dt=dt)
        else:
            z0 = loc + q.scale * noise[0]
            bm = StoredNoise(torch.cat([noise[1:] * dt**0.5, torch.zeros(steps, batch, 1)], -1))
        if adjoint:
            params = (*self.f_net.parameters(), *self.h_net.parameters(), *self.g_nets.parameters(), context)
            z, kl = torchsde.sdeint_adjoint(
                self, z0, ts, bm=bm, dt=dt, method="euler", logqp=True, names={"drift": "f"}, adjoint_params=params
            )
        else:
            z, kl = torchsde.sdeint(self, z0, ts, bm=bm, dt=dt, method="euler", logqp=True)
        seen = torch.distributions.Normal(self.emit(z), self.obs_scale).log_prob(values).sum()
        return torch.distributions.kl_divergence(q, p).sum() + kl.sum() - seen
