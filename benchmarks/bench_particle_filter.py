"""A bootstrap particle filter for stochastic volatility, against `particles`: one series and 32, 1e3 and 1e5 particles.

Equal work: the same model and data, systematic resampling below N / 2, evidence and effective sample sizes kept. The
*lean* case is the same process written by hand as a `FeynmanKac`, without the model's components and laws: what remains
is the filter itself. `particles` takes one series at a time. Two estimates are random: before timing they must agree
within their spread over a few runs.

    python benchmarks/bench_particle_filter.py           # writes results/particle_filter.json and .md
    python benchmarks/bench_particle_filter.py small     # the cases of 1e3 particles only
"""

from __future__ import annotations

import math
import statistics
import sys

from harness import Case, DisagreementError, pin_threads, run

pin_threads(1)

import particles  # noqa: E402  (threads are pinned before numpy and torch are imported)
import torch  # noqa: E402
from particles import state_space_models  # noqa: E402

import pyro_ssm as ssm  # noqa: E402
from pyro_ssm.components import Emission  # noqa: E402

MU, RHO, SIGMA = -1.02, 0.9702, 0.178  # Pitt and Shephard (1999)
START = SIGMA / math.sqrt(1 - RHO**2)


def normal(loc, scale):
    return ssm.distributions.DiagonalNormal(loc, scale)


class Returns(Emission):
    state_dim, obs_dim = 1, 1

    def forward(self, state, time, inputs, memory=None):
        return normal(state.new_zeros(()), (0.5 * state).exp())


def stochastic_volatility() -> ssm.StateSpaceModel:
    """An autoregression of the log variance, from its stationary law."""
    start = ssm.dynamics.NormalInitial(1, loc=MU, scale=START)
    move = ssm.dynamics.LinearNormal(1, matrix=torch.tensor([[RHO]]), scale=SIGMA)
    with torch.no_grad():
        move.offset.fill_(MU * (1 - RHO))
    return ssm.StateSpaceModel(start, move, Returns())


def lean(values: torch.Tensor) -> ssm.infer.FeynmanKac:
    """The same process on plain tensors ``(N, *batch)``."""
    constant, steps = 0.5 * math.log(2 * math.pi), values.unbind(-2)
    y = [-0.5 * value.squeeze(-1).square() for value in steps]
    start, move = normal(torch.full((1,), MU), torch.full((1,), START)), torch.full((1,), SIGMA)

    def potential(k, previous, x):
        return torch.addcmul(-0.5 * x - constant, y[k], (-x).exp())

    return ssm.infer.FeynmanKac(
        initial=lambda draw, shape: draw(start, shape).squeeze(-1),
        propagate=lambda k, x, draw: draw(normal((RHO * x + MU * (1 - RHO)).unsqueeze(-1), move), x.shape).squeeze(-1),
        log_potential=potential,
        num_times=len(y),
        batch_shape=values.shape[:-2],
        state=lambda x: x.unsqueeze(-1),
    )


def agree(ours, peer, spread: float) -> float:
    """Two estimates of the evidence, each with a standard deviation of ``spread``."""
    ours, peer = float(ours.sum()), float(peer)
    if abs(ours - peer) > 4 * math.sqrt(2) * spread + 0.01:
        raise DisagreementError(f"log evidence {ours:.3f} and {peer:.3f}, with a spread of {spread:.3f} each")
    return abs(ours - peer)


def cases(num_particles: int, num_times: int, num_series: int) -> list[Case]:
    torch.manual_seed(1)
    model = stochastic_volatility()
    batch = (num_series,) if num_series > 1 else ()
    times = torch.arange(float(num_times))
    with torch.no_grad():
        _, y = model(ssm.TimeSeries(times.expand(batch + (num_times,))))
    data = ssm.TimeSeries(times, y)
    series = [row.squeeze(-1).numpy() for row in y.reshape(-1, num_times, 1).unbind(0)]
    theirs = state_space_models.StochVol(mu=MU, rho=RHO, sigma=SIGMA)

    def peer() -> float:
        total = 0.0
        for row in series:
            fk = state_space_models.Bootstrap(ssm=theirs, data=row)
            smc = particles.SMC(fk=fk, N=num_particles, resampling="systematic", ESSrmin=0.5)
            smc.run()
            total += smc.logLt
        return total

    def ours() -> torch.Tensor:
        return ssm.infer.particle_filter(ssm.infer.bootstrap(model, data), num_particles).total

    def by_hand() -> torch.Tensor:
        return ssm.infer.particle_filter(lean(y), num_particles).total

    spread = statistics.stdev(float(ours().sum()) for _ in range(12))
    name = f"{num_series} series, N={num_particles:.0e}, T={num_times}"
    checks = {"peer": peer, "peer_name": "particles", "agree": lambda a, b: agree(a, b, spread)}
    return [Case(name, ours=ours, **checks), Case(f"{name}, lean", ours=by_hand, **checks)]


if __name__ == "__main__":
    small = sys.argv[1:] == ["small"]
    rows = cases(1000, 1000, 1)
    if not small:
        rows += cases(1000, 100, 32) + cases(100_000, 100, 1)
    run("particle_filter_small" if small else "particle_filter", rows, packages=["particles", "numpy"], repeats=5)
