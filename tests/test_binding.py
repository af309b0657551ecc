"""One reading of every parameter; a copy that speaks no Pyro."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.distributions import constraints

from pyro_ssm.binding import bind, is_bound, parameter_names, random_parameters
from pyro_ssm.components import AffineGaussian, Component, Emission, Transition
from pyro_ssm.data import TimeSeries
from pyro_ssm.models import StateSpaceModel, observation_law, path_law
from tests.contracts.toys import Decay, See, Start, normal, series, toy


class Parts(Component):
    """One parameter of each kind."""

    event_dims = {"rate": 1, "matrix": 2, "level": 1}

    def __init__(self):
        super().__init__()
        self.rate = PyroSample(dist.LogNormal(0.0, 1.0))
        self.matrix = PyroSample(dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
        self.level = nn.Parameter(torch.zeros(2))
        self.width = PyroParam(torch.tensor(2.0), constraints.positive)


# --------------------------------------------------------------------------------------------------- names


def test_parameter_names_are_dotted():
    model = toy()
    assert "transition.rate" in parameter_names(model) and "emission.matrix" in parameter_names(model)
    assert parameter_names(Parts()) == ["rate", "matrix", "width", "level"]
    assert random_parameters(Parts()) == ["rate", "matrix"]


@pytest.mark.parametrize(
    ("typo", "meant"), [("transition.rat", "transition.rate"), ("emision.matrix", "emission.matrix")]
)
def test_a_typo_raises_and_the_error_says_what_was_meant(typo, meant):
    with pytest.raises(KeyError) as raised:
        toy().bind({typo: torch.tensor(1.0)})
    assert typo in str(raised.value) and f"Did you mean {meant}?" in str(raised.value)


def test_an_unknown_name_raises_and_lists_the_known_ones():
    with pytest.raises(KeyError) as raised:
        bind(Parts(), {"nothing.like.it": torch.tensor(1.0)})
    assert "rate" in str(raised.value) and "matrix" in str(raised.value)


def test_the_name_of_a_hidden_unconstrained_parameter_is_unknown():
    with pytest.raises(KeyError):
        bind(Parts(), {"width_unconstrained": torch.tensor(1.0)})


def test_a_random_parameter_without_value_raises_outside_a_trace():
    with pytest.raises(RuntimeError) as raised:
        bind(Parts(), {"rate": torch.tensor(1.0)})
    assert "matrix" in str(raised.value) and "infer.sample_prior" in str(raised.value)


# -------------------------------------------------------------------------------------------------- shapes


def test_values_get_a_time_axis():
    bound = bind(Parts(), {"rate": torch.ones(5), "matrix": torch.ones(5, 2, 2), "level": torch.ones(5, 2)})
    assert bound.rate.shape == (5, 1, 1)
    assert bound.matrix.shape == (5, 1, 2, 2)
    assert bound.level.shape == (5, 1, 2)
    assert bound.parameter_shape == (5,)


def test_draws_and_plates_stay_in_front():
    bound = bind(Parts(), {"rate": torch.ones(5, 3), "matrix": torch.ones(5, 1, 2, 2)})
    assert bound.rate.shape == (5, 3, 1, 1) and bound.matrix.shape == (5, 1, 1, 2, 2)
    assert bound.parameter_shape == (5, 3)


def test_one_value_has_a_time_axis_too():
    bound = bind(Parts(), {"rate": torch.tensor(1.2), "matrix": torch.eye(2)})
    assert bound.rate.shape == (1, 1) and bound.matrix.shape == (1, 2, 2) and bound.parameter_shape == ()


def test_draws_of_a_learnable_scalar_are_draws():
    """A scalar that broadcasts over the state counts as event dim 1, so draws ``(3,)`` of it are not an event of 3."""

    class Scalar(Component):
        event_dims = {"rate": 1}

        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(1.0))

    assert bind(Scalar(), {"rate": torch.ones(3)}).rate.shape == (3, 1, 1)


def test_a_value_with_too_many_event_dims_raises():
    class Wrong(Component):
        event_dims = {"rate": 1}

        def __init__(self):
            super().__init__()
            self.rate = PyroSample(dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))

    with pytest.raises(ValueError, match="rate"):
        bind(Wrong(), {"rate": torch.zeros(2, 2)})


def test_a_value_with_too_few_dims_raises():
    with pytest.raises(ValueError, match="matrix"):
        bind(Parts(), {"rate": torch.tensor(1.0), "matrix": torch.zeros(2)})


# ------------------------------------------------------------------------------------- one trace, one value


def with_prior(model=None):
    model = toy() if model is None else model
    model.transition.rate = PyroSample(dist.LogNormal(torch.zeros(2, dtype=torch.float64), 0.5).to_event(1))
    model.emission.offset = PyroSample(lambda self: dist.Normal(self.matrix.detach().sum(-1), 1.0).to_event(1))
    return model


def test_one_trace_has_one_value():
    model, data = with_prior(), series(batch=(3,))
    traced = poutine.trace(model).get_trace(data)
    first = traced.log_prob_sum()
    for site in traced.nodes.values():
        site.pop("log_prob", None), site.pop("log_prob_sum", None)
    assert traced.log_prob_sum() == first
    replayed = poutine.trace(poutine.replay(model, trace=traced)).get_trace(data)
    torch.testing.assert_close(replayed.log_prob_sum(), first)
    # by hand: the prior of the parameters, and the laws bound to the values that the trace shows
    values = {name: traced.nodes[name]["value"] for name in ("transition.rate", "emission.offset")}
    bound, z = model.bind(values), traced.nodes["z"]["value"].clone()
    hand = path_law(bound, data).log_prob(z).sum() + observation_law(bound, data, z).log_prob(data.values).sum()
    hand = hand + dist.LogNormal(0.0, 0.5).log_prob(values["transition.rate"]).sum()
    hand = hand + dist.Normal(model.emission.matrix.sum(-1), 1.0).log_prob(values["emission.offset"]).sum()
    torch.testing.assert_close(first, hand)


def test_every_random_parameter_is_one_site():
    traced = poutine.trace(with_prior()).get_trace(series(batch=(3,)))
    assert list(traced.stochastic_nodes) == ["transition.rate", "emission.offset", "series", "z"]
    assert traced.nodes["transition.rate"]["value"].shape == (2,)  # shared by all series


def test_given_values_make_no_site():
    model = with_prior()

    def program():
        return model.bind({"transition.rate": torch.ones(2)})

    traced = poutine.trace(program).get_trace()
    assert "transition.rate" not in traced.nodes and "emission.offset" in traced.nodes


class Chained(Component):
    """c depends on b, which depends on a."""

    event_dims = {"a": 1, "b": 1, "c": 1}

    def __init__(self):
        super().__init__()
        self.c = PyroSample(lambda self: dist.Normal(self.b, 1e-6))
        self.b = PyroSample(lambda self: dist.Normal(10.0 * self.a, 1e-6))
        self.a = PyroSample(dist.Normal(0.0, 1.0))


def test_priors_that_depend_on_each_other_are_drawn_once():
    chained = Chained()
    traced = poutine.trace(lambda: bind(chained)).get_trace()
    a, b, c = (traced.nodes[name]["value"] for name in "abc")
    torch.testing.assert_close(b, 10.0 * a, atol=1e-4, rtol=0.0)
    torch.testing.assert_close(c, b, atol=1e-4, rtol=0.0)
    bound = traced.nodes["_RETURN"]["value"]
    assert (bound.a.item(), bound.b.item(), bound.c.item()) == (a.item(), b.item(), c.item())


def test_a_given_value_is_what_other_priors_depend_on():
    chained = Chained()
    traced = poutine.trace(lambda: bind(chained, {"a": torch.tensor(3.0)})).get_trace()
    assert set(traced.stochastic_nodes) == {"b", "c"}
    torch.testing.assert_close(traced.nodes["b"]["value"], torch.tensor(30.0), atol=1e-4, rtol=0.0)
    bound = bind(chained, {"a": torch.tensor(3.0), "b": torch.tensor(1.0), "c": torch.tensor(2.0)})
    assert (bound.a.item(), bound.b.item(), bound.c.item()) == (3.0, 1.0, 2.0)


class Shared(Component):
    def __init__(self):
        super().__init__()
        self.weight = PyroSample(dist.Normal(0.0, 1.0))


class SharingTransition(Transition):
    def __init__(self, shared):
        super().__init__()
        self.state_dim, self.shared = 1, shared

    def forward(self, state, time, next_time, inputs, memory=None):
        return normal(self.shared.weight * state, torch.ones(1))


class SharingEmission(Emission):
    def __init__(self, shared):
        super().__init__()
        self.state_dim, self.obs_dim, self.shared = 1, 1, shared

    def forward(self, state, time, inputs, memory=None):
        return normal(self.shared.weight * state, torch.ones(1))


def test_a_shared_submodule_is_bound_once():
    shared = Shared()
    model = StateSpaceModel(Start(1), SharingTransition(shared), SharingEmission(shared))
    names = [name for name in parameter_names(model) if "shared" in name]
    assert len(names) == 1
    bound = model.bind({names[0]: torch.tensor(2.0)})
    assert bound.transition.shared is bound.emission.shared
    traced = poutine.trace(model).get_trace(TimeSeries(torch.arange(3.0), torch.zeros(3, 1)))
    assert [name for name in traced.stochastic_nodes if "weight" in name] == names


# --------------------------------------------------------------------------------------------- the bound copy


def test_the_copy_shares_parameters_and_keeps_capabilities():
    model = toy()
    bound = model.bind()
    assert is_bound(bound) and not is_bound(model)
    assert bound.transition.rate is model.transition.rate
    assert isinstance(bound, StateSpaceModel) and isinstance(bound.transition, (Decay, AffineGaussian))
    data = series()
    z = path_law(bound, data).sample()
    path_law(bound, data).log_prob(z.clone()).backward()
    assert model.transition.rate.grad is not None and bool((model.transition.rate.grad != 0).all())


def test_binding_leaves_the_model_as_it_was():
    model = with_prior()
    before = (dict(model.transition.__dict__["_pyro_samples"]), dict(model.named_parameters()))
    model.bind({"transition.rate": torch.ones(2), "emission.offset": torch.ones(2)})
    assert before == (model.transition.__dict__["_pyro_samples"], dict(model.named_parameters()))


def test_binding_twice_is_binding_once():
    bound = toy().bind()
    assert bind(bound) is bound
    with pytest.raises(ValueError, match="bound already"):
        bind(bound, {"transition.rate": torch.ones(2)})


def test_a_constrained_parameter_is_read_with_its_gradient():
    parts = Parts()
    bound = bind(parts, {"rate": torch.tensor(1.0), "matrix": torch.eye(2)})
    assert bound.width.item() == pytest.approx(2.0)
    bound.width.sum().backward()
    assert parts.width_unconstrained.grad.item() == pytest.approx(2.0)


class Count(Messenger):
    """How many messages Pyro's handlers see."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def _process_message(self, msg):
        self.messages.append((msg["type"], msg["name"]))


