"""One gradient of the bound of a latent SDE, by the public API, against torchsde's `sdeint` with `logqp`, and diffrax.

The set-up of torchsde's `latent_sde_lorenz` (batch 512, 100 Euler steps, latent 4, hidden 128, context 64), the encoder
left out on both sides: features of the data are given. Equal work: the same networks with the same weights, one draw,
the path KL without its Itô term (`TraceMeanField_ELBO`; torchsde's `logqp`), and a linear Gaussian emission. Loss and
gradients are compared on the same increments before timing; in the first row torchsde then runs as in its example, with
float32 times; in the second its `BrownianInterval` is told the step and times are float64, which spares it a last step
of rounding size that rebuilds its tree; in the third it is given the increments; the last two are its adjoint.

diffrax runs compiled, compilation not counted: first as in its documentation; then with a checkpoint at each step, one
term for drift and noise, and a softplus of fewer operations; last by its steps in a scan. Each of its rows is compared
with torchsde on the increments that it saw, in the loss and every gradient whole; those of the same increments with
ours too.

    python benchmarks/bench_latent_sde_step.py             # writes results/latent_sde_step.json and .md (minutes)
    python benchmarks/bench_latent_sde_step.py direct      # without `sdeint_adjoint`
    python benchmarks/bench_latent_sde_step.py diffrax     # diffrax alone: results/latent_sde_step_diffrax.json and .md
"""

from __future__ import annotations

import sys
from functools import partial

from harness import Case, DisagreementError, pin_threads, run

pin_threads(1)
MODE = sys.argv[1] if len(sys.argv) > 1 else ""

import torch  # noqa: E402  (threads are pinned before torch is imported)
from peers.torchsde_latent_sde import LatentSDE  # noqa: E402
from pyro.infer import TraceMeanField_ELBO  # noqa: E402

import pyro_ssm as ssm  # noqa: E402
from pyro_ssm.guides import Context  # noqa: E402

BATCH, STEPS, LATENT, CONTEXT, HIDDEN, OBS, OBS_SCALE = 512, 100, 4, 64, 128, 3, 0.1


class Given(torch.nn.Module):
    """Features of the data that were computed elsewhere."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.given = Context(features)

    def forward(self, data, model):
        return self.given


def pair(features: torch.Tensor):
    sde = ssm.dynamics.NeuralSDE(
        ssm.dynamics.MLPDrift(LATENT, (HIDDEN, HIDDEN)),
        ssm.dynamics.ElementwiseDiffusion(LATENT, HIDDEN, ceiling=1.0, floor=1e-7),
    )
    start, emission = ssm.dynamics.NormalInitial(LATENT), ssm.emissions.LinearNormal(LATENT, OBS, scale=OBS_SCALE)
    for known in (*start.parameters(), *(p for n, p in emission.named_parameters() if "scale" in n)):
        known.requires_grad_(False)
    model = ssm.StateSpaceModel(start, sde, emission)
    guide = ssm.guides.PosteriorSDE(model, CONTEXT, drift_hidden=(HIDDEN, HIDDEN))
    guide.encoder = Given(features)
    return model, guide


def copy_weights(peer: LatentSDE, model, guide) -> None:
    """The peer's weights into ours."""
    sde, drift = model.transition, guide.drift
    with torch.no_grad():
        for ours, theirs in zip(sde.drift.network.layers, peer.h_net[::2], strict=True):
            ours.weight.copy_(theirs.weight)
            ours.bias.copy_(theirs.bias)
        drift.from_state.weight.copy_(peer.f_net[0].weight[:, :LATENT])
        drift.from_features.weight.copy_(peer.f_net[0].weight[:, LATENT:])
        drift.from_features.bias.copy_(peer.f_net[0].bias)
        for ours, theirs in zip(drift.rest.layers, peer.f_net[2::2], strict=True):
            ours.weight.copy_(theirs.weight)
            ours.bias.copy_(theirs.bias)
        for i, net in enumerate(peer.g_nets):
            sde.diffusion.slope[i], sde.diffusion.shift[i] = net[0].weight[:, 0], net[0].bias
            sde.diffusion.weight[i], sde.diffusion.bias[i] = net[2].weight[0], net[2].bias[0]
        guide.first.weight.copy_(peer.first.weight)
        guide.first.bias.copy_(peer.first.bias)
        model.emission.matrix.copy_(peer.emit.weight)
        model.emission.offset.copy_(peer.emit.bias)


