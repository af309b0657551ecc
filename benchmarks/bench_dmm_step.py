"""One gradient step of a deep Markov model, through `SVI(model, guide).step`, against the per-step-site program.

Equal work: the same networks with the same sizes, one Monte Carlo sample, the same optimiser (ClippedAdam), a ragged
batch. Before timing, the weights are copied across and both densities, of model and guide, are compared at one path.

    python benchmarks/bench_dmm_step.py example    # writes results/dmm_step_example.json and .md
    python benchmarks/bench_dmm_step.py small

One size a process: Pyro's `SVI` trains through a store of parameters by name, in which two models of a class collide.
"""

from __future__ import annotations

import sys

from harness import Case, pin_threads, run

pin_threads(1)

import pyro  # noqa: E402  (threads are pinned before torch is imported)
import torch  # noqa: E402
from peers.per_step_dmm import PerStepDMM, reversed_within_length  # noqa: E402
from pyro.infer import SVI, Trace_ELBO  # noqa: E402
from pyro.optim import ClippedAdam  # noqa: E402
from pyro.poutine import condition, trace  # noqa: E402

import pyro_ssm as ssm  # noqa: E402

SIZES = {
    "example": ("T=100, batch 20, latent 100, transition 200, RNN 600", (20, 100, 88, 100, 100, 200, 600)),
    "small": ("T=100, batch 20, latent 8, transition 16, RNN 32", (20, 100, 88, 8, 16, 16, 32)),
}
OPTIMISER = {"lr": 3e-4, "betas": (0.96, 0.999), "clip_norm": 10.0}


def pair(obs: int, state: int, emission: int, transition: int, hidden: int):
    model = ssm.StateSpaceModel(
        ssm.dynamics.NormalInitial(state),
        ssm.dynamics.GatedTransition(state, transition, floor=1e-6),
        ssm.emissions.Bernoulli(state, obs, hidden=(emission, emission)),
    )
    guide = ssm.guides.Structured(model, hidden, direction="future", cell="relu", scale_floor=1e-6)
    return model, guide


def copy_weights(peer: PerStepDMM, model: ssm.StateSpaceModel, guide: ssm.guides.Structured) -> None:
    """The peer's weights into ours, wherever the two have the same network."""
    gated = model.transition
    with torch.no_grad():
        gated.hidden.weight.copy_(torch.cat([peer.gate[0].weight, peer.proposal[0].weight]))
        gated.hidden.bias.copy_(torch.cat([peer.gate[0].bias, peer.proposal[0].bias]))
        pairs = [(gated.gate, peer.gate[2]), (gated.proposal, peer.proposal[2]), (gated.linear, peer.linear)]
        pairs += [(gated.raw_scale, peer.raw_scale), (guide.combiner, peer.combiner)]
        layers = model.emission.network.layers
        pairs += list(zip(layers, (peer.emit[0], peer.emit[2], peer.emit[4]), strict=True))
        for ours, theirs in pairs:
            ours.weight.copy_(theirs.weight)
            ours.bias.copy_(theirs.bias)
        guide.head.weight.copy_(torch.cat([peer.loc.weight, peer.guide_scale.weight]))
        guide.head.bias.copy_(torch.cat([peer.loc.bias, peer.guide_scale.bias]))


def densities_agree(peer: PerStepDMM, peer_args, model, data, tolerance: float = 1e-4) -> float:
    """log p(z_2:T | z_1) + log p(y | z) at one path: the law of z_1 differs in form, all else must be equal."""
    z = torch.randn(*data.values.shape[:-1], model.initial.state_dim)
    sites = trace(condition(peer.model, data={f"z_{t}": z[:, t] for t in range(z.shape[1])})).get_trace(*peer_args)
    sites.compute_log_prob()
    theirs = sum(site["log_prob_sum"] for name, site in sites.nodes.items() if name.startswith(("z_", "y_")))
    theirs = theirs - sites.nodes["z_0"]["log_prob_sum"]
    bound = model.bind()
    path = ssm.models.path_law(bound, data).log_prob_steps(z)[..., 1:].sum()
    ours = path + ssm.models.observation_law(bound, data, z).log_prob(data.values).sum()
    difference = float(((ours - theirs).abs() / theirs.abs()).detach())
    if difference > tolerance:
        raise AssertionError(f"densities differ by {difference:.2e} relative")
    return difference


def case(name: str, sizes: tuple[int, ...]) -> Case:
    batch, num_times, obs, state, emission, transition, hidden = sizes
    torch.manual_seed(0)
    lengths = torch.randint(num_times // 2, num_times + 1, (batch,))
    lengths[0] = num_times
    y = (torch.rand(batch, num_times, obs) > 0.95).float()
    data = ssm.TimeSeries(torch.arange(float(num_times)), y, lengths=lengths)
    peer = PerStepDMM(obs, state, emission, transition, hidden)
    peer_args = (data.values, reversed_within_length(data.values, lengths), data.step_mask.float().bool(), lengths)
    model, guide = pair(obs, state, emission, transition, hidden)
    copy_weights(peer, model, guide)
    difference = densities_agree(peer, peer_args, model, data)
    pyro.clear_param_store()  # what the comparison of densities registered
    ours_svi = SVI(model, guide, ClippedAdam(dict(OPTIMISER)), Trace_ELBO())
    peer_svi = SVI(peer.model, peer.guide, ClippedAdam(dict(OPTIMISER)), Trace_ELBO())
    return Case(
        name,
        ours=lambda: ours_svi.step(data),
        peer=lambda: peer_svi.step(*peer_args),
        peer_name="Pyro, one site a step",
        agree=lambda ours, theirs: difference,
    )


if __name__ == "__main__":
    size = sys.argv[1] if len(sys.argv) > 1 else "example"
    run(f"dmm_step_{size}", [case(*SIZES[size])], packages=["pyro-ppl", "torch"])
