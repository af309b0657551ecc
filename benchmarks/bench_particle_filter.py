"""Bootstrap filters against `particles`, cuthbert and Pyro's SMCFilter: 1e3 and 1e5 particles, 1 and 32 series.

Equal work: the same model and data, systematic resampling below N / 2, evidence and effective sample sizes kept. Two
models: stochastic volatility, and the growth model of Gordon, Salmond and Smith (1993). The *lean* case is stochastic
volatility written by hand as a `FeynmanKac`, without the model's components and laws: the filter itself.
Ours and cuthbert compute in float32, `particles` in float64. Two estimates are random: before timing they must agree
within their spread over a few runs. Pyro's SMCFilter is left out at 1e5 particles and on the growth model, where it
indexes out of range now and then.

    python benchmarks/bench_particle_filter.py           # against `particles` and SMCFilter
    python benchmarks/bench_particle_filter.py all       # cuthbert too, and 32 series of 1e5 particles
    python benchmarks/bench_particle_filter.py small     # stochastic volatility at 1e3 particles against `particles`
    python benchmarks/bench_particle_filter.py torch     # as the first, with the compiled library left aside

Each writes results/particle_filter[_MODE].json and .md.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import warnings

from harness import Case, DisagreementError, pin_threads, run

pin_threads(1)
MODE = sys.argv[1] if len(sys.argv) > 1 else ""
if MODE == "torch":
    os.environ["PYRO_SSM_COMPILED"] = "0"

import pyro  # noqa: E402  (threads are pinned before numpy and torch are imported)
import torch  # noqa: E402
from peers import particle_filters as peers  # noqa: E402
from peers.particle_filters import GROWTH_SCALE, MU, RHO, SIGMA, START  # noqa: E402

import pyro_ssm as ssm  # noqa: E402
from pyro_ssm.components import Emission  # noqa: E402
from pyro_ssm.distributions import DiagonalNormal  # noqa: E402


class Returns(Emission):
    state_dim, obs_dim = 1, 1

    def forward(self, state, time, inputs, memory=None):
        return DiagonalNormal(state.new_zeros(()), (0.5 * state).exp())


def stochastic_volatility() -> ssm.StateSpaceModel:
    """An autoregression of the log variance, from its stationary law."""
    start = ssm.dynamics.NormalInitial(1, loc=MU, scale=START)
    move = ssm.dynamics.LinearNormal(1, matrix=torch.tensor([[RHO]]), scale=SIGMA)
    with torch.no_grad():
        move.offset.fill_(MU * (1 - RHO))
    return ssm.StateSpaceModel(start, move, Returns())


def growth() -> ssm.StateSpaceModel:
    """The growth model; its force is an input."""
    start = ssm.dynamics.NormalInitial(1, scale=2.0)
    move = ssm.dynamics.FunctionTransition(1, lambda z, u: 0.5 * z + 25 * z / (1 + z * z) + u, scale=GROWTH_SCALE)
    return ssm.StateSpaceModel(start, move, ssm.emissions.FunctionNormal(1, 1, lambda z, u: 0.05 * z * z, scale=1.0))


def lean(values: torch.Tensor) -> ssm.infer.FeynmanKac:
    """Stochastic volatility on plain tensors ``(N, *batch)``."""
    constant, steps = 0.5 * math.log(2 * math.pi), values.unbind(-2)
    y = [-0.5 * value.squeeze(-1).square() for value in steps]
    offset, scale = torch.full((1,), MU * (1 - RHO)), torch.full((1,), SIGMA)
    moves = [(torch.full((1, 1), RHO), offset, scale)] * (len(y) - 1)

    def potential(k, state):
        x = state.squeeze(-1)
        return torch.addcmul(-0.5 * x - constant, y[k], (-x).exp())

    return ssm.infer.FeynmanKac(
        initial=lambda draw, shape: draw(DiagonalNormal(torch.full((1,), MU), torch.full((1,), START)), shape),
        propagate=lambda k, x, draw: draw(DiagonalNormal(RHO * x + offset, scale), x.shape[:-1]),
        log_potential=lambda k, previous, x: potential(k, x),
        num_times=len(y),
        batch_shape=values.shape[:-2],
        gaussian=ssm.infer.smc.GaussianSteps(lambda: moves, potential),
    )


def agree(ours, peer, spread: float) -> float:
    """Two estimates of the evidence, each with a standard deviation of ``spread``."""
    ours, peer = float(ours.sum()), float(peer)
    if abs(ours - peer) > 4 * math.sqrt(2) * spread + 0.01:
        raise DisagreementError(f"log evidence {ours:.3f} and {peer:.3f}, with a spread of {spread:.3f} each")
    return abs(ours - peer)


def cases(name: str, num_particles: int, num_times: int, num_series: int) -> list[Case]:
    torch.manual_seed(1)
    pyro.clear_param_store()  # two models name their parameters alike
    model = growth() if name == "growth" else stochastic_volatility()
    batch = (num_series,) if num_series > 1 else ()
    times = torch.arange(float(num_times))
    inputs = (8 * torch.cos(1.2 * times)).unsqueeze(-1).expand(batch + (num_times, 1)) if name == "growth" else None
    with torch.no_grad():
        _, y = model(ssm.TimeSeries(times.expand(batch + (num_times,)), inputs=inputs))
    data = ssm.TimeSeries(times, y, inputs=inputs)
    rows = y.reshape(-1, num_times).numpy()

    def ours() -> torch.Tensor:
        return ssm.infer.particle_filter(ssm.infer.bootstrap(model, data), num_particles).total

    def by_hand() -> torch.Tensor:
        return ssm.infer.particle_filter(lean(y), num_particles).total

    spread = statistics.stdev(float(ours().sum()) for _ in range(12))
    label = f"{name}, {num_series} series, N={num_particles:.0e}, T={num_times}"
    functions = {"particles": peers.by_particles}
    if MODE == "all":
        functions["cuthbert"] = peers.by_cuthbert
    crashes = num_particles > 1000 or name == "growth"
    if not crashes and MODE != "small":
        functions["Pyro SMCFilter"] = peers.by_smc_filter

    def check(one, other):
        return agree(one, other, spread)

    found = [
        Case(label, ours=ours, peer=function(name, rows, num_particles), peer_name=peer, agree=check)
        for peer, function in functions.items()
    ]
    if name == "volatility":
        found.append(Case(f"{label}, lean", ours=by_hand, peer=found[0].peer, peer_name="particles", agree=check))
    return found


if __name__ == "__main__":
    print(ssm.ops.info())
    # the growth model's clouds collapse at surprising observations, in every library
    warnings.filterwarnings("ignore", category=ssm.infer.smc.ParticleCollapseWarning)
    sizes = [("volatility", 1000, 1000, 1)]
    if MODE != "small":
        sizes += [("volatility", 1000, 100, 32), ("volatility", 100_000, 100, 1)]
        sizes += [("growth", 1000, 1000, 1), ("growth", 1000, 100, 32), ("growth", 100_000, 100, 1)]
    if MODE == "all":
        sizes += [("volatility", 100_000, 20, 32), ("growth", 100_000, 20, 32)]
    packages = ["particles", "numpy"] + (["cuthbert", "jax"] if MODE == "all" else [])
    rows = [case for size in sizes for case in cases(*size)]
    run(f"particle_filter_{MODE}".rstrip("_"), rows, packages=packages, repeats=5)
