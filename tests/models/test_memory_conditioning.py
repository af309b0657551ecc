"""When memory sees y: the law of (z, y) is one, however z and y are given; judged by the dense joint normal."""

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from pyro.nn import PyroSample

from pyro_ssm.data import TimeSeries
from pyro_ssm.guides import Guide
from pyro_ssm.models import history, observation_law, path_law
from tests.contracts.toys import dense_normal, joint, normal, remembering, series, simulate


@pytest.fixture
def model():
    return remembering()


@pytest.fixture
def data():
    return series(num_times=4, batch=(3,))


def log_prob(program, data):
    """log p(z, y) of each series in a fresh trace of ``program``."""
    traced = poutine.trace(program).get_trace(data)
    traced.compute_log_prob()
    return traced.nodes["z"]["log_prob"] + traced.nodes["y"]["log_prob"], traced


def dense(model, data, z, y):
    return dense_normal(model, data.times).log_prob(torch.cat([z.flatten(-2), y.flatten(-2)], -1))


class Fixed(Guide):
    """A guide whose path is one given tensor, spread by a normal law."""

    looks_ahead = True

    def __init__(self, model, path):
        super().__init__(model)
        self.given = path

    def encode(self, data, model):
        return self.given

    def step(self, state, k, context, memory=None):
        return normal(context[..., k, :], torch.full((), 0.3, dtype=context.dtype))


def drawn(model, data):
    with torch.no_grad():
        z, y = model(data.without_values())
    return z, y


def test_the_reference_is_a_normal_law_of_the_simulator(model, data):
    mean, square = joint(model, data.times)
    z, y = simulate(model, data.times, torch.randn(40_000, 4, 2).double(), torch.randn(40_000, 4, 2).double())
    found = torch.cat([z.flatten(1), y.flatten(1)], 1)
    error = (square.diagonal() / len(found)).sqrt()
    assert ((found.mean(0) - mean) / error).abs().max() < 4.5


def test_all_conditionings_have_one_density(model, data):
    """Both conditioned; y in the data and z conditioned; y in the data and z from a guide."""
    z, y = drawn(model, data)
    wanted = dense(model, data, z, y)
    bare, full = data.without_values(), data.replace(values=y)
    z, y = z.clone(), y.clone()

    found, _ = log_prob(poutine.condition(model, data={"z": z, "y": y}), bare)
    torch.testing.assert_close(found, wanted)
    found, _ = log_prob(poutine.condition(model, data={"z": z}), full)
    torch.testing.assert_close(found, wanted)

    guide = Fixed(model, z)
    guided = poutine.trace(guide).get_trace(full)
    path = guided.nodes["z"]["value"]
    found, _ = log_prob(poutine.replay(model, trace=guided), full)
    torch.testing.assert_close(found, dense(model, data, path.detach(), y))


def test_a_joint_draw_has_the_joint_density(model, data):
    found, traced = log_prob(model, data.without_values())
    z, y = traced.nodes["z"]["value"], traced.nodes["y"]["value"]
    torch.testing.assert_close(found.detach(), dense(model, data, z.detach(), y.detach()))


def test_a_replayed_joint_draw_has_the_joint_density(model, data):
    bare = data.without_values()
    _, first = log_prob(model, bare)
    found, again = log_prob(poutine.replay(model, trace=first), bare)
    z, y = again.nodes["z"]["value"], again.nodes["y"]["value"]
    assert z is first.nodes["z"]["value"] and y is first.nodes["y"]["value"]
    torch.testing.assert_close(found.detach(), dense(model, data, z.detach(), y.detach()))


def test_z_given_y_drawn_has_the_joint_density(model, data):
    z = torch.randn(3, 4, 2).double()
    found, traced = log_prob(poutine.condition(model, data={"z": z}), data.without_values())
    y = traced.nodes["y"]["value"]
    torch.testing.assert_close(found, dense(model, data, z, y.detach()))


def test_the_density_of_one_trace_does_not_change(model, data):
    """Evaluated twice, and in either order of the sites."""
    for program, given in ((model, data), (model, data.without_values())):
        traced = poutine.trace(program).get_trace(given)
        values = [(traced.nodes[n]["fn"].log_prob(traced.nodes[n]["value"])) for n in ("y", "z", "z", "y")]
        torch.testing.assert_close(values[0], values[3])
        torch.testing.assert_close(values[1], values[2])