def test_a_bound_call_makes_no_handler_traffic():
    model, data = with_prior(), series(batch=(3,))
    bound = model.bind({"transition.rate": torch.ones(2), "emission.offset": torch.ones(2)})
    with Count() as count:
        z = path_law(bound, data).rsample()
        path_law(bound, data).log_prob(z.clone())
        observation_law(bound, data, z).log_prob(data.values)
    assert count.messages == []
    with Count() as count:  # the handler does count
        model(data)
    assert ("sample", "z") in count.messages and ("sample", "transition.rate") in count.messages


class Net(Transition):
    def __init__(self):
        super().__init__()
        self.state_dim = 2
        self.net = nn.Linear(2, 2)

    def forward(self, state, time, next_time, inputs, memory=None):
        return normal(self.net(state), torch.ones(2))


def test_parameters_of_plain_modules_reach_the_parameter_store():
    model = StateSpaceModel(Start(2), Net(), See(2, 1))
    data = TimeSeries(torch.arange(3.0), torch.zeros(3, 1))
    with poutine.trace(param_only=True) as traced:
        model(data)
    names = set(traced.trace.nodes)
    assert {"transition.net.weight", "transition.net.bias"} <= {name.replace("$$$", ".") for name in names}


def test_a_bound_component_compiles_without_graph_breaks():
    model = with_prior()
    bound = model.bind({"transition.rate": torch.ones(2), "emission.offset": torch.ones(2)})
    data = series(batch=(3,))
    z = path_law(bound, data).sample()

    def step(state):
        law = bound.transition(state, data.times[:-1], data.times[1:], None)
        return law.base_dist.loc, law.base_dist.scale

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for found, wanted in zip(compiled(z[..., :-1, :]), step(z[..., :-1, :]), strict=True):
        torch.testing.assert_close(found, wanted)