def diffrax_cases(size: str, ours, peer: LatentSDE, by_time: torch.Tensor, values, noise: torch.Tensor) -> list[Case]:
    """The ways to use diffrax; ``noise`` is that of ours and of the stored increments."""
    import jax
    import numpy as np
    from peers import diffrax_latent_sde as theirs
    from peers.diffrax_latent_sde import Use

    uses = {
        "diffrax as in its documentation (VirtualBrownianTree)": Use(two_terms=True, softplus=jax.nn.softplus),
        "diffrax, a checkpoint a step, VirtualBrownianTree": Use(checkpoints=STEPS),
        "diffrax, a checkpoint a step, increments drawn at once": Use("drawn", STEPS),
        "diffrax, a checkpoint a step, stored increments": Use("stored", STEPS),
        "diffrax, the same with jax.nn.softplus": Use("stored", STEPS, softplus=jax.nn.softplus),
        "diffrax Euler.step in a scan, stored increments": Use("stored", manual=True),
    }

    def check(use: Use, source: jax.Array, ours: torch.Tensor, answer) -> float:
        seen = torch.tensor(np.asarray(theirs.standard_noise(use, source, STEPS, (BATCH, LATENT))))
        peer.zero_grad()
        by_time.grad = None
        loss = peer.loss(by_time, values, torch.cat([noise[:1], seen]))
        loss.backward()
        expected = theirs.Networks.of(peer, use.softplus, lambda p: p.grad), by_time.grad.numpy()
        difference = theirs.largest_difference(answer, (loss.detach().numpy(), expected))
        if use.noise == "stored":
            found, (by_weight, by_context) = answer
            grads = [by_weight.f[0][0][:, :LATENT], by_weight.g[2], by_context[1:]]
            norms = [float(found), *(np.linalg.norm(np.asarray(g, np.float64)) for g in grads)]
            difference = max(difference, float((ours / torch.tensor(norms) - 1).abs().max()))
        if difference > 1e-4:
            raise DisagreementError(f"loss and gradients differ by {difference:.2e} relative")
        return difference

    cases = []
    for name, use in uses.items():
        source = jax.numpy.asarray(noise[1:].numpy()) if use.noise == "stored" else jax.random.key(1)
        call = theirs.gradient(use, peer, by_time, values, noise[0], source)
        cases.append(Case(size, ours, call, name, agree=partial(check, use, source)))
    return cases


def main() -> None:
    torch.manual_seed(0)
    values = torch.randn(BATCH, STEPS + 1, OBS)
    features = torch.randn(BATCH, STEPS + 1, CONTEXT, requires_grad=True)
    by_time = features.detach().transpose(0, 1).contiguous().requires_grad_()
    values_by_time = values.transpose(0, 1).contiguous()
    data = ssm.TimeSeries(torch.linspace(0, 1, STEPS + 1, dtype=torch.float64), values)
    peer = LatentSDE(LATENT, CONTEXT, HIDDEN, OBS, OBS_SCALE)
    model, guide = pair(features)
    copy_weights(peer, model, guide)
    bound = TraceMeanField_ELBO()(model, guide)
    torch.manual_seed(1)
    noise = torch.randn(BATCH, STEPS + 1, LATENT).transpose(0, 1).contiguous()  # what ours draws from this seed

    def ours() -> torch.Tensor:
        bound.zero_grad()
        features.grad = None
        torch.manual_seed(1)
        loss = bound(data)
        loss.backward()
        grads = [guide.drift.from_state.weight.grad, model.transition.diffusion.weight.grad, features.grad[:, 1:]]
        return torch.stack([loss.detach(), *(g.double().norm().float() for g in grads)])

    def theirs(stored: bool = False, **how: bool) -> torch.Tensor:
        peer.zero_grad()
        by_time.grad = None
        loss = peer.loss(by_time, values_by_time, noise if stored else None, **how)
        loss.backward()
        diffusion = torch.stack([net[2].weight.grad[0] for net in peer.g_nets])
        grads = [peer.f_net[0].weight.grad[:, :LATENT], diffusion, by_time.grad[1:]]
        return torch.stack([loss.detach(), *(g.double().norm().float() for g in grads)])

    difference = float((ours() / theirs(stored=True) - 1).abs().max())
    if difference > 2e-3:
        raise AssertionError(f"loss and gradients differ by {difference:.2e} relative on the same increments")
    size = f"batch {BATCH}, {STEPS} steps, latent {LATENT}, hidden {HIDDEN}"
    if MODE == "diffrax":
        cases = diffrax_cases(size, ours, peer, by_time, values_by_time, noise)
        run("latent_sde_step_diffrax", cases, packages=["diffrax", "jax", "torchsde"])
        return
    peers = {
        "torchsde sdeint as in its example (float32 times)": {"plain": True},
        "torchsde sdeint, BrownianInterval(dt=dt)": {},
        "torchsde sdeint, stored increments": {"stored": True},
    }
    if MODE != "direct":
        peers["torchsde sdeint_adjoint as in its example (float32 times)"] = {"plain": True, "adjoint": True}
        peers["torchsde sdeint_adjoint, BrownianInterval(dt=dt)"] = {"adjoint": True}
    cases = [
        Case(size, ours, partial(theirs, **how), name, agree=lambda a, b: difference) for name, how in peers.items()
    ]
    run("latent_sde_step", cases, packages=["torchsde", "pyro-ppl", "torch"])


if __name__ == "__main__":
    main()
