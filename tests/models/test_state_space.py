"""The model as a Pyro program: its sites, plates and names, and what it refuses."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_ssm.data import TimeSeries
from pyro_ssm.guides import GaussianMarkov, Structured
from pyro_ssm.models import StateSpaceModel, observation_law, path_law
from tests.contracts.toys import Decay, Leak, See, Start, StateLeak, dense_normal, remembering, series, toy


def total(program, *args):
    return poutine.trace(program).get_trace(*args).log_prob_sum()


# ---------------------------------------------------------------------------------------------------- sites


def test_sites_and_returned_values():
    data = series(batch=(3,))
    traced = poutine.trace(toy()).get_trace(data)
    assert [n for n, s in traced.nodes.items() if s["type"] == "sample"] == ["series", "z", "y"]
    z, y = traced.nodes["_RETURN"]["value"]
    assert z is traced.nodes["z"]["value"] and y is traced.nodes["y"]["value"] and y is data.values
    assert z.shape == (3, 4, 2)


def test_y_is_observed_exactly_when_there_are_values():
    data = series(batch=(3,))
    assert poutine.trace(toy()).get_trace(data).nodes["y"]["is_observed"]
    traced = poutine.trace(toy()).get_trace(data.without_values())
    assert not traced.nodes["y"]["is_observed"] and traced.nodes["y"]["value"].shape == (3, 4, 2)


def test_the_joint_density_is_the_dense_normal():
    model, data = toy(), series(num_times=5)
    traced = poutine.trace(model).get_trace(data)
    z = traced.nodes["z"]["value"].detach()
    wanted = dense_normal(model, data.times).log_prob(torch.cat([z.flatten(), data.values.flatten()]))
    torch.testing.assert_close(traced.log_prob_sum().detach(), wanted)


def test_the_prior_is_the_dense_normal():
    model, times, num = toy(), series(num_times=3).times, 30_000
    draws = Predictive(model, num_samples=num, parallel=True)(TimeSeries(times))
    found = torch.cat([draws["z"].reshape(num, -1), draws["y"].reshape(num, -1)], 1).detach()
    law = dense_normal(model, times)
    assert ((found.mean(0) - law.mean) / (law.variance / num).sqrt()).abs().max() < 4.5
    spread = law.variance.outer(law.variance) + law.covariance_matrix**2
    assert ((found.T.cov() - law.covariance_matrix) / (spread / num).sqrt()).abs().max() < 4.8


# --------------------------------------------------------------------------------------------------- plates


def test_a_single_series_opens_no_plate():
    assert "series" not in poutine.trace(toy()).get_trace(series()).nodes


def test_a_users_plate_is_not_doubled():
    data = series(batch=(3,))

    def program(data):
        with pyro.plate("mine", 3, dim=-1):
            return model(data)

    model = toy()
    with poutine.condition(data={"z": torch.randn(3, 4, 2).double()}):
        inside, alone = poutine.trace(program).get_trace(data), total(model, data)
    assert "series" not in inside.nodes and "mine" in inside.nodes
    torch.testing.assert_close(inside.log_prob_sum(), alone)


def test_a_users_plate_at_dim_minus_two_gets_the_series_plate_inside():
    data = series(batch=(2, 3))
    model = toy()

    def program(data):
        with pyro.plate("groups", 2, dim=-2):
            return model(data)

    z = torch.randn(2, 3, 4, 2).double()
    traced = poutine.trace(poutine.condition(program, data={"z": z})).get_trace(data)
    assert "series" in traced.nodes
    traced.compute_log_prob()
    assert traced.nodes["z"]["log_prob"].shape == (2, 3)
    for g in range(2):
        for i in range(3):
            one = TimeSeries(data.times, data.values[g, i])
            wanted = total(poutine.condition(model, data={"z": z[g, i]}), one)
            torch.testing.assert_close((traced.nodes["z"]["log_prob"] + traced.nodes["y"]["log_prob"])[g, i], wanted)


def test_a_deeper_dim_without_plate_raises_and_says_which():
    with pytest.raises(ValueError) as raised:
        toy()(series(batch=(2, 3)))
    assert "(2, 3)" in str(raised.value) and "[-2]" in str(raised.value) and "pyro.plate" in str(raised.value)


@pytest.mark.parametrize("guide_of", [lambda m: Structured(m, 8), lambda m: GaussianMarkov(m, 8)])
def test_the_guide_opens_the_same_plate(guide_of):
    model, data = toy(dtype=torch.float32), series(batch=(4,), dtype=torch.float32)
    guide = guide_of(model)
    batch = data.minibatch([2, 0])
    traces = [poutine.trace(program).get_trace(batch) for program in (model, guide)]
    for traced in traces:
        assert traced.nodes["z"]["scale"] == 2.0
        assert traced.nodes["series"]["value"].tolist() == [2, 0]
    with pyro.plate("mine", 4, dim=-1):
        assert "series" not in poutine.trace(guide).get_trace(data).nodes


@pytest.mark.parametrize("make", [toy, remembering])
def test_minibatches_add_up_to_the_full_data_exactly(make):
    """The mean over a partition into equal mini-batches of the scaled density is the density of all the data."""
    model, data = make(), series(batch=(6,), missing=True)
    z = torch.randn(6, 4, 2).double()
    full = total(poutine.condition(model, data={"z": z}), data)
    parts = []
    for index in ([0, 3], [5, 1], [2, 4]):
        batch = data.minibatch(index)
        parts.append(total(poutine.condition(model, data={"z": z[index]}), batch))
    torch.testing.assert_close(sum(parts) / 3, full)


def test_minibatches_do_not_scale_shared_parameters():
    model, data = toy(), series(batch=(6,))
    model.transition.rate = PyroSample(dist.LogNormal(torch.zeros(2).double(), 0.5).to_event(1))
    traced = poutine.trace(model).get_trace(data.minibatch([1, 4]))
    assert traced.nodes["transition.rate"]["scale"] == 1.0 and traced.nodes["z"]["scale"] == 3.0


def test_vectorised_particles_are_leftmost():
    model, data = toy(dtype=torch.float32), series(batch=(3,), dtype=torch.float32)
    model.transition.rate = PyroSample(dist.LogNormal(torch.zeros(2), 0.5).to_event(1))
    guide = Structured(model, 8)
    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    ((modelled, guided),) = list(elbo._get_traces(model, guide, (data,), {}))
    rate, z = guided.nodes["transition.rate"]["value"], guided.nodes["z"]["value"]
    assert rate.shape == (5, 1, 2) and z.shape == (5, 3, 4, 2)
    modelled.compute_log_prob()
    guided.compute_log_prob()
    for s in range(5):
        bound = model.bind({"transition.rate": rate[s, 0].detach()})
        path = z[s].detach().clone()
        torch.testing.assert_close(modelled.nodes["z"]["log_prob"][s], path_law(bound, data).log_prob(path))
        y = observation_law(bound, data, path).log_prob(data.values)
        torch.testing.assert_close(modelled.nodes["y"]["log_prob"][s], y)
        torch.testing.assert_close(guided.nodes["z"]["log_prob"][s], guide.path(data, bound).log_prob(path))


def test_vectorised_particles_of_a_single_series():
    model, data = toy(dtype=torch.float32), series(dtype=torch.float32)
    model.transition.rate = PyroSample(dist.LogNormal(torch.zeros(2), 0.5).to_event(1))
    guide = GaussianMarkov(model, 8)
    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=0)
    ((modelled, guided),) = list(elbo._get_traces(model, guide, (data,), {}))
    rate, z = guided.nodes["transition.rate"]["value"], guided.nodes["z"]["value"]
    assert rate.shape == (5, 2) and z.shape == (5, 4, 2)
    modelled.compute_log_prob()
    for s in range(5):
        bound = model.bind({"transition.rate": rate[s].detach()})
        wanted = path_law(bound, data).log_prob(z[s].detach().clone())
        torch.testing.assert_close(modelled.nodes["z"]["log_prob"][s], wanted)


# ----------------------------------------------------------------------------------------------- composition


class Outer(PyroModule):
    def __init__(self):
        super().__init__()
        self.child = toy(dtype=torch.float32)
        self.child.transition.rate = PyroSample(dist.LogNormal(torch.zeros(2), 0.5).to_event(1))

    def forward(self, data):
        return self.child(data)


def test_inside_a_users_module_names_get_its_prefix():
    traced = poutine.trace(Outer()).get_trace(series(batch=(3,), dtype=torch.float32))
    assert {"child.z", "child.y", "child.series", "child.transition.rate"} <= set(traced.nodes)


def test_a_guide_of_a_composed_model_has_its_names():
    outer, data = Outer(), series(batch=(3,), dtype=torch.float32)
    outer(data)
    guide = Structured(outer.child, 8)
    traced = poutine.trace(guide).get_trace(data)
    assert {"child.z", "child.series", "child.transition.rate"} <= set(traced.nodes)
    replayed = poutine.trace(poutine.replay(outer, trace=traced)).get_trace(data)
    assert replayed.nodes["child.z"]["value"] is traced.nodes["child.z"]["value"]


def test_a_guide_of_a_composed_model_that_has_not_run_has_its_names():
    outer, data = Outer(), series(batch=(3,), dtype=torch.float32)
    guide = Structured(outer.child, 8)
    assert {"child.z", "child.series", "child.transition.rate"} <= set(poutine.trace(guide).get_trace(data).nodes)


def test_two_models_in_one_module_do_not_clash():
    class Pair(PyroModule):
        def __init__(self):
            super().__init__()
            self.left, self.right = toy(), toy()

        def forward(self, data):
            return self.left(data), self.right(data)

    names = set(poutine.trace(Pair()).get_trace(series(batch=(3,))).nodes)
    assert {"left.z", "left.y", "left.series", "right.z", "right.y", "right.series"} <= names


def test_compose_first_run_afterwards():
    model = toy()
    model(series().without_values())
    with pytest.raises(RuntimeError, match="compose first, run afterwards"):
        Outer().other = model
    with pytest.raises(RuntimeError, match="compose first, run afterwards"):
        StateSpaceModel(model.initial, model.transition, model.emission)


def test_a_guide_that_ran_does_not_adopt_the_model():
    model, data = toy(dtype=torch.float32), series(dtype=torch.float32)
    guide = Structured(model, 8)
    guide(data)
    assert set(poutine.trace(model).get_trace(data).stochastic_nodes) == {"z"}
    assert "z" in poutine.trace(guide).get_trace(data).nodes


def test_an_ordinary_nn_module_may_hold_the_model():
    class Holder(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, data):
            return self.model(data)

    holder = Holder(toy())
    assert "z" in poutine.trace(holder).get_trace(series()).nodes


# --------------------------------------------------------------------------------------------------- refusals


def test_the_class_is_final():
    with pytest.raises(TypeError, match="final"):

        class Mine(StateSpaceModel):
            pass


def test_a_user_class_named_bound_is_refused_too():
    with pytest.raises(TypeError, match="final"):

        class BoundMine(StateSpaceModel):
            pass


@pytest.mark.parametrize("verb", ["fit", "filter", "smooth", "forecast", "sample", "predict"])
def test_the_model_has_no_verbs(verb):
    assert not hasattr(toy(), verb)


def test_two_memories_raise():
    class Bringing(See):
        def __init__(self):
            super().__init__(2, 1, 2)
            self.memory = StateLeak(2)

    with pytest.raises(ValueError, match="two memories"):
        StateSpaceModel(Start(2, 2), Decay(2, 2), Bringing(), Leak(2, 1))
    model = StateSpaceModel(Start(2, 2), Decay(2, 2), Bringing())
    assert model.memory is model.emission.memory
    names = [name for name, _ in model.named_parameters()]
    assert "emission.memory.keep" in names and "memory.keep" not in names and len(names) == len(set(names))
    bound = model.bind()
    assert bound.memory is bound.emission.memory
    assert model(TimeSeries(torch.arange(3.0).expand(2, 3)))[0].shape == (2, 3, 2)


def test_memory_is_registered_once():
    model = remembering()
    names = [name for name, _ in model.named_parameters() if "keep" in name]
    assert names == ["memory.keep"]
    assert model.bind().memory.keep is model.memory.keep


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (lambda: (Decay(2), Decay(2), See(2, 1)), "`initial` must be a components.Initial, got Decay"),
        (lambda: (Start(2), nn.Linear(2, 2), See(2, 1)), "`transition` must be a components.Transition, got Linear"),
        (lambda: (Start(2), Decay(2), Start(2)), "`emission` must be a components.Emission, got Start"),
        (lambda: (Start(2), Decay(2), See(2, 1), See(2, 1)), "`memory` must be a components.Memory, got See"),
    ],
)
def test_a_part_of_another_kind_raises(parts, words):
    with pytest.raises(TypeError, match=words):
        StateSpaceModel(*parts())


def test_state_dims_that_differ_raise():
    with pytest.raises(ValueError, match="state dimensions differ"):
        StateSpaceModel(Start(2), Decay(3), See(2, 1))


def test_what_is_not_a_time_series_raises():
    with pytest.raises(TypeError, match=r"TimeSeries, got Tensor"):
        toy()(torch.zeros(3, 4, 2))


def test_values_of_another_size_raise():
    with pytest.raises(ValueError, match="obs_dim=2"):
        toy()(series(obs_dim=1))


def test_the_model_pickles_and_moves():
    model, data = toy(), series()
    again = pickle.loads(pickle.dumps(model))
    z = torch.randn(4, 2).double()
    torch.testing.assert_close(
        total(poutine.condition(again, data={"z": z}), data), total(poutine.condition(model, data={"z": z}), data)
    )
    assert model.float()(data.without_values().to(dtype=torch.float32))[0].dtype == torch.float32


def test_float64_times_leave_a_float32_model_float32():
    model, data = toy(dtype=torch.float32), series(batch=(3,), dtype=torch.float32)
    traced = poutine.trace(model).get_trace(data)
    assert data.times.dtype == torch.float64
    assert traced.nodes["z"]["value"].dtype == torch.float32 and traced.log_prob_sum().dtype == torch.float32