# ----------------------------------------------------------------------------------- draws and series at once


def test_posterior_draws_are_a_loop_over_draws():
    model, data = with_prior(), series(batch=(3,), missing=True, own=True)
    draws = {"transition.rate": torch.rand(5, 1, 2).double() + 0.2, "emission.offset": torch.randn(5, 1, 2).double()}
    bound = model.bind(draws)
    z = path_law(bound, data).sample().clone()
    assert z.shape == (5, 3, 4, 2)
    found = path_law(bound, data).log_prob(z), observation_law(bound, data, z).log_prob(data.values)
    for s in range(5):
        one = model.bind({name: value[s, 0] for name, value in draws.items()})
        torch.testing.assert_close(found[0][s], path_law(one, data).log_prob(z[s]))
        torch.testing.assert_close(found[1][s], observation_law(one, data, z[s]).log_prob(data.values))


def test_a_scalar_per_series_where_series_and_state_have_one_size():
    """Two series, two state coordinates: a rate for each series must not be taken as a rate for each coordinate."""
    model = toy()
    model.transition.rate = PyroSample(dist.LogNormal(torch.tensor(0.0, dtype=torch.float64), 0.5))
    data = series(batch=(2,))
    rates = torch.tensor([0.1, 2.0], dtype=torch.float64)
    bound = model.bind({"transition.rate": rates})
    z = path_law(bound, data).sample().clone()
    found = path_law(bound, data).log_prob(z)
    for i in range(2):
        one = path_law(model.bind({"transition.rate": rates[i]}), data.series(i))
        torch.testing.assert_close(found[i], one.log_prob(z[i]))