def test_values_with_z_free_give_the_path_given_its_y(model, data):
    """With ``data.values`` and z free, z is drawn from p(z_t | z_<t, y_<t), and the density is the joint's."""
    found, traced = log_prob(model, data)
    z = traced.nodes["z"]["value"]
    torch.testing.assert_close(found.detach(), dense(model, data, z.detach(), data.values))


def test_conditioning_y_alone_raises_and_says_what_to_do(model, data):
    with pytest.raises(ValueError) as raised:
        poutine.condition(model, data={"y": data.values})(data.without_values())
    for words in ('site "y"', '"z" is free', "`values`", "condition on z as well"):
        assert words in str(raised.value)


def test_y_is_the_one_drawn_iff_z_is_the_tensor_drawn(model, data):
    bare = data.without_values()
    _, traced = log_prob(model, bare)
    z, y = traced.nodes["z"]["value"], traced.nodes["y"]["value"]
    run = traced.nodes["y"]["fn"]._history
    law = path_law(model.bind(), bare, run)
    assert law.batch_shape == (3,)
    # the same numbers in another tensor: y is drawn anew
    _, again = log_prob(poutine.condition(model, data={"z": z.clone()}), bare)
    assert bool((again.nodes["y"]["value"] != y).any())


def z_scores(found, wanted_mean, wanted_square):
    """Standardised deviations of the means and of the second moments of ``found`` ``(n, dims)``."""
    n, centred = len(found), found - wanted_mean
    mean = centred.mean(0) / (wanted_square.diagonal() / n).sqrt()
    products = centred.unsqueeze(-1) * centred.unsqueeze(-2)
    spread = (wanted_square.diagonal().outer(wanted_square.diagonal()) + wanted_square**2) / n
    return torch.cat([mean, ((products.mean(0) - wanted_square) / spread.sqrt()).flatten()])


@pytest.mark.parametrize("parallel", [True, False])
def test_prior_moments_are_those_of_the_joint(model, parallel):
    num = 30_000 if parallel else 200
    data = series(num_times=3)
    draws = Predictive(model, num_samples=num, parallel=parallel)(data.without_values())
    found = torch.cat([draws["z"].reshape(num, -1), draws["y"].reshape(num, -1)], 1)
    scores = z_scores(found.detach(), *joint(model, data.times))
    assert scores.abs().max() < 4.8


def test_prior_moments_of_many_series(model):
    times = torch.tensor([0.0, 0.5, 1.7]).double()
    z, y = model(TimeSeries(times.expand(20_000, 3)))
    found = torch.cat([z.flatten(1), y.flatten(1)], 1).detach()
    assert z_scores(found, *joint(model, times)).abs().max() < 4.8


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive_given_z_draws_y_step_by_step_along_it(model, parallel):
    """Each y_t is drawn from p(y_t | z_<=t, y_<t): every draw anew, whether draws are vectorised or not."""
    data, num = series(num_times=3), 20_000 if parallel else 400
    z = torch.tensor([[1.0, -1.0], [0.5, 0.0], [1.0, -0.5]]).double()
    program = poutine.condition(model, data={"z": z})
    found = (
        Predictive(program, num_samples=num, parallel=parallel)(data.without_values())["y"].reshape(num, 3, 2).detach()
    )
    wanted = along(model, data.times, z, torch.randn(20_000, 3, 2).double())
    error = (wanted.var(0) / 20_000 + found.var(0) / num).sqrt()
    assert ((found.mean(0) - wanted.mean(0)) / error).abs().max() < 4.5
    assert (found.var(0) / wanted.var(0) - 1).abs().max() < 6 * (2 / num) ** 0.5


def test_predictive_given_drawn_paths_draws_y_along_each(model):
    """Posterior draws of z: y of draw s is along path s."""
    data, num = series(num_times=3), 4000
    far = torch.tensor([[[1.0, -1.0]] * 3, [[-30.0, 40.0]] * 3]).double()
    z = far[torch.arange(num) % 2]
    y = (
        Predictive(model, posterior_samples={"z": z}, parallel=True)(data.without_values())["y"]
        .reshape(num, 3, 2)
        .detach()
    )
    for i in range(2):
        wanted = along(model, data.times, far[i], torch.randn(num, 3, 2).double())
        found = y[i::2]
        error = (wanted.var(0) / num + found.var(0) / len(found)).sqrt()
        assert ((found.mean(0) - wanted.mean(0)) / error).abs().max() < 4.5


