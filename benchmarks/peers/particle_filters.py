"""The evidence of two state-space models by the bootstrap filters of peers.

Each function takes the name of a model, observations ``(series, time)`` as a NumPy array, and the number of particles;
it returns a function without arguments: the log evidence, summed over series. All resample systematically below N / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

MU, RHO, SIGMA = -1.02, 0.9702, 0.178  # stochastic volatility; Pitt and Shephard (1999)
START = SIGMA / math.sqrt(1 - RHO**2)
GROWTH_SCALE = math.sqrt(10.0)  # the growth model of Gordon, Salmond and Smith (1993), which starts from N(0, 4)

Evidence = Callable[[], float]


def by_particles(model: str, y: np.ndarray, num_particles: int) -> Evidence:
    """`particles`, one series after the other, float64."""
    import particles
    from particles import state_space_models

    if model == "growth":
        theirs = state_space_models.Gordon_etal(sigmaX=GROWTH_SCALE)
    else:
        theirs = state_space_models.StochVol(mu=MU, rho=RHO, sigma=SIGMA)

    def run() -> float:
        total = 0.0
        for row in y:
            fk = state_space_models.Bootstrap(ssm=theirs, data=row)
            smc = particles.SMC(fk=fk, N=num_particles, resampling="systematic", ESSrmin=0.5)
            smc.run()
            total += smc.logLt
        return float(total)

    return run


def by_cuthbert(model: str, y: np.ndarray, num_particles: int) -> Evidence:
    """cuthbert, compiled, vmapped over series, float32; its filter also returns the clouds of all steps."""
    import jax
    import jax.numpy as jnp
    from cuthbert import filtering
    from cuthbert.smc import particle_filter
    from cuthbertlib.resampling import ess_decorator, systematic

    def normal(value, loc, scale):
        return -0.5 * ((value - loc) / scale) ** 2 - jnp.log(scale) - 0.5 * math.log(2 * math.pi)

    def start(key):
        if model == "growth":
            return 2.0 * jax.random.normal(key)
        return MU + START * jax.random.normal(key)

    def move(key, x, now):
        # their first cloud is not weighed: it is our cloud before the first observation, and stays where it is then
        t, noise = now["t"], jax.random.normal(key)
        if model == "growth":
            moved = 0.5 * x + 25 * x / (1 + x**2) + 8 * jnp.cos(1.2 * (t - 1)) + GROWTH_SCALE * noise
        else:
            moved = MU + RHO * (x - MU) + SIGMA * noise
        return jnp.where(t == 0, x, moved)

    def potential(before, x, now):
        if model == "growth":
            return normal(now["y"], 0.05 * x**2, 1.0)
        return normal(now["y"], 0.0, jnp.exp(0.5 * x))

    resampling = ess_decorator(systematic.resampling, 0.5)
    found = particle_filter.build_filter(start, move, potential, num_particles, resampling)
    times = jnp.arange(y.shape[-1])

    def one(key, row):
        first, rest = jax.random.split(key)
        states = filtering.filter(found, {"y": row, "t": times}, found.init_prepare(key=first), key=rest)
        return states.log_normalizing_constant[-1]

    total = jax.jit(lambda key, rows: jax.vmap(one)(jax.random.split(key, len(rows)), rows).sum())
    if len(y) == 1:  # without vmap, which would turn the choice whether to resample into doing both
        total = jax.jit(lambda key, rows: one(key, rows[0]))
    rows, keys = jnp.asarray(y, dtype=jnp.float32), iter(range(10**9))
    return lambda: float(total(jax.random.key(next(keys)), rows).block_until_ready())


def by_smc_filter(model: str, y: np.ndarray, num_particles: int) -> Evidence:
    """Pyro's SMCFilter, one series after the other, float32; its evidence is added up beside it (2 % of its time)."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SMCFilter

    class Program:
        def init(self, state):
            loc, scale = (0.0, 2.0) if model == "growth" else (MU, START)
            state["x"] = pyro.sample("x_0", dist.Normal(loc, scale, validate_args=False))
            self.t = 0

        def step(self, state, value=None):
            x = state["x"]
            if self.t:
                if model == "growth":
                    loc = 0.5 * x + 25 * x / (1 + x**2) + 8 * math.cos(1.2 * (self.t - 1))
                    law = dist.Normal(loc, GROWTH_SCALE, validate_args=False)
                else:
                    law = dist.Normal(MU + RHO * (x - MU), SIGMA, validate_args=False)
                x = pyro.sample(f"x_{self.t}", law)
            if value is None:
                return  # the guide: what is drawn is replayed
            state["x"] = x
            if model == "growth":
                seen = dist.Normal(0.05 * x**2, 1.0, validate_args=False)
            else:
                seen = dist.Normal(0.0, (0.5 * x).exp(), validate_args=False)
            pyro.sample(f"y_{self.t}", seen, obs=value)

    class Guide(Program):
        def init(self, state):
            loc, scale = (0.0, 2.0) if model == "growth" else (MU, START)
            pyro.sample("x_0", dist.Normal(loc, scale, validate_args=False))
            self.t = 0

        def step(self, state, value=None):
            super().step(state)

    class Filter(SMCFilter):
        def _update_weights(self, model_trace, guide_trace):
            model_trace.compute_log_prob()
            before = self.state._log_weights
            for site in model_trace.nodes.values():
                if site["type"] == "sample" and site["is_observed"]:
                    after = before + site["log_prob"]
                    self.evidence += float(after.logsumexp(0) - before.logsumexp(0))
            super()._update_weights(model_trace, guide_trace)

    rows = [torch.as_tensor(row, dtype=torch.float32).unbind(0) for row in y]

    def run() -> float:
        total = 0.0
        for row in rows:
            program, guide = Program(), Guide()
            smc = Filter(program, guide, num_particles, max_plate_nesting=0, ess_threshold=0.5)
            smc.evidence = 0.0
            smc.init()
            for t, value in enumerate(row):
                program.t = guide.t = t
                smc.step(value)
            total += smc.evidence
        return total

    with_no_grad = torch.no_grad()(run)
    return with_no_grad