def test_parameters_in_a_users_plate_are_per_series():
    model, data = toy(), series(batch=(2,))
    model.transition.rate = PyroSample(dist.LogNormal(torch.tensor(0.0, dtype=torch.float64), 0.5))

    def program(data):
        with pyro.plate("people", 2, dim=-1):
            return model(data)

    traced = poutine.trace(program).get_trace(data)
    rates, z = traced.nodes["transition.rate"]["value"], traced.nodes["z"]["value"].clone()
    assert rates.shape == (2,) and "series" not in traced.nodes
    traced.compute_log_prob()
    for i in range(2):
        one = path_law(model.bind({"transition.rate": rates[i]}), data.series(i))
        torch.testing.assert_close(traced.nodes["z"]["log_prob"][i], one.log_prob(z[i]))


def test_pyro_module_of_a_user_keeps_dotted_names_relative_to_the_model():
    class Outer(PyroModule):
        def __init__(self):
            super().__init__()
            self.child = with_prior()

        def forward(self, data):
            return self.child(data)

    outer, data = Outer(), series()
    traced = poutine.trace(outer).get_trace(data)
    assert "child.transition.rate" in traced.nodes
    assert "transition.rate" in random_parameters(outer.child)
    outer.child.bind({"transition.rate": torch.ones(2), "emission.offset": torch.ones(2)})


# ---------------------------------------------------------------------------------------------------- held


def test_svi_leaves_a_parameter_without_gradient_alone():
    """Pyro's store would set `requires_grad` of what it registers, and train it."""
    part = Parts()
    part.held = nn.Parameter(torch.ones(2), requires_grad=False)
    part.matrix = nn.Parameter(torch.ones(2, 2))

    def program():
        bound = bind(part)
        pyro.sample("y", dist.Normal(bound.held + bound.level, 1.0).to_event(1), obs=torch.full((2,), 5.0))

    def guide():
        pyro.sample("rate", dist.LogNormal(0.0, 1.0))

    svi = pyro.infer.SVI(program, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    for _ in range(3):
        svi.step()
    assert torch.equal(part.held, torch.ones(2)) and not part.held.requires_grad
    assert (part.level != 0).all()
    assert "held" not in pyro.get_param_store() and "level" in pyro.get_param_store()