def along(model, times, z, noise):
    """y simulated along a given path, in a plain loop."""
    memory, see = model.memory, model.emission
    with torch.no_grad():
        m, ys = memory.first.expand(len(noise), 2), []
        for k in range(len(z)):
            m = m + z[k] @ memory.state_weight.T
            y = z[k] @ see.matrix.T + see.offset + m @ see.memory_weight.T + see.log_scale.exp() * noise[:, k]
            m = memory.keep * m + y @ memory.value_weight.T
            ys.append(y)
    return torch.stack(ys, 1)


def test_predictive_with_a_guide_and_no_values_simulates_y_along_the_guides_path(model, data):
    """Posterior predictive: z from the guide given the data, y drawn anew along it."""
    guide = Fixed(model, torch.randn(3, 4, 2).double())
    paths = [guide.path(data, model.bind()).sample() for _ in range(5)]
    draws = Predictive(model, posterior_samples={"z": torch.stack(paths)})(data.without_values())
    assert draws["y"].shape == (5, 3, 4, 2)


def test_a_missing_observation_is_skipped_by_memory(model):
    """Not marginalised: the density of what follows is that given a memory that skipped it."""
    data = series(num_times=4)
    mask = torch.ones(4, 2, dtype=torch.bool)
    mask[1] = False
    z = torch.randn(4, 2).double()
    found, _ = log_prob(poutine.condition(model, data={"z": z}), data.replace(values=data.values, mask=mask))
    memory, see = model.memory, model.emission
    a, b = model.initial, model.transition
    with torch.no_grad():
        m, total = memory.first, 0.0
        for k in range(4):
            if k == 0:
                law = dist.Normal(a.loc + a.memory_weight @ m, a.log_scale.exp())
            else:
                decay = torch.exp(-b.rate * (data.times[k] - data.times[k - 1]))
                loc = decay * z[k - 1] + (1 - decay) * b.level + b.memory_weight @ m
                law = dist.Normal(loc, b.log_scale.exp() * (1 - decay**2).sqrt())
            total = total + law.log_prob(z[k]).sum()
            m = m + memory.state_weight @ z[k]
            if k != 1:
                loc = see.matrix @ z[k] + see.offset + see.memory_weight @ m
                total = total + dist.Normal(loc, see.log_scale.exp()).log_prob(data.values[k]).sum()
            m = memory.keep * m + (memory.value_weight @ data.values[k] if k != 1 else 0.0)
    torch.testing.assert_close(found.detach(), total)


def test_vectorised_particles_are_a_loop_over_particles(model, data):
    guide = Fixed(model, torch.randn(3, 4, 2).double())
    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    (pair,) = list(elbo._get_traces(model, guide, (data,), {}))
    z = pair[1].nodes["z"]["value"].detach()
    assert z.shape == (5, 3, 4, 2)
    pair[0].compute_log_prob()
    found = pair[0].nodes["z"]["log_prob"] + pair[0].nodes["y"]["log_prob"]
    torch.testing.assert_close(found.detach(), dense(model, data, z, data.values.expand(5, 3, 4, 2)))


def test_draws_of_parameters_and_of_a_memory_are_a_loop(data):
    """Random parameters of transition and memory, vectorised particles, a memory of y: particle by particle."""
    model = remembering()
    model.transition.rate = PyroSample(dist.LogNormal(torch.zeros(2).double(), 0.3).to_event(1))
    model.memory.keep = PyroSample(dist.Normal(torch.zeros(2).double(), 0.3).to_event(1))
    guide = Fixed(model, torch.randn(3, 4, 2).double())
    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    ((modelled, guided),) = list(elbo._get_traces(model, guide, (data,), {}))
    modelled.compute_log_prob()
    values = {name: guided.nodes[name]["value"].detach() for name in ("transition.rate", "memory.keep")}
    z = guided.nodes["z"]["value"].detach()
    for s in range(5):
        bound = model.bind({name: value[s, 0] for name, value in values.items()})
        run, path = history(bound, data), z[s].clone()
        torch.testing.assert_close(modelled.nodes["z"]["log_prob"][s], path_law(bound, data, run).log_prob(path))
        y = observation_law(bound, data, path, run).log_prob(data.values)
        torch.testing.assert_close(modelled.nodes["y"]["log_prob"][s], y)
