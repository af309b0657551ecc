"""Particle filters count the Poisson process of observation times: against quadrature, paths and single draws."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ssm import StateSpaceModel, TimeSeries, infer, predict
from pyro_ssm.components import Gaussian, Transition
from pyro_ssm.diagnostics.densities import densities
from pyro_ssm.dynamics import NeuralODE, NormalInitial, discretize
from pyro_ssm.emissions import LinearNormal
from pyro_ssm.infer.smc import FixedNoise
from pyro_ssm.infer.smc.model_steps import StateParticles
from pyro_ssm.infer.smc.score import fisher_score
from pyro_ssm.models.times import path_times_law, times_law

D = torch.float64
FLOOR, SCALE = 0.6, 1.5


def series(lengths=None):
    generator = torch.Generator().manual_seed(3)
    times = (torch.rand(3, 5, generator=generator, dtype=D) + 0.2).cumsum(-1)
    values = torch.randn(3, 5, 1, generator=generator, dtype=D)
    mask = torch.rand(3, 5, 1, generator=generator) < 0.6
    mask[:, 0], mask[:, -1] = True, False
    return TimeSeries(times, values, mask=mask, lengths=lengths)


def walk(floor=FLOOR, log_intensity=None):
    """A random walk whose state is the logarithm of the rate."""
    rate = (lambda t, z, u: z) if log_intensity is None else log_intensity
    ode = NeuralODE(lambda t, z, u: 0 * z, state_dim=1, log_intensity=rate, method="rk4", step_size=1.0)
    transition = ode if floor is None else discretize(ode, "flow", noise_floor=floor)
    return StateSpaceModel(NormalInitial(1), transition, LinearNormal(1, 1, scale=SCALE)).double()


def by_quadrature(model, data, b):
    """log p(y, times) by a grid over the state, step after step."""
    z = torch.linspace(-8, 8, 1601, dtype=D)
    matrix, offset = model.emission.matrix.detach().item(), model.emission.offset.detach()
    weight = dist.Normal(0.0, 1.0).log_prob(z)
    for k in range(data.num_times):
        if k:
            gap = float(data.times[b, k] - data.times[b, k - 1])
            moved = dist.Normal(z.unsqueeze(-1), FLOOR * gap**0.5).log_prob(z)  # from rows to columns
            weight = ((weight - gap * z.exp()).unsqueeze(-1) + moved).logsumexp(0) + math.log(float(z[1] - z[0]))
        if data.mask[b, k, 0]:
            weight = weight + z + dist.Normal(matrix * z + offset, SCALE).log_prob(data.values[b, k, 0])
    return float(weight.logsumexp(0)) + math.log(float(z[1] - z[0]))


def proposal(state, k, memory):
    law = dist.Normal(torch.zeros(3, 1, 1, dtype=D) if state is None else state, 1.0)
    return law.to_event(1)


@pytest.mark.parametrize("build", ["bootstrap", "guided", "locally_optimal", "auxiliary"])
def test_the_evidence_is_that_of_quadrature(build):
    torch.manual_seed(0)
    model, data = walk(), series()
    make = {"guided": lambda m, d: infer.guided(m, proposal, d)}.get(build) or getattr(infer, build)
    runs = torch.stack([infer.particle_filter(make(model, data), 1000).log_likelihood.sum(-1) for _ in range(12)])
    for b in range(3):
        exact = by_quadrature(model, data, b)
        ratio = (runs[:, b] - exact).exp()  # unbiased: its mean is 1
        assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / 12**0.5 < 0.25


def test_an_equation_without_noise_is_importance_sampling():
    """Its particles are starts: without resampling the evidence is the mean of their likelihoods, times included."""
    torch.manual_seed(0)
    model, data = walk(floor=None), series()
    found = infer.particle_filter(infer.bootstrap(model, data), 50, ess_threshold=0.0)
    starts = found.cloud.particles.state  # constant along the flow
    bound = model.bind()
    path, law = times_law(bound, data, starts)
    seen = dist.Normal(bound.emission(path, data.times, None).mean, SCALE).log_prob(data.values)
    wanted = torch.where(data.mask, seen, 0.0).sum((-1, -2)) + law.log_prob(data.mask)
    torch.testing.assert_close(found.log_likelihood.sum(-1), wanted.logsumexp(0) - math.log(50))


@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 2, 4])])
def test_a_path_has_the_same_density_everywhere(lengths):
    torch.manual_seed(0)
    model, data = walk(log_intensity=lambda t, z, u: torch.sin(z) + 0.1 * t), series(lengths)
    z = torch.randn(3, 5, 1, dtype=D)
    traced = poutine.trace(poutine.condition(model, {"z": z})).get_trace(data)
    traced.compute_log_prob()
    names = ("z", "y", "times")
    joint = sum(traced.nodes[name]["log_prob"] for name in names)
    assert traced.nodes["times"]["log_prob"].abs().min() > 0
    found = densities(model, predict.PosteriorDraws({}, z.unsqueeze(0)), data).joint[0]
    torch.testing.assert_close(found, joint)
    fk = infer.bootstrap(model, data)
    alive = torch.ones(3, 5, dtype=torch.bool) if fk.step_mask is None else fk.step_mask
    clouds = [StateParticles(z[None, :, k : k + 1], None, None) for k in range(5)]
    steps = torch.stack([fk.log_step(k, clouds[k - 1] if k else None, clouds[k])[0] for k in range(5)], -1)
    torch.testing.assert_close(torch.where(alive, steps, 0.0).sum(-1), joint)
    for k in range(1, 5):  # the backward kernel: what depends on the earlier state
        other = StateParticles(clouds[k - 1].state + 0.3, None, None)
        change = fk.log_backward(k, other, clouds[k]) - fk.log_backward(k, clouds[k - 1], clouds[k])
        torch.testing.assert_close(change, fk.log_step(k, other, clouds[k]) - fk.log_step(k, clouds[k - 1], clouds[k]))


def test_series_by_series_and_on_a_refined_grid():
    torch.manual_seed(0)
    model, data = walk(), series(torch.tensor([5, 2, 4]))
    bound, z = model.bind(), torch.randn(3, 5, 1, dtype=D)
    together = path_times_law(bound, data, z).log_prob(data.mask)
    for b in range(3):
        one = data.series(b)
        alone = path_times_law(bound, one, z[b, : one.num_times]).log_prob(one.mask)
        torch.testing.assert_close(together[b], alone)
    whole = series()
    constant = walk(log_intensity=lambda t, z, u: 0 * z + math.log(0.7))
    refined = whole.refine(4)
    found = path_times_law(constant.bind(), refined, torch.randn(3, refined.num_times, 1, dtype=D))
    spans = whole.times[:, -1] - whole.times[:, 0]
    wanted = whole.mask.sum((-1, -2)) * math.log(0.7) - 0.7 * spans
    torch.testing.assert_close(found.log_prob(refined.mask), wanted)
    # and so in a filter, whatever is drawn: the times add a constant to the evidence
    noise = FixedNoise(torch.randn(refined.num_times, 20, 3, 1, dtype=D))
    with_times = infer.particle_filter(infer.bootstrap(constant, refined), 20, ess_threshold=0.0, noise=noise)
    plain = discretize(NeuralODE(lambda t, z, u: 0 * z, state_dim=1, method="rk4"), "flow", noise_floor=FLOOR)
    without = StateSpaceModel(NormalInitial(1), plain, LinearNormal(1, 1, scale=SCALE)).double()
    without.emission.load_state_dict(constant.emission.state_dict())
    alone = infer.particle_filter(infer.bootstrap(without, refined), 20, ess_threshold=0.0, noise=noise)
    change = with_times.log_likelihood.sum(-1) - alone.log_likelihood.sum(-1)
    torch.testing.assert_close(change, wanted)


def test_a_single_time_and_an_online_filter():
    model, data = walk(), series()
    one = TimeSeries(data.times[:, :1], data.values[:, :1])
    z = torch.randn(3, 1, 1, dtype=D)
    torch.testing.assert_close(path_times_law(model.bind(), one, z).log_prob(one.mask), z[:, 0, 0])
    online = infer.OnlineParticleFilter(walk(log_intensity=lambda t, z, u: 0 * z + 2.0, floor=1e-9), 10)
    online.model.emission.matrix.data.zero_()
    y = torch.zeros(1, dtype=D)
    state = online.init(0.0, y)
    base = state.log_likelihood - 2.0
    state = online.step(state, 3.0, y)
    torch.testing.assert_close(state.log_likelihood, base + 2.0 - 3 * torch.tensor(2.0, dtype=D).exp())


class Wrapper(Transition, Gaussian):
    """A user's transition around an equation."""

    state_dim = 1

    def __init__(self, ode):
        super().__init__()
        self.inner = ode

    def forward(self, state, time, next_time, inputs, memory=None):
        return self.inner(state, time, next_time, inputs)


def test_what_cannot_count_the_times_refuses():
    model, data = walk(), series()
    for call in (
        lambda: infer.extended_kalman_filter(model, data),
        lambda: infer.unscented_kalman_filter(model, data),
        lambda: infer.ensemble_kalman_filter(model, data),
        lambda: fisher_score(model, data, 5),
    ):
        with pytest.raises(TypeError, match="does not count the times of observation"):
            call()
    ode = NeuralODE(lambda t, z, u: 0 * z, state_dim=1, log_intensity=lambda t, z, u: z)
    wrapped = StateSpaceModel(NormalInitial(1), Wrapper(ode), LinearNormal(1, 1)).double()
    for call in (lambda: infer.bootstrap(wrapped, data), lambda: wrapped(data)):
        with pytest.raises(TypeError, match="does not pass on the `log_intensity`"):
            call()
    three = walk(log_intensity=lambda t, z, u: z.expand(z.shape[:-1] + (3,)))
    with pytest.raises(ValueError, match="3 channels"):
        infer.particle_filter(infer.bootstrap(three, data), 5)
