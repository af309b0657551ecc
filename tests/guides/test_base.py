"""Names, parameters and bounds of guides."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal
from pyro.nn import PyroSample

from pyro_ssm.data import TimeSeries
from pyro_ssm.guides import GaussianMarkov, Guide, Structured
from pyro_ssm.infer import Marginal, kalman_filter
from pyro_ssm.models import path_law
from tests.contracts.toys import normal, remembering, series, toy


@pytest.fixture
def data():
    return series(batch=(3,), dtype=torch.float32)


def random_model():
    model = toy(dtype=torch.float32)
    model.transition.rate = PyroSample(dist.LogNormal(torch.zeros(2), 0.3).to_event(1))
    model.emission.offset = PyroSample(dist.Normal(torch.zeros(2), 1.0).to_event(1))
    return model


# ------------------------------------------------------------------------------------------------- names


def names(program, data):
    return [n for n, s in poutine.trace(program).get_trace(data).nodes.items() if s["type"] == "sample"]


def test_a_model_that_marginal_or_a_guide_holds_keeps_its_names(data):
    model = random_model()
    wanted = ["transition.rate", "emission.offset", "series", "z", "y"]
    assert names(model, data) == wanted
    model = random_model()
    guide, marginal = Structured(model, 8), Marginal(model, filter=kalman_filter)
    poutine.trace(guide).get_trace(data), poutine.trace(marginal).get_trace(data)
    assert names(model, data) == wanted
    assert {"transition.rate", "emission.offset", "y"} <= set(names(marginal, data)) and "z" not in names(
        marginal, data
    )
    parameters = {name for name, _ in model.named_parameters()}
    assert {"initial.loc", "transition.level"} <= parameters and not any(n.startswith("model") for n in parameters)


def test_posterior_names_are_what_bind_takes(data):
    """Draws of a guide go into ``bind`` as they are."""
    model = random_model()
    guide = Structured(model, 8)
    draws = Predictive(guide, num_samples=5, parallel=True)(data)
    values = {n: draws[n].detach() for n in ("transition.rate", "emission.offset")}
    bound = model.bind(values)
    assert bound.parameter_shape == (5, 1) and path_law(bound, data).sample().shape == (5, 3, 4, 2)


def test_the_model_is_not_registered(data):
    model = toy(dtype=torch.float32)
    guide = Structured(model, 8)
    assert guide.model is model and model not in list(guide.modules())
    shared = {id(p) for p in guide.parameters()} & {id(p) for p in model.parameters()}
    assert shared == set()


@pytest.mark.parametrize("wrong", [torch.nn.Linear(1, 1), toy(dtype=torch.float32).bind()], ids=["module", "bound"])
def test_a_guide_of_what_is_no_unbound_model_raises(wrong):
    with pytest.raises(TypeError, match="unbound StateSpaceModel"):
        Structured(wrong, 8)


def test_a_guide_needs_values(data):
    with pytest.raises(ValueError, match=r"`data.values` is None"):
        Structured(toy(dtype=torch.float32), 8)(data.without_values())


def test_data_of_other_columns_are_refused_by_the_emission(data):
    model = toy(dtype=torch.float32)
    wide = TimeSeries(data.times, torch.zeros(data.batch_shape + (data.num_times, 5)))
    with pytest.raises(ValueError, match=f"has 5 columns, the emission has obs_dim={model.emission.obs_dim}"):
        Structured(model, 8)(wide)
    with pytest.raises(TypeError, match="needs a TimeSeries, got Tensor"):
        Structured(model, 8)(torch.zeros(3))


def test_what_a_subclass_must_define_is_named(data):
    class Empty(Guide):
        looks_ahead = False

    with pytest.raises(NotImplementedError, match="encode"):
        Empty(toy(dtype=torch.float32))(data)
    with pytest.raises(NotImplementedError, match="step"):
        Empty(toy(dtype=torch.float32)).step(None, slice(0, 1), None)


def test_inputs_of_another_size_raise(data):
    guide = Structured(toy(dtype=torch.float32), 8, input_dim=2)
    with pytest.raises(ValueError, match="input_dim=2"):
        guide(data)


# -------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("auto", [AutoDelta, AutoMultivariateNormal])
def test_any_guide_over_parameters_is_taken(auto, data):
    model = random_model()
    inner = auto(poutine.block(model, expose=["transition.rate", "emission.offset"]))
    guide = Structured(model, 8, parameters=inner)
    traced = poutine.trace(guide).get_trace(data)
    assert {"transition.rate", "emission.offset", "z"} <= set(traced.nodes)
    # the path is drawn from the guide whose model has the values that were drawn
    values = {name: traced.nodes[name]["value"] for name in ("transition.rate", "emission.offset")}
    alone = guide.path(data, model.bind(values)).log_prob(traced.nodes["z"]["value"])
    traced.compute_log_prob()
    torch.testing.assert_close(traced.nodes["z"]["log_prob"], alone)
    # and the bound is what the two programs say of that draw
    pyro.set_rng_seed(4)
    loss = Trace_ELBO().loss(model, guide, data)
    pyro.set_rng_seed(4)
    traced = poutine.trace(guide).get_trace(data)
    replayed = poutine.trace(poutine.replay(model, traced)).get_trace(data)
    path = path_law(model.bind({name: traced.nodes[name]["value"] for name in values}), data)
    wanted = path.log_prob(traced.nodes["z"]["value"]).sum()
    replayed.compute_log_prob()
    torch.testing.assert_close(replayed.nodes["z"]["log_prob"].sum(), wanted)
    assert loss == pytest.approx(float((traced.log_prob_sum() - replayed.log_prob_sum()).detach()), rel=1e-5)


def test_a_function_may_be_the_guide_over_parameters(data):
    model = random_model()

    def parameters(data):
        pyro.sample("transition.rate", dist.Delta(torch.tensor([0.5, 0.7]), event_dim=1))
        pyro.sample("emission.offset", dist.Delta(torch.tensor([0.1, 0.2]), event_dim=1))

    guide = Structured(model, 8, parameters=parameters)
    assert guide.parameters_given(data)["transition.rate"].tolist() == pytest.approx([0.5, 0.7])


def test_one_left_out_raises_and_is_named(data):
    model = random_model()

    def parameters(data):
        pyro.sample("transition.rate", dist.Delta(torch.tensor([0.5, 0.7]), event_dim=1))

    with pytest.raises(ValueError) as raised:
        Structured(model, 8, parameters=parameters)(data)
    assert "emission.offset" in str(raised.value) and "transition.rate" not in str(raised.value).split("every")[0]


def test_the_path_is_drawn_given_the_parameters_of_the_same_trace(data):
    model = random_model()
    guide = GaussianMarkov(model, 8)
    traced = poutine.trace(guide).get_trace(data)
    values = {n: traced.nodes[n]["value"].detach() for n in ("transition.rate", "emission.offset")}
    z = traced.nodes["z"]["value"].detach().clone()
    traced.compute_log_prob()
    again = guide.path(data, model.bind(values)).log_prob(z)
    torch.testing.assert_close(traced.nodes["z"]["log_prob"].detach(), again.detach())
    other = guide.path(data, model.bind({n: v + 1.0 for n, v in values.items()})).log_prob(z)
    assert bool((other != again).all())  # q(z | y, theta) is amortised over theta


def test_drawn_parameters_in_a_batch_are_a_loop(data):
    model = random_model()
    guide = GaussianMarkov(model, 8)
    draws = {"transition.rate": torch.rand(5, 1, 2) + 0.1, "emission.offset": torch.randn(5, 1, 2)}
    law = guide.path(data, model.bind(draws))
    z = law.rsample().detach().clone()
    assert z.shape == (5, 3, 4, 2)
    for s in range(5):
        one = guide.path(data, model.bind({n: v[s, 0] for n, v in draws.items()}))
        torch.testing.assert_close(law.log_prob(z)[s], one.log_prob(z[s]))


# ------------------------------------------------------------------------------------------------ bounds


class Noise:
    """Stands for ``torch.randn``: the same noise for the same series and time, however long the padding is."""

    def __init__(self, rows, steps, state):
        self.table = torch.randn(rows, steps, state, generator=torch.Generator().manual_seed(2))
        self.next = 0

    def __call__(self, *shape, **options):
        rows, steps, _ = (shape[0] if len(shape) == 1 else shape)[-3:]
        first = self.next if steps == 1 else 0
        self.next = self.next + 1 if steps == 1 else 0
        return self.table[:rows, first : first + steps]


LENGTHS = (5, 2, 3)


def ragged(extra):
    gen = torch.Generator().manual_seed(3)
    times = torch.rand(3, 5, generator=gen, dtype=torch.float64).add(0.2).cumsum(-1)
    values, mask = torch.randn(3, 5, 2, generator=gen), torch.rand(3, 5, 2, generator=gen) < 0.7
    mask[:, 0] = True
    times = torch.cat([times, times[..., -1:] + torch.arange(1.0, extra + 1).double()], -1)
    pad = torch.zeros(3, extra, 2)
    return TimeSeries(times, torch.cat([values, pad], 1), torch.cat([mask, pad.bool()], 1), lengths=LENGTHS)


@pytest.mark.parametrize("make", [toy, remembering], ids=["markov", "memory"])
@pytest.mark.parametrize("direction", ["past", "future", "both"])
@pytest.mark.parametrize("family", [Structured, GaussianMarkov])
def test_a_padded_step_changes_no_bound_and_no_gradient(family, direction, make, monkeypatch):
    results = []
    for extra in (0, 4):
        torch.manual_seed(0)
        model = make(dtype=torch.float32)
        guide = family(model, 8, direction=direction)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", Noise(3, 9, 2))
            loss = Trace_ELBO().differentiable_loss(model, guide, ragged(extra))
        named = [*model.named_parameters(), *guide.named_parameters()]
        grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        results.append((loss, dict(zip([n for n, _ in named], grads, strict=True))))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0.0)
    for name, grad in results[0][1].items():
        if grad is None:
            assert results[1][1][name] is None
        else:
            torch.testing.assert_close(grad, results[1][1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [toy, remembering], ids=["markov", "memory"])
@pytest.mark.parametrize("family", [Structured, GaussianMarkov])
def test_the_bound_of_a_ragged_batch_is_the_sum_over_its_series(family, make, monkeypatch):
    model = make(dtype=torch.float32)
    guide, data = family(model, 8), ragged(2)
    noise = Noise(3, 9, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", noise)
        whole = Trace_ELBO().loss(model, guide, data)
    alone = []
    for i in range(3):
        with monkeypatch.context() as patch:
            one = Noise(1, 9, 2)
            one.table = noise.table[i : i + 1]
            patch.setattr(torch, "randn", lambda *shape, one=one, **options: one(*_batched(shape)).squeeze(0))
            alone.append(Trace_ELBO().loss(model, guide, data.series(i)))
    assert whole == pytest.approx(sum(alone), rel=1e-5)


def _batched(shape):
    return (torch.Size((1,)) + torch.Size(shape[0] if len(shape) == 1 else shape),)


# ------------------------------------------------------------------------------------- own guides


class Given(Guide):
    """The smallest guide: independent normal steps around the observations."""

    looks_ahead = False

    def encode(self, data, model):
        return data.values

    def step(self, state, k, context, memory=None):
        return normal(context[..., k, :], torch.full((2,), 0.5))


def test_a_guide_of_ones_own_needs_encode_and_step_only(data):
    guide = Given(toy(dtype=torch.float32))
    traced = poutine.trace(guide).get_trace(data)
    z = traced.nodes["z"]["value"].clone()
    traced.compute_log_prob()
    wanted = dist.Normal(data.values, 0.5).log_prob(z).sum((-1, -2))
    torch.testing.assert_close(traced.nodes["z"]["log_prob"], wanted)
